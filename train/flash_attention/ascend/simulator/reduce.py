"""Reductions of the vector unit: per 32-byte block, per repeat, over everything, and of adjacent pairs.

Masked lanes take part as the neutral element. Sums are binary trees over all lanes, rounded at every level.
"""

import numpy as np

from . import numerics
from .binding import require_written
from .geometry import MAX_REPEAT, Operand, accesses, lane_runs, lanes_of, repeat_count, slots
from .isa import NOTHING, Plan, register
from .memory import BLOCK, Access
from .vector import F16, F32, vector_cost

MAX_SOURCE_STRIDE = 65535
MAX_REDUCE_REPEAT = 4095
_LIMITS = "UB; src, dst (and work) must not overlap; "

_FUNCTIONS = {"add": (np.add, 0.0), "max": (np.maximum, -np.inf), "min": (np.minimum, np.inf)}


class Lanes:
    """The source of a reduction: its runs of lanes gathered into an array (repeats, lanes)."""

    def __init__(self, call, mask, src, repeats, block, repeat, neutral):
        self.lanes = lanes_of(src)
        self.runs = lane_runs(call, mask, self.lanes)
        self.neutral, self.repeats = neutral, repeats
        self.access = accesses(call, [Operand("src", src, block, repeat)], self.runs, repeats)[0]
        self.slots = slots(self.access, self.runs)

    def gather(self, arrays):
        values = np.full((self.repeats, self.lanes), self.neutral, self.access.dtype)
        for (first, count), array in zip(self.slots, arrays):
            values[:, first : first + count] = array.reshape(self.repeats, count)
        return values


def _reduction(call, lanes, target, reduce, costs, work=None, unwritten=None):
    """The plan of a reduction. ``reduce(values)`` gives an array of the target's shape."""
    call.disjoint(lanes.access, target, *([work] if work else []))

    def effect(machine, statement, out, *views):
        sources = views[: len(lanes.slots)]
        require_written(machine, call, sources)
        result = reduce(lanes.gather([view.data for view in sources]))
        np.copyto(out.data, result)
        out.mark()
        if unwritten is not None:
            out.shadow[unwritten] = 0
            out.buffer.clean = False

    return Plan([lanes.access], [target], effect=effect, costs=costs)


def _check(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride, highest=MAX_REPEAT):
    call.tensor("dst", dst, "UB"), call.tensor("src", src, "UB")
    call.typed("dst, src", dst, src)
    call.aligned("src", src)
    call.in_range("dst_rep_stride", dst_rep_stride, 0, MAX_SOURCE_STRIDE)
    call.in_range("src_blk_stride", src_blk_stride, 0, MAX_SOURCE_STRIDE)
    call.in_range("src_rep_stride", src_rep_stride, 0, MAX_SOURCE_STRIDE)
    return repeat_count(call, repeat_times, highest)


