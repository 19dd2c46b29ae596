"""The tables that steer a kernel, int32 arrays made from core's TilePlan: the kernels contain no window logic.

TilePlan -> tiles each query tile (or key tile) visits and which of them need a predicate -> one row a task, and a
contiguous share of the (head, task) sequence for each core. Heads of a group are neighbours in that sequence, so the
cores that share key/value heads work on them at about the same time.
"""

import math

import numpy as np

TASK_HEAD = 8
"""Integers before the per-tile part of a row: [first, stop) of the key tiles that any of the task's tiles visits."""
TILE_FIELDS = ("first", "stop", "low_stop", "high_first", "before_stop", "after_first", "strip_row", "strip_first")
"""The eight integers of one query tile, in units of key tiles t:

``[first, stop)`` is visited; ``t < low_stop`` needs the lower bound, ``t >= high_first`` the upper one;
``t < before_stop`` has only keys at or before every query's position, ``t >= after_first`` only keys at or after it;
``strip_row`` and ``strip_first`` place the compact mask: its tile ``t - strip_first`` of that row, where it has one.
"""
CORE_FIELDS = 8
"""Integers of a core's row: [start, stop) of its part of the (head, task) sequence; the rest fills a 32-byte block."""


def visible_keys(plan):
    """(first, last) visible key of each query, int64 (Sq,), by core's formulas."""
    positions = np.arange(plan.band.q_len, dtype=np.int64) + plan.offset
    return plan.band.first_key(positions), plan.band.last_key(positions)


def strip_shape(plan):
    """(rows, tiles a row) of the compact mask's tiles; (0, 0) sizes never occur.

    A query tile's own blocks lie in at most ``tiles`` key tiles, and where they lie repeats with the least common
    multiple of block and tile sizes.
    """
    period = _lcm(_lcm(plan.band.block_size, plan.q_tile), plan.kv_tile) // plan.q_tile
    first, stop = _own_blocks(plan, np.arange(plan.q_tiles))
    return min(plan.q_tiles, period), int((stop - first).max())


def _lcm(a, b):
    return a * b // math.gcd(a, b)


def _own_blocks(plan, tile):
    """[first, stop) key tiles that hold the queries' own blocks; not clipped to the keys that exist."""
    block = plan.band.block_size
    p_first = tile * plan.q_tile + plan.offset
    p_last = p_first + plan.q_tile - 1
    return p_first // block * block // plan.kv_tile, -(-((p_last // block + 1) * block) // plan.kv_tile)


def query_tiles(plan):
    """int32 (q_tiles, 8) with the columns of :data:`TILE_FIELDS`."""
    first_key, last_key = visible_keys(plan)
    tile = np.arange(plan.q_tiles, dtype=np.int64)
    first_query = tile * plan.q_tile
    last_query = np.minimum(first_query + plan.q_tile, plan.band.q_len) - 1
    strip_rows = strip_shape(plan)[0]
    columns = [
        plan.kv_range[:, 0],
        plan.kv_range[:, 1],
        -(-first_key[last_query] // plan.kv_tile),
        (last_key[first_query] + 1) // plan.kv_tile,
        (first_query + plan.offset + 1) // plan.kv_tile,
        -(-(last_query + plan.offset) // plan.kv_tile),
        tile % strip_rows,
        _own_blocks(plan, tile)[0],
    ]
    return np.stack(columns, axis=1).astype(np.int32)


def query_tasks(plan, resident):
    """The query-major task table: int32 (tasks, 8 + 8 * resident), see :data:`TASK_HEAD` and :data:`TILE_FIELDS`.

    Tiles beyond the last one, and tiles that see no key, visit nothing (first == stop).
    """
    tiles = query_tiles(plan)
    tasks = -(-len(tiles) // resident)
    padded = np.zeros((tasks * resident, len(TILE_FIELDS)), np.int32)
    padded[: len(tiles)] = tiles
    grouped = padded.reshape(tasks, resident, len(TILE_FIELDS))
    head = np.zeros((tasks, TASK_HEAD), np.int32)
    head[:, :2] = _union(grouped[:, :, 0], grouped[:, :, 1])
    return np.concatenate([head, grouped.reshape(tasks, -1)], axis=1)


def _union(first, stop):
    """[first, stop) that covers the non-empty ranges of each row, (0, 0) when there is none."""
    visits = stop > first
    low = np.where(visits, first, np.iinfo(np.int32).max).min(axis=1)
    high = np.where(visits, stop, 0).max(axis=1)
    return np.stack([np.where(high > 0, low, 0), high], axis=1)


def key_tasks(plan):
    """The key-major table for dK and dV: int32 (kv_tiles, 8), in units of query tiles i.

    Columns: ``[first, stop)`` visited; ``i >= low_first`` needs the lower bound, ``i < high_stop`` the upper one;
    four zeros.
    """
    first_key, last_key = visible_keys(plan)
    tile = np.arange(plan.q_tiles, dtype=np.int64)
    last_query = np.minimum((tile + 1) * plan.q_tile, plan.band.q_len) - 1
    start = np.arange(plan.kv_tiles, dtype=np.int64) * plan.kv_tile
    # Both bounds never decrease with the query, so the tiles that need one are an end of the range.
    low_first = np.searchsorted(first_key[last_query], start, side="right")
    high_stop = np.searchsorted(last_key[tile * plan.q_tile], start + plan.kv_tile - 1, side="left")
    table = np.zeros((plan.kv_tiles, 8), np.int32)
    table[:, :2] = plan.q_range
    table[:, 2], table[:, 3] = low_first, high_stop
    return table


def split(loads, heads, cores):
    """Shares of the (head, task) sequence: int32 (cores, 8), [start, stop) in the first two columns.

    Args:
        loads: work of each task of a head, e.g. visited tile pairs plus a constant for loading and storing.
        heads: how often the tasks repeat.
        cores: number of shares; they are contiguous, and as even as whole tasks allow: each boundary is the one
            nearest to the ideal one.
    """
    total = np.concatenate([[0], np.cumsum(np.tile(np.asarray(loads, np.float64), heads))])
    ideal = total[-1] * np.arange(cores + 1) / cores
    after = np.clip(np.searchsorted(total, ideal), 1, len(total) - 1)
    nearer_before = ideal - total[after - 1] <= total[after] - ideal
    bounds = np.where(nearer_before, after - 1, after)
    bounds[0], bounds[-1] = 0, len(total) - 1
    table = np.zeros((cores, CORE_FIELDS), np.int32)
    table[:, 0], table[:, 1] = bounds[:-1], bounds[1:]
    return table
