"""Data movement: data_move, tensor_mov, load2dv1, broadcast_ub_to_l0c, fixpipe, and their paths."""

from typing import NamedTuple

import numpy as np

from . import numerics
from .binding import outside_cores, report_race
from .chips import GM, L0A, L0B, L0C, L1, UB
from .isa import NOTHING, Cost, Plan, instruction
from .memory import BLOCK, Access, round_up
from .vector import F16, F32, S8, S16, S32, U8, U16, U32

FRACTAL = 512  # bytes of a 16 x 16 tile of 16-bit elements
L0C_FRACTAL = 256  # elements


class Path(NamedTuple):
    """One legal pair of scopes: the pipe, and the rate that bounds it (a field of Rates)."""

    pipe: str
    rate: str


PATHS = {
    (UB, GM): Path("MTE2", "gm_read"),
    (L1, GM): Path("MTE2", "gm_read"),
    (GM, UB): Path("MTE3", "gm_write"),
    (L1, UB): Path("MTE3", "ub_to_l1"),
    (UB, UB): Path("V", "vector"),
    (UB, L1): Path("MTE1", "l1_to_ub"),
    (UB, L0C): Path("V", "l0c_to_ub"),
    (L0C, UB): Path("V", "ub_to_l0c"),
}  # destination, source
_ALIGNMENT = {GM: 1, UB: BLOCK, L1: BLOCK}
_BURST = "nburst 1..4095; burst 1..65535; strides 0..65535 (gaps)"


def _path(call, dst, src):
    call.tensor("dst", dst), call.tensor("src", src)
    path = PATHS.get((dst.scope, src.scope))
    if path is None:
        legal = ", ".join("{}->{}".format(source, target) for target, source in PATHS)
        call.fail("path", "src", "moved on one of the paths {}".format(legal), "{}->{}".format(src.scope, dst.scope))
    return path


