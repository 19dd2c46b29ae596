"""Engine 'tik' without CANN: what MindSpore is told of the kernels, and the tensors it would hand them."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.ascend_entry import ENTRY, PLAIN, SPECS, make_tensors
from support.tik_route import simulated_operator

from flash_attention.ascend import simulated
from flash_attention.ascend.backward_arguments import cotangent_exponent, result_factors
from flash_attention.ascend.entry.request import BACKWARD, FORWARD, PREPROCESS, KernelRequest
from flash_attention.ops import tik
from flash_attention.ops.tik import custom
from flash_attention.ops.tik.backward_operands import Scaled
from flash_attention.ops.tik.engine import TikEngine

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
MODES = {"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}


@pytest.fixture
def in_mode():
    """``in_mode(name)`` switches MindSpore's mode for the rest of the test."""
    before = ms.get_context("mode")
    yield lambda name: ms.set_context(mode=MODES[name])
    ms.set_context(mode=before)


class WithGradients(nn.Cell):
    """``((out, lse), gradients)``; ``present`` are the places among the thirteen inputs of the tensors given."""

    def __init__(self, cell, present):
        super().__init__()
        self.call = Call(cell, present)
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, tensors, cotangents):
        return self.call(*tensors), self.gradient(self.call)(*tensors, cotangents)


class Call(nn.Cell):
    """A cell of thirteen inputs as one of those that are there."""

    def __init__(self, cell, present):
        super().__init__()
        self.cell, self.present = cell, present

    def construct(self, *tensors):
        slots, taken = (), 0
        for place in range(13):
            if place in self.present:
                slots = slots + (tensors[taken],)
                taken = taken + 1
            else:
                slots = slots + (None,)
        return self.cell(*slots)


@pytest.mark.parametrize(
    "name, mode",
    [
        ("everything", "pynative"),
        pytest.param("compact mask", "pynative", marks=pytest.mark.slow),
        ("one key of a mask", "graph"),
        pytest.param("key bias", "graph", marks=pytest.mark.slow),
        pytest.param("plain", "graph", marks=pytest.mark.slow),
        pytest.param("everything", "graph", marks=pytest.mark.slow),
    ],
)
def test_route_gives_what_the_kernels_give(name, mode, in_mode):
    """Forward bit by bit; gradients but for packing in fp32 instead of fp64."""
    in_mode(mode)
    spec = SPECS[name]
    (query, key, value), operands, (d_out, d_lse) = make_tensors(spec)
    arrays = (query, key, value) + operands[:10]
    present = tuple(place for place, array in enumerate(arrays) if array is not None)
    cell = WithGradients(TikEngine(simulated_operator).cell(spec), present)
    results, grads = cell(tuple(Tensor(arrays[place]) for place in present), (Tensor(d_out), Tensor(d_lse)))

    out, lse = simulated.forward(spec, query, key, value, operands)
    np.testing.assert_array_equal(results[0].asnumpy(), out)
    np.testing.assert_array_equal(results[1].asnumpy(), lse)
    want = simulated.backward(spec, (query, key, value, operands, out, lse), (d_out, d_lse))
    by_place = dict(zip((0, 1, 2, 3, 5, 6), want))
    for place, got in zip(present, grads):
        other = by_place.get(place)
        if other is None:
            assert not got.asnumpy().any()
        else:
            assert str(got.asnumpy().dtype) == str(other.dtype)
            np.testing.assert_allclose(got.asnumpy(), other, rtol=4e-3, atol=2e-3 * np.abs(other).max())


@pytest.mark.parametrize("size", (1.0, 50.0, 6e3, 6e4))
def test_cotangents_are_divided_as_in_numpy(size):
    """By the same power of two, bit for bit, whatever the cotangent of a row that sees no key is."""
    (_, _, value), _, (d_out, d_lse) = make_tensors(PLAIN)
    d_out = np.clip(size * d_out.astype(np.float32), -65504, 65504).astype(np.float16)
    lse = np.zeros_like(d_lse)
    lse[..., 3], d_lse[..., 3] = -np.inf, 1e30
    power = 2.0 ** cotangent_exponent(PLAIN, value, d_out, np.delete(d_lse, 3, axis=-1))
    geometry = KernelRequest.of(BACKWARD, PLAIN).geometry
    got = Scaled(geometry)(*map(Tensor, (value, lse, d_out, d_lse)))
    assert got[2].asnumpy() == power and (power > 1) == (size > 50)
    np.testing.assert_array_equal(got[0].asnumpy(), (d_out.astype(np.float32) / power).astype(np.float16))
    np.testing.assert_array_equal(got[1].asnumpy(), np.where(np.isinf(lse), 0, d_lse) / np.float32(power))
    np.testing.assert_array_equal(got[3].asnumpy(), result_factors(geometry, power))


