"""Landmark attention in JAX: the differentiable call, the published class, and which way a call is computed.

Idea, formulas and checks: `core.mechanisms.landmark`; the loops: landmark_tiles.py, landmark_retrieval.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core.mechanisms import landmark as shared
from flash_attention.jax.functional import describe, flash_attention, is_concrete
from flash_attention.jax.mechanisms import landmark_tiles as tiles
from flash_attention.jax.mechanisms.landmark_retrieval import retrieve

LAYER = "fused_landmark_attention"


def fused_landmark_attention(q, k, v, is_mem, sm_scale=None, block_size=64, top_k_blocks=None):
    """Landmark attention (Mohtashami and Jaggi, 2023), causal; queries are the last Nq of the Nk positions.

    A landmark closes its section. A query sees the ordinary tokens of its own section up to itself, one by one, and
    each past section with the weight of its landmark, shared out by a softmax inside the section. Landmarks give no
    value. Without landmarks this is causal attention.

    Cost: the pairs of causal attention, memory O(N * D). With ``top_k_blocks`` (Nk / block_size + (k + 1) * block_size)
    pairs a query, and what is not chosen is not read, unless the pattern is traced.

    Args:
        q: (B, H, Nq, D); k, v: (B, H, Nk, D), Nq <= Nk; float16, bfloat16, float32 or float64.
        is_mem: which keys are landmarks, bool or int (Nk,) or (B, Nk). The pattern "last of every block_size keys"
            takes the fast path where it is concrete; any other one, or a traced one, computes all Nq * Nk pairs.
        sm_scale: factor on the scores; default ``1 / sqrt(D)``.
        block_size: of the regular pattern, at least 2. It matters to speed only.
        top_k_blocks: a query sees only the k past sections whose landmarks score highest (the earlier one on ties);
            None = all. The choice has no gradient.

    Returns:
        (B, H, Nq, D) in v's dtype. A query that sees nothing (a landmark first of all) gives 0.

    Raises:
        ValueError, TypeError: shapes that do not fit, a block size below 2.
    """
    tensors = [jnp.asarray(x) for x in (q, k, v)]
    concrete = is_concrete(is_mem)
    is_mem = np.asarray(is_mem) if concrete else is_mem
    infos = map(describe, (*tensors, is_mem))
    scale = shared.check_call(LAYER, *infos, sm_scale, block_size, top_k_blocks)
    is_mem = is_mem != 0
    if concrete and not is_mem.any():
        dtype = jnp.result_type(*tensors)
        given = (x.astype(dtype) for x in tensors)
        return flash_attention(*given, is_causal=True, scale=scale, layout="BNSD").astype(v.dtype)
    if concrete and top_k_blocks is not None:
        pattern = np.broadcast_to(is_mem, (tensors[0].shape[0], is_mem.shape[-1]))
        if top_k_blocks < pattern.sum(1).max():
            return retrieve(scale, top_k_blocks, *tensors, *shared.tables(pattern), shared.sections(pattern))
        top_k_blocks = None
    if concrete and shared.is_regular(is_mem, block_size):
        return _attend(scale, block_size, None, *tensors, None)
    return _attend(scale, 0, top_k_blocks, *tensors, jnp.asarray(is_mem))


class FusedLandmarkAttention:
    """The published class, with its methods: landmark attention of the regular pattern and its explicit gradient.

    ``ctx`` is any object that takes attributes, for instance ``types.SimpleNamespace()``.
    """

    @staticmethod
    def forward(ctx, q, k, v, n_prefix_q, sm_scale=None, block_size=64):
        """Attend, and keep on ``ctx`` what :meth:`backward` needs; q, k, v (B, H, N, D).

        Args:
            n_prefix_q: blocks of keys before the first query, (Nk - Nq) / block_size.
            sm_scale, block_size: as in :func:`fused_landmark_attention`.
        """
        scale, q, k, v = _check_class(q, k, v, n_prefix_q, sm_scale, block_size)
        out, saved = _attend_fwd(scale, block_size, None, q, k, v, None)
        ctx.scale, ctx.block_size, ctx.saved = scale, block_size, saved
        return out

    @staticmethod
    def backward(ctx, do):
        """``(dq, dk, dv, None, None, None)`` of the output's cotangent ``do``."""
        d_q, d_k, d_v, _ = _attend_bwd(ctx.scale, ctx.block_size, None, ctx.saved, do)
        return d_q, d_k, d_v, None, None, None

    @staticmethod
    def apply(q, k, v, n_prefix_q, sm_scale=None, block_size=64):
        """The differentiable call; arguments as in :meth:`forward`."""
        scale, q, k, v = _check_class(q, k, v, n_prefix_q, sm_scale, block_size)
        return _attend(scale, block_size, None, q, k, v, None)


def _check_class(q, k, v, n_prefix_q, sm_scale, block_size):
    layer = "FusedLandmarkAttention"
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    scale = shared.check_call(layer, *map(describe, (q, k, v)), None, sm_scale, block_size, None)
    shared.check_prefix(layer, q.shape, k.shape, n_prefix_q, block_size)
    return scale, q, k, v


# --- all pairs ------------------------------------------------------------------------------------------------------
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, block, top_k, query, key, value, is_landmark):
    return _attend_fwd(scale, block, top_k, query, key, value, is_landmark)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend_fwd(scale, block, top_k, query, key, value, is_landmark):
    static, held = _prepare(scale, block, top_k, query, key, value, is_landmark)
    out, lse = (x[:, : static.q_len] for x in tiles.forward(static, held))
    out, lse = out.reshape(query.shape), lse.reshape(query.shape[:3])
    return out.astype(value.dtype), (query, key, value, is_landmark, out.astype(query.dtype), lse)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend_bwd(scale, block, top_k, saved, d_out):
    query, key, value, is_landmark, out, lse = saved
    static, held = _prepare(scale, block, top_k, query, key, value, is_landmark)
    delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)
    pad = functools.partial(_flat, tile=static.q_tile)
    held = held._replace(
        d_out=pad(d_out), lse=pad(jnp.where(lse == -jnp.inf, jnp.inf, lse), fill=jnp.inf), delta=pad(delta)
    )
    grads = tiles.backward(static, held)
    inputs = query, key, value
    grads = [g[:, : x.shape[2]].reshape(x.shape).astype(x.dtype) for g, x in zip(grads, inputs)]
    return (*grads, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _prepare(scale, block, top_k, query, key, value, is_landmark):
    """``(static, held)``, padded to whole tiles. Padding comes last, so that no query sees it.

    Landmarks' values become 0: nobody may see them, and 0 * NaN would.
    """
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    static = tiles.Static(heads, q_len, kv_len, scale, block, top_k)
    dtype = jnp.result_type(query, key, value)
    section = None
    if block:
        is_landmark = jnp.asarray(shared.regular(kv_len, block))
    else:
        is_landmark = jnp.broadcast_to(is_landmark, (batch, kv_len))
        landmark = is_landmark.astype(jnp.int32)
        section = jnp.cumsum(landmark, -1, dtype=jnp.int32) - landmark
    value = jnp.where(is_landmark.reshape(-1, 1, kv_len, 1), 0, value)
    query = _flat(query.astype(dtype), static.q_tile)
    key, value = (_flat(x.astype(dtype), static.kv_tile) for x in (key, value))
    return static, tiles.Held(query, key, value, section, None if block else is_landmark)


def _flat(x, tile, fill=0):
    """(B, H, N, ..) -> (B * H, N padded to whole tiles, ..)."""
    x = x.reshape((-1,) + x.shape[2:])
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