def path_cost(call, path, size):
    """Busy time of a move on its pipe."""
    return [Cost(path.pipe, -(-size // getattr(call.rates, path.rate)), size)]


def _check_bursts(call, nburst, burst, src_stride, dst_stride, burst_name="burst"):
    call.in_range("nburst", nburst, 1, 4095, zero_at_run_time=True)
    call.in_range(burst_name, burst, 1, 65535, zero_at_run_time=True)
    call.in_range("src_stride", src_stride, 0, 65535)
    call.in_range("dst_stride", dst_stride, 0, 65535)
    return nburst == 0 or burst == 0


def _bursts(call, operand, address, nburst, size, gap, dtype=None):
    """Access of nburst runs of ``size`` bytes, ``gap`` bytes apart (end to start)."""
    dtype = dtype or address.dtype
    itemsize = np.dtype(dtype).itemsize
    piece = (address.offset, (nburst, size // itemsize), (size + gap, itemsize))
    access = Access(operand, address.buffer, dtype, [piece])
    slack = 0
    if operand == "src" and address.scope == GM:  # a tail may be read up to the next 32-byte boundary
        slack = round_up(address.buffer.size, BLOCK) - address.buffer.size
    return call.bounded(access, slack)


def copy(out, data):
    """Kernel of every plain move."""
    np.copyto(out, data)


@instruction(
    "data_move", "dst src sid nburst burst src_stride dst_stride", "path",
    limits="sid 0..15; {}; equal dtypes; 32 B units (L0C: one fractal), UB and L1 at 32 B, GM at 1 B".format(_BURST),
    cost="bytes / rate of the path", source="D",
)  # fmt: skip
def data_move(call, dst, src, sid, nburst, burst, src_stride, dst_stride):
    """nburst runs of burst units; strides are gaps from the end of a run to the start of the next."""
    path = _path(call, dst, src)
    call.in_range("sid", sid, 0, 15)
    if dst.dtype != src.dtype:
        call.fail("dtype", "src", "of dst's dtype {}".format(dst.dtype), src.dtype, "data_move does not convert.")
    idle = _check_bursts(call, nburst, burst, src_stride, dst_stride)
    unit = BLOCK
    if L0C in (dst.scope, src.scope):
        unit = _fractal_bytes(call, dst)
    for operand, address in (("dst", dst), ("src", src)):
        call.aligned(operand, address, unit if address.scope == L0C else _ALIGNMENT[address.scope])
    if idle:
        return NOTHING
    size = burst * unit
    source = _bursts(call, "src", src, nburst, size, src_stride * (unit if src.scope == L0C else BLOCK))
    target = _bursts(call, "dst", dst, nburst, size, dst_stride * (unit if dst.scope == L0C else BLOCK))
    _check_copy_overlap(call, target, source)
    costs = path_cost(call, path, nburst * size)
    if (dst.scope, src.scope) == (GM, UB):
        return Plan([source], [target], effect=store(call), costs=costs)
    return Plan([source], [target], copy, costs, shadow="move")


def _fractal_bytes(call, address):
    if address.itemsize not in (2, 4):
        call.fail("dtype", "src", "of 16 or 32 bits between L0C and UB", address.dtype)
    return L0C_FRACTAL * address.itemsize


def _check_copy_overlap(call, target, source):
    """Runs of source and destination are equal in length: they overlap when two starts are closer than that."""
    if target.buffer is not source.buffer or target.pieces == source.pieces:
        return
    ((offset, (count, elements), (step, itemsize)),) = source.pieces
    starts = offset + step * np.arange(count)
    ((offset, (count, elements), (step, itemsize)),) = target.pieces
    targets = offset + step * np.arange(count)
    nearest = np.searchsorted(starts, targets)
    gaps = [np.abs(starts[np.clip(nearest + side, 0, count - 1)] - targets) for side in (-1, 0)]
    if min(gap.min() for gap in gaps) < elements * itemsize:
        call.fail("overlap", "src", "clear of 'dst', or identical to it", "overlapping bursts", hazard=True)


def store(call):
    """UB->GM: adds where atomic add is on, writes where it is off."""

    def effect(machine, statement, out, data):
        if machine.atomic:
            if out.data.dtype != np.float32:
                call.fail("atomic", "dst", "float32 while atomic add is on", str(out.data.dtype))
            for view, operand in ((data, "src"), (out, "dst")):
                if machine.params.uninitialized == "raise" and not view.written():
                    need = "written before it is added" if view is data else "cleared before the first atomic add"
                    call.fail("uninitialized", operand, need, "'{}'".format(view.buffer.name), hazard=True)
            np.add(out.data, data.data, out=out.data)
            out.mark()
        else:
            np.copyto(out.data, data.data)
            if not (out.buffer.clean and data.buffer.clean):
                np.copyto(out.shadow, data.shadow)
                out.buffer.clean = False
        if out.buffer.tracked and not machine.core:
            outside_cores(statement, [out])
        elif out.buffer.tracked:
            other = machine.races.write(out, machine.core, bool(machine.atomic))
            report_race(statement, out, "used", other, machine.core)

    return effect


_MATRIX = {  # (dst, src) -> what tensor_mov does between L0C and UB
    "out": [(F16, F16), (F32, F32), (S32, S32), (U32, U32), (F16, F32), (F16, S32)],
    "in": [(F16, F16), (F32, F32), (S32, S32), (U32, U32), (F16, F32)],
}


@instruction(
    "tensor_mov",
    "dst src block_mode nburst burst_len dst_stride src_stride deqscale=None sid_store_mode=0 relu=False pad_mode=None "
    "pad_value=None",
    "path", limits="block_mode '' or 'm'; {}; L0C<->UB converts float32 to float16".format(_BURST),
    cost="bytes of the wider side / rate of the path", source="C",
)  # fmt: skip
def tensor_mov(call, dst, src, block_mode, nburst, burst_len, dst_stride, src_stride, deqscale=None, sid_store_mode=0,
               relu=False, pad_mode=None, pad_value=None):  # fmt: skip
    """data_move with conversion between L0C and UB, one 16x16 fractal a unit; note dst_stride before src_stride."""
    path = _path(call, dst, src)
    for operand, value in (("pad_mode", pad_mode), ("pad_value", pad_value)):
        if value is not None:
            call.fail("unsupported", operand, "None on the simulator", value)
    call.in_range("sid_store_mode", sid_store_mode, 0, 15)
    if L0C not in (dst.scope, src.scope):
        if block_mode not in ("", "m") or relu or deqscale is not None:
            call.fail("path", "block_mode", "'' without relu and deqscale outside L0C<->UB", repr(block_mode))
        return data_move(call, dst, src, sid_store_mode, nburst, burst_len, src_stride, dst_stride)
    if block_mode != "m":
        call.fail("unsupported", "block_mode", "'m' between L0C and UB on the simulator", repr(block_mode))
    kinds = _MATRIX["in" if dst.scope == L0C else "out"]
    if (dst.dtype, src.dtype) not in kinds:
        need = "of dtypes {} (dst, src)".format(" or ".join("({}, {})".format(*pair) for pair in kinds))
        call.fail("dtype", "dst, src", need, (dst.dtype, src.dtype))
    if (deqscale is None) == ((dst.dtype, src.dtype) == (F16, S32)):
        call.fail("dtype", "deqscale", "given exactly for float16 <- int32", deqscale)
    if _check_bursts(call, nburst, burst_len, src_stride, dst_stride, "burst_len"):
        return NOTHING
    sides = []
    for operand, address, stride in (("dst", dst, dst_stride), ("src", src, src_stride)):
        unit = L0C_FRACTAL * address.itemsize
        call.aligned(operand, address, unit if address.scope == L0C else BLOCK)
        gap = stride * (unit if address.scope == L0C else BLOCK)
        sides.append(_bursts(call, operand, address, nburst, burst_len * unit, gap))
    size = nburst * burst_len * L0C_FRACTAL * max(dst.itemsize, src.itemsize)
    kernel = _matrix_kernel(call, dst.dtype, src.dtype, relu, deqscale)
    shadow = "move" if dst.itemsize == src.itemsize else _narrowed_marks
    return Plan(sides[1:], sides[:1], kernel, path_cost(call, path, size), shadow=shadow)


def _matrix_kernel(call, dst, src, relu, deqscale):
    if dst == src and not relu:
        return copy
    if relu and (dst, src) != (F16, F32):
        call.fail("dtype", "relu", "False except for float16 <- float32", (dst, src))
    scale = np.float32(1 if deqscale is None else call.scalar("deqscale", deqscale, F16))

    def kernel(out, data):
        wide = data if src == F32 else data.astype(np.float32) * scale
        numerics.to_half(call, np.maximum(wide, np.float32(0)) if relu else wide, out)

    return kernel


def _narrowed_marks(out, data):
    """Marks of a conversion from 32 to 16 bits: an element is written when its whole source is."""
    if data.buffer.clean:
        out.mark()
        return
    np.multiply(data.shadow == data.full, out.full, out=out.shadow, casting="unsafe")
    out.buffer.clean = False


@instruction(
    "load2dv1", "dst src index repeat_times src_stride sid if_transpose=False addr_mode=None", "path",
    dtypes=[(dtype, dtype) for dtype in (F16, S16, U16, S8, U8)],
    limits="L1->L0A/L0B, GM->L0A/L0B/L1; 512 B starts; repeat_times 1..255; index, src_stride 0..65535; "
    "if_transpose from L1 to L0A/L0B, 16 bits only",
    cost="512 B a fractal / rate of the path", source="D",
)  # fmt: skip
def load2dv1(call, dst, src, index, repeat_times, src_stride, sid, if_transpose=False, addr_mode=None):
    """repeat_times fractals of 512 B; source fractal r is index + r * src_stride (start to start)."""
    call.tensor("dst", dst), call.tensor("src", src)
    rates = {(L0A, L1): "l1_to_l0a", (L0B, L1): "l1_to_l0b", (L0A, GM): "gm_read", (L0B, GM): "gm_read",
             (L1, GM): "gm_read"}  # fmt: skip
    rate = rates.get((dst.scope, src.scope))
    if rate is None:
        call.fail("path", "src", "moved L1->L0A, L1->L0B or GM->L0A, L0B, L1", "{}->{}".format(src.scope, dst.scope))
    call.typed("dst, src", dst, src)
    call.in_range("index", index, 0, 65535)
    call.in_range("repeat_times", repeat_times, 1, 255, zero_at_run_time=True)
    call.in_range("src_stride", src_stride, 0, 65535)
    call.in_range("sid", sid, 0, 15)
    if if_transpose and (src.scope == GM or src.itemsize != 2):
        call.fail("path", "if_transpose", "False except from L1 with 16-bit types", if_transpose)
    if addr_mode not in (None, "inc", "dec"):
        call.fail("range", "addr_mode", "'inc' or 'dec'", repr(addr_mode))
    call.aligned("dst", dst, FRACTAL)
    if src.scope != GM:
        call.aligned("src", src, FRACTAL)
    if repeat_times == 0:
        return NOTHING
    shape, strides = (repeat_times, 16, BLOCK // src.itemsize), (BLOCK, src.itemsize)  # a fractal: 16 rows of 32 B
    step = src_stride * FRACTAL * (-1 if addr_mode == "dec" else 1)
    source = Access("src", src.buffer, src.dtype, [(src.offset + index * FRACTAL, shape, (step,) + strides)])
    target = Access("dst", dst.buffer, dst.dtype, [(dst.offset, shape, (FRACTAL,) + strides)])
    path = Path("MTE2" if src.scope == GM else "MTE1", rate)
    kernel = _transposed if if_transpose else copy
    costs = path_cost(call, path, repeat_times * FRACTAL)
    return Plan([call.bounded(source)], [call.bounded(target)], kernel, costs, shadow="move")


def _transposed(out, data):
    np.copyto(out, data.swapaxes(-1, -2))


@instruction(
    "broadcast_ub_to_l0c", "dst src nburst burst_len src_gap dst_gap", "V",
    dtypes=[(dtype, dtype) for dtype in (F16, F32, S32)],
    limits="UB->L0C; nburst, burst_len 1..255; gaps 0..255 (src 32 B, dst one fractal); src at 32 B, dst at 1024 B",
    cost="bytes written / ub_to_l0c", source="C",
)  # fmt: skip
def broadcast_ub_to_l0c(call, dst, src, nburst, burst_len, src_gap, dst_gap):
    """Each 16 source elements become one 16x16 fractal whose 16 rows all equal them."""
    call.tensor("dst", dst, L0C), call.tensor("src", src, UB)
    call.typed("dst, src", dst, src)
    for operand, value, low in (("nburst", nburst, 1), ("burst_len", burst_len, 1), ("src_gap", src_gap, 0),
                                ("dst_gap", dst_gap, 0)):  # fmt: skip
        call.in_range(operand, value, low, 255, zero_at_run_time=bool(low))
    call.aligned("dst", dst, 1024)
    call.aligned("src", src)
    if nburst == 0 or burst_len == 0:
        return NOTHING
    size = src.itemsize
    group, fractal = 16 * size, L0C_FRACTAL * size
    source_piece = (src.offset, (nburst, burst_len, 1, 16), (burst_len * group + src_gap * BLOCK, group, 0, size))
    target_piece = (dst.offset, (nburst, burst_len, 16, 16), ((burst_len + dst_gap) * fractal, fractal, group, size))
    source = call.bounded(Access("src", src.buffer, src.dtype, [source_piece]))
    target = call.bounded(Access("dst", dst.buffer, dst.dtype, [target_piece]))
    costs = path_cost(call, Path("V", "ub_to_l0c"), nburst * burst_len * fractal)
    return Plan([source], [target], copy, costs, shadow="move")
