"""The generated CANN operator package: its files agree with the kernels' signatures, compile, build and run."""

import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.ascend_entry import PLAIN, SPECS, describe, make_tensors

from flash_attention.ascend import simulated
from flash_attention.ascend.chips import ASCEND_310P, ASCEND_910A
from flash_attention.ascend.entry.request import BACKWARD, FORWARD, INFERENCE, KINDS, PREPROCESS, KernelRequest
from flash_attention.ascend.host import pack_forward, run, unpack_forward
from flash_attention.ascend.simulator import installed_as_tbe
from flash_attention_infer.ascend_package.__main__ import main
from flash_attention_infer.ascend_package.operators import package_operators

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
HEADERS = Path(__file__).resolve().parents[3] / "support" / "cann_headers"
SOCS = ("ascend910", "ascend310p")
GE_TYPES = {"float16": "DT_FLOAT16", "float32": "DT_FLOAT", "int32": "DT_INT32", "uint8": "DT_UINT8"}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "out"
    main(["--out", str(folder), "--soc"] + list(SOCS))
    return folder


def largest_call(kind):
    """The signature of a call that has every argument which the package's operator of this kind can have."""
    spec = SPECS["everything"]
    options = {"mask_shape": spec.mask_shape, "causal": True}
    options.update(bias_shape=spec.bias_shape, alibi_shape=spec.alibi_shape)
    if kind != INFERENCE:
        options["dropout_rate"] = 0.2
    sizes = dict(batch=2, heads=2, kv_heads=1, q_len=40, kv_len=50, head_dim=24, dtype="float16")
    return KernelRequest.of(kind, type(spec)(**dict(sizes, **options)), term_gradients=False).signature()


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("kind", KINDS)
def test_operator_information_is_the_signature(package, soc, kind):
    parser = configparser.ConfigParser()
    parser.optionxform = str
    text = (package / "tbe" / "op_info_cfg" / "ai_core" / soc / (kind + ".ini")).read_text()
    parser.read_string(text)
    assert parser.sections() == ["".join(word.capitalize() for word in kind.split("_"))]
    section = dict(parser[parser.sections()[0]])
    always = {argument.name for argument in KernelRequest.of(kind, PLAIN).signature()[0]} - {"bounds"}
    for side, arguments in zip(("input", "output"), largest_call(kind)):
        assert "{}{}.name".format(side, len(arguments)) not in section
        for number, argument in enumerate(arguments):
            got = [section["{}{}.{}".format(side, number, key)] for key in ("name", "dtype", "format", "paramType")]
            need = "required" if side == "output" or argument.name in always else "optional"
            assert got == [argument.name, argument.dtype, argument.format, need]
    assert section["attr.list"] == "request" and section["attr_request.paramType"] == "required"
    assert section["opFile.value"] == section["opInterface.value"] == kind
    assert (package / "tbe" / "impl" / (kind + ".py")).is_file()


def test_prototypes_list_the_same_arguments(package):
    text = (package / "op_proto" / "flash_attention_operators.h").read_text()
    for operator in package_operators():
        body = re.search(r"REG_OP\({0}\)(.*?)OP_END_FACTORY_REG\({0}\)".format(operator.type), text, re.S).group(1)
        got = re.findall(r"\.(\w+)\((\w+), (?:TensorType\(\{(\w+)\}\)|String)\)", body)
        want = [
            ("INPUT" if argument.required else "OPTIONAL_INPUT", argument.name, GE_TYPES[argument.dtype])
            for argument in operator.inputs
        ]
        want += [("OUTPUT", argument.name, GE_TYPES[argument.dtype]) for argument in operator.outputs]
        assert got == want + [("REQUIRED_ATTR", "request", "")]
    described = json.loads((package / "ir.json").read_text())
    assert [entry["op"] for entry in described] == [operator.type for operator in package_operators()]


