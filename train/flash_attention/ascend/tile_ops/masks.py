"""What changes single scores: bounds of visible keys, mask and bias tiles, ALiBi, dropout. Score tiles are transposed.

Visibility by position arrives as data from `core.ranges`: each query's first and last visible key, so causality,
windows, the ragged end and everything the core will ever add are one predicate a side, ``first <= j <= last``.
"""

from flash_attention.ascend.tile_ops.vector import (
    HALF_LANES,
    LANES,
    Lanes,
    Place,
    binary,
    convert,
    low_level,
    scale_and_add,
    unary,
    with_scalar,
)

UNIT = 2.0**33
"""Scores a step beyond a bound are lowered to ``-UNIT / 2`` or less; a power of two, so that products are exact."""

DISCARD = -65504.0
"""What a mask tile holds where a key is discarded; 0 where it is kept. Multiplied by ``-DISCARD`` and added."""

HIDDEN = DISCARD * -DISCARD
"""The largest score of a hidden key, about -4.3e9, for scores within +-2**29."""


def index_tile(api, dst, keys, unit=1.0):
    """``dst[key][lane] = unit * key``: fp32, ``keys * 16`` elements, made once a core by doubling."""
    for row in range(4):
        api.vec_dup(16, dst[row * 16], row * unit, 1, 8)
    done, total = 1, keys // 4
    while done < total:
        count = min(done, total - done)
        with_scalar(api.vec_adds, Lanes(dst, done * LANES), Lanes(dst), 4 * done * unit, count)
        done += count


def first_key_of_tile(api, dst, integers, key, unit=1.0):
    """64 lanes of ``unit * key`` in fp32 from a run-time int: no scalar access to the Unified Buffer is needed.

    Args:
        dst: fp32 tensor of 64 lanes. integers: int32 tensor of 64 lanes.
        key: int32 Scalar or expression.
    """
    api.vec_dup(LANES, integers, key, 1, 8)
    api.vec_conv(LANES, "none", dst, integers, 1, 8, 8)
    if unit != 1.0:
        api.vec_muls(LANES, dst, dst, unit, 1, 8, 8)


