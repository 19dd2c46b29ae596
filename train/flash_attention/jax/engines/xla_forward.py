"""Forward direction of the `xla` engine: FlashAttention-2's loop over query tiles, then over their visited keys."""

import jax.numpy as jnp
from jax import lax

from flash_attention.jax.engines import cpu
from flash_attention.jax.engines import xla_tiles as tiles

WIDTHS = (2, 1)
"""Inner key tiles in one softmax: [512, 1024] scores save a rescaling and stay in the cache."""

SAFE_CAP = 60.0
"""Scores within +-60 need no running maximum: exp(60) times 2**29 keys is below float32's largest number."""


def forward(spec, geo, inputs, sinks):
    """``(out (T, R, D) in the query's dtype, lse (T, R) float32)``; sinks (T, R) float32 or None.

    The output of a wide spec is float32.
    """
    dtype = cpu.dot_dtype(inputs.query.dtype, geo.q_tile)

    def tile(outer, i, inputs):
        where = tiles.place(spec, geo, inputs, outer)
        rows = tiles.rows_of(spec, geo, inputs, where, i)
        limits = tiles.bounds(spec, geo, inputs, where, rows)
        q = tiles.cut_head(inputs.query, outer, rows.start, geo.q_tile)
        q = tiles.load_query(spec, q, dtype)

        def visit(carry, inputs, first, count, edge):
            width = count * geo.kv_tile
            start, extras = tiles.extras_of(spec, geo, inputs, where, rows, first, width, edge)
            k = tiles.cut_head(inputs.key, where.kv, start, width).astype(dtype)
            v = tiles.cut_head(inputs.value, where.kv, start, width).astype(dtype)
            return accumulate(spec, carry, q, k, tiles.clean(v, extras), extras, rows.key)

        state = tiles.sweep(geo, limits, visit, start_of(spec, geo.q_tile, spec.head_dim), inputs, WIDTHS)
        sink = None if sinks is None else tiles.cut(sinks, outer, rows.start, geo.q_tile)
        absent = None
        if inputs.q_lengths is not None:
            absent = rows.index >= tiles.at(inputs.q_lengths, where.batch)
        out, lse = finish(spec, state, sink, absent)
        return rows.start, out, lse

    def head(outer, carry, inputs):
        if geo.q_tiles > 1:
            inputs = tiles.with_own_keys(inputs, tiles.place(spec, geo, inputs, outer).kv)

        def body(i, done, inputs):
            start, out, lse = tile(outer, i, inputs)
            return (
                lax.dynamic_update_slice(done[0], out, (start, 0)),
                lax.dynamic_update_slice(done[1], lse, (start,)),
            )

        done = jnp.zeros((geo.rows, spec.head_dim), jnp.float32), jnp.zeros((geo.rows,), jnp.float32)
        out, lse = tiles.loop(geo.q_tiles, body, done, inputs)
        return carry, (out.astype(tiles.out_dtype(spec, inputs.query)), lse)

    return tiles.over_heads(geo, head, tiles.count_heads(inputs.query), inputs)[1]


def start_of(spec, rows, dim):
    """(unnormalised output (rows, dim), running maximum (rows,), running sum (rows,)) before any key."""
    peak = 0.0 if bounded(spec) else tiles.LOWEST
    return (
        jnp.zeros((rows, dim), jnp.float32),
        jnp.full((rows,), peak, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )


def bounded(spec):
    """True when the soft cap alone keeps exp(score) finite, so that no running maximum is needed."""
    return (
        spec.soft_cap is not None and spec.soft_cap <= SAFE_CAP and spec.bias_shape is None and spec.alibi_shape is None
    )


def accumulate(spec, state, q, k, v, extras, row_key, by=tiles.EXACT):
    """Add one tile's keys to the running softmax of its rows."""
    out, peak, total = state
    s, _ = tiles.scores(spec, q, k, extras, by=by)
    if bounded(spec):
        p = by.exp(s)
    else:
        new = jnp.maximum(peak, s.max(axis=1))
        p = by.exp(s - new[:, None])
        shrink = by.exp(peak - new)
        out, total, peak = out * shrink[:, None], total * shrink, new
    total = total + p.sum(axis=1)
    if spec.dropout_rate:
        p = jnp.where(tiles.kept(spec, row_key, extras, False), p, 0.0)
    return out + tiles.nn(p.astype(v.dtype), v), peak, total


def finish(spec, state, sink=None, absent=None):
    """Normalise: ``(out (R, D), lse (R,))`` float32; ``absent`` rows and rows that see no key give 0 and -inf."""
    out, peak, total = state
    dead = total == 0.0
    if absent is not None:
        dead = dead | absent
    lse = peak + jnp.log(jnp.where(dead, 1.0, total))
    factor = 1.0 / jnp.where(dead, 1.0, total)
    if sink is not None:
        joint = jnp.logaddexp(lse, sink)
        factor, lse = factor * jnp.exp(lse - joint), joint
    if spec.dropout_rate:
        factor = factor * (1.0 / (1.0 - spec.dropout_rate))
    out = jnp.where(dead[:, None], 0.0, out * factor[:, None])
    return out, jnp.where(dead, -jnp.inf, lse)
