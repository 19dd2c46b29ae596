"""From products to P and dS on transposed tiles ``[q1][key][16 queries]``, all in fp16: the backward's vector work.

The cube has subtracted ``lse / scale`` from the scores and delta from dP already (extra columns of its operands), so
the rounding to fp16 is that of a difference, done while L0C is drained.
"""

from flash_attention.ascend.tile_ops.vector import (
    HALF_LANES,
    LANES,
    Lanes,
    binary,
    convert,
    low_level,
    unary,
    with_scalar,
)


def scale(api, dst, src, factor, elements):
    """``dst = factor * src``: one cycle for 128 elements."""
    with_scalar(api.vec_muls, Lanes(dst), Lanes(src), factor, elements // HALF_LANES, mask=HALF_LANES)


def discard(api, exponents, mask, groups, keys, mask_groups):
    """``x = min(x, mask)``: one cycle for 128 elements.

    ``mask`` (fp16 tensor) is -65504 where a key is discarded, elsewhere above every exponent of a visible key.
    ``mask`` holds ``[mask_groups][keys][16]``; ``mask_groups`` is ``groups``, or 1: one tile for all queries.
    """
    count = 1 if mask_groups == groups else groups
    repeats = groups // count * keys * 16 // HALF_LANES
    for number in range(count):
        tile = Lanes(exponents, number * keys * 16)
        binary(api.vec_min, tile, tile, Lanes(mask), repeats, mask=HALF_LANES)


def exponential(api, probs, elements):
    """``P = exp(x)`` in place: one cycle for 128 elements, or its own rate."""
    unary(api.vec_exp, Lanes(probs), Lanes(probs), elements // HALF_LANES, mask=HALF_LANES)


def score_gradients(api, d_scores, probs, elements):
    """``dS = P * (dP - delta)``, in place of the difference: one cycle for 128 elements."""
    binary(api.vec_mul, Lanes(d_scores), Lanes(d_scores), Lanes(probs), elements // HALF_LANES, mask=HALF_LANES)


def drop(api, kept, dropped, probs, keep, elements):
    """P -> ``kept = P * keep`` and ``dropped = P - kept``: three cycles for 128 elements.

    Args:
        kept, dropped, probs: fp16 tensors. keep: uint8 tensor of ones and zeros.
    """
    repeats = elements // HALF_LANES
    convert(api, Lanes(dropped), Lanes(keep, 0, 4), repeats, mask=HALF_LANES)
    binary(api.vec_mul, Lanes(kept), Lanes(probs), Lanes(dropped), repeats, mask=HALF_LANES)
    binary(api.vec_sub, Lanes(dropped), Lanes(probs), Lanes(kept), repeats, mask=HALF_LANES)


def add_dropped(api, d_scores, dropped, minus_delta, groups, keys):
    """``dS += dropped * (-delta)``: what dropout leaves of a dropped key's gradient; one cycle for 128 elements.

    An element is either kept or dropped, so each is rounded once, and the sum over a row loses nothing.

    Args:
        d_scores, dropped: fp16 tensors. minus_delta: fp16 tensor ``[groups][128 lanes]``, lane l for query l % 16.
    """
    for group in range(groups):
        tile, other = (Lanes(tensor, group * keys * 16) for tensor in (d_scores, dropped))
        lane = Lanes(minus_delta, group * HALF_LANES, 0)
        low_level(api.vmla, tile, other, lane, keys * 16 // HALF_LANES, mask=HALF_LANES)


def signs(api, dst, relative, index, work, units, groups, keys):
    """``dst = sign(position - key)``, for tiles that the diagonal crosses: eight cycles for 128 elements.

    Args:
        dst: fp16 tensor. relative: Lanes of a statistic, position - tile's first key.
        index: tensor of ``masks.index_tile``. work: fp32 tensor of ``groups * keys * 16`` elements.
        units: fp16 tensor of 1 in 128 lanes, then -1 in 128 lanes.
    """
    for group in range(groups):
        lane = relative._replace(offset=relative.offset + group * LANES, step=0)
        binary(api.vec_sub, Lanes(work, group * keys * 16), lane, Lanes(index), keys // 4)
    convert(api, Lanes(dst, 0, 4), Lanes(work), groups * keys // 4)
    repeats = groups * keys * 16 // HALF_LANES
    binary(api.vec_min, Lanes(dst), Lanes(dst), Lanes(units, 0, 0), repeats, mask=HALF_LANES)
    binary(api.vec_max, Lanes(dst), Lanes(dst), Lanes(units, HALF_LANES, 0), repeats, mask=HALF_LANES)
