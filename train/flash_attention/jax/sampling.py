"""Sampling in JAX: logits -> token, the same draws as MindSpore's for the same seed. The formulas: core/sampling.py."""

import jax.numpy as jnp

from flash_attention.core import sampling as shared
from flash_attention.core.sampling import Sampling


def sample(logits, seed=0, position=0, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Choose a token a row. Pure: works under ``jax.jit`` with the keywords static.

    Args:
        logits: (B, V), any float dtype.
        seed: uint32, a scalar for the batch or (B,), one a row; the latter makes a row independent of its batch.
        position: int, scalar or (B,): number of the token in its sequence. Every position draws anew.
        temperature, top_k, top_p, min_p: see :class:`flash_attention.core.sampling.Sampling`; temperature 0 is greedy.

    Returns:
        int32 (B,).

    Raises:
        ValueError, TypeError: bad argument.
    """
    shared.check_logits(jnp.shape(logits))
    return shared.sample(jnp, logits, seed, position, Sampling(temperature, top_k, top_p, min_p))


def filter_logits(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """float32 (B, V): the logits that ``sample`` draws from, -inf where a token is removed; temperature above 0."""
    shared.check_logits(jnp.shape(logits))
    return shared.filter_logits(jnp, logits, Sampling(temperature, top_k, top_p, min_p))
