"""The online softmax on transposed score tiles (Dao, "FlashAttention-2", 2023, algorithm 1), statistics in fp32.

Per key tile: ``m' = max(m, max_j s_j)``, ``P = exp(scale (s - m'))``, ``O' = exp(scale (m - m')) O + P V``.
The difference is formed in fp32 and only then rounded to fp16, which the cube needs anyway. The row sums are one more
column group of V, all ones, so they are accumulated by the cube in fp32 from the very P that multiplies V.
The largest P of a row is exactly 1, so a row that one key dominates is as exact as V.
"""

from flash_attention.ascend.tile_ops.vector import (
    HALF_LANES,
    LANES,
    Lanes,
    binary,
    convert,
    low_level,
    scale_and_add,
    unary,
    with_scalar,
)

LOWEST = -(2.0**30)
"""The running maximum before any key: far below every real score, far above every hidden one (``masks.HIDDEN``)."""


def max_over_keys(api, dst, scores, scratch, groups, keys):
    """``dst`` = maximum over the keys of each query, in all four copies.

    A tree of elementwise maxima over neighbouring repeats, then four rows of a repeat to one: about
    ``groups * (keys / 4 + 3)`` cycles where ``keys / 16`` is a power of two.

    Args:
        dst: statistic of ``groups`` groups. scores: fp32 score tile ``[groups][keys][16]``.
        scratch: fp32, ``groups * max(8 * keys, 128)`` elements.
    """
    repeats = keys // 4  # of each group
    source = scores
    while repeats % 2 == 0:
        repeats //= 2
        binary(api.vec_max, Lanes(scratch), Lanes(source, 0, 16), Lanes(source, LANES, 16), groups * repeats)
        source = scratch
    four_rows = scratch
    if repeats > 1:  # an odd number of repeats a group: one after the other, all groups at once
        step = 8 * repeats
        first = Lanes(scratch, 0, step)
        for number in range(1, repeats):
            binary(api.vec_max, Lanes(dst), first, Lanes(scratch, number * LANES, step), groups)
            first = Lanes(dst)
        four_rows = dst
    _max_of_four_rows(api, dst, four_rows, Lanes(scratch, groups * LANES), groups)


def _max_of_four_rows(api, dst, source, two_rows, groups):
    """Rows of 16 lanes, 2 blocks each: (0, 1) with (2, 3), then both results into all four rows."""
    binary(api.vec_max, two_rows, Lanes(source), Lanes(source, LANES // 2), groups, mask=LANES // 2)
    for block in (0, 8):  # each half of a row: one block, read four times and written to every other block
        low = two_rows._replace(offset=two_rows.offset + block)
        high = two_rows._replace(offset=two_rows.offset + block + 16)
        low_level(api.vmax, Lanes(dst, block), low, high, groups, blocks=(2, 0, 0), mask=LANES // 2)


def update_maximum(api, running, tile_max, rescale, addend, groups, scale=1.0):
    """Take a tile's maxima into the running ones; 6 cycles a group and the exponential.

    Args:
        running: :class:`Lanes` of a statistic, m -> m' = max(m, tile_max).
        tile_max: Lanes; maxima of the tile's scores.
        rescale: Lanes, receives ``exp(scale * (m - m'))``, the factor on O and l.
        addend: Lanes, receives ``-scale * m'``.
        scale: factor that the scores have not been multiplied with yet.
    """
    binary(api.vec_max, addend, running, tile_max, groups)
    binary(api.vec_sub, rescale, running, addend, groups)
    binary(api.vec_max, running, running, tile_max, groups)
    if scale != 1.0:
        with_scalar(api.vec_muls, rescale, rescale, scale, groups)
    unary(api.vec_exp, rescale, rescale, groups)
    with_scalar(api.vec_muls, addend, addend, -scale, groups)


def probabilities(api, dst, scores, addend, groups, keys, factor=None):
    """``dst = exp(factor * scores + addend)`` in fp16; ``scores`` is overwritten.

    Subtraction and conversion take one cycle for 64 elements each, the exponential one for 128 (or its own rate).

    Args:
        dst: fp16 tensor ``[groups][keys][16]``. scores: fp32 tensor of that shape.
        addend: Lanes of a statistic.
        factor: None, or Lanes that hold the scale.
    """
    repeats = keys // 4
    for group in range(groups):
        tile = Lanes(scores, group * keys * 16)
        lane = addend._replace(offset=addend.offset + group * LANES, step=0)
        scale_and_add(api, tile, lane, repeats, factor)
    convert(api, Lanes(dst, 0, 4), Lanes(scores), groups * repeats)
    unary(api.vec_exp, Lanes(dst), Lanes(dst), groups * keys // 8, mask=HALF_LANES)


def accumulate(api, output, products, rescale, groups, rows):
    """``output = rescale * output + products``: one cycle for 64 elements.

    Args:
        output: Lanes of fp32 ``[groups][rows][16 queries]`` (O transposed, with the row sums as more rows).
        products: fp32 tensor of that shape, this tile's P V.
        rescale: Lanes of a statistic.
    """
    for group in range(groups):
        start = group * rows * 16
        tile = output._replace(offset=output.offset + start)
        lane = rescale._replace(offset=rescale.offset + group * LANES, step=0)
        scale_and_add(api, tile, Lanes(products, start), rows // 4, lane)
