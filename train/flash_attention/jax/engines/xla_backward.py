"""Backward direction of the `xla` engine: probabilities are recomputed tile by tile from the saved LSE.

One key/value head after the other; inside, one query tile of its heads after the other, over the key tiles that the
forward visited (same ranges, same code). Tiles are keys x rows here, so that dK += dS Q and dV += P dO are plain
row-major products into contiguous slices, and row statistics are vectors along the fast axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention.jax.engines import cpu
from flash_attention.jax.engines import xla_tiles as tiles

WIDTHS = (1,)
"""Five dots a tile hide the loop's cost: wider inner tiles gain nothing when causal (measured 1 to 4)."""


class Saved(NamedTuple):
    """What the loops read."""

    inputs: tiles.Inputs
    d_out: jax.Array  # like Inputs.query
    lse: jax.Array  # (T, R)
    delta: jax.Array  # (T, R)
    key_t: jax.Array = None  # (D, Sk): K of the current key/value head, transposed


class Grads(NamedTuple):
    """Running gradients of one key/value head and the query heads that share it."""

    key: jax.Array  # (Sk, D) float32
    value: jax.Array  # (Sk, D) float32
    query: jax.Array  # (heads of the group / stack, R, D)
    slopes: jax.Array  # (heads of the group / stack, R) or None
    bias: jax.Array  # like Inputs.bias, float32, or None


def backward(spec, geo, inputs, d_out, lse, delta):
    """Gradients of the flattened tensors.

    Args:
        d_out: like ``inputs.query``. lse, delta: (T, R) float32; lse is +inf for rows without a visible key.

    Returns:
        ``(d_query (T, R, D), d_key, d_value (B * kv_heads, Sk, D), d_slopes (T, R) or None, d_bias or None)``.
    """
    dtype = cpu.dot_dtype(inputs.query.dtype, geo.q_tile)
    outers = spec.group // geo.stack  # rows of Inputs.query that share a key/value head

    def head(kv, d_bias, saved):
        saved = saved._replace(inputs=tiles.with_own_keys(saved.inputs, kv))
        # K transposed once a head: dQ is formed as K^T dS, again a row-major product. The barrier keeps XLA from
        # folding the transposition back into the dot, where it costs half the speed (and has no bfloat16 kernel).
        key_t = lax.optimization_barrier(tiles.cut_head(saved.inputs.key, kv, 0, spec.kv_len).T.astype(dtype))
        saved = saved._replace(key_t=key_t)

        def tile(n, grads, saved):
            return _query_tile(spec, geo, saved, kv * outers + n // geo.q_tiles, n, grads, dtype)

        grads = tiles.loop(outers * geo.q_tiles, tile, _zeros(spec, geo, inputs, d_bias), saved)
        d_key = grads.key if tiles.folds_scale(spec, dtype) else grads.key * spec.scale
        parts = [x.astype(tiles.out_dtype(spec, inputs.key)) for x in (grads.query, d_key, grads.value)]
        return grads.bias, (*parts, grads.slopes)

    # Heads may share a bias: its gradient is summed from head to head.
    d_bias = None if inputs.bias is None else jnp.zeros(inputs.bias.shape, jnp.float32)
    saved, count = Saved(inputs, d_out, lse, delta), tiles.count_heads(inputs.key)
    d_bias, parts = tiles.over_heads(geo, head, count, saved, d_bias)
    d_query, d_key, d_value, d_slopes = parts
    d_slopes = None if d_slopes is None else d_slopes.reshape(-1, geo.rows)
    return d_query.reshape(-1, geo.rows, spec.head_dim), d_key, d_value, d_slopes, d_bias


def _zeros(spec, geo, inputs, d_bias):
    """:class:`Grads` before the first tile."""
    outers, size = spec.group // geo.stack, (spec.kv_len, spec.head_dim)
    return Grads(
        jnp.zeros(size, jnp.float32),
        jnp.zeros(size, jnp.float32),
        jnp.zeros((outers, geo.rows, spec.head_dim), jnp.float32),
        None if inputs.slopes is None else jnp.zeros((outers, geo.rows), jnp.float32),
        d_bias,
    )


def _query_tile(spec, geo, saved, outer, n, grads, dtype):
    """Add query tile ``n`` of the group, a tile of row ``outer`` of the queries, to the running gradients."""
    inputs, local = saved.inputs, n // geo.q_tiles
    where = tiles.place(spec, geo, inputs, outer)
    rows = tiles.rows_of(spec, geo, inputs, where, n % geo.q_tiles)
    q, d_o = [tiles.cut_head(x, outer, rows.start, geo.q_tile) for x in (inputs.query, saved.d_out)]
    lse, delta = [tiles.cut(x, outer, rows.start, geo.q_tile) for x in (saved.lse, saved.delta)]
    if rows.fresh is not None:  # rows of the previous tile must not count twice: their probabilities become 0
        lse = jnp.where(rows.fresh, lse, jnp.inf)
    q, d_o = tiles.load_query(spec, q, dtype), d_o.astype(dtype)

    def visit(carry, saved, first, count, edge):
        d_q, d_slope, d_key, d_value, d_bias = carry
        inputs, width = saved.inputs, count * geo.kv_tile
        start, extras = tiles.extras_of(spec, geo, inputs, where, rows, first, width, edge)
        k = tiles.clean(tiles.cut_head(inputs.key, where.kv, start, width).astype(dtype), extras)
        v = tiles.clean(tiles.cut_head(inputs.value, where.kv, start, width).astype(dtype), extras)
        k_t = lax.dynamic_slice(saved.key_t, (0, start), (spec.head_dim, width))
        k_t = tiles.clean(k_t, extras, flip=True)
        p, d_s, d_raw = score_grads(spec, q, k, v, d_o, lse, delta, extras, rows.key, flip=True)
        if d_bias is not None:
            d_bias = _add_bias(geo, d_bias, where, rows, start, d_s)
        if d_slope is not None:
            d_slope = d_slope - (d_s * tiles.distance(extras, True)).sum(axis=0)
        d_raw = d_raw.astype(dtype)
        d_key = _add(d_key, tiles.nn(d_raw, q), start)
        d_value = _add(d_value, tiles.nn(p.astype(dtype), d_o), start)
        return d_q + tiles.nn(k_t, d_raw), d_slope, d_key, d_value, d_bias

    d_q = jnp.zeros((spec.head_dim, geo.q_tile), jnp.float32)
    d_slope = None if grads.slopes is None else jnp.zeros((geo.q_tile,), jnp.float32)
    limits = tiles.bounds(spec, geo, inputs, where, rows)
    carry = d_q, d_slope, grads.key, grads.value, grads.bias
    d_q, d_slope, d_key, d_value, d_bias = tiles.sweep(geo, limits, visit, carry, saved, WIDTHS)
    d_q = lax.optimization_barrier(d_q).T * spec.scale  # the barrier: as in `backward`
    d_query = _add(grads.query, d_q[None], local, rows.start)
    slopes = None if d_slope is None else _add(grads.slopes, d_slope[None], local, rows.start)
    return Grads(d_key, d_value, d_query, slopes, d_bias)


def _add(x, part, *corner):
    """``x`` with ``part`` added at ``corner`` (in place inside a loop)."""
    corner = corner + (0,) * (x.ndim - len(corner))
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, corner, part.shape) + part, corner)


