"""Composite vector calls of higher precision. Each needs a work tensor of a documented size, given as a slice."""

import numpy as np

from . import numerics
from .geometry import Operand, lane_runs, lanes_of, repeat_count
from .isa import NOTHING, register
from .memory import BLOCK, round_up
from .reduce import work_area
from .vector import F16, F32, LIMITS, check_strides, elementwise, kernel_for


def _source_extent(call, mask, src, repeats, src_rep_stride):
    """Elements from the first to the last one of the source, rounded up to a block."""
    first, count = lane_runs(call, mask, lanes_of(src))[-1]
    per_block = BLOCK // src.itemsize
    return round_up((repeats - 1) * src_rep_stride * per_block + first + count, per_block)


def _expm1_extent(call, mask, src, repeats, src_rep_stride):
    stride = max(src_rep_stride, 8) if src_rep_stride else 0
    return round_up((repeats - 1) * stride * 16 + 128, 16)


def _composite(name, function, work_dtype, factors, extent, dtypes, cycles, source="D"):
    """``factors``: source dtype -> work elements for each element of the source's extent."""

    def plan(call, mask, dst, src, work_tensor, repeat_times, dst_rep_stride, src_rep_stride):
        check_strides(call, dst_rep_stride=dst_rep_stride, src_rep_stride=src_rep_stride)
        operands = [Operand("dst", call.tensor("dst", dst, "UB"), 1, dst_rep_stride),
                    Operand("src", call.tensor("src", src, "UB"), 1, src_rep_stride)]  # fmt: skip
        dtype = call.typed("dst, src", dst, src)[0]
        call.tensor("work_tensor", work_tensor, "UB")
        if work_tensor.dtype != work_dtype:
            call.fail("dtype", "work_tensor", "of dtype {}".format(work_dtype), work_tensor.dtype)
        repeats = repeat_count(call, repeat_times)
        if repeats == 0:
            return NOTHING
        need = factors[dtype] * extent(call, mask, src, repeats, src_rep_stride)
        for operand, address, least in (("work_tensor", work_tensor, need), ("src", src, 2), ("dst", dst, 2)):
            given = int(np.prod(address.shape))
            if given < least:
                what = "a tensor or slice t[k:] (not t[k]) of at least {} elements".format(least)
                call.fail("bounds", operand, what, given, hazard=given > 1)
        kernel, events = kernel_for(call, function, dtype, True)
        result = elementwise(call, mask, operands, repeat_times, kernel, undefined=events)
        work = work_area(call, work_tensor, min(need, _room(work_tensor)))
        call.disjoint(*result.reads, *result.writes, work)
        result.costs = tuple(cost._replace(cycles=cycles * cost.cycles) for cost in result.costs)
        return result

    register(name, plan, "mask dst src work_tensor repeat_times dst_rep_stride src_rep_stride", "V", dtypes=dtypes,
             limits=LIMITS + "; work of {}, {} x the source's extent".format(work_dtype, _words(factors)), sync=False,
             ir=8, cost="{} cycles a repeat [U]".format(cycles), source=source)  # fmt: skip


def _room(address):
    """Elements from the address to the end of its buffer."""
    return (address.buffer.size - address.offset) // address.itemsize


def _words(factors):
    return ", ".join("{} ({})".format(factor, dtype) for dtype, factor in factors.items())


_PAIR = [(F16, F16), (F32, F32)]
_composite("vec_rec_high_preci", numerics.reciprocal, F32, {F16: 4, F32: 2}, _source_extent, _PAIR, 12)
# The pages give 6 and 4 for the older 200/300/500 products; the training products' factors were not found [U].
_composite("vec_rsqrt_high_preci", numerics.inverse_root, F32, {F16: 6, F32: 4}, _source_extent, _PAIR, 20, "U")
_composite("vec_expm1_high_preci", np.expm1, F16, {F16: 11}, _expm1_extent, [(F16, F16)], 30)
