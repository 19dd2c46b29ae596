"""dp and mp: how the operator of a call is described to MindSpore's semi-automatic parallelism.

Each device attends for its own batch rows (dp) and heads (mp), with the kernel, tables included, of that smaller call.
From documentation and published operators only: no part of this was run on several devices.
"""

from flash_attention.core.sharding import parts
from flash_attention.ops.tik.custom import framework_shape

_BATCH, _HEADS, _WHOLE = 1, 0, -1
"""Axes of the device matrix (dp, mp), counted from the right as tensor maps do; -1 = not split."""


def strategy(argument, dp, mp):
    """Parts along each axis of an argument of the whole call, as ``Primitive.shard`` takes them; 1 of a table."""
    shape = framework_shape(argument)
    return (1, 1) if len(shape) == 2 else parts(shape, dp, mp)


def tensor_map(argument):
    """The device axis that splits each axis of an argument: batch, heads."""
    counts = strategy(argument, 2, 2)
    axes = (_BATCH, _HEADS) + (_WHOLE,) * len(counts)
    return [axis if count > 1 else _WHOLE for axis, count in zip(axes, counts)]


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