def score_grads(spec, q, k, v, d_o, lse, delta, extras, row_key, flip, by=tiles.EXACT):
    """Probabilities that multiplied V, gradients of the scores behind and before the soft cap; (R, C), (C, R) if flip.

    ``lse`` is +inf for rows that see no key.
    """
    s, squashed = tiles.scores(spec, q, k, extras, flip, by)
    p = by.exp(s - tiles.row(lse, flip))
    d_p = tiles.nt(v, d_o) if flip else tiles.nt(d_o, v)
    applied = p
    if spec.dropout_rate:
        keep = tiles.kept(spec, row_key, extras, flip)
        grow = 1.0 / (1.0 - spec.dropout_rate)
        applied, d_p = jnp.where(keep, p * grow, 0.0), jnp.where(keep, d_p * grow, 0.0)
    d_s = p * (d_p - tiles.row(delta, flip))
    raw = d_s if squashed is None else d_s * (1.0 - squashed * squashed)
    return applied, d_s, raw


def _add_bias(geo, d_bias, where, rows, start, d_s):
    """Add a tile's dS (C, R) to the gradient of the (1|B, 1|N, 1|Sq, 1|Sk) bias."""
    b, n, sq, sk = d_bias.shape
    part = d_s.T.reshape(geo.stack, geo.q_tile // geo.stack, -1)
    sums = tuple(axis for axis, size in enumerate((n, sq, sk)) if size == 1)
    part = part.sum(axis=sums, keepdims=True)[None]
    zero = jnp.int32(0)
    return _add(
        d_bias,
        part,
        where.batch if b > 1 else zero,
        where.head if n > 1 else zero,
        rows.start if sq > 1 and geo.stack == 1 else zero,
        start if sk > 1 else zero,
    )
