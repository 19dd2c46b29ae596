"""Vector instructions over many repeats: operands as (tensor, offset, step), calls split at 255 repeats."""

from typing import NamedTuple

REPEAT_LIMIT = 255
BLOCK = {"uint8": 32, "float16": 16, "float32": 8, "int32": 8}
"""Elements of a 32-byte block."""
LANES = 64
"""Lanes of a repeat of 32-bit elements; also of a conversion between 16 and 32 bit."""
HALF_LANES = 128
"""Lanes of a repeat of fp16."""


class Place(NamedTuple):
    """Where a tile starts: a tensor in any memory, and an element of it (an int or a TIK expression)."""

    tensor: object
    offset: object = 0

    def at(self, element=0):
        """The tensor from ``element`` of the tile on."""
        return self.tensor[self.offset + element]


class Lanes(NamedTuple):
    """An operand in the Unified Buffer.

    Attributes:
        tensor: one-dimensional TIK tensor.
        offset: element where repeat 0 starts; int or TIK expression, a multiple of the dtype's block.
        step: blocks of 32 bytes from one repeat to the next; 8 = contiguous (4 for the fp16 side of a conversion),
            0 = the same lanes every time.
    """

    tensor: object
    offset: object = 0
    step: int = 8

    def at(self, repeat):
        """The tensor from the first element of ``repeat`` on."""
        return self.tensor[self.offset + repeat * self.step * BLOCK[self.tensor.dtype]]

    @property
    def place(self):
        """The :class:`Place` where the lanes start, for moves."""
        return Place(self.tensor, self.offset)


def _calls(repeats):
    """(first repeat, number of repeats) of each instruction."""
    return [(first, min(REPEAT_LIMIT, repeats - first)) for first in range(0, repeats, REPEAT_LIMIT)]


def binary(op, dst, src0, src1, repeats, mask=LANES):
    """``dst = op(src0, src1)`` with a ``vec_*`` instruction of two sources; one cycle a repeat."""
    for first, count in _calls(repeats):
        op(mask, dst.at(first), src0.at(first), src1.at(first), count, dst.step, src0.step, src1.step)


def unary(op, dst, src, repeats, mask=LANES):
    """``dst = op(src)`` with a ``vec_*`` instruction of one source."""
    for first, count in _calls(repeats):
        op(mask, dst.at(first), src.at(first), count, dst.step, src.step)


def with_scalar(op, dst, src, value, repeats, mask=LANES):
    """``vec_adds``, ``vec_muls``, ``vec_axpy``: one source and a scalar of the source's dtype."""
    for first, count in _calls(repeats):
        op(mask, dst.at(first), src.at(first), value, count, dst.step, src.step)


def fill(api, dst, value, repeats, mask=LANES):
    """``dst = value`` in every lane."""
    for first, count in _calls(repeats):
        api.vec_dup(mask, dst.at(first), value, count, dst.step)


def convert(api, dst, src, repeats, mode="none", mask=LANES):
    """``dst = src`` in another dtype; 64 lanes a repeat, 128 between 8 and 16 bit."""
    for first, count in _calls(repeats):
        api.vec_conv(mask, mode, dst.at(first), src.at(first), count, dst.step, src.step)


def low_level(op, dst, src0, src1, repeats, blocks=(1, 1, 1), mask=LANES):
    """An instruction with block strides (``vmax``, ``vmadd``, ``vmla``, ``vdiv``): ``blocks`` of dst, src0, src1."""
    for first, count in _calls(repeats):
        op(mask, dst.at(first), src0.at(first), src1.at(first), count, *blocks, dst.step, src0.step, src1.step)


def sum_rows(api, dst, src, rows):
    """Sums of rows of 16 fp32 lanes, one value a row: one cycle a row. ``dst`` and ``src``: :class:`Place`."""
    for first, count in _calls(rows):
        api.vcadd(16, dst.at(first), src.at(16 * first), count, 1, 1, 2)


def scale_and_add(api, tile, addend, repeats, factor=None):
    """``tile = factor * tile + addend`` in fp32, one cycle a repeat; ``factor``: None, or Lanes of the factor."""
    if factor is None:
        binary(api.vec_add, tile, tile, addend, repeats)
    else:
        low_level(api.vmadd, tile, factor, addend, repeats)