# --- what MindSpore is told -----------------------------------------------------------------------
@pytest.mark.parametrize("kind", [FORWARD, PREPROCESS, BACKWARD])
@pytest.mark.parametrize("name", list(SPECS))
def test_registration_is_the_kernels_argument_list(kind, name):
    request = KernelRequest.of(kind, SPECS[name])
    info = json.loads(json.dumps(custom.registration(request)))
    inputs, outputs = request.signature()
    assert [entry["name"] for entry in info["inputs"]] == [argument.name for argument in inputs]
    assert [entry["name"] for entry in info["outputs"]] == [argument.name for argument in outputs]
    assert {entry["paramType"] for entry in info["inputs"] + info["outputs"]} == {"required"}
    assert [entry["index"] for entry in info["inputs"]] == list(range(len(inputs)))
    formats = ["FRACTAL_NZ" if argument.nd_shape else "DefaultFormat" for argument in inputs + outputs]
    assert info["dtype_format"] == [[list(pair) for pair in zip([x.dtype for x in inputs + outputs], formats)]]
    matrices = ["output", "d_out"] if kind == PREPROCESS else ["query", "key", "value"]
    assert [argument.name for argument in inputs[: len(matrices)]] == matrices
    assert set(formats[: len(matrices)]) == {"FRACTAL_NZ"}
    assert formats[len(inputs)] == ("DefaultFormat" if kind == PREPROCESS else "FRACTAL_NZ")
    assert (info["op_name"], info["kernel"]) == (request.operator, request.operator)
    assert [(entry["name"], entry["type"]) for entry in info["attr"]] == [("request", "str")]


def test_custom_operator_names_the_entry_and_carries_the_request():
    request = KernelRequest.of(FORWARD, PLAIN)
    operator = custom.custom_operator(request, request)
    attributes = operator.get_attr_dict()
    assert (attributes["imply_path"], attributes["func_name"]) == (ENTRY, request.operator)
    assert KernelRequest.from_json(attributes["request"]) == request
    assert attributes["input_names"][:3] == ["query", "key", "value"]
    assert attributes["output_names"] == ["output", "lse"]
    shapes, dtypes = custom.infer_functions(request, request)
    assert shapes((1, 2, 40, 24)) == ((1, 2, 40, 24), (1, 2, 48))
    assert dtypes(ms.float16) == (ms.float16, ms.float32)


# --- where it is offered --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "soc, version, value",
    [
        ("Ascend910A", "2.2.0", None),
        ("Ascend910ProB", "2.6.0rc1", None),
        ("Ascend", "2.3.1", None),  # a MindSpore that cannot tell
        ("Ascend910B2", "2.3.0", "Ascend910B2"),
        ("Ascend910_9391", "2.6.0", "Ascend910_9391"),
        ("Ascend310P3", "2.2.0", "Ascend310P3"),
        ("CPU", "2.2.0", "CPU"),
        ("Ascend910A", "2.10.0", "MindSpore 2.10.0"),
    ],
)
def test_only_where_the_device_and_its_mindspore_can_run_it(monkeypatch, soc, version, value):
    monkeypatch.setattr(tik.importlib.util, "find_spec", lambda name: object())
    reason = tik.refused_here(soc, version)
    assert (reason and reason.value) == value


def test_kernels_register_when_first_asked_on_such_a_device(monkeypatch):
    monkeypatch.setattr(tik, "_kernels", [])
    assert tik.supports(PLAIN).argument == "engine" and tik._kernels == []
    monkeypatch.setattr(tik, "refused_here", lambda: None)
    assert tik.supports(PLAIN) is None and len(tik._kernels) == 1
    assert tik.supports(PLAIN) is None and len(tik._kernels) == 1
    with pytest.raises(ValueError, match="registered already"):
        tik.register_kernels(lambda *args: None)