def hide_after(api, scores, last, index, scratch, groups, keys):
    """Lower the scores of keys after each query's last one: ``s = min(s, last - index)``, two cycles for 64 elements.

    Args:
        scores: fp32 score tile. scratch: fp32, ``keys * 16`` elements.
        last: Lanes of a statistic, ``(last key - tile's first key + 1/2) * UNIT``.
        index: tensor of :func:`index_tile` in units of UNIT.
    """
    for group, tile in _tiles(scores, groups, keys):
        lane = last._replace(offset=last.offset + group * LANES, step=0)
        binary(api.vec_sub, Lanes(scratch), lane, Lanes(index), keys // 4)
        binary(api.vec_min, tile, tile, Lanes(scratch), keys // 4)


def hide_before(api, scores, first, index, scratch, groups, keys):
    """The other side, ``s = min(s, index - first)``; ``first`` is (first key - tile's first key - 1/2) * UNIT."""
    for group, tile in _tiles(scores, groups, keys):
        lane = first._replace(offset=first.offset + group * LANES, step=0)
        binary(api.vec_sub, Lanes(scratch), Lanes(index), lane, keys // 4)
        binary(api.vec_min, tile, tile, Lanes(scratch), keys // 4)


def discard(api, scores, mask, groups, keys, mask_groups):
    """Lower the scores that ``mask`` (fp16, DISCARD or 0) discards: one cycle for 64 elements.

    ``mask`` (:class:`~flash_attention.ascend.tile_ops.layout.Place`) holds ``[mask_groups][keys][16]``; ``mask_groups``
    is ``groups``, or 1: one tile for all queries.
    """
    for dst, src, repeats in _pairs(scores, mask, groups, keys, mask_groups, step=4):
        with_scalar(api.vec_axpy, dst, src, -DISCARD, repeats)


def add_bias(api, scores, bias, groups, keys, bias_groups, factor=None):
    """``s = factor * s + bias`` (fp32), one cycle for 64 elements; ``bias_groups`` as in :func:`discard`.

    ``factor``: None, or Lanes of the scale that the scores still lack.
    """
    for dst, src, repeats in _pairs(scores, bias, groups, keys, bias_groups, step=8):
        scale_and_add(api, dst, src, repeats, factor)


def slope_tile(api, dst, index, slope, keys):
    """``dst[key][lane] = slope * key``: made once a head. ``slope``: Lanes of a block of 8 equal values, step 0."""
    low_level(api.vmul, Lanes(dst.tensor, dst.offset), Lanes(index), slope, keys // 4, blocks=(1, 1, 0))


def add_one_sided_alibi(api, scores, lanes, relative, tables, sign, groups, keys, factor=None):
    """``s = factor * s + slope * key``: the part of ALiBi that depends on the key, one cycle for 64 elements.

    For tiles whose keys are all at or before every query's position (``sign`` 0), where ALiBi is
    ``-slope * (position - key)``, or all at or after it (``sign`` 1), where it is the negative of that.

    Args:
        lanes: Lanes of a statistic, receives the part of the query, ``-slope * position`` or its negative.
        relative: Lanes of a statistic, position - tile's first key.
        tables: both signs' :func:`slope_tile`, one after the other, and eight times slope, eight times -slope: tensors.
    """
    slope_tiles, slope = tables
    add_bias(api, scores, Place(slope_tiles, sign * keys * 16), groups, keys, 1, factor)
    low_level(api.vmul, lanes, relative, Lanes(slope, 8 * (1 - sign), 0), groups, blocks=(1, 1, 0))


def add_lanes(api, scores, lanes, groups, keys):
    """``s = s + lanes``, one value a query: one cycle for 64 elements. ``lanes``: :class:`Lanes` of a statistic."""
    for group, tile in _tiles(scores, groups, keys):
        binary(api.vec_add, tile, tile, lanes._replace(offset=lanes.offset + group * LANES, step=0), keys // 4)


def add_alibi(api, scores, relative, index, slope, scratch, groups, keys, factor=None):
    """``s = factor * s - slope * |position - key|``, for tiles that the diagonal crosses: four cycles for 64 elements.

    On one side of the diagonal :func:`add_one_sided_alibi` does it in one.

    Args:
        relative: Lanes of a statistic, position - tile's first key.
        index: tensor of :func:`index_tile` in units of 1.
        slope: Lanes of a block of 8 values, minus the slope, step 0.
        scratch: fp32, ``keys * 16`` elements.
    """
    bias = Lanes(scratch)
    for group, tile in _tiles(scores, groups, keys):
        lane = relative._replace(offset=relative.offset + group * LANES, step=0)
        binary(api.vec_sub, bias, Lanes(index), lane, keys // 4)
        unary(api.vec_abs, bias, bias, keys // 4)
        low_level(api.vmul, bias, bias, slope, keys // 4, blocks=(1, 1, 0))
        scale_and_add(api, tile, bias, keys // 4, factor)


def drop(api, dst, src, keep, widened, elements):
    """``dst = src * keep``: probabilities that dropout keeps; two cycles for 128 elements.

    Args:
        dst, src: fp16 tensors. keep: uint8 tensor of ones and zeros. widened: fp16 tensor for them.
    """
    repeats = elements // HALF_LANES
    convert(api, Lanes(widened), Lanes(keep, 0, 4), repeats, mask=HALF_LANES)
    binary(api.vec_mul, Lanes(dst), Lanes(src), Lanes(widened), repeats, mask=HALF_LANES)


def _tiles(scores, groups, keys):
    return [(group, Lanes(scores, group * keys * 16)) for group in range(groups)]


def _pairs(scores, other, groups, keys, other_groups, step):
    """(score lanes, other lanes, repeats): one pair for all groups, or one a group when they share ``other``."""
    source = Lanes(other.tensor, other.offset, step)
    if other_groups == groups:
        return [(Lanes(scores), source, groups * keys // 4)]
    return [(tile, source, keys // 4) for _, tile in _tiles(scores, groups, keys)]
