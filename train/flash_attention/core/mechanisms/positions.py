"""Position encodings: rotary, xPos and T5 bias as tables; ALiBi's dense bias. Both frameworks apply these tables.

Rotary: Su et al., "RoFormer", 2021. xPos: Sun et al., "A Length-Extrapolatable Transformer", 2022. T5: Raffel et al.,
2020. ALiBi: Press et al., 2022 (slopes in ``core.alibi``).
"""

import math

import numpy as np

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import check_bool, check_int, check_positive, is_int

_SMALLEST_ZETA = 0.4 / 1.4
# exp(range) of the largest xPos factor: what is left of a dtype's range then holds the tensor's own values.
_FACTOR_RANGE = {"float16": 10.0, "bfloat16": 80.0, "float32": 80.0, "float64": 600.0}


def frequencies(dim, base=10000.0):
    """``base ** (-2 m / dim)`` for the ``dim / 2`` pairs, float64."""
    return float(base) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def rotary_tables(xp, positions, dim, base=10000.0):
    """``(cos, sin)`` of shape (..., dim / 2) for positions (...), in the dtype of the positions."""
    angles = positions[..., None] * xp.asarray(frequencies(dim, base), dtype=positions.dtype)
    return xp.cos(angles), xp.sin(angles)


def xpos_tables(xp, positions, centre, dim, downscale=False, scale_base=512.0):
    """Rotary tables with xPos's factor ``zeta_m ** ((p - centre) / scale_base)`` in them; its inverse to downscale.

    Args:
        positions: (...,) float array; centre: broadcastable to it. Only differences survive in a product of an
            upscaled query and a downscaled key that share the centre.
    """
    zeta = (np.arange(0, dim, 2, dtype=np.float64) + 0.4 * dim) / (1.4 * dim)
    power = (positions - centre)[..., None] / scale_base
    factor = xp.exp((-power if downscale else power) * xp.asarray(np.log(zeta), dtype=positions.dtype))
    cos, sin = rotary_tables(xp, positions, dim)
    return cos * factor, sin * factor


def rotate(stack, x, cos, sin, interleaved=True):
    """Rotate the pairs of the last axis: ``(a cos - b sin, b cos + a sin)``.

    Args:
        stack: the framework's ``stack(arrays, axis)``.
        x: (..., d); cos, sin: broadcastable to (..., d / 2).
        interleaved: pairs (2m, 2m + 1); False: (m, m + d / 2).
    """
    half = x.shape[-1] // 2
    if interleaved:
        pairs = x.reshape(x.shape[:-1] + (half, 2))
        a, b = pairs[..., 0], pairs[..., 1]
    else:
        pairs = x.reshape(x.shape[:-1] + (2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
    axis = -1 if interleaved else -2
    return stack((a * cos - b * sin, b * cos + a * sin), axis).reshape(x.shape)


def xpos_centre(positions, length, segment=None):
    """The position whose factor is 1: the middle of ``length`` positions, or of each position's own segment."""
    if segment is None:
        return -(-length // 2)
    return positions // segment * segment + segment // 2


def xpos_reach(dtype, scale_base=512.0):
    """Most positions that may share one centre: beyond, the factors overflow ``dtype``."""
    return int(2 * scale_base * _FACTOR_RANGE[dtype] / -math.log(_SMALLEST_ZETA))


def check_rotary(layer, dim, base, interleaved, dims):
    """Raise unless the last ``dims`` features (None = ``dim``) can be paired; returns how many are rotated."""
    check_positive(layer, "base", base)
    check_bool(layer, "interleaved", interleaved)
    dims = dim if dims is None else check_int(layer, "dims", dims, 2, dim)
    if dims % 2:
        raise invalid_value(layer, "dims", "even (features are rotated in pairs)", dims)
    return dims


def check_xpos(layer, dim, length, dtype, downscale, scale_base, segment):
    """Raise unless xPos is defined and finite here. ``length`` is ``n + offset``, None where it is not known."""
    check_bool(layer, "downscale", downscale)
    check_positive(layer, "scale_base", scale_base)
    if dim % 2:
        raise invalid_value(layer, "x", "of an even last axis (features are rotated in pairs)", dim)
    reach = xpos_reach(dtype, scale_base)
    if segment is not None:
        check_int(layer, "segment", segment, 1, reach)
    elif length is not None and length > reach:
        need = "at most {} in {} with one centre (the factors overflow)".format(reach, dtype)
        remedy = "Give segment=, the range within which queries and keys meet."
        raise invalid_value(layer, "n + offset", need, length, remedy)


def check_t5(layer, num_buckets, max_distance, bidirectional):
    """Raise unless the buckets of T5's bias can be formed."""
    check_bool(layer, "bidirectional", bidirectional)
    check_int(layer, "num_buckets", num_buckets, 4 if bidirectional else 2)
    if num_buckets % (4 if bidirectional else 2):
        need = "a multiple of {}".format(4 if bidirectional else 2)
        raise invalid_value(layer, "num_buckets", need, num_buckets)
    check_int(layer, "max_distance", max_distance, num_buckets // (4 if bidirectional else 2) + 1)


def t5_buckets(relative, bidirectional=True, num_buckets=32, max_distance=128):
    """Bucket of every ``relative = key position - query position``; int32, computed in float64 on the host."""
    relative = np.asarray(relative, np.int64)
    buckets, first = num_buckets, np.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        first = np.where(relative > 0, buckets, 0)
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    exact = buckets // 2
    growth = np.log(np.maximum(distance, exact) / float(exact)) / math.log(max_distance / float(exact))
    # The nudge keeps distances that lie on a bucket's edge (powers of two) from falling below it by rounding.
    coarse = np.minimum(exact + np.floor(growth * (buckets - exact) + 1e-9).astype(np.int64), buckets - 1)
    return (first + np.where(distance < exact, distance, coarse)).astype(np.int32)


def t5_bucket_table(q_len, kv_len, step=0, bidirectional=True, num_buckets=32, max_distance=128):
    """int32 (q_len, kv_len): the bucket of every pair; query ``i`` stands at ``i + step``."""
    relative = np.arange(kv_len)[None, :] - (np.arange(q_len)[:, None] + step)
    return t5_buckets(relative, bidirectional, num_buckets, max_distance)


def check_lengths(layer, q_len, kv_len, step=0):
    """Raise unless the sizes of a bias are plain ints."""
    check_int(layer, "q_len", q_len, 1)
    check_int(layer, "kv_len", kv_len, 1)
    if not is_int(step) or step < 0:
        raise invalid_type(layer, "step", "an int >= 0", repr(step))


def alibi_bias_array(heads, q_len, kv_len, alibi_num_heads=None):
    """float32 (heads, q_len, kv_len): ``-slope * |i + kv_len - q_len - j|``; queries are the last of the positions."""
    slopes = alibi_slopes(heads, alibi_num_heads)
    distance = np.abs(np.arange(q_len)[:, None] + kv_len - q_len - np.arange(kv_len)[None, :])
    return -slopes[:, None, None] * distance.astype(np.float32)
