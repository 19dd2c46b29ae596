"""Multi-query and grouped-query attention in JAX: the core call shares key/value heads; here are mapping and layer."""

import jax
import jax.numpy as jnp

from flash_attention.core.mechanisms import multi_query as shared
from flash_attention.jax.functional import flash_attention
from flash_attention.jax.mechanisms.layers import Layer, dense, dense_init


def grouped_query_attention(
    query, key, value, mask=None, *, is_causal=False, scale=None, kv_head_mapping="interleave", implementation=None
):
    """Attention with fewer key/value heads than query heads; keys and values are never repeated.

    Args:
        query: (B, Nq, H, D); key, value: (B, Nk, Hkv, D), Hkv divides H.
        mask: keep where True or > 0; broadcastable to (B, H, Nq, Nk).
        is_causal: key j visible to query i when ``j <= i + Nk - Nq``.
        scale: default ``1 / sqrt(D)``.
        kv_head_mapping: 'interleave': query head h uses key/value head ``h // (H / Hkv)`` (Llama, torch); 'tile':
            ``h % Hkv`` (x-transformers).
        implementation: as in :func:`flash_attention.jax.flash_attention`.

    Returns:
        (B, Nq, H, D).
    """
    shared.check_mapping("grouped_query_attention", kv_head_mapping)
    tiled = kv_head_mapping == "tile" and key.shape[2] > 1
    if tiled:
        query = shared.group_heads(query, key.shape[2], 2)
        if mask is not None and jnp.ndim(mask) > 2 and mask.shape[-3] > 1:
            mask = shared.group_heads(mask, key.shape[2], jnp.ndim(mask) - 3)
    out = flash_attention(
        query, key, value, mask=mask, is_causal=is_causal, scale=scale, implementation=implementation
    )  # fmt: skip
    return shared.tile_heads(out, key.shape[2], 2) if tiled else out


class MultiQueryAttention(Layer):
    """Attention layer whose query heads share ``kv_heads`` key/value heads (Shazeer, 2019; Ainslie et al., 2023).

    Args:
        dim: width E of the input and of the output.
        heads: query heads H.
        dim_head: size D of a head; None = ``dim / heads``.
        kv_heads: key/value heads, a divisor of ``heads``; 1 = multi-query, ``heads`` = ordinary attention.
        causal: bottom-right: the queries are the last of the keys' positions.
        kv_head_mapping: 'interleave' or 'tile', see :func:`grouped_query_attention`.
        bias: whether the projections have biases.
        dtype: of the computation and the output; parameters are float32.

    Raises:
        ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self,
        dim,
        heads,
        dim_head=None,
        kv_heads=1,
        causal=False,
        *,
        kv_head_mapping="interleave",
        bias=False,
        dtype=jnp.float32,
    ):
        self.dim_head = shared.check_layer(
            "MultiQueryAttention", dim, heads, dim_head, kv_heads, causal, kv_head_mapping
        )
        self.dim, self.heads, self.kv_heads, self.causal = dim, heads, kv_heads, causal
        self.kv_head_mapping, self.bias, self.dtype = kv_head_mapping, bias, dtype

    def init(self, key):
        """New parameters: 'to_q', 'to_k', 'to_v', 'to_out', each with 'weight' (out, in) and, if asked for, 'bias'."""
        inner, shared_width = self.heads * self.dim_head, self.kv_heads * self.dim_head
        sizes = {"to_q": (self.dim, inner), "to_k": (self.dim, shared_width), "to_v": (self.dim, shared_width)}
        sizes["to_out"] = (inner, self.dim)
        keys = jax.random.split(key, len(sizes))
        return {name: dense_init(k, *size, bias=self.bias) for k, (name, size) in zip(keys, sizes.items())}

    def __call__(self, x, context=None, mask=None, cache=None, return_cache=False, params=None):
        """Attend.

        Args:
            x: (B, Nq, dim).
            context: (B, N, dim), source of keys and values; None = x.
            mask: keep where True or > 0; broadcastable to (B, heads, Nq, Nk).
            cache: keys and values of earlier positions, a pair of (B, N, kv_heads, D), put in front.
            return_cache: also return all keys and values, the ``cache`` of the next call.
            params: used instead of the layer's own.

        Returns:
            (B, Nq, dim), or with return_cache a pair (output, cache).
        """
        params = self.params if params is None else params
        source = x if context is None else context
        query = self._heads(dense(params["to_q"], x, self.dtype), self.heads)
        key, value = (self._heads(dense(params[name], source, self.dtype), self.kv_heads) for name in ("to_k", "to_v"))
        if cache is not None:
            key, value = (jnp.concatenate([old.astype(self.dtype), new], 1) for old, new in zip(cache, (key, value)))
        out = grouped_query_attention(
            query, key, value, mask, is_causal=self.causal, kv_head_mapping=self.kv_head_mapping
        )  # fmt: skip
        out = dense(params["to_out"], out.reshape(x.shape[:2] + (-1,)), self.dtype)
        return (out, (key, value)) if return_cache else out

    def _heads(self, x, heads):
        return x.reshape(x.shape[:2] + (heads, self.dim_head))
