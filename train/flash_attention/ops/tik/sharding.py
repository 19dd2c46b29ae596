"""dp and mp: one device's share of a call, and how its operator is described to MindSpore's semi-automatic parallelism.

Each device attends for its own batch rows (dp) and heads (mp), with the kernel, tables included, of that smaller call.
From documentation and published operators only: no part of this was run on several devices.
"""

from dataclasses import replace

from flash_attention.core.errors import invalid_value
from flash_attention.ops.tik.custom import framework_shape

_BATCH, _HEADS, _WHOLE = 1, 0, -1
"""Axes of the device matrix (dp, mp), counted from the right as tensor maps do; -1 = not split."""


def share(spec, dp, mp):
    """The spec of one device's part of the call ``spec``.

    Raises:
        ValueError: dp does not divide the batch, or mp the key/value heads.
    """
    for name, parts, what, size in (("dp", dp, "batch", spec.batch), ("mp", mp, "key/value heads", spec.kv_heads)):
        if size % parts:
            raise invalid_value("FlashAttention", name, "a divisor of the {} {}".format(size, what), parts)

    def smaller(shape):
        if shape is None:
            return None
        return (shape[0] // dp if shape[0] > 1 else 1, shape[1] // mp if shape[1] > 1 else 1) + shape[2:]

    slopes = spec.alibi_shape and spec.alibi_shape[:-1] + (spec.alibi_shape[-1] // mp,)
    if slopes and len(slopes) == 2:
        slopes = (slopes[0] // dp, slopes[1])
    return replace(
        spec,
        batch=spec.batch // dp,
        heads=spec.heads // mp,
        kv_heads=spec.kv_heads // mp,
        mask_shape=spec.mask_shape if spec.compact_mask else smaller(spec.mask_shape),
        bias_shape=smaller(spec.bias_shape),
        alibi_shape=slopes,
    )


def tensor_map(argument):
    """The device axis that splits each axis of an argument of the whole call: batch, heads; nothing of a table."""
    shape = framework_shape(argument)
    if len(shape) == 2:
        return [_WHOLE, _WHOLE]
    leading = [axis if size > 1 else _WHOLE for axis, size in zip((_BATCH, _HEADS), shape)]
    return leading + [_WHOLE] * (len(shape) - 2)


def strategy(argument, dp, mp):
    """Parts along each axis, as ``Primitive.shard`` takes them."""
    parts = {_BATCH: dp, _HEADS: mp, _WHOLE: 1}
    return tuple(parts[axis] for axis in tensor_map(argument))


def split(operator, whole, dp, mp):
    """Describe ``operator``, of the whole call's request ``whole``, as split by dp and mp."""
    inputs, outputs = whole.signature()
    operator.shard(tuple(strategy(argument, dp, mp) for argument in inputs))
    operator.add_prim_attr("dev_matrix_shape", [dp, mp])
    operator.add_prim_attr("inputs_tensor_map", [tensor_map(argument) for argument in inputs])
    operator.add_prim_attr("outputs_tensor_map", [tensor_map(argument) for argument in outputs])
    operator.add_prim_attr("as_loss_divisor", 0)
    operator.add_prim_attr("empty_mirror_ops", 0)
    return operator
