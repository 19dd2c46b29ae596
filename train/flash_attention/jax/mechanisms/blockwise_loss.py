"""Language-model head and cross-entropy in JAX, a chunk of tokens at a time; fused, no logits exist as a whole."""

import jax
import jax.numpy as jnp

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms import blockwise as shared
from flash_attention.core.validation import check_bool, check_int
from flash_attention.jax.mechanisms.chunks import over_chunks, rematerialised
from flash_attention.jax.mechanisms.layers import Layer, dense, dense_init

HEAD = "Blockwise_LM_Head"


class Blockwise_LM_Head(Layer):  # noqa: N801  (its published name)
    """The projection to the vocabulary, ``chunk_size`` tokens at a time.

    Args:
        vocab_size: V.
        chunk_size: tokens of a chunk; None = all at once.
        policy: name of a ``jax.checkpoint_policies`` member, None = keep everything for the backward pass.
        dtype: of the product and the logits; parameters are float32.
        prevent_cse: as in ``jax.checkpoint``.
        return_probs: give the softmax of the logits instead.
        hidden_size: E; None = the width of the first input.
    """

    def __init__(
        self,
        vocab_size,
        chunk_size,
        policy="nothing_saveable",
        dtype=jnp.float32,
        prevent_cse=False,
        *,
        return_probs=False,
        hidden_size=None,
    ):
        check_int(HEAD, "vocab_size", vocab_size, 1)
        shared.check_policy(HEAD, policy, prevent_cse)
        shared.check_chunk(HEAD, "chunk_size", chunk_size, 1)
        check_bool(HEAD, "return_probs", return_probs)
        self.vocab_size, self.chunk_size, self.policy, self.dtype = vocab_size, chunk_size, policy, dtype
        self.prevent_cse, self.return_probs = prevent_cse, return_probs
        self.hidden_size = None if hidden_size is None else check_int(HEAD, "hidden_size", hidden_size, 1)

    def init(self, key):
        """New parameters: 'weight' (V, E), normal with standard deviation ``1 / sqrt(E)``, and 'bias' (V,), zeros."""
        if self.hidden_size is None:
            raise invalid_value(HEAD, "hidden_size", "given, or taken from a first call", None)
        return dense_init(key, self.hidden_size, self.vocab_size, std=self.hidden_size**-0.5)

    def __call__(self, hidden_states, *, params=None):
        """(B, N, E) -> logits (B, N, V) in ``dtype``, or with return_probs their softmax, computed in float32."""
        params = self._fitting(hidden_states, params)
        size = shared.check_ffn(HEAD, hidden_states.shape, self.chunk_size)

        def body(carry, start, chunk):
            logits = dense(params, chunk, self.dtype)
            return carry, _softmax(logits) if self.return_probs else logits

        return over_chunks(rematerialised(body, self.policy, self.prevent_cse), hidden_states, size)[1]

    def loss(self, hidden_states, tokens, valid=None, *, reduction="token_mean", params=None):
        """``(loss, accuracy)`` of the logits, which are never formed: see :func:`blockwise_fused_cross_entropy`."""
        params = self._fitting(hidden_states, params)
        return blockwise_fused_cross_entropy(
            hidden_states.astype(self.dtype),
            params["weight"].astype(self.dtype),
            tokens,
            valid,
            bias=params["bias"].astype(self.dtype),
            chunk_size=self.chunk_size,
            policy=self.policy,
            prevent_cse=self.prevent_cse,
            reduction=reduction,
        )

    def _fitting(self, hidden_states, params):
        """The parameters for an input; the first input decides the width where none was given."""
        if self.hidden_size is None:
            self.hidden_size = hidden_states.shape[-1]
        shared.check_hidden(HEAD, hidden_states.shape, self.hidden_size)
        return self.params if params is None else params


