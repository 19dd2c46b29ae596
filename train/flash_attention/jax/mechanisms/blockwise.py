"""Blockwise attention and feed-forward network in JAX (Liu and Abbeel, 2023): the core call in the chunks asked for."""

import functools

import jax
import jax.numpy as jnp

from flash_attention.core.mechanisms import blockwise as shared
from flash_attention.core.spec import Operands
from flash_attention.core.validation import Options, check_bool
from flash_attention.jax.functional import attend
from flash_attention.jax.mechanisms.chunks import over_chunks, rematerialised
from flash_attention.jax.mechanisms.layers import seed_of


def blockwise_compute_attn(
    query,
    key,
    value,
    bias=None,
    deterministic=False,
    dropout_rng=None,
    attn_pdrop=0.0,
    causal_mask=True,
    query_chunk_size=None,
    key_chunk_size=None,
    dtype=jnp.float32,
    policy="nothing_saveable",
    precision=jax.lax.Precision.HIGHEST,
    prevent_cse=False,
):
    """``softmax(query key^T + bias) value``, a query chunk and a key chunk at a time, for any chunk sizes.

    Scores are **not scaled**: divide the query by ``sqrt(D)``. Key chunks above the diagonal are skipped. The scores of
    a chunk are never kept: the backward pass rebuilds them, whatever the policy.

    Args:
        query: (B, Nq, H, D); key, value: (B, Nk, H, D). float64 is computed by the plain formula, all at once.
        bias: added to the scores, each axis 1 or that of (B, H, Nq, Nk); -inf hides a key; differentiable.
        deterministic: True = no dropout.
        dropout_rng: PRNG key, needed when dropout acts; the mask does not depend on the chunks.
        attn_pdrop: probability of dropping a softmax weight, in [0, 1).
        causal_mask: key j visible to query i only when ``j <= i``, both counted from their own start.
        query_chunk_size, key_chunk_size: most tokens of a chunk; None = the whole length. Never change a result.
        dtype: of the output.
        policy: name of a ``jax.checkpoint_policies`` member: what else may be kept for the backward pass, the output
            and its LSE. 'nothing_saveable' computes them again, None (no rematerialisation) is faster.
        precision: of the matrix products, as in ``jax.default_matmul_precision``; None rounds no float32 operand.
        prevent_cse: as in ``jax.checkpoint``; needed only outside of jit and scan.

    Returns:
        (B, Nq, H, D) in ``dtype``; a query that sees no key gives 0.

    Raises:
        KeyError: an unknown policy.
        ValueError, TypeError: shapes that do not fit, dropout without ``dropout_rng``.
    """
    layer = "blockwise_compute_attn"
    shared.check_policy(layer, policy, prevent_cse)
    shared.check_options(layer, {"deterministic": deterministic, "causal_mask": causal_mask}, attn_pdrop)
    shared.check_attention(layer, query.shape, key.shape, value.shape)
    if bias is not None:
        shared.check_bias(layer, jnp.shape(bias), query.shape, key.shape)
    rate = 0.0 if deterministic else float(attn_pdrop)
    options = Options(
        scale=1.0,
        is_causal=causal_mask,
        q_offset=0,
        dropout_rate=rate,
        tile=(
            shared.check_chunk(layer, "query_chunk_size", query_chunk_size, query.shape[1]),
            shared.check_chunk(layer, "key_chunk_size", key_chunk_size, key.shape[1]),
        ),
    )
    operands = Operands(bias=bias, dropout_seed=seed_of(layer, dropout_rng) if rate else None)

    def call(query, key, value, operands):
        return attend(layer, query, key, value, operands, options, engine_for(query))[0]

    call = rematerialised(functools.partial(_with_precision, call, precision), policy, prevent_cse)
    return call(query, key, value, operands).astype(dtype)


def blockwise_compute_ffn(
    cell, inputs, chunk_size, deterministic=True, policy="nothing_saveable", prevent_cse=False
):  # fmt: skip
    """A position-wise network, ``chunk_size`` tokens at a time: the hidden activation of a chunk is all that exists.

    Args:
        cell: with a method ``forward_ffn(chunk, deterministic=...)``, or callable as ``cell(chunk)``.
        inputs: (B, N, E), any N.
        chunk_size: tokens of a chunk; None = all at once.
        deterministic: handed to ``forward_ffn``.
        policy: name of a ``jax.checkpoint_policies`` member, None = keep everything for the backward pass.
        prevent_cse: as in ``jax.checkpoint``.

    Returns:
        what one call on the whole sequence gives.

    Raises:
        KeyError: an unknown policy.
    """
    layer = "blockwise_compute_ffn"
    shared.check_policy(layer, policy, prevent_cse)
    check_bool(layer, "deterministic", deterministic)
    size = shared.check_ffn(layer, inputs.shape, chunk_size)

    def body(carry, start, chunk):
        if hasattr(cell, "forward_ffn"):
            return carry, cell.forward_ffn(chunk, deterministic=deterministic)
        return carry, cell(chunk)

    return over_chunks(rematerialised(body, policy, prevent_cse), inputs, size)[1]


def engine_for(query):
    """The engine of a call: float64 has the plain formula alone, the judge, which forms all scores."""
    return "reference" if query.dtype == jnp.float64 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_precision(function, precision, *arguments):
    """``function(*arguments)`` with its products at ``precision``, in the backward pass too, which is traced later."""
    with jax.default_matmul_precision(_named(precision)):
        return function(*arguments)


def _forward(function, precision, *arguments):
    with jax.default_matmul_precision(_named(precision)):
        return jax.vjp(function, *arguments)


def _backward(function, precision, pullback, d_out):
    with jax.default_matmul_precision(_named(precision)):
        return pullback(d_out)


_with_precision.defvjp(_forward, _backward)


def _named(precision):
    """A ``lax.Precision``, its name or None as ``jax.default_matmul_precision`` takes it."""
    return precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
