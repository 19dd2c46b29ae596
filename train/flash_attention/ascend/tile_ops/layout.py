"""Moves of tiles between global memory, L1, the Unified Buffer (UB) and L0C, and 16 x 16 transposes.

A head lies in global memory as FRACTAL_NZ ``[columns/16][rows][16]``; a tile of it as ``[columns/16][tile rows][16]``.
All row counts are multiples of 16 unless said otherwise. Gaps are from the end of one burst to the next one's start.
"""

from typing import NamedTuple

from flash_attention.ascend.tile_ops.vector import BLOCK
from flash_attention.ascend.tile_ops.vector import Place as Place  # what every move below takes

GAP_LIMIT = 65535
"""Largest gap of ``data_move``, in blocks of 32 bytes."""


class Rows(NamedTuple):
    """The rows of a zN matrix that a move takes: ``rows`` of ``total``, for ``columns`` columns (multiples of 16).

    ``tile`` is the number of rows of the tile in local memory; a tile may be longer than what is moved.
    """

    columns: int
    total: int
    tile: int
    rows: int


def load_rows(api, dst, src, size):
    """Rows of a head -> fp16 tile in L1 or UB (pipe MTE2), ``rows * columns * 2`` bytes.

    Args:
        dst: :class:`Place` of the tile. src: Place of the head's first wanted row in global memory.
        size: :class:`Rows`.
    """
    _strided(api, size, dst, size.tile, src, size.total)


def store_rows(api, dst, src, size):
    """fp16 tile in UB -> rows of a head in global memory (pipe MTE3); arguments as in :func:`load_rows`."""
    _strided(api, size, dst, size.total, src, size.tile)


def _strided(api, size, dst, dst_rows, src, src_rows):
    """One burst a column group; a block is one row of 16 fp16."""
    bursts, rows = size.columns // 16, size.rows
    if size.total - rows <= GAP_LIMIT:
        api.data_move(dst.at(), src.at(), 0, bursts, rows, src_rows - rows, dst_rows - rows)
        return
    with api.for_range(0, bursts, name="column_group") as group:  # gaps beyond the limit: one burst a call
        api.data_move(dst.at(group * (dst_rows * 16)), src.at(group * (src_rows * 16)), 0, 1, rows, 0, 0)


def clear_rows(api, dst, zeros, size):
    """Zero the rows from ``size.rows`` on of a tile in L1 (pipe MTE3).

    Args:
        dst: :class:`Place` of the tile. zeros: fp16 tensor in UB, at least ``16 * (tile - rows)`` zeros.
    """
    for group in range(size.columns // 16):
        start = (group * size.tile + size.rows) * 16
        api.data_move(dst.at(start), zeros, 0, 1, size.tile - size.rows, 0, 0)


def copy(api, dst, src, elements):
    """Contiguous copy of whole blocks, between any two memories that ``data_move`` connects; both :class:`Place`."""
    api.data_move(dst.at(), src.at(), 0, 1, elements // BLOCK[src.tensor.dtype], 0, 0)


def load_operand(api, dst, src, head, heads, q_tile, key_tile, piece, groups):
    """One piece of a packed operand (mask, bias, keep) -> UB (pipe MTE2).

    Args:
        dst: tensor in UB. src: tensor in global memory with the axes of ``signature.tile_axes``.
        head: batch and head, counted together; heads: N. q_tile, key_tile: which tile.
        piece: which of its pieces of ``groups`` groups of queries.

    Returns:
        the groups it has: 1 where all queries share a tile.
    """
    batches, own_heads, q_tiles, kv_tiles, all_groups, keys, lanes = src.shape
    batch = head // heads if batches > 1 else 0
    head = head % heads if own_heads > 1 else 0
    tile = ((batch * own_heads + head) * q_tiles + (q_tile if q_tiles > 1 else 0)) * kv_tiles + key_tile
    loaded = min(all_groups, groups)
    offset = tile * (all_groups * keys * lanes) + (piece * loaded * keys * lanes if all_groups > 1 else 0)
    copy(api, Place(dst), Place(src, offset), loaded * keys * lanes)
    return loaded


def drain(api, dst, src, bursts, fractals, dst_gap=0):
    """L0C -> UB in the layout of L0C (pipe V): one cycle for 256 bytes read.

    Args:
        dst: :class:`Place` in UB, fp32 or (rounding to nearest) fp16. src: Place in L0C, fp32.
        bursts, fractals: number of bursts, and 16 x 16 fractals of each.
        dst_gap: blocks of 32 bytes between bursts in UB.
    """
    api.tensor_mov(dst.at(), src.at(), "m", bursts, fractals, dst_gap, 0)


def spread_lanes(api, dst, src, groups):
    """One fp32 value a query, ``[groups][16]`` -> a statistic ``[groups][64]`` of four copies in UB.

    ``dst`` and ``src`` are :class:`Place`; ``src`` in UB (pipe V) or in global memory (pipe MTE2).
    """
    for number in range(4):
        api.data_move(dst.at(number * 16), src.at(), 0, groups, 2, 0, 6)


def gather_lanes(api, dst, src, groups):
    """A statistic ``[groups][64]`` -> one fp32 value a query ``[groups][16]``, both :class:`Place` in UB."""
    api.data_move(dst.at(), src.at(), 0, groups, 2, 6, 0)


def transposed_rows(api, dst, src, groups, columns):
    """fp16 tile ``[q1][columns][16 queries]`` -> zN ``[columns/16][q1 * 16 rows][16]``, both in UB.

    One ``vec_trans`` a group of queries, which transposes ``columns / 16`` fractals.

    Args:
        dst, src: :class:`Place`; different tensors. groups: groups of 16 queries.
    """
    for group in range(groups):
        api.vec_trans(dst.at(group * 256), src.at(group * columns * 16), columns // 16, groups, 1)
