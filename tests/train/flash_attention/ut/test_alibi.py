"""core/alibi.py: the published slopes, and those of head counts that are no power of two."""

import numpy as np
import pytest

from flash_attention.core.alibi import alibi_slopes

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def test_powers_of_two_are_geometric():
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_allclose(alibi_slopes(1), [1 / 256])
    assert alibi_slopes(16).dtype == np.float32


def test_other_head_counts_interleave_the_next_power():
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    np.testing.assert_allclose(alibi_slopes(12)[:8], alibi_slopes(8))
    np.testing.assert_allclose(alibi_slopes(12)[8:], alibi_slopes(16)[[0, 2, 4, 6]])


@pytest.mark.parametrize("heads", range(1, 100))
def test_every_head_count_gives_distinct_slopes(heads):
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,) and len(set(slopes.tolist())) == heads
    assert slopes.min() >= 2.0**-8 and slopes.max() < 1


@pytest.mark.parametrize("heads", [0, -1, 2.0, "8"])
def test_bad_head_count(heads):
    with pytest.raises(ValueError) as caught:
        alibi_slopes(heads)
    assert str(caught.value) == "For 'alibi_slopes', 'heads' must be an int >= 1, but got {}.".format(heads)