# --- one result a block ---------------------------------------------------------------------------
def _per_block(name, kind):
    function, neutral = _FUNCTIONS[kind]

    def plan(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride):
        repeats = _check(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride)
        call.aligned("dst", dst, 16)
        if dst.offset % BLOCK:
            call.fail("alignment", "dst", "at a multiple of 32 bytes", "byte offset {}".format(dst.offset), hazard=True)
        if repeats == 0:
            return NOTHING
        lanes = Lanes(call, mask, src, repeats, src_blk_stride, src_rep_stride, neutral)
        step = 8 * dst.itemsize
        shape, strides = (repeats, 8), (dst_rep_stride * step, dst.itemsize)
        target = call.bounded(Access("dst", dst.buffer, dst.dtype, [(dst.offset, shape, strides)]))
        idle = np.ones((8, BLOCK // src.itemsize), bool)
        for first, count in lanes.runs:
            idle.reshape(-1)[first : first + count] = False
        idle = idle.all(axis=1)

        def reduce(values):
            return numerics.tree(call, function, values.reshape(repeats, 8, -1))

        unwritten = (slice(None), idle) if idle.any() else None  # what the device writes there is not documented
        return _reduction(call, lanes, target, reduce, vector_cost(call, lanes.lanes, repeats), unwritten=unwritten)

    register(name, plan, "mask dst src repeat_times dst_rep_stride src_blk_stride src_rep_stride", "V",
             dtypes=[(F16, F16)], limits=_LIMITS + "dst stride in 8 elements; repeat_times 1..255",
             cost="1 cycle a repeat", source="C")  # fmt: skip


for _kind in _FUNCTIONS:
    _per_block("vcg" + _kind, _kind)


# --- one result a repeat --------------------------------------------------------------------------
def _vcadd(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride):
    repeats = _check(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride)
    if repeats == 0:
        return NOTHING
    lanes = Lanes(call, mask, src, repeats, src_blk_stride, src_rep_stride, 0.0)
    piece = (dst.offset, (repeats,), (dst_rep_stride * dst.itemsize,))
    target = call.bounded(Access("dst", dst.buffer, dst.dtype, [piece]))
    return _reduction(
        call, lanes, target, lambda values: numerics.tree(call, np.add, values), vector_cost(call, lanes.lanes, repeats)
    )


register("vcadd", _vcadd, "mask dst src repeat_times dst_rep_stride src_blk_stride src_rep_stride", "V",
         dtypes=[(F16, F16), (F32, F32)], limits=_LIMITS + "dst stride in elements; repeat_times 1..255",
         cost="1 cycle a repeat", source="C")  # fmt: skip


def _first_index(values, kind):
    return (np.argmax if kind == "max" else np.argmin)(values, axis=-1)


def _per_repeat_extreme(name, kind):
    """Value and lane index of the first extreme of each repeat; the index as bits of a 16-bit integer."""
    neutral = _FUNCTIONS[kind][1]

    def plan(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride):
        repeats = _check(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride)
        if repeats == 0:
            return NOTHING
        lanes = Lanes(call, mask, src, repeats, src_blk_stride, src_rep_stride, neutral)
        piece = (dst.offset, (repeats, 2), (dst_rep_stride * 2 * dst.itemsize, dst.itemsize))
        target = call.bounded(Access("dst", dst.buffer, dst.dtype, [piece]))

        def reduce(values):
            index = _first_index(values, kind)
            best = values[np.arange(repeats), index]
            return np.stack([best, index.astype(np.uint16).view(np.float16)], axis=1)

        return _reduction(call, lanes, target, reduce, vector_cost(call, lanes.lanes, repeats))

    register(name, plan, "mask dst src repeat_times dst_rep_stride src_blk_stride src_rep_stride", "V",
             dtypes=[(F16, F16)], limits=_LIMITS + "dst stride in 2 elements; repeat_times 1..255",
             cost="1 cycle a repeat", source="C")  # fmt: skip


_per_repeat_extreme("vcmax", "max")
_per_repeat_extreme("vcmin", "min")


# --- adjacent pairs -------------------------------------------------------------------------------
def _pairs(call, mask, dst, src, repeat_times, dst_rep_stride, src_rep_stride, src_blk_stride=1):
    repeats = _check(call, mask, dst, src, repeat_times, dst_rep_stride, src_blk_stride, src_rep_stride)
    call.aligned("dst", dst)
    if repeats == 0:
        return NOTHING
    lanes = Lanes(call, mask, src, repeats, src_blk_stride, src_rep_stride, 0.0)
    piece = (dst.offset, (repeats, lanes.lanes // 2), (dst_rep_stride * 128, dst.itemsize))
    target = call.bounded(Access("dst", dst.buffer, dst.dtype, [piece]))

    def reduce(values):
        return numerics.tree(call, np.add, values.reshape(repeats, -1, 2))

    return _reduction(call, lanes, target, reduce, vector_cost(call, lanes.lanes, repeats))


_PAIRS = {"unit": "V", "dtypes": [(F16, F16)], "limits": _LIMITS + "dst stride in 128 B; repeat_times 1..255",
          "cost": "1 cycle a repeat"}  # fmt: skip
register("vec_cpadd", _pairs, "mask dst src repeat_times dst_rep_stride src_rep_stride", **_PAIRS)
register("vcpadd", _pairs, "mask dst src repeat_times dst_rep_stride src_blk_stride src_rep_stride", **_PAIRS)


# --- everything -----------------------------------------------------------------------------------
def work_area(call, work_tensor, elements):
    """The Access of the first ``elements`` of a work tensor; it must hold them."""
    call.tensor("work_tensor", work_tensor, "UB")
    call.aligned("work_tensor", work_tensor)
    piece = (work_tensor.offset, (elements,), (work_tensor.itemsize,))
    return call.bounded(Access("work_tensor", work_tensor.buffer, work_tensor.dtype, [piece]))


def _reduce_add(call, mask, dst, src, work_tensor, repeat_times, src_rep_stride):
    """Sum of all repeats to dst[0]: a tree inside each repeat, then trees over the partial sums."""
    repeats = _check(call, mask, dst, src, repeat_times, 1, 1, src_rep_stride, MAX_REDUCE_REPEAT)
    call.tensor("work_tensor", work_tensor, "UB")
    if work_tensor.dtype != src.dtype:
        call.fail("dtype", "work_tensor", "of src's dtype {}".format(src.dtype), work_tensor.dtype)
    if repeats == 0:
        return NOTHING
    lanes = Lanes(call, mask, src, repeats, 1, src_rep_stride, 0.0)
    target = call.bounded(Access("dst", dst.buffer, dst.dtype, [(dst.offset, (1,), (dst.itemsize,))]))

    def reduce(values):
        while values.shape[0] > 1 or values.shape[1] > 1:
            partial = numerics.tree(call, np.add, values)
            if partial.size == 1:
                return partial
            rows = -(-partial.size // lanes.lanes)
            values = np.zeros((rows, lanes.lanes), partial.dtype)
            values.reshape(-1)[: partial.size] = partial
        return values[0]

    costs = vector_cost(call, lanes.lanes, repeats + -(-repeats // lanes.lanes))
    return _reduction(call, lanes, target, reduce, costs, work_area(call, work_tensor, repeats))


register("vec_reduce_add", _reduce_add, "mask dst src work_tensor repeat_times src_rep_stride", "V",
         dtypes=[(F16, F16), (F32, F32)], sync=False, ir=4, cost="1 cycle a repeat, twice the tree",
         limits=_LIMITS + "repeat_times 1..4095; work >= repeat_times elements of src's dtype")  # fmt: skip


def _reduce_extreme(name, kind):
    """Extreme of all repeats to dst[0]; with cal_index the element's distance from src to dst[1] as bits [U]."""
    neutral = _FUNCTIONS[kind][1]

    def plan(call, mask, dst, src, work_tensor, repeat_times, src_rep_stride, cal_index=False):
        repeats = _check(call, mask, dst, src, repeat_times, 1, 1, src_rep_stride, MAX_REDUCE_REPEAT)
        call.tensor("work_tensor", work_tensor, "UB")
        if work_tensor.dtype != src.dtype:
            call.fail("dtype", "work_tensor", "of src's dtype {}".format(src.dtype), work_tensor.dtype)
        if repeats == 0:
            return NOTHING
        lanes = Lanes(call, mask, src, repeats, 1, src_rep_stride, neutral)
        count = 2 if cal_index else 1
        target = call.bounded(Access("dst", dst.buffer, dst.dtype, [(dst.offset, (count,), (dst.itemsize,))]))
        per_repeat = src_rep_stride * (BLOCK // src.itemsize)

        def reduce(values):
            lane = _first_index(values, kind)
            row = int(_first_index(values[np.arange(repeats), lane], kind))
            index = np.array([row * per_repeat + lane[row]], np.uint16).view(np.float16)
            return np.concatenate([values[row, lane[row] : lane[row] + 1], index])[:count]

        costs = vector_cost(call, lanes.lanes, repeats + -(-2 * repeats // lanes.lanes))
        need = 2 * repeats if not cal_index else 2 * repeats + lanes.lanes
        return _reduction(call, lanes, target, reduce, costs, work_area(call, work_tensor, need))

    register(name, plan, "mask dst src work_tensor repeat_times src_rep_stride cal_index=False", "V",
             dtypes=[(F16, F16)], sync=False, ir=4, cost="1 cycle a repeat, twice the tree",
             limits=_LIMITS + "repeat_times 1..4095; work >= 2 * repeat_times (+ 1 repeat with index [U])")  # fmt: skip


_reduce_extreme("vec_reduce_max", "max")
_reduce_extreme("vec_reduce_min", "min")
