"""Adapter of support/cached.py and support/generated.py to JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from support import in_jax
from support.cached import Cached

from flash_attention_infer.jax import KVCache


class InJax(Cached):
    functions, KVCache = in_jax.FUNCTIONS, KVCache

    @staticmethod
    def array(x, dtype):
        return jnp.asarray(x, jnp.float32).astype(getattr(jnp, dtype))

    @staticmethod
    def numpy(x):
        return np.asarray(x.astype(jnp.float32))

    @staticmethod
    def poison(cache):
        def spoil(x):
            return jnp.full_like(x, 127 if x.dtype == jnp.int8 else jnp.nan)

        cache.layers = jax.tree.map(spoil, cache.layers)
