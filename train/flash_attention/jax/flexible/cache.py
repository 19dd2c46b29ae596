"""FlaxAttentionModule: what attention layers of Flax models share, without Flax: heads, masks and the KV cache.

The cache is a pytree that goes in and comes out, so it works in any module system and under jit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention.core.errors import invalid_value

LAYER = "FlaxAttentionModule"


class KVCache(NamedTuple):
    """Keys and values of the tokens so far: (B, max_length, K, D) each, and how many are filled, int32 scalar."""

    cached_key: jax.Array
    cached_value: jax.Array
    cache_index: jax.Array


class FlaxAttentionModule:
    """Base of attention layers.

    Args:
        num_attention_heads: N.
        head_dim: D.
        num_key_value_heads: K, default N; divides it.
    """

    def __init__(self, num_attention_heads, head_dim, num_key_value_heads=None):
        self.num_attention_heads, self.head_dim = num_attention_heads, head_dim
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        if num_attention_heads % self.num_key_value_heads:
            need = "a divisor of num_attention_heads = {}".format(num_attention_heads)
            raise invalid_value(LAYER, "num_key_value_heads", need, self.num_key_value_heads)

    def _merge_heads(self, hidden_states):
        """(B, T, N, D) -> (B, T, N * D)."""
        return hidden_states.reshape(hidden_states.shape[:2] + (-1,))

    def _split_heads(self, hidden_states, num_heads=None):
        """(B, T, heads * D) -> (B, T, heads, D); N heads unless given."""
        heads = self.num_attention_heads if num_heads is None else num_heads
        return hidden_states.reshape(hidden_states.shape[:2] + (heads, self.head_dim))

    @staticmethod
    def repeat_key_value(key, value, num_reps):
        """(B, S, K, D) -> (B, S, K * num_reps, D), each head repeated in place: 0, 0, 1, 1."""
        return jnp.repeat(key, num_reps, axis=2), jnp.repeat(value, num_reps, axis=2)

    def init_cache(self, batch_size, max_length, dtype=jnp.float32):
        """An empty :class:`KVCache`."""
        shape = (batch_size, max_length, self.num_key_value_heads, self.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))

    def _concatenate_to_cache(self, cache, query, key, value, attention_mask=None):
        """Append the new keys and values.

        Args:
            cache: :class:`KVCache`.
            query: (B, T, N, D), of the new tokens.
            key, value: (B, T, K, D), likewise.
            attention_mask: keep mask (B, max_length) or (1|B, 1, 1|T, max_length) over the cache, or None.

        Under jit the caller must see to it that the new tokens fit: there the index has no value yet to be checked.

        Returns:
            ``(key, value, attention_mask, cache)``: the whole cache's keys and values, and the mask
            (1|B, 1, T, max_length) ANDed with causality over the filled part; call attention with causal=False
            and this mask, or with ``uses_cache=True, key_value_sequence_length=cache.cache_index``, which skips the
            unfilled part.
        """
        new, length = query.shape[1], cache.cached_key.shape[1]
        if key.shape[1] != new or new > length:
            need = "of the query's {} tokens, at most the cache's {}".format(new, length)
            raise invalid_value(LAYER, "key", need, key.shape[1])
        start = cache.cache_index
        if not isinstance(start, jax.core.Tracer) and start + new > length:
            raise invalid_value(LAYER, "key", "of at most the {} tokens left in the cache".format(length - start), new)
        keys, values = (
            lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, axis=1)
            for old, x in ((cache.cached_key, key), (cache.cached_value, value))
        )
        position = start + jnp.arange(new)[:, None]
        keep = (jnp.arange(length)[None, :] <= position)[None, None]
        if attention_mask is not None:
            mask = jnp.asarray(attention_mask)
            keep = keep & ((mask[:, None, None] if mask.ndim == 2 else mask) > 0)
        return keys, values, keep, KVCache(keys, values, start + new)