def blockwise_cross_entropy(
    logits, tokens, valid=None, chunk_size=None, policy=None, prevent_cse=None, *, reduction="token_mean"
):
    """Mean cross-entropy and accuracy over the valid tokens, computed in float32.

    Args:
        logits: (B, N, V), any float dtype; differentiable.
        tokens: (B, N) integers in [0, V); ignored where ``valid`` is not > 0.
        valid: (B, N), > 0 counts; None = all.
        chunk_size: tokens of a chunk, counted over B * N; None = all at once.
        policy, prevent_cse: as in :func:`blockwise_compute_ffn`; None = no rematerialisation, False.
        reduction: 'token_mean': over all valid tokens, whatever the chunks; 'chunk_mean': within each chunk, then over
            the chunks with equal weight, as published.

    Returns:
        ``(loss, accuracy)``, float32 scalars; 0 where nothing is valid.

    Raises:
        KeyError: an unknown policy.
        ValueError, TypeError: shapes that do not fit, tokens that are not integers.
    """
    return _reduced(
        "blockwise_cross_entropy",
        lambda chunk: chunk,
        logits,
        tokens,
        valid,
        chunk_size,
        policy,
        prevent_cse,
        reduction,
    )


def blockwise_fused_cross_entropy(
    hidden_states,
    weight,
    tokens,
    valid=None,
    *,
    bias=None,
    chunk_size=1024,
    policy="nothing_saveable",
    prevent_cse=None,
    reduction="token_mean",
):
    """:func:`blockwise_cross_entropy` of ``hidden_states @ weight.T + bias`` without ever forming those logits.

    A chunk's logits are formed, reduced and forgotten; the backward pass forms them again ('nothing_saveable').

    Args:
        hidden_states: (B, N, E); differentiable.
        weight: (V, E), the head's; bias: (V,) or None; both differentiable.
        tokens, valid, chunk_size, policy, prevent_cse, reduction: as in :func:`blockwise_cross_entropy`. Memory is
            ``chunk_size * V``; with chunk_size=None, and under other policies, it is ``B * N * V``.

    Returns:
        ``(loss, accuracy)``, float32 scalars.
    """
    layer = "blockwise_fused_cross_entropy"
    shared.check_head(layer, hidden_states.shape, weight.shape, None if bias is None else bias.shape)

    def logits(chunk):
        wide = jnp.promote_types(chunk.dtype, jnp.float32)
        out = jnp.einsum("bne,ve->bnv", chunk, weight.astype(chunk.dtype), preferred_element_type=wide)
        return out if bias is None else out + bias.astype(wide)

    return _reduced(layer, logits, hidden_states, tokens, valid, chunk_size, policy, prevent_cse, reduction)


def _reduced(layer, logits_of, inputs, tokens, valid, chunk_size, policy, prevent_cse, reduction):
    """``(loss, accuracy)`` of ``logits_of(chunk)`` over chunks of the B * N tokens."""
    prevent_cse = False if prevent_cse is None else prevent_cse
    shared.check_policy(layer, policy, prevent_cse)
    tokens = jnp.asarray(tokens)
    shared.check_integers(layer, str(tokens.dtype))
    counted = jnp.ones(inputs.shape[:2], bool) if valid is None else jnp.asarray(valid) > 0
    size = shared.check_loss(layer, inputs.shape, tokens.shape, counted.shape, chunk_size, reduction)
    flat = [x.reshape((1, -1) + x.shape[2:]) for x in (inputs, tokens, counted)]
    chunk_mean = reduction == "chunk_mean"
    total = jnp.sum(counted)
    chunks = -(-flat[1].shape[1] // max(size, 1))

    def body(sums, start, chunk):
        inputs, tokens, counted = chunk
        nll, right = _token_losses(logits_of(inputs), jnp.where(counted, tokens, 0), counted)
        count = jnp.maximum(jnp.sum(counted) if chunk_mean else total, 1).astype(nll.dtype)
        return (sums[0] + nll / count, sums[1] + right / count), None

    wide = jnp.promote_types(inputs.dtype, jnp.float32)
    zeros = jnp.zeros((), wide), jnp.zeros((), wide)
    (loss, accuracy), _ = over_chunks(rematerialised(body, policy, prevent_cse), tuple(flat), size, zeros)
    return (loss / chunks, accuracy / chunks) if chunk_mean else (loss, accuracy)


def _token_losses(logits, labels, counted):
    """Sums over the counted tokens of the negative log-likelihood and of the right guesses; float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    own = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    nll = jax.nn.logsumexp(logits, -1) - own
    right = jnp.where(counted, logits.argmax(-1) == labels, False)
    return jnp.where(counted, nll, 0.0).sum(), right.sum().astype(nll.dtype)


def _softmax(logits):
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return jax.nn.softmax(logits.astype(wide), -1).astype(logits.dtype)
