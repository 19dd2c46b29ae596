"""Arithmetic as the units do it: float16 rounded after each operation, conversions that saturate, sums as trees."""

import numpy as np

HALF_MAX = np.float16(65504)


def to_half(call, source, out):
    """Round float32 to nearest-even float16; what exceeds the range saturates to +-65504 and is counted."""
    np.copyto(out, source, casting="unsafe")
    bits = np.bitwise_and(out.view(np.uint16), 0x7FFF)
    if bits.size and np.maximum.reduce(bits, axis=None) >= 0x7C00:
        infinite = bits == 0x7C00
        count = int(infinite.sum())
        if count:
            out[infinite] = np.copysign(HALF_MAX, out[infinite])
            call.program.saturations += count
        return count
    return 0


def relu(x, out=None):
    """max(x, 0)."""
    return np.maximum(x, x.dtype.type(0), out=out)


def reciprocal(x, out=None):
    """1 / x."""
    return np.divide(x.dtype.type(1), x, out=out)


def inverse_root(x, out=None):
    """1 / sqrt(x)."""
    return np.divide(x.dtype.type(1), np.sqrt(x), out=out)


SELECTING = (np.maximum, np.minimum, np.abs, relu)  # their result is one of their inputs: nothing to round


def rounded(call, ufunc, undefined=False):
    """``ufunc`` over float16 arrays: computed in float32, rounded once to float16, exact for + - * / and roots.

    float32 has more than twice the digits of float16 plus two, so rounding twice equals rounding once.
    ``undefined``: a result out of range is an error, not a saturation.
    """

    if ufunc in SELECTING:
        return lambda out, *inputs: np.copyto(out, ufunc(*[x.astype(np.float32) for x in inputs]), casting="unsafe")

    def kernel(out, *inputs):
        result = ufunc(*[array.astype(np.float32) for array in inputs])
        if to_half(call, result, out) and undefined and np.isfinite(result).all():  # else numpy reports 1 / 0
            call.fail("undefined", "src", "in the range where the result is defined", "overflow", hazard=True)

    return kernel


def direct(ufunc):
    """``ufunc`` writing to its output, for 32-bit and integer types."""

    def kernel(out, *inputs):
        ufunc(*inputs, out=out)

    return kernel


def tree(call, function, values):
    """Reduce the last axis (a power of two) by adjacent pairs, rounding at every level to the dtype of ``values``."""
    half = values.dtype == np.float16
    while values.shape[-1] > 1:
        left, right = values[..., ::2], values[..., 1::2]
        if half:
            result = np.empty(left.shape, np.float16)
            rounded(call, function)(result, left, right)
        else:
            result = function(left, right)
        values = result
    return values[..., 0]


ROUNDERS = {
    "round": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
    "ceiling": np.ceil,
    "to-zero": np.trunc,
    "away-zero": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
}


def to_integer(call, mode, source, out):
    """Float to integer by the named rounding; out of range saturates and is counted."""
    values = ROUNDERS[mode](source.astype(np.float64))
    info = np.iinfo(out.dtype)
    outside = (values < info.min) | (values > info.max)
    if outside.any():
        call.program.saturations += int(outside.sum())
        values = np.clip(values, info.min, info.max)
    np.copyto(out, values, casting="unsafe")


def odd_half(source, out):
    """Round float32 to float16 to odd: truncated, with the last bit set when inexact."""
    bits = source.astype(np.float16)
    with np.errstate(over="ignore"):
        wide = bits.astype(np.float32)
    too_far = np.abs(wide) > np.abs(source)
    truncated = bits.view(np.uint16) - too_far.astype(np.uint16)
    inexact = truncated.view(np.float16).astype(np.float32) != source
    out.view(np.uint16)[...] = truncated | inexact.astype(np.uint16)
