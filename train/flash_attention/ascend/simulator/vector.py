"""The vector unit's elementwise instructions: arithmetic, conversion, fill.

Each line of a table gives the public ``vec_*`` form (block strides 1) and, where TIK has one, the low-level form with
block strides. The semantics is the ufunc; float16 is rounded after every operation (numerics.py).
"""

import numpy as np

from . import numerics
from .expr import INTEGERS
from .geometry import MAX_STRIDE, Operand, accesses, check_overlap, lane_runs, lanes_of, repeat_count
from .isa import INVALID, NOTHING, Cost, Plan, register

F16, F32, S32, U32, S16, U16, S8, U8 = (
    "float16", "float32", "int32", "uint32", "int16", "uint16", "int8", "uint8",
)  # fmt: skip
LIMITS = "UB; 32 B starts; mask 1..128 (16-bit) or 1..64 (32-bit); repeat_times 1..255; strides 0..255"


def vector_cost(call, lanes, repeats, slow=False):
    """One repeat of 256 bytes a cycle; ``slow_vector`` [U] times that for transcendental functions and division."""
    rates = call.rates
    size = 256 * repeats
    return [Cost("V", (rates.slow_vector if slow else 1) * -(-size // rates.vector), size)]


def check_strides(call, **strides):
    """Block and repeat strides are 0..255."""
    for name, value in strides.items():
        call.in_range(name, value, 0, MAX_STRIDE)


def elementwise(call, mask, operands, repeat_times, kernel, slow=False, accumulates=False, undefined=INVALID,
                updates=False):  # fmt: skip
    """The plan of any elementwise instruction; ``operands[0]`` is the destination, which ``updates`` reads too."""
    addresses = [operand.address for operand in operands]
    lanes = lanes_of(*addresses)
    runs = lane_runs(call, mask, lanes)
    repeats = repeat_count(call, repeat_times)
    for operand in operands:
        call.aligned(operand.name, operand.address)
    if repeats == 0:
        return NOTHING
    touched = max(first + count for first, count in runs)
    sequential = check_overlap(call, operands[0], operands[1:], touched, repeats, accumulates, updates)
    parts = accesses(call, operands, runs, repeats, sequential)
    return Plan(
        parts if updates else parts[1:], parts[:1], kernel, vector_cost(call, lanes, repeats, slow), undefined=undefined
    )


def kernel_for(call, ufunc, dtype, undefined):
    """numpy kernel of a ufunc for operands of one dtype, and the events after which its result is undefined."""
    events = INVALID + ("overflow",) if undefined else INVALID
    if dtype == F16:
        return numerics.rounded(call, ufunc, undefined), events
    return numerics.direct(ufunc), events


def _names(count):
    return ["dst", "src"] if count == 1 else ["dst", "src0", "src1"]


def _unary_or_binary(name, low_name, count, ufunc, dtypes, slow=False, undefined=False, accumulates=False, source="D"):
    """Register ``vec_<name>`` and the low-level form: dst = ufunc(sources)."""
    names = _names(count)
    blocks = [operand + "_blk_stride" for operand in names]
    repeats = [operand + "_rep_stride" for operand in names]

    def plan(call, mask, repeat_times, **values):
        check_strides(call, **{key: value for key, value in values.items() if key.endswith("stride")})
        operands = [
            Operand(key, call.tensor(key, values[key], "UB"), values.get(block, 1), values[repeat])
            for key, block, repeat in zip(names, blocks, repeats)
        ]
        dtype = call.typed(", ".join(names), *[operand.address for operand in operands])[0]
        kernel, events = kernel_for(call, ufunc, dtype, undefined)
        return elementwise(call, mask, operands, repeat_times, kernel, slow, accumulates, events)

    row = {"unit": "V", "dtypes": [(dtype,) * len(names) for dtype in dtypes], "limits": LIMITS, "source": source,
           "cost": "slow_vector [U] x 1 cycle a repeat" if slow else "1 cycle a repeat"}  # fmt: skip
    head = " ".join(["mask"] + names + ["repeat_times"])
    if name:
        register(name, plan, " ".join([head] + repeats), **row)
    if low_name:
        register(low_name, plan, " ".join([head] + blocks + repeats), **row)


# name, low-level name, sources, function, dtypes, options
for _row in (
    ("vec_add", "vadd", 2, np.add, (F16, F32, S32), {"accumulates": True}),
    ("vec_sub", "vsub", 2, np.subtract, (F16, F32, S32), {"accumulates": True}),
    ("vec_mul", "vmul", 2, np.multiply, (F16, F32, S32), {"accumulates": True}),
    ("vec_max", "vmax", 2, np.maximum, (F16, F32, S32), {"accumulates": True}),
    ("vec_min", "vmin", 2, np.minimum, (F16, F32, S32), {"accumulates": True}),
    ("vec_and", "vand", 2, np.bitwise_and, (U16, S16), {"accumulates": True}),
    ("vec_or", "vor", 2, np.bitwise_or, (U16, S16), {"accumulates": True}),
    (None, "vdiv", 2, np.divide, (F16, F32), {"slow": True, "source": "C"}),
    ("vec_abs", "vabs", 1, np.abs, (F16, F32), {}),
    ("vec_not", "vnot", 1, np.invert, (U16, S16), {}),
    ("vec_relu", "vrelu", 1, numerics.relu, (F16,), {}),
    ("vec_exp", "vexp", 1, np.exp, (F16, F32), {"slow": True, "undefined": True}),
    ("vec_ln", "vln", 1, np.log, (F16, F32), {"slow": True, "undefined": True}),
    ("vec_rsqrt", "vrsqrt", 1, numerics.inverse_root, (F16, F32), {"slow": True, "undefined": True}),
    (None, "vsqrt", 1, np.sqrt, (F16, F32), {"slow": True, "undefined": True, "source": "C"}),
):
    _unary_or_binary(*_row[:5], **_row[5])


# --- reciprocal: a table on the device ------------------------------------------------------------
def _reciprocal_plan(
    call, mask, dst, src, repeat_times, dst_rep_stride, src_rep_stride, dst_blk_stride=1, src_blk_stride=1
):
    check_strides(call, dst_rep_stride=dst_rep_stride, src_rep_stride=src_rep_stride)
    check_strides(call, dst_blk_stride=dst_blk_stride, src_blk_stride=src_blk_stride)
    operands = [Operand("dst", call.tensor("dst", dst, "UB"), dst_blk_stride, dst_rep_stride),
                Operand("src", call.tensor("src", src, "UB"), src_blk_stride, src_rep_stride)]  # fmt: skip
    dtype = call.typed("dst, src", dst, src)[0]
    error = call.program.params.reciprocal_error
    random = np.random.RandomState(call.program.params.random_seed)

    def inexact(x, out=None):
        factor = 1 + error * random.uniform(-1, 1, x.shape).astype(np.float32)
        return np.multiply(numerics.reciprocal(x), factor, out=out)

    kernel, events = kernel_for(call, inexact if error else numerics.reciprocal, dtype, True)
    return elementwise(call, mask, operands, repeat_times, kernel, slow=True, undefined=events)


_RECIPROCAL = {"unit": "V", "dtypes": [(F16, F16), (F32, F32)], "limits": LIMITS + "; SimulatorParams.reciprocal_error",
               "cost": "slow_vector [U] x 1 cycle a repeat"}  # fmt: skip
_HEAD, _STRIDES = "mask dst src repeat_times ", "dst_rep_stride src_rep_stride"
register("vec_rec", _reciprocal_plan, _HEAD + _STRIDES, **_RECIPROCAL)
register("vrec", _reciprocal_plan, _HEAD + "dst_blk_stride src_blk_stride " + _STRIDES, **_RECIPROCAL)


# --- with a scalar --------------------------------------------------------------------------------
def _with_scalar(name, low_name, ufunc, dtypes, updates=False):
    """dst = ufunc(src, scalar); ``updates``: dst += src * scalar, computed in dst's dtype."""

    def plan(call, mask, dst, src, scalar, repeat_times, dst_rep_stride, src_rep_stride, dst_blk_stride=1,
             src_blk_stride=1, mask_mode="normal"):  # fmt: skip
        check_strides(call, dst_rep_stride=dst_rep_stride, src_rep_stride=src_rep_stride)
        check_strides(call, dst_blk_stride=dst_blk_stride, src_blk_stride=src_blk_stride)
        if mask_mode != "normal":
            call.fail(
                "unsupported", "mask_mode", "'normal' (counter mode has no effect on these chips)", repr(mask_mode)
            )
        operands = [Operand("dst", call.tensor("dst", dst, "UB"), dst_blk_stride, dst_rep_stride),
                    Operand("src", call.tensor("src", src, "UB"), src_blk_stride, src_rep_stride)]  # fmt: skip
        call.typed("dst, src", dst, src)
        value = call.scalar("scalar", scalar, src.dtype)
        if updates:
            kernel = _axpy(call, dst.dtype, value)
        elif dst.dtype == F16:
            wide = np.float32(value)
            kernel = numerics.rounded(call, lambda x: ufunc(x, wide))
        else:

            def kernel(out, data):
                ufunc(data, value, out=out)

        return elementwise(call, mask, operands, repeat_times, kernel, updates=updates)

    row = {"unit": "V", "dtypes": dtypes, "limits": LIMITS + "; scalar of src's dtype", "cost": "1 cycle a repeat"}
    head, tail = "mask dst src scalar repeat_times ", "dst_rep_stride src_rep_stride"
    register(name, plan, head + tail + ("" if updates else " mask_mode='normal'"), **row)
    register(
        low_name,
        plan,
        head + "dst_blk_stride src_blk_stride " + tail + ("" if updates else " mask_mode='normal'"),
        **row,
    )


def _axpy(call, dtype, value):
    """dst += src * scalar: the product is exact or fp32, and one rounding ends it [U]."""
    if dtype == F16:
        return _in_order(call, lambda out, old, data: old + data * np.float32(value))
    wide = np.float32(value)

    def kernel(out, old, data):
        np.add(old, data.astype(np.float32) * wide, out=out)

    return kernel


def _in_order(call, function):
    def kernel(out, *inputs):
        numerics.to_half(call, function(out, *[array.astype(np.float32) for array in inputs]), out)

    return kernel


_with_scalar("vec_adds", "vadds", np.add, [(F16, F16), (F32, F32)])
_with_scalar("vec_muls", "vmuls", np.multiply, [(F16, F16), (F32, F32)])
_with_scalar("vec_axpy", "vaxpy", None, [(F16, F16), (F32, F32), (F32, F16)], updates=True)


# --- multiply and add, low-level names only -------------------------------------------------------
def _multiply_add(name, function, dtypes):
    """dst = function(old dst, src0, src1)."""

    def plan(call, mask, dst, src0, src1, repeat_times, dst_blk_stride, src0_blk_stride, src1_blk_stride,
             dst_rep_stride, src0_rep_stride, src1_rep_stride):  # fmt: skip
        blocks, repeats = (
            (dst_blk_stride, src0_blk_stride, src1_blk_stride),
            (dst_rep_stride, src0_rep_stride, src1_rep_stride),
        )
        names = _names(2)
        check_strides(call, **dict(zip([key + "_blk_stride" for key in names], blocks)))
        check_strides(call, **dict(zip([key + "_rep_stride" for key in names], repeats)))
        operands = [Operand(key, call.tensor(key, address, "UB"), block, repeat)
                    for key, address, block, repeat in zip(names, (dst, src0, src1), blocks, repeats)]  # fmt: skip
        call.typed("dst, src0, src1", dst, src0, src1)
        if dst.dtype == F16:
            kernel = _in_order(call, lambda out, old, a, b: function(old, a, b))
        else:

            def kernel(out, old, a, b):
                np.copyto(out, function(old, a.astype(np.float32), b.astype(np.float32)))

        return elementwise(call, mask, operands, repeat_times, kernel, updates=True)

    parameters = ("mask dst src0 src1 repeat_times dst_blk_stride src0_blk_stride src1_blk_stride "
                  "dst_rep_stride src0_rep_stride src1_rep_stride")  # fmt: skip
    register(name, plan, parameters, "V", dtypes=dtypes, limits=LIMITS, cost="1 cycle a repeat", source="C")


_SAME = [(F16, F16, F16), (F32, F32, F32)]
_multiply_add("vmla", lambda old, a, b: old + a * b, _SAME + [(F32, F16, F16)])
_multiply_add("vmadd", lambda old, a, b: a * old + b, _SAME)
_multiply_add("vmaddrelu", lambda old, a, b: np.maximum(a * old + b, np.float32(0)), _SAME)


# --- fill -----------------------------------------------------------------------------------------
def _fill(call, mask, dst, scalar, repeat_times, dst_rep_stride, dst_blk_stride=1):
    check_strides(call, dst_rep_stride=dst_rep_stride, dst_blk_stride=dst_blk_stride)
    operand = Operand("dst", call.tensor("dst", dst, "UB"), dst_blk_stride, dst_rep_stride)
    call.typed("dst", dst)
    value = call.scalar("scalar", scalar, dst.dtype)
    return elementwise(call, mask, [operand], repeat_times, lambda out: out.fill(value))


_FILL = {"unit": "V", "dtypes": [(dtype,) for dtype in (F16, F32, S16, U16, S32, U32)],
         "limits": LIMITS + "; scalar of dst's dtype", "cost": "1 cycle a repeat"}  # fmt: skip
register("vec_dup", _fill, "mask dst scalar repeat_times dst_rep_stride", **_FILL)
register("vector_dup", _fill, "mask dst scalar repeat_times dst_blk_stride dst_rep_stride", **_FILL)

# --- conversion -----------------------------------------------------------------------------------
_NEAREST, _EXACT = ("", "none"), ("", "none")
_INTEGER_MODES = tuple(numerics.ROUNDERS)
CONVERSIONS = {  # (dst, src) -> round modes
    (F16, F32): _NEAREST + ("odd",),
    (F32, F16): _EXACT,
    (S32, F16): _INTEGER_MODES,
    (S32, F32): _INTEGER_MODES,
    (S8, F16): _NEAREST + _INTEGER_MODES,
    (U8, F16): _NEAREST + _INTEGER_MODES,
    (F32, S32): _EXACT,
    (F16, S32): _EXACT,
    (F16, U8): _EXACT,
    (F16, S8): _EXACT,
}


def _conversion(call, mask, round_mode, dst, src, repeat_times, dst_rep_stride, src_rep_stride, deqscale=None,
                ldst_high_half=False, dst_blk_stride=1, src_blk_stride=1):  # fmt: skip
    check_strides(call, dst_rep_stride=dst_rep_stride, src_rep_stride=src_rep_stride)
    check_strides(call, dst_blk_stride=dst_blk_stride, src_blk_stride=src_blk_stride)
    operands = [Operand("dst", call.tensor("dst", dst, "UB"), dst_blk_stride, dst_rep_stride),
                Operand("src", call.tensor("src", src, "UB"), src_blk_stride, src_rep_stride)]  # fmt: skip
    kernel = converter(call, round_mode, dst, src, deqscale)
    if ldst_high_half:
        call.fail("unsupported", "ldst_high_half", "False on the simulator", ldst_high_half)
    return elementwise(call, mask, operands, repeat_times, kernel)


def converter(call, round_mode, dst, src, deqscale=None):
    """The numpy kernel of a conversion, its dtypes and round mode checked."""
    call.typed("dst, src", dst, src)
    modes = CONVERSIONS[dst.dtype, src.dtype]
    if round_mode not in modes:
        call.fail("dtype", "round_mode", "one of {} for {} <- {}".format(modes, dst.dtype, src.dtype), repr(round_mode))
    if (deqscale is None) == ((dst.dtype, src.dtype) == (F16, S32)):
        call.fail("dtype", "deqscale", "given exactly for float16 <- int32", deqscale)
    if deqscale is not None:
        scale = np.float32(call.scalar("deqscale", deqscale, F16))
        return lambda out, data: numerics.to_half(call, data.astype(np.float32) * scale, out) and None
    if dst.dtype in INTEGERS:
        mode = "round" if round_mode in _NEAREST else round_mode
        return lambda out, data: numerics.to_integer(call, mode, data, out)
    if round_mode == "odd":
        return lambda out, data: numerics.odd_half(data, out)
    if dst.dtype == F16 and src.dtype == F32:
        return lambda out, data: numerics.to_half(call, data, out) and None
    return lambda out, data: np.copyto(out, data, casting="unsafe")


_CONVERT = {"unit": "V", "dtypes": list(CONVERSIONS), "cost": "1 cycle a repeat of the wider type", "source": "D",
            "limits": LIMITS + "; round_mode by pair; saturates"}  # fmt: skip
register("vec_conv", _conversion,
         "mask round_mode dst src repeat_times dst_rep_stride src_rep_stride deqscale=None ldst_high_half=False",
         **_CONVERT)  # fmt: skip
register("vconv", _conversion,
         "mask round_mode dst src repeat_times dst_blk_stride src_blk_stride dst_rep_stride src_rep_stride "
         "deqscale=None ldst_high_half=False", **_CONVERT)  # fmt: skip
