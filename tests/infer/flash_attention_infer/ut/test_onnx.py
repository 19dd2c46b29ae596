"""The operator in ONNX models: the node that ATC converts, and onnxruntime on the same model against the reference."""

from dataclasses import replace

import numpy as np
import pytest
from support.ascend_entry import SPECS, make_tensors

from flash_attention.ascend.chips import ASCEND_310P
from flash_attention.ascend.entry.request import INFERENCE, KernelRequest
from flash_attention.core import reference
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.spec import Operands

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from flash_attention_infer.ascend_package import onnx_model  # noqa: E402  (needs onnx only when called)
from flash_attention_infer.ascend_package.operators import package_operators  # noqa: E402

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
CASES = {name: replace(spec, dropout_rate=0.0) for name, spec in SPECS.items() if not spec.compact_mask}
CASES["plain"] = replace(CASES["plain"], heads=4)


def drawn(spec):
    tensors, operands, _ = make_tensors(spec)
    return dict(zip(("query", "key", "value"), tensors)), operands


def run(model, feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def judge(spec, feeds, operands):
    wide = [x.astype(np.float64) for x in feeds.values()]
    return reference.attention(np, spec, *wide, operands)[0]


@pytest.mark.parametrize("spec", CASES.values(), ids=list(CASES))
def test_onnxruntime_equals_the_reference(spec):
    feeds, operands = drawn(spec)
    model = onnx_model.checkable(onnx_model.attention_model(spec, operands))
    onnx.checker.check_model(model)
    want = judge(spec, feeds, operands)
    np.testing.assert_allclose(run(model, feeds), want, atol=2 * 2.0**-11 * np.abs(want).max())


@pytest.mark.parametrize("spec", CASES.values(), ids=list(CASES))
def test_the_node_is_the_package_operator(spec):
    """Type, inputs in the operator's order with the absent ones empty, request; the constants are the kernel's."""
    _, operands = drawn(spec)
    model = onnx_model.attention_model(spec, operands)
    (node,), request = model.graph.node, KernelRequest.of(INFERENCE, spec, ASCEND_310P)
    operator = next(one for one in package_operators() if one.kind == INFERENCE)
    assert (node.op_type, node.domain) == (operator.type, "")
    assert node.attribute[0].name == "request" and node.attribute[0].s.decode() == request.to_json()
    stored = {one.name.split("/")[-1]: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    for argument, name in zip(operator.inputs, node.input):
        assert name in ("", argument.name, "output/" + argument.name)
        assert name or not argument.required
    wanted = {argument.name: argument for argument in request.signature()[0]}
    assert {name.split("/")[-1] for name in node.input if name} == set(wanted)
    for name, array in stored.items():
        assert (array.shape, str(array.dtype)) == (wanted[name].shape, wanted[name].dtype)


def test_the_check_reads_the_tables():
    """A wrong bound, mask tile or slope in the model changes what onnxruntime gives."""
    feeds, operands = drawn(CASES["everything"])
    model = onnx_model.attention_model(CASES["everything"], operands)
    right = run(onnx_model.checkable(model), feeds)
    for name in ("bounds", "mask", "slopes", "bias"):
        spoiled = onnx.ModelProto()
        spoiled.CopyFrom(model)
        (tensor,) = [one for one in spoiled.graph.initializer if one.name == "output/" + name]
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array((array / 2 - 1).astype(array.dtype), tensor.name))
        assert np.abs(run(onnx_model.checkable(spoiled), feeds) - right).max() > 0.05, name


def test_in_a_larger_graph():
    """Two nodes with one request share a function, a third has its own; ordinary operators lie between them."""
    spec = replace(CASES["plain"], kv_len=40)
    helper = onnx.helper
    nodes, constants = [], []
    for number, causal in enumerate((True, True, False)):
        query = "query" if number == 0 else "scaled{}".format(number - 1)
        made = onnx_model.attention_node(replace(spec, causal=causal), query, "key", "value", "out{}".format(number))
        nodes += [made[0], helper.make_node("Add", [made[0].output[0], query], ["scaled{}".format(number)])]
        constants += made[1]
    feeds, _ = drawn(spec)
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, x.shape) for name, x in feeds.items()]
    output = helper.make_tensor_value_info("scaled2", onnx.TensorProto.FLOAT16, feeds["query"].shape)
    graph = helper.make_graph(nodes, "three", infos, [output], initializer=constants)
    model = onnx_model.checkable(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", onnx_model.OPSET)], ir_version=8)
    )
    assert len(model.functions) == 2
    x = feeds["query"].astype(np.float64)
    for causal in (True, True, False):
        x = x + judge(replace(spec, causal=causal), dict(feeds, query=x), Operands())
    np.testing.assert_allclose(run(model, feeds), x, atol=8 * 2.0**-11 * np.abs(x).max())


def test_refuses():
    spec = CASES["plain"]
    with pytest.raises(UnsupportedError, match="For 'attention_node', 'dtype' must be float16"):
        onnx_model.attention_model(replace(spec, dtype="float32"))
    with pytest.raises(ValueError, match="'dropout_rate' must be 0 at inference"):
        onnx_model.attention_model(replace(spec, dropout_rate=0.1))
    with pytest.raises(ValueError, match="'mask' must be given exactly when the spec has one"):
        onnx_model.attention_model(CASES["everything"])
    compact = SPECS["compact mask"]
    model = onnx_model.attention_model(compact, Operands(mask=np.tri(16, dtype=bool)))
    with pytest.raises(ValueError, match="'compact_mask' must be False"):
        onnx_model.checkable(model)