def test_shape_inference_follows_the_signature(package):
    text = (package / "op_proto" / "flash_attention_operators.cpp").read_text()
    got = re.findall(r'SetOutput\(op, "(\w+)", (?:(\w+)\()?DimsOf\(op, "(\w+)"\)+, (\w+)\)', text)
    half = "DT_FLOAT16"
    assert got == [
        ("output", "", "query", half),
        ("output", "", "query", half), ("lse", "RowsOf", "query", "DT_FLOAT"),
        ("query_columns", "ColumnsOf", "statistics", half), ("minus_delta", "QueriesOf", "statistics", half),
        ("d_query", "", "query", half), ("d_key", "", "key", half), ("d_value", "", "key", half),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["op_proto/flash_attention_operators.cpp", "framework/onnx_plugin/flash_attention_plugin.cpp"]
)
def test_cpp_passes_a_compiler(package, name):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-fsyntax-only"]
    command += ["-I", str(HEADERS), "-I", str(package / "op_proto"), str(package / name)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")


# --- the entry functions --------------------------------------------------------------------------


def load(package, kind):
    spec = importlib.util.spec_from_file_location("package_" + kind, str(package / "tbe" / "impl" / (kind + ".py")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DISABLE_DEBUG = False
    return module


def build(package, request, chip):
    """The kernel of a request through the package's entry function; inputs the call does not have are None."""
    path = list(sys.path)
    with installed_as_tbe(soc=chip.soc):
        entry = getattr(load(package, request.kind), request.kind)
        operator = [one for one in package_operators() if one.kind == request.kind][0]
        given = {argument.name: describe(argument) for side in request.signature() for argument in side}
        arguments = [given.get(argument.name) for argument in operator.inputs + operator.outputs]
        kernel = entry(*arguments, request.to_json(), kernel_name="kernel_3")
    sys.path[:] = path
    return kernel


@pytest.mark.parametrize("chip", [ASCEND_910A, ASCEND_310P], ids=lambda chip: chip.soc)
def test_inference_entry_runs_on_the_simulator(package, chip):
    spec = SPECS["key bias"]
    (query, key, value), operands, _ = make_tensors(spec)
    request = KernelRequest.of(INFERENCE, spec, chip)
    feed = pack_forward(request.geometry, request.cores, query, key, value, operands)
    out, lse = unpack_forward(request.geometry, run(build(package, request, chip), feed))
    assert lse is None
    np.testing.assert_array_equal(out, simulated.forward(spec, query, key, value, operands, chip=chip)[0])


@pytest.mark.parametrize("kind", [FORWARD, PREPROCESS, BACKWARD])
def test_training_entries_build(package, kind):
    request = KernelRequest.of(kind, SPECS["compact mask"])
    kernel = build(package, request, ASCEND_910A)
    assert hasattr(kernel, "tikdb")


def test_backward_entry_refuses_gradients_it_has_no_output_for(package):
    with pytest.raises(ValueError, match="bias_sums"):
        build(package, KernelRequest.of(BACKWARD, SPECS["key bias"]), ASCEND_910A)


def test_backward_entry_takes_bias_and_slopes_without_their_gradients(package):
    """The gradients of query, key and value are, bit for bit, those of the kernel that gives all."""
    spec = SPECS["key bias"]
    (query, key, value), operands, cotangents = make_tensors(spec)
    saved = (query, key, value, operands) + simulated.forward(spec, query, key, value, operands)
    request = KernelRequest.of(BACKWARD, spec, term_gradients=False)
    kernels = [build(package, replace(request, kind=kind), ASCEND_910A) for kind in (PREPROCESS, BACKWARD)]
    got = simulated.run_backward(kernels, request.geometry, request.cores, saved, cotangents)
    want = simulated.backward(spec, saved, cotangents)
    assert got[3] is None and got[4] is None and want[3] is not None and want[4] is not None
    for one, other in zip(got[:3], want[:3]):
        np.testing.assert_array_equal(one, other)


def test_package_is_whole_without_this_one(package, tmp_path):
    """An entry module finds the package's own copy of the kernel sources, and those all they import."""
    stand_in = tmp_path / "tbe" / "common" / "utils"
    stand_in.mkdir(parents=True)
    for folder in (stand_in, stand_in.parent, stand_in.parent.parent):
        (folder / "__init__.py").write_text("")
    kinds = "REQUIRED_INPUT OPTION_INPUT REQUIRED_OUTPUT REQUIRED_ATTR_STR KERNEL_NAME"
    (stand_in / "para_check.py").write_text(
        "check_op_params = lambda *kinds: lambda function: function\n{} = range(5)\n".format(kinds.replace(" ", ", "))
    )
    probe = (
        "import runpy, sys\n"
        "module = runpy.run_path(sys.argv[1])\n"
        "import flash_attention\n"
        "print(sorted(name for name in module if name.startswith('flash_attention_')))\n"
        "print(flash_attention.__file__)\n"
    )
    entry = package / "tbe" / "impl" / "flash_attention_backward.py"
    done = subprocess.run(
        [sys.executable, "-c", probe, str(entry)], cwd=str(tmp_path), env={"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, timeout=120
    )  # fmt: skip
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert lines == ["['flash_attention_backward']", str(package / "tbe" / "impl" / "flash_attention" / "__init__.py")]


# --- the build script -----------------------------------------------------------------------------
MSOPGEN = r"""#!/bin/bash
while [ $# -gt 0 ]; do
    case "$1" in -out) out="$2" ;; -c) core="$2" ;; esac
    shift
done
mkdir -p "$out/op_proto" "$out/framework/onnx_plugin" "$out/tbe/impl" "$out/tbe/op_info_cfg/ai_core/${core#ai_core-}"
touch "$out"/op_proto/sample.{h,cc} "$out/framework/onnx_plugin/sample.cc" "$out/tbe/impl/sample.py"
touch "$out/tbe/op_info_cfg/ai_core/${core#ai_core-}/sample.ini"
echo 'echo "built with $ASCEND_TENSOR_COMPILER_INCLUDE"' >"$out/build.sh"
"""


def files_below(top):
    """Relative paths of the files, without byte code."""
    return {path.relative_to(top) for path in top.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_build_script_fills_the_project(package, tmp_path):
    """With a stand-in of msopgen, which makes the folders that the real one makes and a sample in each."""
    tool = tmp_path / "python" / "site-packages" / "bin" / "msopgen"
    tool.parent.mkdir(parents=True)
    tool.write_text(MSOPGEN)
    tool.chmod(0o755)
    command = ["bash", str(package / "build.sh")]
    environment = dict(os.environ, ASCEND_TOOLKIT_HOME=str(tmp_path))
    environment.pop("ASCEND_TENSOR_COMPILER_INCLUDE", None)
    done = subprocess.run(command + ["ascend310p"], env=environment, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    assert done.stdout.decode().strip() == "built with {}".format(tmp_path / "include")
    made = package / "project"
    for folder in ("op_proto", "framework/onnx_plugin", "tbe/impl", "tbe/op_info_cfg/ai_core/ascend310p"):
        ours, theirs = files_below(package / folder), files_below(made / folder)
        assert ours == theirs and ours
    assert not (made / "tbe" / "op_info_cfg" / "ai_core" / "ascend910").exists()
    wrong = subprocess.run(command + ["ascend910b"], env=environment, stderr=subprocess.PIPE, timeout=60)
    assert wrong.returncode == 1
    assert wrong.stderr.decode() == "build.sh: SOC must be one of: ascend910 ascend310p, but got 'ascend910b'.\n"


def test_generator_refuses_a_folder_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "the folder must be empty" in capsys.readouterr().err
