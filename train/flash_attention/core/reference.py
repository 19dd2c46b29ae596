"""The judge: attention as one plain dense formula over an array namespace, and its explicit backward.

``jax.numpy`` (float64, autodiff) and ``numpy`` (float64, :func:`attention_grad`, for machines without JAX) run the
same lines and are tested equal. O(Sq * Sk) memory; nothing here is meant to be fast.
"""

from typing import NamedTuple

import numpy as np

from flash_attention.core import dropout
from flash_attention.core.ranges import visible
from flash_attention.core.spec import Operands


def positions(xp, spec, operands):
    """Positions of the queries: int32 (1|B, 1, Sq, 1)."""
    index = xp.arange(spec.q_len, dtype=xp.int32)[None, None, :, None]
    if not spec.dynamic_offset:
        return index + spec.offset
    return index + xp.asarray(operands.q_offset, dtype=xp.int32).reshape(-1, 1, 1, 1)


def visibility(xp, spec, operands):
    """Boolean (1|B, 1|N, Sq, Sk): True where a query sees a key. Every restriction is ANDed."""
    p = positions(xp, spec, operands)
    i = xp.arange(spec.q_len, dtype=xp.int32)[None, None, :, None]
    j = xp.arange(spec.kv_len, dtype=xp.int32)[None, None, None, :]
    seen = visible(spec.band, p, j)
    if spec.compact_mask:
        size = spec.block_size
        own_block = p // size == j // size
        seen = seen & (~own_block | (xp.asarray(operands.mask) > 0)[p % size, j % size])
    elif spec.mask_shape is not None:
        seen = seen & (xp.asarray(operands.mask) > 0)
    if spec.segments:
        q_ids, kv_ids = xp.asarray(operands.q_segment_ids), xp.asarray(operands.kv_segment_ids)
        seen = seen & (q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    if spec.kv_lengths:
        seen = seen & (j < xp.asarray(operands.kv_lengths).reshape(-1, 1, 1, 1))
    if spec.q_lengths:
        seen = seen & (i < xp.asarray(operands.q_lengths).reshape(-1, 1, 1, 1))
    return seen


def distance(xp, spec, operands):
    """|p - j|, int32 (1|B, 1, Sq, Sk)."""
    return abs(positions(xp, spec, operands) - xp.arange(spec.kv_len, dtype=xp.int32)[None, None, None, :])


def keep_mask(xp, spec, operands):
    """Boolean (B, N, Sq, Sk): what dropout keeps."""
    axes = (spec.batch, spec.heads, spec.q_len, spec.kv_len)
    b, h, i, j = [
        xp.arange(size, dtype=xp.uint32).reshape([-1 if axis == own else 1 for axis in range(4)])
        for own, size in enumerate(axes)
    ]
    start = xp.asarray(spec.origin if operands.origin is None else operands.origin).astype(xp.uint32)
    b, h, i, j = [x + start[axis] for axis, x in enumerate((b, h, i, j))]
    return dropout.keep(xp, operands.dropout_seed, b, h, i, j, spec.dropout_rate)


class Forward(NamedTuple):
    """Everything the plain formula forms on its way; (B, N, Sq, Sk) unless said."""

    out: object  # (B, N, Sq, D)
    lse: object  # (B, N, Sq)
    probs: object  # before dropout
    dropped: object  # after dropout
    capped: object  # scores after the soft cap, before bias and ALiBi


def _repeat(xp, x, group):
    return x if group == 1 else xp.repeat(x, group, axis=1)


def slopes4(xp, slopes):
    """(N,) or (B, N) -> (1|B, N, 1, 1)."""
    slopes = xp.asarray(slopes)
    return slopes.reshape((-1, slopes.shape[-1], 1, 1))


def forward(xp, spec, query, key, value, operands=Operands()):
    """The formula, in the dtype of the inputs, with every intermediate. Masked probabilities are exactly 0."""
    key, value = _repeat(xp, key, spec.group), _repeat(xp, value, spec.group)
    seen = visibility(xp, spec, operands)
    scores = xp.matmul(query, xp.swapaxes(key, -1, -2)) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * xp.tanh(scores / spec.soft_cap)
    capped = scores
    if spec.bias_shape is not None:
        scores = scores + operands.bias
    if spec.alibi_shape is not None:
        scores = scores - slopes4(xp, operands.slopes) * distance(xp, spec, operands)
    scores = xp.where(seen, scores, -xp.inf)

    peak = xp.max(scores, axis=-1, keepdims=True)
    dead = peak == -xp.inf
    peak = xp.where(dead, xp.zeros_like(peak), peak)
    # The inner where keeps the gradient of a hidden score exactly 0 (never inf * 0).
    weights = xp.where(seen, xp.exp(xp.where(seen, scores - peak, xp.zeros_like(scores))), xp.zeros_like(scores))
    total = xp.sum(weights, axis=-1, keepdims=True)
    if spec.sinks:
        sink = xp.asarray(operands.sinks).reshape(1, -1, 1, 1)
        top = xp.maximum(peak, sink)
        weights, total = weights * xp.exp(peak - top), total * xp.exp(peak - top) + xp.exp(sink - top)
        peak = xp.where(dead, peak, top)
    total = xp.where(dead, xp.ones_like(total), total)
    probs = weights / total
    dropped = probs
    if spec.dropout_rate:
        kept = keep_mask(xp, spec, operands)
        dropped = xp.where(kept, probs, xp.zeros_like(probs)) / (1.0 - spec.dropout_rate)
    lse = xp.where(dead, xp.full_like(total, -xp.inf), peak + xp.log(total))[..., 0]
    return Forward(xp.matmul(dropped, value), lse, probs, dropped, capped)


def attention(xp, spec, query, key, value, operands=Operands()):
    """``(out (B, N, Sq, D), lse (B, N, Sq))`` by the plain formula.

    Args:
        xp: numpy or jax.numpy; give float64 arrays for a judgement, float32 ones for the naive comparison.
        spec: :class:`~flash_attention.core.spec.AttentionSpec`.
        query, key, value: (B, N, Sq, D), (B, Nkv, Sk, D), (B, Nkv, Sk, D).
        operands: :class:`~flash_attention.core.spec.Operands`.
    """
    result = forward(xp, spec, query, key, value, operands)
    return result.out, result.lse


def _reduce_to(x, shape):
    """Sum the axes along which ``shape`` was broadcast."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return x.sum(axis=axes, keepdims=True) if axes else x


def _sum_groups(x, group):
    batch, heads = x.shape[:2]
    return x.reshape((batch, heads // group, group) + x.shape[2:]).sum(axis=2)


def attention_grad(spec, query, key, value, operands, d_out, d_lse=None):
    """Float64 gradients by the explicit backward of FlashAttention-2 (Dao 2023, algorithm 2), in numpy.

    Args:
        spec, query, key, value, operands: as for :func:`attention`; any float dtype, computed in float64.
        d_out: cotangent of the output (B, N, Sq, D); d_lse: cotangent of the LSE (B, N, Sq) or None.

    Returns:
        dict with 'query', 'key', 'value' and, where the operand exists, 'bias', 'slopes', 'sinks'.
    """
    q, k, v, d_out = [np.asarray(x, np.float64) for x in (query, key, value, d_out)]
    wide = {
        name: np.asarray(getattr(operands, name), np.float64)
        for name in ("bias", "slopes", "sinks")
        if getattr(operands, name) is not None
    }
    operands = operands._replace(**wide)
    fwd = forward(np, spec, q, k, v, operands)
    dead = np.isneginf(fwd.lse)
    delta = (d_out * fwd.out).sum(-1)
    if d_lse is not None:
        delta = delta - np.where(dead, 0.0, np.asarray(d_lse, np.float64))
    d_probs = np.matmul(d_out, np.swapaxes(_repeat(np, v, spec.group), -1, -2))
    if spec.dropout_rate:
        d_probs = np.where(keep_mask(np, spec, operands), d_probs, 0.0) / (1.0 - spec.dropout_rate)
    d_scores = fwd.probs * (d_probs - delta[..., None])
    grads = {}
    if spec.sinks:
        # The sink's share of the softmax acts like one more key whose value is 0.
        share = np.where(dead, 0.0, np.exp(operands.sinks.reshape(1, -1, 1) - np.where(dead, 0.0, fwd.lse)))
        grads["sinks"] = -(share * delta).sum(axis=(0, 2))
    if spec.alibi_shape is not None:
        d_slopes = -(d_scores * distance(np, spec, operands)).sum(axis=(2, 3))
        grads["slopes"] = d_slopes if len(spec.alibi_shape) == 2 else d_slopes.sum(axis=0)
    if spec.bias_shape is not None:
        grads["bias"] = _reduce_to(d_scores, spec.bias_shape)
    if spec.soft_cap is not None:
        d_scores = d_scores * (1.0 - (fwd.capped / spec.soft_cap) ** 2)
    d_scores = d_scores * spec.scale
    grads["query"] = np.matmul(d_scores, _repeat(np, k, spec.group))
    grads["key"] = _sum_groups(np.matmul(np.swapaxes(d_scores, -1, -2), q), spec.group)
    grads["value"] = _sum_groups(np.matmul(np.swapaxes(fwd.dropped, -1, -2), d_out), spec.group)
    return grads
