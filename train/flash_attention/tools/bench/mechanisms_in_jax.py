"""JAX mechanisms as benchmark candidates: ``{name: function(case) -> attend(query, key, value)}``, BSND tensors.

Another mechanism is one more entry here and in ``mechanisms_in_mindspore.py``; ``cases.pair_counts`` tells the judge
what its queries see.
"""

import functools

import jax.numpy as jnp

from flash_attention.core.mechanisms.landmark import regular
from flash_attention.jax import (
    ConditionalRoutedAttention,
    MultiQueryAttention,
    blockwise_compute_attn,
    dilated_attention,
    dynamic_sparse_attention,
    fused_landmark_attention,
)
from flash_attention.tools.bench.cases import (
    BUCKETS,
    KEPT,
    LANDMARK_BLOCK,
    geometric_patterns,
    routed_layer,
    sparse_indices,
)


def _dilated(case):
    sizes, rates = geometric_patterns(case.q_len)
    return functools.partial(dilated_attention, segment_size=sizes, dilation_rate=rates, is_causal=case.causal)


def _blockwise(case):
    """Chunks of 512 x 512; the scale is the caller's here, as users of the call write it."""

    def attend(query, key, value):
        return blockwise_compute_attn(
            query * case.head_dim**-0.5,
            key,
            value,
            causal_mask=case.causal,
            query_chunk_size=512,
            key_chunk_size=512,
            dtype=case.dtype,
            policy=None,
        )

    return attend


def _sparse(candidate, case):
    mode, q_idx, k_idx = sparse_indices(case, candidate)
    return functools.partial(dynamic_sparse_attention, q_idx=q_idx, k_idx=k_idx, sparsity_mode=mode)


def _landmark(case):
    pattern = regular(case.spec().kv_len, LANDMARK_BLOCK)

    def attend(query, key, value):
        by_head = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        return jnp.swapaxes(fused_landmark_attention(*by_head, pattern), 1, 2)

    return attend


def _layer(layer):
    """A self-attention layer: its input is the query's heads side by side; key and value are not used."""

    def attend(query, key, value):
        del key, value
        return layer(query.reshape(query.shape[:2] + (-1,))).reshape(query.shape)

    return attend


def _colt5(case):
    width, sizes = routed_layer(case)
    return _layer(ConditionalRoutedAttention(width, dtype=case.dtype, **sizes))


def _dense_layer(case):
    """Projections around dense attention of all heads: what CoLT5's layer replaces."""
    width = case.heads * case.head_dim
    return _layer(MultiQueryAttention(width, case.heads, kv_heads=case.heads, dtype=case.dtype))


MECHANISMS = {
    "blockwise": _blockwise,
    "colt5": _colt5,
    "dense layer": _dense_layer,
    "dilated": _dilated,
    "landmark": _landmark,
}
MECHANISMS.update((name, functools.partial(_sparse, name)) for name in (*BUCKETS, *KEPT))
