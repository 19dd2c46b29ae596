"""The ``h_*`` family: whole tensors or rectangular slices. No public page describes it; see each limit's tag.

Accepted is what shipped operators use: operands of one shape, slices that start at 32 bytes with a last axis of whole
blocks, a Python number or Scalar as second source. Broadcasting and unaligned slices are refused.
"""

import numpy as np

from . import numerics
from .chips import GM, UB
from .isa import INVALID, Cost, Plan, register
from .memory import BLOCK, Access
from .move import PATHS, copy, path_cost, store
from .tensor import Address
from .vector import CONVERSIONS, F16, F32, S16, S32, U16, U32, converter, kernel_for

SCRATCH = 16384  # bytes of UB these calls may need for themselves [U]
_LIMITS = "UB; one shape, no broadcasting; 32 B starts and whole blocks in the last axis"


def _operand(call, operand, address, *scopes):
    """Access of a whole tensor or slice, its alignment checked."""
    call.tensor(operand, address, *scopes)
    per_block = BLOCK // address.itemsize
    rows = [stride for stride, extent in zip(address.strides[:-1], address.shape[:-1]) if extent > 1]
    start = address.offset % BLOCK if address.scope == UB else 0
    if start or address.shape[-1] % per_block or any(stride % BLOCK for stride in rows):
        need = "a slice that starts at 32 bytes and has whole blocks of {} elements in its last axis".format(per_block)
        call.fail("alignment", operand, need, "{} at byte {}".format(address.shape, address.offset), hazard=True)
    return call.bounded(
        Access(operand, address.buffer, address.dtype, [(address.offset, address.shape, address.strides)])
    )


def _same_shape(call, operand, address, dst):
    if address.shape != dst.shape:
        call.fail("shape", operand, "of dst's shape {} (no broadcasting)".format(dst.shape), address.shape)


def _check_scratch(call):
    if call.program.allocator.available(UB) < SCRATCH:
        call.program.warn(
            "capacity", "{} with less than {} bytes of UB free at {}".format(call.name, SCRATCH, call.line)
        )


