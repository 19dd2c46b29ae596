"""The inference operator as a model-local ONNX function of standard operators, in float32. Needs `onnx`.

It reads what the kernel reads: which keys are visible comes from 'bounds', masks and biases from their tiles. A wrong
table is therefore seen, which a function of the plain arguments would hide.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from flash_attention.ascend.signature import tile_axes
from flash_attention.ascend.tile_ops.masks import UNIT
from flash_attention.core.errors import invalid_value

_LOW = -1e30  # finite: a row without a visible key must not become NaN


class _Body:
    """Nodes of the function; a call adds one and returns the name of its output."""

    def __init__(self):
        self.nodes = []

    def __call__(self, operator, *inputs, **attributes):
        name = "{}_{}".format(operator.lower(), len(self.nodes))
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value, dtype=np.float32):
        return self("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def wide(self, x):
        return self("Cast", x, to=TensorProto.FLOAT)

    def reshape(self, x, shape):
        return self("Reshape", x, self.constant(shape, np.int64))

    def head(self, x, sizes, axes):
        """The first ``sizes`` places along ``axes``."""
        starts, sizes, axes = (self.constant(one, np.int64) for one in ([0] * len(sizes), sizes, axes))
        return self("Slice", x, starts, sizes, axes)


def operator_function(request, domain, name, opset):
    """FunctionProto of one :class:`~flash_attention.ascend.entry.request.KernelRequest` of kind inference.

    Inputs: the kernel's, in its order, those that this call has. Output: 'output', float16 (B, N, Sq, D).
    """
    geometry, spec = request.geometry, request.geometry.spec
    if spec.compact_mask:
        raise invalid_value("checkable", "compact_mask", "False", True, "Give the node the whole mask.")
    inputs = [argument.name for argument in request.signature()[0]]
    body = _Body()
    scores = _scores(body, spec)
    if "bias" in inputs:
        scores = body("Add", scores, _untiled(body, "bias", geometry, spec.bias_shape))
    keep = []
    if "mask" in inputs:
        tiles = _untiled(body, "mask", geometry, spec.mask_shape)
        keep.append(body("Equal", tiles, body.constant(0)))
    if "bounds" in inputs:
        first, last, position = (_bound(body, row, spec) for row in range(3))
        keys = body.constant(np.arange(spec.kv_len)[None])
        at = body("Mul", keys, body.constant(UNIT))
        keep += [body("LessOrEqual", first, at), body("LessOrEqual", at, last)]
        if "slopes" in inputs:
            slope = body.head("slopes", [1, 1], [2, 3])  # (B, N, 1, 1)
            distance = body("Abs", body("Sub", position, keys))
            scores = body("Sub", scores, body("Mul", slope, distance))
    weights = _softmax(body, scores, keep)
    _output(body, spec, weights)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(domain, name, inputs, ["output"], body.nodes, imports)


def _by_kv_head(body, x, spec, rows, columns):
    """(B, heads, rows, columns) with the heads split by key/value head: (B, K, heads / K, rows, columns)."""
    return body.reshape(x, (spec.batch, spec.kv_heads, -1, rows, columns))


def _scores(body, spec):
    """scale * query key^T, (B, N, Sq, Sk)."""
    query = _by_kv_head(body, body.wide("query"), spec, spec.q_len, spec.head_dim)
    key = _by_kv_head(body, body.wide("key"), spec, spec.kv_len, spec.head_dim)
    product = body("MatMul", query, body("Transpose", key, perm=[0, 1, 2, 4, 3]))
    scores = body.reshape(product, (spec.batch, spec.heads, spec.q_len, spec.kv_len))
    return body("Mul", scores, body.constant(spec.scale))


def _untiled(body, name, geometry, shape):
    """Tiles as :func:`~flash_attention.ascend.host.pack_tiles` made them, as float32 of ``shape``."""
    q_tiles, kv_tiles, groups, keys, queries = tile_axes(geometry, shape)[2:]
    rows = body("Transpose", body.wide(name), perm=[0, 1, 2, 4, 6, 3, 5])
    rows = body.reshape(rows, tuple(shape[:2]) + (q_tiles * groups * queries, kv_tiles * keys))
    return body.head(rows, shape[2:], [2, 3])


def _bound(body, row, spec):
    """One row of 'bounds', (Sq, 1)."""
    values = body("Gather", "bounds", body.constant(row, np.int64), axis=0)
    return body.reshape(body.head(values, [spec.q_len], [0]), (spec.q_len, 1))


def _softmax(body, scores, keep):
    """Softmax over the kept keys, 0 elsewhere and in rows that keep none."""
    kept = None
    for one in keep:
        kept = one if kept is None else body("And", kept, one)
    if kept is not None:
        scores = body("Where", kept, scores, body.constant(_LOW))
    peak = body("ReduceMax", scores, axes=[-1], keepdims=1)
    weights = body("Exp", body("Sub", scores, peak))
    if kept is not None:
        weights = body("Mul", weights, body.wide(kept))
    total = body("ReduceSum", weights, body.constant([-1], np.int64), keepdims=1)
    alive = body("Greater", total, body.constant(0))
    return body("Div", weights, body("Where", alive, total, body.constant(1)))


def _output(body, spec, weights):
    """weights value as 'output', float16."""
    weights = _by_kv_head(body, weights, spec, spec.q_len, spec.kv_len)
    value = _by_kv_head(body, body.wide("value"), spec, spec.kv_len, spec.head_dim)
    out = body.reshape(body("MatMul", weights, value), (spec.batch, spec.heads, spec.q_len, spec.head_dim))
    body.nodes.append(helper.make_node("Cast", [out], ["output"], to=TensorProto.FLOAT16))
