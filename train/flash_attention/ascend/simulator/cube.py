"""The cube unit: mmad on L0 operands, and the composite calls matmul (from L1) and fixpipe (to GM)."""

import numpy as np

from . import numerics
from .chips import GM, L0A, L0B, L0C, L1, UB
from .isa import NOTHING, Cost, Plan, instruction
from .memory import Access, round_up
from .vector import F16, F32, S8, S32, U8, U32

_MMAD = [(F32, F16, F16), (F16, F16, F16), (S32, S8, S8), (U32, U8, U8), (S32, U8, S8)]


def _k0(address):
    """Elements of the k axis in one fractal: 16 of 16 bits, 32 of 8 bits."""
    return 32 // address.itemsize


def cube_cost(call, m, k, n, k0):
    """One 16 x k0 x 16 product of fractals a cycle."""
    products = -(-m // 16) * -(-n // 16) * -(-k // k0)
    return Cost("M", -(-products // call.rates.cube_fractals), products * 16 * k0 * 4)


def _tile(operand, call, address, shape, order):
    """Access of fractals stored in ``order`` of axes (names of ``shape``), shown as (row1, row0, col1, col0)."""
    strides, step = {}, address.itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    axes = ("r1", "r0", "c1", "c0")
    piece = (address.offset, tuple(shape[axis] for axis in axes), tuple(strides[axis] for axis in axes))
    return call.bounded(Access(operand, address.buffer, address.dtype, [piece]))


def _fractals(rows, row0, columns, column0):
    return {"r1": -(-rows // row0), "r0": row0, "c1": -(-columns // column0), "c0": column0}


def _matrix(array):
    """(r1, r0, c1, c0) as a matrix, copied."""
    return array.reshape(array.shape[0] * array.shape[1], -1)


def _product(call, m, k, n, accumulate):
    """Kernel and marks of C[:m, :n] = A[:m, :k] B[:n, :k]^T; what lies beyond m and n becomes undefined.

    The device accumulates in fp32; the order of its sum is unknown.
    """

    def kernel(c, a, b, *_old):  # an accumulator is among the reads too
        wide = np.float32 if a.dtype == np.float16 else np.float64  # 8-bit products are exact in float64
        left = _matrix(a)[:m, :k].astype(wide)
        right = _matrix(b)[:n, :k].astype(wide)
        result = np.matmul(left, right.T)
        whole = np.zeros((c.shape[0] * c.shape[1], c.shape[2] * c.shape[3]), result.dtype)
        whole[:m, :n] = result
        tile = whole.reshape(c.shape)
        if accumulate:
            tile = tile + c
        if c.dtype == np.float16:
            numerics.to_half(call, tile, c)
        else:
            np.copyto(c, tile, casting="unsafe")
        if m < whole.shape[0] or n < whole.shape[1]:
            outside = np.ones(whole.shape, bool)
            outside[:m, :n] = False
            c[outside.reshape(c.shape)] = np.nan if c.dtype.kind == "f" else -1

    def shadow(c, a, b, *_old):
        operands = [(a, m, k), (b, n, k)] + ([(c, m, n)] if accumulate else [])
        wrong = None
        for view, rows, columns in operands:
            if not view.buffer.clean and not (_matrix(view.shadow)[:rows, :columns] == view.full).all():
                wrong = view
        marks = np.zeros((c.shadow.shape[0] * c.shadow.shape[1], c.shadow.shape[2] * c.shadow.shape[3]), c.shadow.dtype)
        marks[:m, :n] = c.full
        if not (c.buffer.clean and marks.all()):
            np.copyto(c.shadow, marks.reshape(c.shadow.shape))
            c.buffer.clean = False
        return wrong

    return kernel, shadow


@instruction(
    "mmad", "dst a b m k n is_bias fm_offset=0 en_weight_offset=False smask=None", "M", dtypes=_MMAD,
    limits="dst L0C at 1024 B, a L0A and b L0B at 512 B; m, k, n 0..4095; m = 1 is GEMV: refused on zZ data",
    cost="1 cycle a product of fractals", source="D",
)  # fmt: skip
def mmad(call, dst, a, b, m, k, n, is_bias, fm_offset=0, en_weight_offset=False, smask=None):
    """C (zN in L0C) = A (zZ in L0A) x B (nZ in L0B), accumulating onto C when is_bias is 1."""
    call.tensor("dst", dst, L0C), call.tensor("a", a, L0A), call.tensor("b", b, L0B)
    call.typed("dst, a, b", dst, a, b)
    for operand, value in (("m", m), ("k", k), ("n", n)):
        call.in_range(operand, value, 0, 4095)
    accumulate = call.in_range("is_bias", int(is_bias), 0, 1)
    for operand, value, default in (("fm_offset", fm_offset, 0), ("en_weight_offset", en_weight_offset, False),
                                    ("smask", smask, None)):  # fmt: skip
        if value != default:
            call.fail("unsupported", operand, "{} on {}".format(default, call.program.chip.name), value)
    call.aligned("dst", dst, 1024), call.aligned("a", a, 512), call.aligned("b", b, 512)
    if 0 in (m, k, n):
        return NOTHING
    if m == 1:
        call.fail("gemv", "m", "rounded up to 16 (1 reads L0A as a plain vector)", 1, hazard=True)
    k0 = _k0(a)
    left = _tile("a", call, a, _fractals(m, 16, k, k0), ("r1", "c1", "r0", "c0"))  # zZ
    right = _tile("b", call, b, _fractals(n, 16, k, k0), ("c1", "r1", "r0", "c0"))  # nZ, seen as (n, k)
    target = _tile("dst", call, dst, _fractals(m, 16, n, 16), ("c1", "r1", "r0", "c0"))  # zN
    kernel, shadow = _product(call, m, k, n, accumulate)
    reads = [left, right, target] if accumulate else [left, right]
    return Plan(reads, [target], kernel, [cube_cost(call, m, k, n, k0)], shadow=shadow)


@instruction(
    "matmul", "dst a b m k n init_l1out=True bias=None", "M", sync=False, ir=8,
    dtypes=[(F32, F16, F16), (S32, S8, S8), (S32, U8, S8)],
    limits="a, b in L1 at 512 B, [K1, rows, K0]; dst in L1OUT at 1024 B, [N1, M, 16]; Python ints m, n 1..4096, "
    "k 1..16384; needs free L0A and L0B",
    cost="MTE1 of a and b once, 1 cycle a product of fractals", source="D",
)  # fmt: skip
def matmul(call, dst, a, b, m, k, n, init_l1out=True, bias=None):
    """dst = a b^T of zN operands: b is given as [K1, N, K0]. Accumulates onto dst when init_l1out is False."""
    call.tensor("dst", dst, L0C), call.tensor("a", a, L1), call.tensor("b", b, L1)
    call.typed("dst, a, b", dst, a, b)
    call.static("m", m, 1, 4096), call.static("n", n, 1, 4096), call.static("k", k, 1, 16384)
    if bias is not None:
        call.fail("unsupported", "bias", "None on {}".format(call.program.chip.name), bias)
    call.aligned("dst", dst, 1024), call.aligned("a", a, 512), call.aligned("b", b, 512)
    k0 = _k0(a)
    for operand, address, need in (("dst", dst, round_up(m, 16) * round_up(n, 16)),
                                   ("a", a, round_up(m, 16) * round_up(k, k0)),
                                   ("b", b, round_up(n, 16) * round_up(k, k0))):  # fmt: skip
        given = int(np.prod(address.shape))
        if given < need:
            call.fail("bounds", operand, "a slice of at least {} elements (t[k:], not t[k])".format(need), given)
    for scope in (L0A, L0B):
        free = call.program.allocator.available(scope)
        if free < 1024:
            call.fail("capacity", "a", "called with at least 1024 bytes of {} free".format(scope), free)
    left = _tile("a", call, a, _fractals(m, 16, k, k0), ("c1", "r1", "r0", "c0"))
    right = _tile("b", call, b, _fractals(n, 16, k, k0), ("c1", "r1", "r0", "c0"))
    target = _tile("dst", call, dst, _fractals(m, 16, n, 16), ("c1", "r1", "r0", "c0"))
    kernel, shadow = _product(call, m, k, n, not init_l1out)
    costs = []
    for operand, address, rows, rate in (("a", a, m, call.rates.l1_to_l0a), ("b", b, n, call.rates.l1_to_l0b)):
        size = round_up(rows, 16) * round_up(k, k0) * address.itemsize
        costs.append(Cost("MTE1", -(-size // rate), size, (operand,)))
    costs.append(cube_cost(call, m, k, n, k0)._replace(operands=("dst",)))
    reads = [left, right] if init_l1out else [left, right, target]
    return Plan(reads, [target], kernel, costs, shadow=shadow)


@instruction(
    "fixpipe", "dst src cburst_num burst_len dst_stride src_stride extend_params=None", "V", sync=False, ir=4,
    dtypes=[(F32, F32), (F16, F32), (S32, S32), (F16, S32)],
    limits="src L1OUT at 1024 B, dst GM or UB (at 32 B); cburst_num 1..4095; burst_len even, 2..65535 in 32 B of src; "
    "dst_stride 0..65535 in 32 B; src_stride 0; extend_params: quantize_params and relu",
    cost="L0C->UB, then UB->GM", source="D",
)  # fmt: skip
def fixpipe(call, dst, src, cburst_num, burst_len, dst_stride, src_stride, extend_params=None):
    """Drain a matmul result [N1, M, 16] to [N1, m, 16], dropping padded rows; converts with quantize_params."""
    call.tensor("dst", dst, GM, UB), call.tensor("src", src, L0C)
    call.typed("dst, src", dst, src)
    call.aligned("src", src, 1024)
    if dst.scope == UB:
        call.aligned("dst", dst)
    call.in_range("cburst_num", cburst_num, 1, 4095)
    call.in_range("burst_len", burst_len, 2, 65535)
    call.in_range("dst_stride", dst_stride, 0, 65535)
    if src_stride != 0 or burst_len % 2:
        call.fail("range", "src_stride, burst_len", "0 and even", (src_stride, burst_len))
    scale, relu = _extended(call, dst, src, extend_params or {})
    rows = burst_len * 32 // (16 * src.itemsize)
    padded = round_up(rows, 16)
    inner = (16 * src.itemsize, src.itemsize)
    source_piece = (src.offset, (cburst_num, rows, 16), (padded * 16 * src.itemsize,) + inner)
    narrow = rows * 16 * dst.itemsize
    target_piece = (dst.offset, (cburst_num, rows, 16), (narrow + dst_stride * 32, 16 * dst.itemsize, dst.itemsize))
    source = call.bounded(Access("src", src.buffer, src.dtype, [source_piece]))
    target = call.bounded(Access("dst", dst.buffer, dst.dtype, [target_piece]))

    def kernel(out, data):
        if out.dtype == np.float16:
            wide = data if scale is None else data.astype(np.float32) * scale
            numerics.to_half(call, np.maximum(wide, np.float32(0)) if relu else wide, out)
        else:
            np.copyto(out, np.maximum(data, data.dtype.type(0)) if relu else data)

    read, written = cburst_num * rows * 16 * src.itemsize, cburst_num * narrow
    costs = [Cost("V", -(-read // call.rates.l0c_to_ub), read)]
    if dst.scope == GM:
        costs = [costs[0]._replace(operands=("src",))]
        costs.append(Cost("MTE3", -(-written // call.rates.gm_write), written, ("dst",)))
    return Plan([source], [target], kernel, costs)


def _extended(call, dst, src, params):
    """(scale or None, relu) of fixpipe's extend_params."""
    unknown = set(params) - {"quantize_params", "relu"}
    if unknown:
        call.fail("unsupported", "extend_params", "of keys quantize_params and relu on the simulator", sorted(unknown))
    quantize = params.get("quantize_params")
    modes = {(F16, F32): "fp322fp16", (F16, S32): "int322fp16"}
    mode = modes.get((dst.dtype, src.dtype))
    if mode != (quantize or {}).get("mode"):
        call.fail("dtype", "quantize_params", "of mode {} for {} <- {}".format(mode, dst.dtype, src.dtype), quantize)
    if mode == "int322fp16":
        return np.float32(call.scalar("mode_param", quantize.get("mode_param"), F16)), bool(params.get("relu"))
    if mode and quantize.get("mode_param") is not None:
        call.fail("dtype", "mode_param", "None for fp322fp16", quantize["mode_param"])
    return None, bool(params.get("relu"))
