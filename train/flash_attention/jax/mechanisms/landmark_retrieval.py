"""Retrieval of landmark attention in JAX: only the best past sections of each query are gathered, and its own.

Chunks of queries bound what is gathered at once; each is computed again for the gradient.
"""

import functools

import jax
import jax.numpy as jnp

from flash_attention.core.mechanisms import landmark as shared


@functools.partial(jax.jit, static_argnums=(0, 1))
def retrieve(scale, top_k, query, key, value, members, landmarks, section):
    """Gather only the ``top_k`` past sections of each query, and its own; tables as `shared.tables` gives them."""
    batch, heads, q_len, dim = query.shape
    wide = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    rows = max(1, min(q_len, shared.RETRIEVED // ((top_k + 1) * members.shape[2] * dim)))
    row = jnp.arange(key.shape[2] - q_len, key.shape[2], dtype=jnp.int32)

    def padded(x, axis):
        pads = [(0, -q_len % rows if n == axis else 0) for n in range(x.ndim)]
        return jnp.pad(x, pads)

    chunks = padded(row, 0).reshape(-1, rows)

    def head(inputs):
        q, k, v, b = inputs
        call = jax.checkpoint(functools.partial(_rows, scale, top_k, wide))
        tables = (members[b], landmarks[b], section[b])
        out = jax.lax.map(lambda chunk: call(*chunk, k, v, *tables), (padded(q, 0).reshape(-1, rows, dim), chunks))
        return out.reshape(-1, dim)[:q_len]

    flat = [x.reshape((-1,) + x.shape[2:]) for x in (query, key, value)]
    members, landmarks, section = (jnp.asarray(x) for x in (members, landmarks, section))
    together = max(1, shared.RETRIEVED // (rows * (top_k + 1) * members.shape[2] * dim))
    every = jnp.arange(batch * heads, dtype=jnp.int32) // heads
    out = jax.lax.map(head, (*flat, every), batch_size=min(together, batch * heads))
    return out.reshape(query.shape).astype(value.dtype)


def _rows(scale, top_k, wide, q, row, key, value, members, landmarks, section):
    """(R, D) of the queries ``q`` at positions ``row``, one head; members (S + 1, L), landmarks (S,), section (Nk,)."""
    own = jnp.take(section, row)  # (R,)
    logits = jnp.einsum("rd,sd->rs", q, jnp.take(key, landmarks, axis=0), preferred_element_type=wide) * scale
    past = (jnp.arange(landmarks.shape[0]) < own[:, None]) & (landmarks >= 0)
    logits = jnp.where(past, logits, -jnp.inf)
    _, best = jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)
    logit = jnp.take_along_axis(logits, best, -1)  # (R, k)
    group = jnp.concatenate([own[:, None], best], -1)
    index = jnp.take(members, group, axis=0)  # (R, k + 1, L)
    chosen = jnp.concatenate([jnp.ones_like(own, bool)[:, None], logit > -jnp.inf], -1)
    seen = (index >= 0) & (index <= row[:, None, None]) & chosen[..., None]
    k, v = (jnp.where(seen[..., None], jnp.take(x, index, axis=0), 0) for x in (key, value))
    s = jnp.einsum("rd,rgld->rgl", q, k, preferred_element_type=wide) * scale
    p, lse = _safe_softmax(s, seen)
    a = jnp.concatenate([lse[:, :1], logit], -1)
    g, _ = _safe_softmax(a, a > -jnp.inf)
    return jnp.einsum("rgl,rgld->rd", (g[..., None] * p).astype(v.dtype), v, preferred_element_type=wide)


def _safe_softmax(x, seen):
    """``(softmax, LSE)`` along the last axis over what is seen; 0 and -inf where nothing is. Gradients are finite."""
    x = jnp.where(seen, x, 0.0)
    alive = seen.any(-1, keepdims=True)
    peak = jax.lax.stop_gradient(jnp.where(seen, x, -jnp.inf).max(-1, keepdims=True))
    peak = jnp.where(alive, peak, 0.0)
    e = jnp.where(seen, jnp.exp(jnp.where(seen, x - peak, 0.0)), 0.0)
    total = jnp.where(alive, e.sum(-1, keepdims=True), 1.0)
    lse = jnp.where(alive, peak + jnp.log(total), -jnp.inf)
    return e / total, lse[..., 0]
