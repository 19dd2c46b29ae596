"""Comparison to bit masks and selection by them. Lane l of a repeat is bit l % 8 of byte l // 8."""

import numpy as np

from .binding import require_written
from .geometry import Operand, accesses, check_overlap, lane_runs, lanes_of, repeat_count, slots
from .isa import NOTHING, Plan, register
from .memory import Access
from .vector import F16, F32, LIMITS, check_strides, vector_cost

BIT_TYPES = ("uint8", "uint16", "uint32", "uint64")
COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
               "ne": np.not_equal}  # fmt: skip


def _bits(call, operand, address, rows, lanes):
    """Access of ``rows`` x ``lanes`` bits from the address on."""
    call.tensor(operand, address, "UB")
    call.aligned(operand, address)
    if address.dtype not in BIT_TYPES:
        call.fail("dtype", operand, "of dtype {}".format(", ".join(BIT_TYPES)), address.dtype)
    piece = (address.offset, (rows, lanes // 8), (lanes // 8, 1))
    return call.bounded(Access(operand, address.buffer, "uint8", [piece]))


def _comparison(name, low_name, function):
    """dst gets one bit a lane, 16 (float16) or 8 (float32) bytes a repeat, without gaps; there is no mask."""

    def plan(call, dst, src0, src1, repeat_times, src0_rep_stride, src1_rep_stride, src0_blk_stride=1,
             src1_blk_stride=1):  # fmt: skip
        check_strides(call, src0_rep_stride=src0_rep_stride, src1_rep_stride=src1_rep_stride,
                      src0_blk_stride=src0_blk_stride, src1_blk_stride=src1_blk_stride)  # fmt: skip
        operands = [Operand("src0", call.tensor("src0", src0, "UB"), src0_blk_stride, src0_rep_stride),
                    Operand("src1", call.tensor("src1", src1, "UB"), src1_blk_stride, src1_rep_stride)]  # fmt: skip
        call.typed("src0, src1", src0, src1)
        for operand in operands:
            call.aligned(operand.name, operand.address)
        repeats, lanes = repeat_count(call, repeat_times), lanes_of(src0)
        if repeats == 0:
            return NOTHING
        sources = accesses(call, operands, ((0, lanes),), repeats)
        target = _bits(call, "dst", dst, repeats, lanes)
        for source in sources:
            call.disjoint(target, source)

        def kernel(out, left, right):
            with np.errstate(invalid="ignore"):  # comparing NaN is false, not undefined
                result = function(left, right).reshape(repeats, lanes // 8, 8)
            out[...] = np.packbits(result[..., ::-1], axis=-1)[..., 0]

        return Plan(sources, [target], kernel, vector_cost(call, lanes, repeats))

    row = {"unit": "V", "dtypes": [(F16, F16), (F32, F32)], "cost": "1 cycle a repeat",
           "limits": "UB; 32 B starts; dst of uint8..64; no mask; repeat_times 1..255; strides 0..255"}  # fmt: skip
    head, tail = "dst src0 src1 repeat_times ", "src0_rep_stride src1_rep_stride"
    register(name, plan, head + tail, **row)
    register(low_name, plan, head + "src0_blk_stride src1_blk_stride " + tail, **row)


for _key, _function in COMPARISONS.items():
    _comparison("vec_cmpv_" + _key, "vcmpv_" + _key, _function)


def _select(call, mask, mode, dst, sel, src0, src1, repeat_times, dst_rep_stride=0, src0_rep_stride=0,
            src1_rep_stride=0, dst_blk_stride=1, src0_blk_stride=1, src1_blk_stride=1):  # fmt: skip
    """src0 where the bit is 1, else src1. Mode 0: one row of bits for all repeats; 2: a row each; 1: src1 a scalar."""
    chip = call.program.chip.name
    highest = 0 if chip == "910A" else 2
    if call.static("mode", mode, 0, 2) > highest:
        call.fail("range", "mode", "0 on {}".format(chip), mode)
    check_strides(call, dst_rep_stride=dst_rep_stride, src0_rep_stride=src0_rep_stride, src1_rep_stride=src1_rep_stride)
    check_strides(call, dst_blk_stride=dst_blk_stride, src0_blk_stride=src0_blk_stride, src1_blk_stride=src1_blk_stride)
    operands = [Operand("dst", call.tensor("dst", dst, "UB"), dst_blk_stride, dst_rep_stride),
                Operand("src0", call.tensor("src0", src0, "UB"), src0_blk_stride, src0_rep_stride)]  # fmt: skip
    if mode == 1:
        call.typed("dst, src0, src1", dst, src0, src0)
        other = call.scalar("src1", src1, dst.dtype)
    else:
        operands.append(Operand("src1", call.tensor("src1", src1, "UB"), src1_blk_stride, src1_rep_stride))
        call.typed("dst, src0, src1", dst, src0, src1)
        other = None
    for operand in operands:
        call.aligned(operand.name, operand.address)
    repeats, lanes = repeat_count(call, repeat_times), lanes_of(dst)
    if repeats == 0:
        return NOTHING
    runs = lane_runs(call, mask, lanes)
    if check_overlap(call, operands[0], operands[1:], max(first + count for first, count in runs), repeats):
        call.fail("overlap", "dst", "distinct in every repeat", "repeats that fall onto each other")
    parts = accesses(call, operands, runs, repeats)
    bits = _bits(call, "sel", sel, repeats if mode else 1, lanes)
    call.disjoint(parts[0], bits)

    def effect(machine, statement, *views):
        bit_view, count = views[-1], len(parts[0].pieces)
        require_written(machine, call, views[count:])
        chosen = np.unpackbits(bit_view.data.copy()).reshape(-1, lanes // 8, 8)[..., ::-1].reshape(-1, lanes)
        for k, (first, width) in enumerate(slots(parts[0], runs)):
            out, left = views[k], views[count + k]
            right = other if mode == 1 else views[2 * count + k].data
            pick = np.broadcast_to(chosen[:, first : first + width], (repeats, width)).reshape(out.data.shape)
            np.copyto(out.data, np.where(pick.astype(bool), left.data, right))
            out.mark()

    return Plan(parts[1:] + [bits], parts[:1], effect=effect, costs=vector_cost(call, lanes, repeats))


_SELECT = {"unit": "V", "dtypes": [(F16, F16, F16), (F32, F32, F32)], "cost": "1 cycle a repeat",
           "limits": LIMITS + "; mode 0 on 910A, 0..2 on 310P; sel of uint8..64"}  # fmt: skip
_HEAD = "mask mode dst sel src0 src1 repeat_times "
register("vec_sel", _select, _HEAD + "dst_rep_stride=0 src0_rep_stride=0 src1_rep_stride=0", **_SELECT)
_STRIDES = "dst_blk_stride src0_blk_stride src1_blk_stride dst_rep_stride src0_rep_stride src1_rep_stride"
register("vsel", _select, _HEAD + _STRIDES, **_SELECT)
