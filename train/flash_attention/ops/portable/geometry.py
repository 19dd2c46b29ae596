"""Host side of the portable engine: the plan as rows of pieces, and the constants that partial tiles need.

AttentionSpec -> TilePlan -> **Row / Piece** (this file) -> scores.py -> forward.py, backward.py. numpy only.

A *row* is one query tile with all keys it visits, side by side: one softmax, no rescaling. A *piece* is a run of those
keys that is treated alike: free of masks, or partial (a constant is added to its scores), or near the diagonal.
"""

from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

from flash_attention.core.plan import make_plan
from flash_attention.core.ranges import Band, visible

HIDDEN = -1e30
"""Added to hidden scores: exp() of it is exactly 0, and several of them never reach -inf (which would breed NaN)."""

DEAD = -5e29
"""A row whose largest score is below this sees no key."""

KV_TILE = 128
"""Granularity of the visited keys; also where a piece may begin. ``AttentionSpec.tile`` overrides it."""


@dataclass(frozen=True)
class Piece:
    """Keys ``start .. start + length`` of one row.

    Attributes:
        hidden: float32 (rows, length), 0 or HIDDEN, or None when every query sees every key.
        side: +1 all keys at or before every query, -1 all at or after, 0 both (matters to ALiBi only).
        own: int32 (rows, length) index into the flattened compact mask (one past its end = "visible"), or None.
    """

    start: int
    length: int
    side: int
    hidden: Optional[np.ndarray] = None
    own: Optional[np.ndarray] = None


@dataclass(frozen=True)
class Row:
    """Queries ``first .. first + rows`` and the keys ``key .. key + keys`` that they visit (keys == 0: none).

    ``alive`` is float32 (rows, 1), 1 where the band leaves the query at least one key; None when it always does.
    """

    first: int
    rows: int
    key: int
    keys: int
    pieces: Tuple[Piece, ...]
    alive: Optional[np.ndarray]


FULL_SHAPE_LIMIT = 1 << 22
"""Elements of a constant that may be stored at full shape (batch and heads too) to save broadcasting."""

_FEW_ROWS = 24  # a graph of this many rows still compiles in seconds
_MANY_ROWS = 96  # beyond, compiling takes minutes: better to compute more hidden scores


def query_tile(spec):
    """Queries of a row: as asked for, else 256 for short sequences, 512 for long ones, more where a window allows it.

    Compile time grows with the number of rows, computed waste with their height. A row's score tile has at most
    512 x max(Sq, Sk) elements a head, and is at least three times (with very many rows: twice) as wide as high.
    """
    if spec.tile is not None:
        return spec.tile[0]
    tile = 256 if spec.q_len <= 4096 else 512
    while spec.q_len > _FEW_ROWS * tile:
        plan = make_plan(static_band(spec), spec.offset or 0, 2 * tile, KV_TILE)
        width = int((plan.kv_range[:, 1] - plan.kv_range[:, 0]).max()) * KV_TILE
        aspect = 2 if spec.q_len > _MANY_ROWS * tile else 3
        if width < aspect * 2 * tile or 2 * tile * width > 512 * max(spec.q_len, spec.kv_len):
            break
        tile *= 2
    return tile


def static_band(spec):
    """The band used for planning: everything is visited when the offset is only known at run time."""
    if spec.dynamic_offset:
        return Band(spec.q_len, spec.kv_len, block_size=spec.block_size)
    return spec.band


def make_rows(spec):
    """The :class:`Row` list of ``spec``."""
    band = static_band(spec)
    offset = 0 if spec.dynamic_offset else spec.offset
    plan = make_plan(band, offset, query_tile(spec), KV_TILE if spec.tile is None else spec.tile[1])
    return [_make_row(spec, band, offset, plan, tile) for tile in range(plan.q_tiles)]


def _make_row(spec, band, offset, plan, tile):
    first, stop = plan.queries(tile)
    p = np.arange(first, stop) + offset
    visited = [plan.keys(t) + (full,) for t, full in plan.visits(tile)]
    if not visited:
        return Row(first, stop - first, 0, 0, (), np.zeros((stop - first, 1), np.float32))
    begin, end = visited[0][0], visited[-1][1]
    pieces = tuple(_make_piece(spec, band, p, start, length) for start, length in _runs(spec, p, visited))
    alive = (band.first_key(p) <= band.last_key(p)).astype(np.float32)[:, None]
    return Row(first, stop - first, begin, end - begin, pieces, None if alive.all() else alive)


def _runs(spec, p, visited):
    """Cut the visited keys where "partial" or the relation to the diagonal changes: ``[(start, length), ...]``."""
    kinds = [(full, _side(spec, p, start, stop), _own(spec, p, start, stop)) for start, stop, full in visited]
    width = visited[-1][1] - visited[0][0]
    partial = sum(stop - start for start, stop, full in visited if not full)
    if _worth_one_piece(spec, len(p), width, partial):
        return [(visited[0][0], width)]
    cuts = [n for n in range(len(visited)) if n == 0 or kinds[n] != kinds[n - 1]] + [len(visited)]
    return [(visited[a][0], visited[b - 1][1] - visited[a][0]) for a, b in zip(cuts, cuts[1:])]


def _worth_one_piece(spec, rows, width, partial):
    """True where adding one constant to the whole row beats joining a free and a partial piece.

    The constant must be affordable at full shape, and rows of a window share it; with two-sided ALiBi or a compact
    mask the pieces differ in more than the constant.
    """
    alike = spec.alibi_shape is None or spec.band.right == 0
    affordable = spec.batch > 0 and spec.batch * spec.heads * rows * width <= FULL_SHAPE_LIMIT
    return alike and affordable and not spec.compact_mask and 4 * partial >= width


def _side(spec, p, start, stop):
    """Where the keys lie; always 0 when nobody asks."""
    if spec.alibi_shape is None or spec.dynamic_offset:
        return 0
    if stop - 1 <= p[0]:
        return 1
    return -1 if start >= p[-1] else 0


def _own(spec, p, start, stop):
    """True when a key may share its block with a query, so that the compact mask applies."""
    if not spec.compact_mask:
        return False
    size = spec.block_size
    return start // size <= p[-1] // size and (stop - 1) // size >= p[0] // size


def _make_piece(spec, band, p, start, length):
    j = np.arange(start, start + length)
    seen = np.broadcast_to(visible(band, p[:, None], j[None, :]), (len(p), length))
    hidden = None if seen.all() else np.where(seen, 0.0, HIDDEN).astype(np.float32)
    own = None
    if _own(spec, p, start, start + length):
        size = spec.block_size
        index = (p % size)[:, None] * size + (j % size)[None, :]
        own = np.where((p // size)[:, None] == (j // size)[None, :], index, size * size).astype(np.int32)
    return Piece(start, length, _side(spec, p, start, start + length), hidden, own)
