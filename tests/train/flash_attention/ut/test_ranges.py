"""core/ranges.py against a brute-force mask: predicate, key bounds and tile ranges, in both directions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attention.core.ranges import Band, key_tiles, maximum, minimum, query_tiles, visible

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

limits = st.none() | st.integers(0, 40)
bands = st.builds(
    Band,
    q_len=st.integers(1, 60),
    kv_len=st.integers(1, 60),
    left=limits,
    right=limits,
    prev=st.none() | st.integers(0, 4),
    next=st.none() | st.integers(0, 4),
    block_size=st.integers(1, 20),
)
offsets = st.integers(-70, 70)
tiles = st.integers(1, 25)


def brute_force(band, offset):
    """The definition, one query and one key at a time: boolean (q_len, kv_len)."""
    mask = np.zeros((band.q_len, band.kv_len), bool)
    for i in range(band.q_len):
        for j in range(band.kv_len):
            p = i + offset
            blocks = j // band.block_size - p // band.block_size
            mask[i, j] = (
                (band.left is None or p - j <= band.left)
                and (band.right is None or j - p <= band.right)
                and (band.prev is None or blocks >= -band.prev)
                and (band.next is None or blocks <= band.next)
            )
    return mask


def tile_grid(mask, q_tile, kv_tile):
    """(some key visible, all visible) of every tile of a boolean mask."""
    rows = range(0, mask.shape[0], q_tile)
    columns = range(0, mask.shape[1], kv_tile)
    parts = [[mask[i : i + q_tile, j : j + kv_tile] for j in columns] for i in rows]
    some = np.array([[part.any() for part in row] for row in parts])
    return some, np.array([[part.all() for part in row] for row in parts])


def check_range(found, some, every):
    """One row of tiles: everything visible is visited, everything called full is full, nothing before or after it."""
    first, stop, full_first, full_stop = found
    assert 0 <= first <= full_first <= full_stop <= stop <= len(some)
    inside = np.zeros(len(some), bool)
    inside[first:stop] = True
    assert not some[~inside].any(), "a visible tile is not visited"
    assert every[full_first:full_stop].all(), "a tile without predicate has a hidden key"


@given(st.integers(-(2**20), 2**20), st.integers(-(2**20), 2**20))
def test_minimum_maximum(a, b):
    assert (minimum(a, b), maximum(a, b)) == (min(a, b), max(a, b))


@given(bands, offsets)
@settings(max_examples=200, deadline=None)
def test_predicate_and_bounds(band, offset):
    p = np.arange(band.q_len) + offset
    want = brute_force(band, offset)
    np.testing.assert_array_equal(visible(band, p[:, None], np.arange(band.kv_len)[None]), want)
    for i, row in enumerate(want):
        keys = np.flatnonzero(row)
        first, last = band.first_key(i + offset), band.last_key(i + offset)
        if len(keys):
            assert (first, last) == (keys[0], keys[-1])
        else:
            assert first > last or first >= band.kv_len or last < 0


@given(bands, st.integers(-70, 130))
@settings(max_examples=200, deadline=None)
def test_transposed_bounds(band, j):
    """first_query .. last_query are the positions that see key j, whatever the queries are."""
    positions = np.arange(j - 200, j + 200)
    endless = Band(1, 2**20, band.left, band.right, band.prev, band.next, band.block_size)
    seen = positions[(positions >= 0) & visible_from(endless, positions, j)] if j >= 0 else np.array([])
    first, last = band.first_query(j), band.last_query(j)
    if len(seen):
        assert first is None or max(first, 0) == seen[0]
        assert last is None or last == seen[-1]


def visible_from(band, positions, j):
    return np.array([brute_force(Band(1, j + 1, *list(vars(band).values())[2:]), int(p))[0, j] for p in positions])


@given(bands, offsets, tiles, tiles)
@settings(max_examples=300, deadline=None)
def test_key_tiles(band, offset, q_tile, kv_tile):
    some, every = tile_grid(brute_force(band, offset), q_tile, kv_tile)
    for tile in range(len(some)):
        first = tile * q_tile + offset
        last = min((tile + 1) * q_tile, band.q_len) - 1 + offset
        check_range(key_tiles(band, first, last, kv_tile), some[tile], every[tile])


@given(bands, offsets, tiles, tiles)
@settings(max_examples=300, deadline=None)
def test_query_tiles(band, offset, q_tile, kv_tile):
    some, every = tile_grid(brute_force(band, offset), q_tile, kv_tile)
    for tile in range(some.shape[1]):
        first, last = tile * kv_tile, min((tile + 1) * kv_tile, band.kv_len) - 1
        check_range(query_tiles(band, offset, first, last, q_tile), some[:, tile], every[:, tile])


@pytest.mark.parametrize(
    "band, first, last, tile, want",
    [
        (Band(8, 8), 0, 3, 4, (0, 2, 0, 2)),
        (Band(8, 8, right=0), 0, 3, 4, (0, 1, 0, 0)),
        (Band(8, 8, right=0), 4, 7, 4, (0, 2, 0, 1)),
        (Band(8, 10, right=0), 9, 9, 4, (0, 3, 0, 3)),  # the ragged last tile is full
        (Band(8, 8, right=0), -4, -1, 4, (0, 0, 0, 0)),  # before the first key: nothing
        (Band(8, 8, left=1), 20, 20, 4, (2, 2, 2, 2)),  # after the last key: nothing
        (Band(512, 512, prev=1, next=0), 256, 383, 128, (1, 3, 1, 3)),
        (Band(512, 512, prev=0, next=0, block_size=64), 128, 255, 128, (1, 2, 1, 1)),
    ],
)
def test_key_tiles_literally(band, first, last, tile, want):
    assert key_tiles(band, first, last, tile) == want


@given(bands, offsets, tiles, tiles)
@settings(max_examples=100, deadline=None)
def test_numpy_integers_give_what_python_integers_give(band, offset, q_tile, kv_tile):
    starts = np.arange(0, band.q_len, q_tile)
    stops = np.minimum(starts + q_tile, band.q_len)
    together = np.stack(np.broadcast_arrays(*key_tiles(band, starts + offset, stops - 1 + offset, kv_tile)), axis=-1)
    one_by_one = [key_tiles(band, int(a) + offset, int(b) - 1 + offset, kv_tile) for a, b in zip(starts, stops)]
    np.testing.assert_array_equal(together, one_by_one)
