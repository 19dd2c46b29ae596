"""The package's inference operator in ONNX models: nodes for ATC, and the same models made runnable by onnxruntime.

**attention_node** / **attention_model** (what ATC converts, with the package installed) -> **checkable** (each node
replaced by a call of a model-local function, onnx_function.py, that computes from the very same inputs). Needs `onnx`.
"""

from flash_attention.ascend import limits
from flash_attention.ascend.chips import ASCEND_310P
from flash_attention.ascend.entry.request import INFERENCE, KernelRequest
from flash_attention.ascend.host import pack_bias, pack_mask, pack_slopes
from flash_attention.core.errors import invalid_value
from flash_attention.core.spec import Operands
from flash_attention_infer.ascend_package.operators import REQUEST, package_operators

OPSET, IR_VERSION = 13, 8  # within what CANN's parser knows; functions need IR 8
DOMAIN = "flash_attention"
LAYER = "attention_node"
_PACK = (("mask", pack_mask, "mask_shape"), ("bias", pack_bias, "bias_shape"), ("slopes", pack_slopes, "alibi_shape"))


def attention_node(spec, query, key, value, output, operands=None, chip=ASCEND_310P):
    """One call of the operator ``FlashAttentionInference``, and the constants that it reads.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec`: float16, static shapes, no dropout.
        query, key, value: names of tensors (B, N, Sq, D), (B, K, Sk, D), (B, K, Sk, D) in the graph.
        output: name for the result (B, N, Sq, D); the constants' names begin with it.
        operands: :class:`~flash_attention.core.spec.Operands` of numpy arrays: mask (keep where True), bias, slopes.
        chip: whose tiles the kernel takes.

    Returns:
        ``(NodeProto, [TensorProto, ...])``.

    Raises:
        UnsupportedError, ValueError: the kernels do not take the call, or an operand is missing or too many.
    """
    from onnx import helper, numpy_helper

    reason = limits.supports(spec)
    if reason is not None:
        raise reason.error(LAYER)
    if spec.dropout_rate:
        raise invalid_value(LAYER, "dropout_rate", "0 at inference", spec.dropout_rate)
    request = KernelRequest.of(INFERENCE, spec, chip)
    constants = _packed(request.geometry, operands or Operands())
    constants.update(request.constants())
    (operator,) = [one for one in package_operators() if one.kind == INFERENCE]
    given = dict({name: "{}/{}".format(output, name) for name in constants}, query=query, key=key, value=value)
    inputs = [given.get(argument.name, "") for argument in operator.inputs]  # "" = this call does not have it
    node = helper.make_node(operator.type, inputs, [output], name=output, **{REQUEST: request.to_json()})
    return node, [numpy_helper.from_array(array, given[name]) for name, array in constants.items()]


def _packed(geometry, operands):
    """Mask, bias and slopes as the kernel takes them, by name."""
    found = {}
    for name, pack, field in _PACK:
        array, shape = getattr(operands, name), getattr(geometry.spec, field)
        if (array is None) != (shape is None):
            raise invalid_value(LAYER, name, "given exactly when the spec has one", "a spec with {}".format(shape))
        if array is not None:
            found[name] = pack(geometry, array)
    return found


def attention_model(spec, operands=None, chip=ASCEND_310P):
    """A model of one call, inputs 'query', 'key', 'value', output 'output'; arguments of :func:`attention_node`."""
    from onnx import TensorProto, helper

    node, constants = attention_node(spec, "query", "key", "value", "output", operands, chip)
    q_shape = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
    kv_shape = (spec.batch, spec.kv_heads, spec.kv_len, spec.head_dim)
    query, key, value, output = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in (("query", q_shape), ("key", kv_shape), ("value", kv_shape), ("output", q_shape))
    )
    graph = helper.make_graph([node], "attention", [query, key, value], [output], initializer=constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def checkable(model):
    """A copy of a model with the operator that onnxruntime runs as it is, to check its numbers before ATC.

    Every node ``FlashAttentionInference`` calls a function of this model, in domain 'flash_attention', which computes
    in float32 from the node's inputs, the kernel's tables of visible keys and packed tiles included.

    Raises:
        ValueError: a node with a compact mask, whose tiles the function cannot lay out again.
    """
    import onnx

    from flash_attention_infer.ascend_package.onnx_function import operator_function

    (operator,) = [one for one in package_operators() if one.kind == INFERENCE]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {}
    for node in copy.graph.node:
        if node.op_type == operator.type and not node.domain:
            (text,) = [attribute.s.decode() for attribute in node.attribute if attribute.name == REQUEST]
            if text not in names:
                names[text] = "{}_{}".format(operator.type, len(names))
                copy.functions.append(operator_function(KernelRequest.from_json(text), DOMAIN, names[text], OPSET))
            present = [name for name in node.input if name]
            call = onnx.helper.make_node(names[text], present, list(node.output), name=node.name, domain=DOMAIN)
            node.CopyFrom(call)
    if names:
        copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return copy
