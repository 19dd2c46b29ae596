"""The end of a query tile: O / l, the log-sum-exp, and what becomes of rows that saw no key."""

from flash_attention.ascend.tile_ops import layout
from flash_attention.ascend.tile_ops.vector import LANES, Lanes, binary, convert, fill, low_level, unary, with_scalar

_MINUS_INFINITY = -(2.0**23)
"""The bits of fp32's -inf, 0xFF800000, are those of this number as an int32."""


def row_sums(api, dst, output, groups, rows):
    """Statistic of the sums l: the last 16 rows of O^T are all equal to them.

    Args:
        dst: :class:`Place` of a statistic in UB. output: Place of fp32 ``[groups][rows][16]``.
    """
    source = output._replace(offset=output.offset + (rows - 16) * 16)
    api.data_move(dst.at(), source.at(), 0, groups, LANES // 8, rows * 2 - LANES // 8, 0)


_SMALLEST = 2.0**-24
"""The smallest positive fp16: a sum of P is 0 or at least this."""


def alive_and_divisor(api, alive, divisor, sums, ones, groups):
    """``alive`` = 1 where a query saw a key, else 0; ``divisor`` = l there, else 1.

    All arguments are :class:`Lanes` of statistics; ``ones`` is overwritten.
    """
    fill(api, ones, 1.0, groups)
    with_scalar(api.vec_muls, alive, sums, 1.0 / _SMALLEST, groups)
    binary(api.vec_min, alive, alive, ones, groups)
    binary(api.vec_sub, divisor, ones, alive, groups)
    binary(api.vec_add, divisor, divisor, sums, groups)


def log_sum_exp(api, dst, running, alive, divisor, groups, scale=1.0):
    """``dst = scale * m + ln(l)``, -inf where no key was seen.

    -inf is put together from bits: on a saturating chip no fp32 instruction returns it.

    Args:
        dst, running, divisor: :class:`Lanes`; ``running`` is overwritten.
        alive: Lanes, overwritten.
        scale: factor that the scores have not been multiplied with.
    """
    unary(api.vec_ln, dst, divisor, groups)
    with_scalar(api.vec_muls, running, running, scale, groups)
    binary(api.vec_add, dst, dst, running, groups)
    binary(api.vec_mul, dst, dst, alive, groups)
    with_scalar(api.vec_adds, dst, dst, 0.0, groups)  # -0 -> +0, whose bits are 0
    with_scalar(api.vec_adds, alive, alive, -1.0, groups)
    with_scalar(api.vec_muls, alive, alive, -_MINUS_INFINITY, groups)
    bits = running._replace(tensor=running.tensor.reinterpret_cast_to("int32"))
    convert(api, bits, alive, groups, mode="round")
    total = dst._replace(tensor=dst.tensor.reinterpret_cast_to("int32"))
    binary(api.vec_add, total, total, bits, groups)


def normalized_rows(api, dst, output, divisor, half, groups, rows):
    """``O / l`` as fp16 rows: zN ``[D/16][groups * 16][16]`` at ``dst``.

    Args:
        dst, half: :class:`Place` of fp16 tensors of ``groups * 16 * (rows - 16)`` elements in UB; half is scratch.
        output: :class:`Lanes` of fp32 ``[groups][rows][16]``, overwritten. divisor: Lanes of a statistic.
    """
    columns = rows - 16
    for group in range(groups):
        tile = output._replace(offset=output.offset + group * rows * 16)
        lane = divisor._replace(offset=divisor.offset + group * LANES, step=0)
        low_level(api.vdiv, tile, tile, lane, columns // 4)
        convert(api, Lanes(half.tensor, half.offset + group * columns * 16, 4), tile, columns // 4)
    layout.transposed_rows(api, dst, half, groups, columns)


def store_statistic(api, dst, statistic, compact, groups):
    """A statistic -> one fp32 value a query in global memory. All are :class:`Place`; ``compact`` is scratch in UB."""
    layout.gather_lanes(api, compact, statistic, groups)
    layout.copy(api, dst, compact, groups * 16)
