"""Sampling: the formulas in numpy against brute force and statistics, and JAX against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.sampling import LOGITS, OPTIONS, Sampled

from flash_attention.core import sampling
from flash_attention.core.sampling import Sampling
from flash_attention.jax.sampling import filter_logits, sample

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


# --- the formulas ---------------------------------------------------------------------------------
def kept_by_hand(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Tokens that stay, one filter after the other, in float64 and plain loops."""
    probs = np.exp(np.asarray(logits, np.float64) / temperature)
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[:top_k]
    if top_p is not None:
        total, nucleus = sum(probs[token] for token in order), []
        while not nucleus or sum(probs[token] for token in nucleus) / total < top_p:
            nucleus.append(order[len(nucleus)])
            if len(nucleus) == len(order):
                break
        order = nucleus
    return sorted(token for token in order if probs[token] >= (min_p or 0.0) * probs[order[0]])


@pytest.mark.parametrize("options", [one for one in OPTIONS if one.get("temperature") != 0], ids=str)
def test_filters(options):
    filtered = sampling.filter_logits(np, LOGITS, Sampling(**options))
    for row, logits in zip(filtered, LOGITS):
        assert np.flatnonzero(np.isfinite(row)).tolist() == kept_by_hand(logits, **options)
        kept = np.isfinite(row)
        np.testing.assert_allclose(row[kept], logits[kept] / options.get("temperature", 1.0), rtol=1e-6)


def test_equal_logits_at_a_limit_stay():
    logits = np.array([[1.0, 3.0, 1.0, 0.0, 1.0]])
    for options in ({"top_k": 2}, {"top_p": 0.75}):
        assert np.isfinite(sampling.filter_logits(np, logits, Sampling(**options)))[0].tolist() == [
            True,
            True,
            True,
            False,
            True,
        ]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"top_k": 4, "temperature": 2.0}], ids=str
)
def test_distribution(options):
    """Chi-squared over 8 tokens and 20,000 draws, of rows, positions and seeds; 7 degrees of freedom, p = 1e-4."""
    count, logits = 20000, np.array([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2], np.float32)
    want = sampling.probabilities(logits[None], Sampling(**options))[0] * count
    many, number = np.repeat(logits[None], count, 0), np.arange(count, dtype=np.uint32)
    for seed, position in (
        (np.uint32(1), np.uint32(2)),
        (np.full(count, 5, np.uint32), number),
        (number, np.uint32(0)),
    ):
        drawn = np.bincount(sampling.sample(np, many, seed, position, Sampling(**options)), minlength=8)
        assert not drawn[want == 0].any()
        assert ((drawn - want)[want > 0] ** 2 / want[want > 0]).sum() < 30


def test_noise_is_finite():
    noise = sampling.gumbel(np, np.uint32(3), np.uint32(0), 200, 2000)
    assert np.isfinite(noise).all() and abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - np.pi**2 / 6) < 0.02


# --- JAX ------------------------------------------------------------------------------------------
class TestJax(Sampled):
    @staticmethod
    def sample(logits, seed, position, **options):
        return np.asarray(sample(jnp.asarray(logits), seed, position, **options))


def test_under_jit():
    drawn = jax.jit(lambda x, seed, n: sample(x, seed, n, top_p=0.9, temperature=0.8))
    want = sampling.sample(np, LOGITS, np.uint32(2), np.uint32(5), Sampling(0.8, top_p=0.9))
    np.testing.assert_array_equal(drawn(LOGITS, 2, 5), want)
    filtered = filter_logits(LOGITS, top_k=3)
    assert (jnp.isfinite(filtered).sum(-1) == 3).all()