def _cost(call, access, factor=1):
    size = int(np.prod(access.pieces[0][1])) * access.dtype.itemsize
    return [Cost("V", factor * -(-size // call.rates.vector), size)]


def _binary(name, ufunc, dtypes, slow=False):
    def plan(call, dst, src0, src1):
        target, first = _operand(call, "dst", dst, UB), _operand(call, "src0", src0, UB)
        _same_shape(call, "src0", src0, dst)
        sources = [first]
        if isinstance(src1, Address):
            _same_shape(call, "src1", src1, dst)
            call.typed("dst, src0, src1", dst, src0, src1)
            sources.append(_operand(call, "src1", src1, UB))
            kernel, events = kernel_for(call, ufunc, dst.dtype, False)
        else:
            call.typed("dst, src0, src1", dst, src0, src0)
            value = call.scalar("src1", src1, dst.dtype)
            kernel, events = _with_number(call, ufunc, dst.dtype, value)
        for source in sources:
            call.disjoint(target, source, or_same=True)
        _check_scratch(call)
        factor = call.rates.slow_vector if slow else 1
        return Plan(sources, [target], kernel, _cost(call, target, factor), undefined=events)

    register(name, plan, "dst src0 src1", "V", dtypes=[(dtype,) * 3 for dtype in dtypes], source="C", ir=3,
             limits=_LIMITS + "; src1 may be a number or Scalar",
             cost="slow_vector [U] x bytes / 256" if slow else "bytes / 256")  # fmt: skip


def _with_number(call, ufunc, dtype, value):
    if dtype == F16:
        wide = np.float32(value)
        return numerics.rounded(call, lambda x: ufunc(x, wide)), INVALID
    return lambda out, data: ufunc(data, value, out=out), INVALID


def _unary(name, ufunc, slow, undefined=False):
    def plan(call, dst, src):
        target, source = _operand(call, "dst", dst, UB), _operand(call, "src", src, UB)
        _same_shape(call, "src", src, dst)
        call.typed("dst, src", dst, src)
        call.disjoint(target, source, or_same=True)
        _check_scratch(call)
        kernel, events = kernel_for(call, ufunc, dst.dtype, undefined)
        factor = call.rates.slow_vector if slow else 1
        return Plan([source], [target], kernel, _cost(call, target, factor), undefined=events)

    register(name, plan, "dst src", "V", dtypes=[(F16, F16), (F32, F32)], source="C", ir=3, limits=_LIMITS,
             cost="slow_vector [U] x bytes / 256" if slow else "bytes / 256")  # fmt: skip


for _name, _ufunc, _dtypes, _slow in (
    ("h_add", np.add, (F16, F32, S32), False),
    ("h_sub", np.subtract, (F16, F32, S32), False),
    ("h_mul", np.multiply, (F16, F32, S32), False),
    ("h_max", np.maximum, (F16, F32, S32), False),
    ("h_min", np.minimum, (F16, F32, S32), False),
    ("h_div", np.divide, (F16, F32), True),
):
    _binary(_name, _ufunc, _dtypes, _slow)

_unary("h_exp", np.exp, True, True)
_unary("h_ln", np.log, True, True)
_unary("h_abs", np.abs, False)
_unary("h_cos", np.cos, True)
_unary("h_sin", np.sin, True)


def _cast(call, dst, src, round_mode):
    target, source = _operand(call, "dst", dst, UB), _operand(call, "src", src, UB)
    _same_shape(call, "src", src, dst)
    kernel = converter(call, round_mode, dst, src)
    call.disjoint(target, source, or_same=True)
    _check_scratch(call)
    wider = max(target, source, key=lambda access: access.dtype.itemsize)
    return Plan([source], [target], kernel, _cost(call, wider))


register("h_cast", _cast, "dst src round_mode", "V", dtypes=[pair for pair in CONVERSIONS if pair != (F16, S32)],
         limits=_LIMITS + "; round_mode by pair as vec_conv", cost="bytes of the wider type / 256", source="C",
         ir=3)  # fmt: skip


def _duplicate(call, dst, value):
    target = _operand(call, "dst", dst, UB)
    call.typed("dst", dst)
    number = call.scalar("value", value, dst.dtype)
    return Plan([], [target], lambda out: out.fill(number), _cost(call, target))


register("h_duplicate", _duplicate, "dst value", "V", dtypes=[(dtype,) for dtype in (F16, F32, S16, U16, S32, U32)],
         limits=_LIMITS, cost="bytes / 256", source="C", ir=2)  # fmt: skip


def _reduction(name, ufunc, neutral):
    def plan(call, dst, src, axis):
        target, source = _operand(call, "dst", dst, UB), _operand(call, "src", src, UB)
        call.typed("dst, src", dst, src)
        axes = tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
        if len(axes) != 1:
            call.fail("range", "axis", "one axis", axis)
        axis = call.static("axis", axes[0], -len(src.shape), len(src.shape) - 1) % len(src.shape)
        left = tuple(extent for index, extent in enumerate(src.shape) if index != axis)
        if tuple(dst.shape) not in (left, left[:axis] + (1,) + left[axis:]):
            call.fail("shape", "dst", "of shape {}".format(left), dst.shape)
        call.disjoint(source, target)
        _check_scratch(call)

        def kernel(out, data):
            lanes = np.moveaxis(data, axis, -1)
            whole = np.full(lanes.shape[:-1] + (1 << (lanes.shape[-1] - 1).bit_length(),), neutral, data.dtype)
            whole[..., : lanes.shape[-1]] = lanes
            out[...] = numerics.tree(call, ufunc, whole).reshape(out.shape)

        return Plan([source], [target], kernel, _cost(call, source, 2))

    register(name, plan, "dst src axis", "V", dtypes=[(F16, F16), (F32, F32)],
             limits=_LIMITS + "; one axis; no overlap",
             cost="2 x bytes / 256 [U]", source="U", ir=6)  # fmt: skip


_reduction("h_reduce_max", np.maximum, -np.inf)
_reduction("h_reduce_sum", np.add, 0.0)


def _data_move(call, dst, src):
    target, source = _operand(call, "dst", dst, GM, UB), _operand(call, "src", src, GM, UB)
    path = PATHS.get((dst.scope, src.scope))
    if path is None:
        call.fail("path", "src", "moved GM->UB, UB->GM or UB->UB", "{}->{}".format(src.scope, dst.scope))
    _same_shape(call, "src", src, dst)
    if dst.dtype != src.dtype:
        call.fail("dtype", "src", "of dst's dtype {}".format(dst.dtype), src.dtype)
    call.disjoint(target, source, or_same=True)
    costs = path_cost(call, path, int(np.prod(dst.shape)) * dst.itemsize)
    if dst.scope == GM:
        return Plan([source], [target], effect=store(call), costs=costs)
    return Plan([source], [target], copy, costs, shadow="move")


register("h_data_move", _data_move, "dst src", "path", limits="GM<->UB; one shape and dtype; whole blocks",
         cost="bytes / rate of the path", source="C", ir=2)  # fmt: skip
