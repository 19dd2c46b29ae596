"""Transposes of 16 x 16 tiles in UB: vec_trans, and the 16-address form vnchwconv / vec_trans_scatter."""

import numpy as np

from .isa import NOTHING, Cost, Plan, register
from .memory import BLOCK, Access
from .vector import F16, S16, U16

TILE_BYTES = 512


def _transpose_kernel(out, tiles):
    np.copyto(out, tiles.swapaxes(-1, -2))


def _cost(call, repeats):
    """512 bytes a repeat at the vector unit's rate."""
    size = TILE_BYTES * repeats
    return [Cost("V", -(-size // call.rates.vector), size)]


def _vec_trans(call, dst, src, repeat_times, dst_rep_stride, src_rep_stride):
    repeats = call.in_range("repeat_times", repeat_times, 1, 4095, zero_at_run_time=True)
    accesses = []
    for operand, address, stride in (("dst", dst, dst_rep_stride), ("src", src, src_rep_stride)):
        call.tensor(operand, address, "UB")
        call.aligned(operand, address)
        call.in_range(operand + "_rep_stride", stride, 0, 4095)
        piece = (address.offset, (max(repeats, 1), 16, 16), (stride * TILE_BYTES, 32, 2))
        accesses.append(Access(operand, address.buffer, address.dtype, [piece]))
    call.typed("dst, src", dst, src)
    if repeats == 0:
        return NOTHING
    target, source = [call.bounded(access) for access in accesses]
    call.disjoint(target, source, or_same=True)  # in place only where every tile keeps its address
    return Plan([source], [target], _transpose_kernel, _cost(call, repeats), shadow="move")


_SIXTEEN = [(dtype, dtype) for dtype in (F16, S16, U16)]
register("vec_trans", _vec_trans, "dst src repeat_times dst_rep_stride src_rep_stride", "V", dtypes=_SIXTEEN,
         limits="UB; repeat_times 1..4095; strides 0..4095 in 512 B; in place only if identical",
         cost="2 cycles a tile [U]")  # fmt: skip


def _vtranspose(call, dst, src):
    return _vec_trans(call, dst, src, 1, 0, 0)


register("vtranspose", _vtranspose, "dst src", "V", dtypes=_SIXTEEN, limits="UB; one 16 x 16 tile",
         cost="2 cycles [U]", source="C")  # fmt: skip


def _scatter(call, dst_high_half, src_high_half, dst_list, src_list, repeat_times, dst_rep_stride, src_rep_stride):
    """Per repeat: element j of source block i becomes element i of destination block j.

    8-bit elements fill half a block: ``*_high_half`` selects bytes 16..31 of each block. With one repeat the strides
    are still added on the device, so they must be 0.
    """
    repeats = call.in_range("repeat_times", repeat_times, 1, 255, zero_at_run_time=True)
    sides = []
    for operand, items, stride, high in (("dst_list", dst_list, dst_rep_stride, dst_high_half),
                                         ("src_list", src_list, src_rep_stride, src_high_half)):  # fmt: skip
        call.in_range(operand[:3] + "_rep_stride", stride, 0, 65535)
        if not isinstance(items, (list, tuple)) or len(items) != 16:
            call.fail(
                "range", operand, "a list of 16 tensors", len(items) if isinstance(items, (list, tuple)) else items
            )
        if repeats == 1 and stride != 0:
            need = "0 when repeat_times is 1 (it is added to the address)"
            call.fail("range", operand[:3] + "_rep_stride", need, stride, hazard=True)
        sides.append([_block(call, operand, item, stride, high, repeats) for item in items])
    dtypes = {item.dtype for item in list(dst_list) + list(src_list)}
    if len(dtypes) > 1:
        call.fail("dtype", "src_list", "of one dtype with dst_list", sorted(dtypes))
    call.typed("dst_list, src_list", dst_list[0], src_list[0])
    if repeats == 0:
        return NOTHING
    targets, sources = sides

    def kernel(*arrays):
        tile = np.stack(arrays[16:])  # (16 blocks, repeats, 16 elements)
        for element, out in enumerate(arrays[:16]):
            out[...] = tile[:, :, element].T

    return Plan(sources, targets, kernel, _cost(call, repeats), shadow=_scatter_marks(kernel))


def _block(call, operand, address, stride, high, repeats):
    call.tensor(operand, address, "UB")
    call.aligned(operand, address)
    half = 16 if address.itemsize == 1 and high else 0
    piece = (address.offset + half, (max(repeats, 1), 16), (stride * BLOCK, address.itemsize))
    return call.bounded(Access(operand, address.buffer, address.dtype, [piece]))


def _scatter_marks(kernel):
    def shadow(*views):
        kernel(*[view.shadow for view in views])
        for view in views[:16]:
            view.buffer.clean = False

    return shadow


_SCATTER = {
    "unit": "V",
    "dtypes": _SIXTEEN + [("int8", "int8"), ("uint8", "uint8")],
    "limits": "UB; 16 blocks a list, 32 B starts; repeat_times 1..255; strides 0..65535, 0 with one repeat",
    "cost": "2 cycles a repeat [U]",
}
_PARAMETERS = "dst_high_half src_high_half dst_list src_list repeat_times dst_rep_stride src_rep_stride"
register("vec_trans_scatter", _scatter, _PARAMETERS, **_SCATTER)
register("vnchwconv", _scatter, _PARAMETERS, **_SCATTER)
