"""TilePlan: which key tiles each query tile visits. Made once from :mod:`ranges`, read by every engine and by people.

O(tiles per side) integers, never tiles x tiles, and never anything per token.
"""

from dataclasses import dataclass

import numpy as np

from flash_attention.core.ranges import Band, key_tiles, query_tiles

_GRID = 20  # a drawing has at most this many rows and columns


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The static plan of one attention call at one tile size.

    Attributes:
        band: the visibility the plan was made from.
        offset: position of query 0.
        q_tile, kv_tile: rows and keys of a tile; the last tile of a side may be ragged.
        kv_range: int32 (q_tiles, 2), first and one-past-last key tile a query tile visits; equal = it sees no key.
        full_range: int32 (q_tiles, 2), the part of ``kv_range`` that needs no predicate; the rest is partial.
        q_range: int32 (kv_tiles, 2), the transposed view for dK and dV.
        q_full_range: int32 (kv_tiles, 2), the part of ``q_range`` that needs no predicate.
        core_of: int16 (q_tiles,), the core that computes a query tile; loads differ by at most the largest tile row.
    """

    band: Band
    offset: int
    q_tile: int
    kv_tile: int
    kv_range: np.ndarray
    full_range: np.ndarray
    q_range: np.ndarray
    q_full_range: np.ndarray
    core_of: np.ndarray

    @property
    def q_tiles(self):
        """Number of query tiles."""
        return len(self.kv_range)

    @property
    def kv_tiles(self):
        """Number of key tiles."""
        return len(self.q_range)

    @property
    def visited(self):
        """Number of (query tile, key tile) pairs that are computed."""
        return int((self.kv_range[:, 1] - self.kv_range[:, 0]).sum())

    @property
    def partial(self):
        """Number of visited pairs that need a predicate."""
        return self.visited - int((self.full_range[:, 1] - self.full_range[:, 0]).sum())

    @property
    def sparsity(self):
        """Share of the tile pairs that are skipped, 0..1."""
        return 1.0 - self.visited / float(self.q_tiles * self.kv_tiles)

    def keys(self, tile):
        """``(first, stop)`` token range of key tile ``tile``."""
        return tile * self.kv_tile, min((tile + 1) * self.kv_tile, self.band.kv_len)

    def queries(self, tile):
        """``(first, stop)`` token range of query tile ``tile``."""
        return tile * self.q_tile, min((tile + 1) * self.q_tile, self.band.q_len)

    def visits(self, tile):
        """``[(key_tile, is_full), ...]`` of query tile ``tile``, in order."""
        first, stop = self.kv_range[tile].tolist()
        full_first, full_stop = self.full_range[tile].tolist()
        return [(t, full_first <= t < full_stop) for t in range(first, stop)]

    def core_loads(self):
        """Visited pairs a core, int64 (cores,)."""
        return np.bincount(self.core_of, weights=self.kv_range[:, 1] - self.kv_range[:, 0]).astype(np.int64)

    def __str__(self):
        head = "{} x {} tiles of {} x {}: {} visited ({} partial), {:.1%} skipped".format(
            self.q_tiles, self.kv_tiles, self.q_tile, self.kv_tile, self.visited, self.partial, self.sparsity
        )
        rows = _sample(self.q_tiles)
        columns = _sample(self.kv_tiles)
        lines = ["".join(self._symbol(i, j) for j in columns) for i in rows]
        legend = "# full   + partial   . skipped"
        if len(rows) < self.q_tiles or len(columns) < self.kv_tiles:
            legend += "   (1 of {} rows and 1 of {} columns of tiles shown)".format(
                -(-self.q_tiles // _GRID), -(-self.kv_tiles // _GRID)
            )
        return "\n".join([head] + lines + [legend])

    def _symbol(self, i, j):
        first, stop = self.kv_range[i]
        full_first, full_stop = self.full_range[i]
        if not first <= j < stop:
            return "."
        return "#" if full_first <= j < full_stop else "+"


def _sample(tiles):
    return range(0, tiles, max(1, -(-tiles // _GRID)))


def _balance(loads, cores):
    """Longest row first to the least loaded core; ties go to the lower core."""
    core_of = np.zeros(len(loads), np.int16)
    totals = np.zeros(cores, np.int64)
    for tile in np.argsort(-loads, kind="stable"):
        core = int(np.argmin(totals))
        core_of[tile] = core
        totals[core] += loads[tile]
    return core_of


def _ranges(tiles, length, tile, ranges_of):
    """Stack ``ranges_of(first, last)`` over the tiles of one side: int32 (tiles, 4)."""
    first = np.arange(tiles, dtype=np.int64) * tile
    last = np.minimum(first + tile, length) - 1
    columns = [np.broadcast_to(np.asarray(column), first.shape) for column in ranges_of(first, last)]
    return np.stack(columns, axis=1).astype(np.int32)


def make_plan(band, offset, q_tile, kv_tile, cores=1):
    """The :class:`TilePlan` of ``band`` at tiles of ``q_tile`` x ``kv_tile``, split over ``cores``.

    Args:
        band: :class:`~flash_attention.core.ranges.Band`.
        offset: position of query 0, a Python int.
        q_tile, kv_tile: tile sizes in tokens, >= 1.
        cores: how many cores share the query tiles.
    """
    if min(q_tile, kv_tile, cores) < 1:
        raise ValueError("q_tile, kv_tile and cores must be >= 1, but got {}, {}, {}".format(q_tile, kv_tile, cores))
    by_query = _ranges(
        -(-band.q_len // q_tile), band.q_len, q_tile, lambda i, k: key_tiles(band, i + offset, k + offset, kv_tile)
    )
    by_key = _ranges(
        -(-band.kv_len // kv_tile), band.kv_len, kv_tile, lambda i, k: query_tiles(band, offset, i, k, q_tile)
    )
    return TilePlan(
        band=band,
        offset=offset,
        q_tile=q_tile,
        kv_tile=kv_tile,
        kv_range=by_query[:, :2],
        full_range=by_query[:, 2:],
        q_range=by_key[:, :2],
        q_full_range=by_key[:, 2:],
        core_of=_balance(by_query[:, 1] - by_query[:, 0], cores),
    )
