"""``attention_fn`` for ``flax.nnx.MultiHeadAttention``: its call, as one of ``flash_attention``. Does not import Flax.

nnx.MultiHeadAttention(..., attention_fn=attention_fn)
"""

import math

import jax
import jax.numpy as jnp

from flash_attention.core.errors import Reason, invalid_value
from flash_attention.jax.functional import flash_attention

LAYER = "attention_fn"


def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    is_causal=False,
    *,
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    implementation=None,
):
    """``flax.nnx.dot_product_attention`` in memory linear in the sequence lengths; set more with functools.partial.

    The mask keeps where True or > 0. Differences from Flax: a row that sees no key is 0 (there: the mean of the
    values), and key/value heads may be fewer than query heads.

    Args:
        query: (batch..., T, N, D); any number of batch axes, also none.
        key, value: (batch..., S, K, D).
        bias: float, broadcastable to (batch..., N, T, S), added to the scaled scores; differentiable.
        mask: likewise broadcastable; also the float masks of ``nnx.make_causal_mask`` and of Flax's decoding cache.
        broadcast_dropout: must be False where dropout acts: the mask differs in every batch row and head.
        dropout_rng: PRNG key; dropout_rate: acts unless ``deterministic``.
        dtype: of the computation; None = promoted from query, key and value.
        precision: must be None, and module (of ``sow_weights=True``) too: no engine has either.
        is_causal: key j is visible to query i when ``j <= i`` (top-left, as in Flax).
        scale, logits_soft_cap, sinks, implementation: as in :func:`flash_attention.jax.flash_attention`.

    Returns:
        (batch..., T, N, D).

    Raises:
        UnsupportedError: precision, module, or dropout that is broadcast.
    """
    dropped = not deterministic and dropout_rate > 0
    reason = _refused(precision, module, dropped and broadcast_dropout)
    if reason is not None:
        raise reason.error(LAYER)
    if dropped and dropout_rng is None:
        raise invalid_value(LAYER, "dropout_rng", "a PRNG key where dropout acts", None)
    dtype = dtype or jnp.result_type(query, key, value)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    out = flash_attention(
        *(x.reshape((-1,) + x.shape[-3:]) for x in (query, key, value)),
        bias=_one_batch_axis(bias, batch),
        mask=_one_batch_axis(mask, batch),
        is_causal=is_causal,
        q_offset=0,
        dropout_rate=dropout_rate if dropped else 0.0,
        dropout_seed=jax.random.bits(dropout_rng, (), "uint32") if dropped else None,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        implementation=implementation,
    )
    return out.reshape(query.shape)


def _refused(precision, module, broadcast):
    if precision is not None:
        return Reason("precision", precision, "None", "Products are in the inputs' dtype, sums in float32.")
    if module is not None:
        return Reason("module", "a module", "None", "The weights are never in memory: call without sow_weights=True.")
    if broadcast:
        remedy = "Build the layer with broadcast_dropout=False."
        return Reason("broadcast_dropout", True, "False where dropout acts", remedy)
    return None


def _one_batch_axis(x, batch):
    """(batch..., N, T, S), each axis 1 or missing where it is broadcast, as (1 or the whole batch, N, T, S)."""
    if x is None:
        return None
    x = jnp.asarray(x)
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if math.prod(x.shape[:-3]) > 1:
        x = jnp.broadcast_to(x, batch + x.shape[-3:])
    return x.reshape((-1,) + x.shape[-3:])
