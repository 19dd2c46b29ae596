"""The same call gives the same bits; block_size and other units never change a result beyond rounding. JAX engines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jax_engines import JaxEngine

from conformance import Case, assert_matches, tagged
from flash_attention.jax import flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
NAMES = ("causal", "dropout", "bias", "block window", "segments")


@pytest.mark.parametrize("case", [case for case in tagged("ci") if case.name in NAMES], ids=str)
def test_same_bits(case):
    engine = JaxEngine("xla")
    first = engine.run(case)
    jax.clear_caches()  # compiled again
    second = engine.run(case)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_equal_windows_in_different_units():
    """Blocks of 16 or of 64 tokens, and a mask, that describe the same visibility."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 320, 2, 16)), jnp.float32) for _ in range(3))
    i, j = np.ogrid[:320, :320]
    mask = jnp.asarray((j // 64 >= i // 64 - 1) & (j // 64 <= i // 64))[None, None]
    by_blocks = flash_attention(q, k, v, prev_block_num=1, next_block_num=0, block_size=64)
    np.testing.assert_allclose(by_blocks, flash_attention(q, k, v, mask=mask), atol=2e-6)
    everything = flash_attention(q, k, v, prev_block_num=19, next_block_num=19, block_size=16)
    np.testing.assert_allclose(everything, flash_attention(q, k, v), atol=2e-6)


def test_the_dropout_seed_decides_alone():
    """Slices of a batch drop what the whole batch drops; another seed drops something else."""
    case = Case(lengths=(80, 80), dropout=0.4, gradients=False)
    got = JaxEngine("xla").run(case)
    assert_matches({case: got})
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((1, 80, 2, 16)), jnp.float32)
    runs = [flash_attention(q, q, q, dropout_rate=0.4, dropout_seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.allclose(runs[0], runs[2])
