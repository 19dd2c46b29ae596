"""Candidates 'prefill' and 'decode' over a cache in JAX, run by a worker of ``flash_attention.tools.bench``."""

import jax
import jax.numpy as jnp

from flash_attention_infer.jax import KVCache
from flash_attention_infer.tools.cached import steps


def build(case, direction, candidate, arrays):
    """``(call, results)``; a cache has no backward, and draws its own inputs."""
    del direction, arrays
    return steps(KVCache, case, candidate, jnp.asarray, jax.block_until_ready)
