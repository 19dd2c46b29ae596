"""Properties of sampling, once for both frameworks: the draws are those of core/sampling.py in numpy."""

import numpy as np
import pytest

from flash_attention.core import sampling
from flash_attention.core.sampling import Sampling

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 100, "top_p": 1.0, "min_p": 0.0},  # removes nothing
]
LOGITS = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32) * 3


class Sampled:
    """A framework gives `sample(logits, seed, position, **options) -> numpy int32`."""

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_equals_numpy(self, options):
        want = sampling.sample(np, LOGITS, np.uint32(7), np.uint32(3), Sampling(**options))
        got = self.sample(LOGITS, 7, 3, **options)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)

    def test_seeds_a_row_do_not_depend_on_the_batch(self):
        seeds, positions = np.arange(40, dtype=np.uint32) % 3 + 2**31, np.arange(40, dtype=np.uint32)
        whole = self.sample(LOGITS, seeds, positions)
        np.testing.assert_array_equal(self.sample(LOGITS[5:9], seeds[5:9], positions[5:9]), whole[5:9])
        same = np.repeat(LOGITS[:1], 40, 0)
        alike = self.sample(same, np.full(40, 9, np.uint32), 0)
        assert (alike == alike[0]).all(), "equal requests draw equal tokens"
        for other in (
            self.sample(same, 9, 0),
            self.sample(same, 9, np.arange(40)),
            self.sample(same, seeds + positions, 0),
        ):
            assert len(set(other.tolist())) > 3, "rows, positions and seeds draw anew"

    def test_half_precision(self):
        half = LOGITS.astype(np.float16)
        want = sampling.sample(np, half, np.uint32(1), np.uint32(0), Sampling(top_p=0.9))
        np.testing.assert_array_equal(self.sample(half, 1, 0, top_p=0.9), want)

    @pytest.mark.parametrize("options, match", [
        ({"temperature": -1.0}, r"'temperature' must be a float in \[0.0, inf\), but got -1.0"),
        ({"temperature": float("nan")}, "'temperature' must be a float"),
        ({"top_k": 0}, "'top_k' must be an int >= 1, but got 0"),
        ({"top_k": 2.0}, "'top_k' must be an int >= 1"),
        ({"top_p": 0.0}, r"'top_p' must be a float in \(0.0, 1.0\], but got 0.0"),
        ({"top_p": "a"}, "'top_p' must be a float"),
        ({"min_p": 1.5}, r"'min_p' must be a float in \[0.0, 1.0\], but got 1.5"),
    ])  # fmt: skip
    def test_refuses(self, options, match):
        with pytest.raises((ValueError, TypeError), match=match):
            self.sample(LOGITS, 0, 0, **options)
        with pytest.raises(ValueError, match=r"'logits' must be of shape \(B, V\)"):
            self.sample(LOGITS[0], 0, 0)
