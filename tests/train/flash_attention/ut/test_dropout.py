"""core/dropout.py: the published vectors, and what a dropout mask must look like."""

import numpy as np
import pytest

from flash_attention.core import dropout

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize("seed, b, h, i, j, want", dropout.TEST_VECTORS)
def test_vectors(seed, b, h, i, j, want):
    """The definition once more, in Python integers."""
    low = 2**32 - 1

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
        x = ((x ^ (x >> 15)) * 0x846CA68B) & low
        return x ^ (x >> 16)

    row = mix(seed)
    for index in (b, h, i):
        row = mix(row ^ (((index + 1) * 0x9E3779B9) & low))
    x = ((row ^ mix(((j + 1) * 0x9E3779B9) & low)) * 0x7FEB352D) & low
    assert ((x ^ (x >> 15)) * 0x846CA68B) & low == want
    found = dropout.element_hash(np, dropout.row_key(np, seed, b, h, i), dropout.col_key(np, j))
    assert int(found) == want
    for rate in (0.1, 0.5, 0.9):
        assert bool(dropout.keep(np, seed, b, h, i, j, rate)) == (want >= round(rate * 2**32))


def mask(seed=1, batch=2, heads=3, size=256, rate=0.1):
    b, h, i, j = np.ogrid[:batch, :heads, :size, :size]
    return dropout.keep(np, seed, b, h, i, j, rate)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_that_is_kept(rate):
    kept = mask(rate=rate)
    sigma = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * sigma
    for axis in range(4):  # no row, column, head or example is special
        other = tuple(k for k in range(4) if k != axis)
        share = kept.mean(axis=other)
        assert np.abs(share - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) * len(share) / kept.size)


def test_neighbours_are_independent():
    kept = mask(rate=0.5).astype(np.float64) - 0.5
    limit = 5 * 0.25 / np.sqrt(kept.size)
    for axis in range(4):
        a = np.moveaxis(kept, axis, 0)
        assert abs((a[1:] * a[:-1]).mean()) < limit * 2
    assert abs((kept * (mask(seed=2, rate=0.5) - 0.5)).mean()) < limit


def test_a_part_of_the_mask_is_the_mask_of_the_part():
    whole = mask(rate=0.3)
    b, h, i, j = np.ogrid[1:2, 2:3, 100:180, 37:99]
    np.testing.assert_array_equal(dropout.keep(np, 1, b, h, i, j, 0.3), whole[1:2, 2:3, 100:180, 37:99])


def test_rate_zero_keeps_everything_and_almost_one_nearly_nothing():
    assert mask(rate=0.0).all()
    assert mask(rate=1 - 1e-7).mean() < 1e-4
