"""Entry functions of the Ascend 910 kernels: called as CANN's compile processes call them, on the simulator."""

import inspect
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from support.ascend_entry import ENTRY, PLAIN, SPECS, build_by_entry, describe, make_tensors

from flash_attention.ascend import simulated
from flash_attention.ascend.entry import flash_attention_tik
from flash_attention.ascend.entry.request import BACKWARD, FORWARD, INFERENCE, KINDS, PREPROCESS, KernelRequest
from flash_attention.ascend.host import pack_forward, run, unpack_forward
from flash_attention.ascend.simulator import installed_as_tbe

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize("name", ["everything", "key bias"])
def test_kernels_built_by_the_entry_give_the_same_numbers(name):
    spec = SPECS[name]
    (query, key, value), operands, (d_out, d_lse) = make_tensors(spec)
    out, lse = simulated.forward(spec, query, key, value, operands)
    forward = KernelRequest.of(FORWARD, spec)
    feed = pack_forward(forward.geometry, forward.cores, query, key, value, operands)
    got = unpack_forward(forward.geometry, run(build_by_entry(forward), feed))
    np.testing.assert_array_equal(got[0], out)
    np.testing.assert_array_equal(got[1], lse)

    saved = query, key, value, operands, out, lse
    want = simulated.backward(spec, saved, (d_out, d_lse))
    requests = [KernelRequest.of(kind, spec) for kind in (PREPROCESS, BACKWARD)]
    kernels = [build_by_entry(request) for request in requests]
    grads = simulated.run_backward(kernels, requests[1].geometry, requests[1].cores, saved, (d_out, d_lse))
    for got, grad in zip(grads[:5], want):
        np.testing.assert_array_equal(got, grad)


def test_inference_kernel_writes_the_output_alone():
    (query, key, value), operands, _ = make_tensors(PLAIN)
    request = KernelRequest.of(INFERENCE, PLAIN)
    assert [argument.name for argument in request.signature()[1]] == ["output"]
    feed = pack_forward(request.geometry, request.cores, query, key, value, operands)
    out, lse = unpack_forward(request.geometry, run(build_by_entry(request), feed))
    assert lse is None
    np.testing.assert_array_equal(out, simulated.forward(PLAIN, query, key, value, operands)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(SPECS))
def test_request_survives_as_text(kind, name):
    request = KernelRequest.of(kind, SPECS[name])
    again = KernelRequest.from_json(request.to_json())
    assert again == request and again.to_json() == request.to_json()
    assert again.signature() == request.signature()


def test_operator_names_tell_argument_lists_apart():
    """Equal names, equal lists of names, dtypes and formats: an operator is registered once for all its specs."""
    lists, names = {}, set()
    for kind in KINDS:
        for spec in list(SPECS.values()) + [replace(spec, q_len=24, q_offset=3) for spec in SPECS.values()]:
            if spec.mask_shape is not None and not spec.compact_mask:
                spec = replace(spec, mask_shape=spec.mask_shape[:2] + (spec.q_len,) + spec.mask_shape[3:])
            if spec.bias_shape is not None and spec.bias_shape[2] > 1:
                spec = replace(spec, bias_shape=spec.bias_shape[:2] + (spec.q_len,) + spec.bias_shape[3:])
            request = KernelRequest.of(kind, spec)
            inputs, outputs = request.signature()
            arguments = [(argument.name, argument.dtype, argument.format) for argument in inputs + outputs]
            assert lists.setdefault(request.operator, arguments) == arguments
            names.add(request.operator)
    assert "flash_attention_forward__mask__bias__slopes__keep__bounds" in names
    assert "flash_attention_backward__bias__slopes__bounds__bias_sums__slope_sums" in names
    assert "flash_attention_preprocess" in names


def test_entry_refuses_what_the_kernel_does_not_take():
    request = KernelRequest.of(FORWARD, PLAIN)
    inputs, outputs = request.signature()
    good = [describe(argument) for argument in inputs + outputs]
    entry = getattr(flash_attention_tik, request.operator)
    wrong = [
        good[:-1],  # no lse
        [dict(good[0], dtype="float32")] + good[1:],
        [dict(good[0], shape=(1, 2, 40, 24))] + good[1:],  # not padded, so not FRACTAL_NZ
    ]
    with installed_as_tbe():
        for tensors in wrong:
            with pytest.raises(ValueError, match="dtypes and elements of \\(query, key, value, .*lse\\) must be"):
                entry(*(tensors + [request.to_json()]))
        with pytest.raises(ValueError, match="must be for it, but got one for 'flash_attention_inference"):
            entry(*(good + [KernelRequest.of(INFERENCE, PLAIN).to_json()]))


def test_entry_module_has_the_operators_and_nothing_else():
    entry = flash_attention_tik.flash_attention_forward__bounds
    assert entry.__name__ == "flash_attention_forward__bounds"
    assert inspect.getfile(entry) == ENTRY  # MindSpore takes the path to import from here
    with pytest.raises(AttributeError, match="no attribute 'flash_attention_sideways'"):
        getattr(flash_attention_tik, "flash_attention_sideways")  # noqa: B009  (as the compile process asks)


def test_entry_is_importable_by_its_path_alone(tmp_path):
    """In a fresh process, elsewhere, without a search path: neither a framework nor CANN is loaded."""
    probe = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('operator_module', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "entry = getattr(module, 'flash_attention_backward', None)\n"
        "loaded = [name for name in sys.modules if name.split('.')[-1] == 'jax' or name.split('.')[0] in\n"
        "          ('mindspore', 'tbe', 'te', 'torch')]\n"
        "print(entry.__name__, loaded)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, ENTRY], cwd=str(tmp_path), env={}, stdout=subprocess.PIPE, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.decode().strip() == "flash_attention_backward []"
