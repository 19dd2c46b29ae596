"""Backward kernels of the `pallas` engine: probabilities are recomputed tile by tile from the saved LSE.

One kernel for dQ (and the slopes' rows), a program a query tile over its key tiles; one for dK and dV, a program a key
tile over its query tiles and the query heads that share it. Neither adds to memory that another program adds to, so a
gradient is the same bit for bit on every run.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flash_attention.jax.engines import pallas_sizes as sizes
from flash_attention.jax.engines import pallas_tiles as tiling
from flash_attention.jax.engines import xla_tiles
from flash_attention.jax.engines.xla_backward import score_grads


def query_gradient(spec, query, key, value, operands, d_out, lse, delta):
    """``(body, arrays)``: ``body(platform, arrays)`` gives [dQ like the query, and the slopes' rows (B, N, Sq)].

    Args:
        d_out: like the query. lse, delta: float32 (B, N, Sq), see :func:`shared.row_statistics`.
    """
    tiles = sizes.tiles_of(spec, "query")
    plan = tiling.plan_by_query(spec, operands, tiles)
    found = operands_of(spec, query, key, value, operands, plan, d_out, lse, delta)
    outs = [(query.shape, xla_tiles.out_dtype(spec, query), tiling.axes_of_heads(spec)[0])]
    if spec.alibi_shape is not None:
        outs.append((lse.shape, jnp.float32, "bnq"))
    grid = (pl.cdiv(spec.q_len, tiles.rows), spec.heads, query.shape[0])
    return tiling.call(spec, tiles, _query_kernel, "flash_attention_query_gradient", grid, found, outs)


def key_gradients(spec, query, key, value, operands, d_out, lse, delta):
    """``(body, arrays)``: ``body(platform, arrays)`` gives [dK, dV] like the key. Args as :func:`query_gradient`."""
    tiles = sizes.tiles_of(spec, "key")
    plan = tiling.plan_by_key(spec, operands, tiles)
    found = operands_of(spec, query, key, value, operands, plan, d_out, lse, delta)
    outs = [(key.shape, xla_tiles.out_dtype(spec, key), tiling.axes_of_heads(spec)[1])] * 2
    grid = (pl.cdiv(spec.kv_len, tiles.keys), spec.kv_heads, key.shape[0])
    name = "flash_attention_key_gradients"
    return tiling.call(spec, tiles, _key_kernel, name, grid, found, outs, tiling.Span(heads=spec.group))


def operands_of(spec, query, key, value, operands, plan, d_out, lse, delta):
    """``{name: (array, axes)}`` of what a backward kernel reads."""
    found = tiling.operands_of(spec, query, key, value, operands, plan)
    found.pop("sinks", None)  # their gradient needs no tile
    found["d_out"] = (d_out.astype(query.dtype), tiling.axes_of_heads(spec)[0])
    found.update(lse=(lse, "bnq"), delta=(delta, "bnq"))
    return found


def of_query_tile(refs, tile):
    """(rows, which exist, q, dO, lse, delta) of a query tile; rows that do not exist have no probability."""
    rows, exists = refs.rows(tile)
    q, d_o = (refs.heads(name, rows.start, exists) for name in ("query", "d_out"))
    lse, delta = refs.per_row("lse", rows, exists, jnp.inf), refs.per_row("delta", rows, exists)
    q = xla_tiles.load_query(refs.units.spec, q, q.dtype)
    return rows, exists, q, d_o, lse * refs.units.factor, delta


def _query_kernel(refs, d_query_ref, d_slopes_ref=None):
    spec, tiles, by, tile = refs.spec, refs.tiles, refs.units.arithmetic, pl.program_id(0)
    rows, exists, q, d_o, lse, delta = of_query_tile(refs, tile)

    def visit(n, edge, carry):
        d_q, d_slope = carry
        start, column, key_exists = refs.keys(n)
        extras = refs.extras(rows, exists, start, column, key_exists, edge)
        k, v = (refs.heads(name, start, key_exists if edge else None) for name in ("key", "value"))
        _, d_s, d_raw = score_grads(refs.units.spec, q, k, v, d_o, lse, delta, extras, rows.key, False, by)
        if d_slopes_ref is not None:
            d_slope = d_slope - (d_s * xla_tiles.distance(extras, False)).sum(axis=1)
        return d_q + xla_tiles.nn(d_raw.astype(k.dtype), k), d_slope

    carry = jnp.zeros((tiles.rows, tiles.dim), jnp.float32), jnp.zeros((tiles.rows,), jnp.float32)
    d_q, d_slope = tiling.sweep(spec, tiles, refs.bounds(tile), visit, carry)
    tiling.store(spec, d_query_ref, refs.axes["query"], d_q * spec.scale, q=rows.start)
    if d_slopes_ref is not None:
        tiling.store(spec, d_slopes_ref, "bnq", d_slope, q=rows.start)


def _key_kernel(refs, d_key_ref, d_value_ref):
    spec, tiles, by, tile = refs.spec, refs.tiles, refs.units.arithmetic, pl.program_id(0)
    start, column, key_exists = refs.keys(tile)
    k, v = (refs.heads(name, start, key_exists) for name in ("key", "value"))

    def of_head(head, carry):
        own = refs.at(head)

        def visit(n, edge, carry):
            d_k, d_v = carry
            rows, exists, q, d_o, lse, delta = of_query_tile(own, n)
            extras = own.extras(rows, exists, start, column, key_exists, edge)
            p, _, d_raw = score_grads(refs.units.spec, q, k, v, d_o, lse, delta, extras, rows.key, True, by)
            d_k = d_k + xla_tiles.nn(d_raw.astype(q.dtype), q)
            return d_k, d_v + xla_tiles.nn(p.astype(d_o.dtype), d_o)

        return tiling.sweep(spec, tiles, refs.bounds(tile), visit, carry)

    carry = (jnp.zeros((tiles.keys, tiles.dim), jnp.float32),) * 2
    d_k, d_v = lax.fori_loop(0, spec.group, of_head, carry) if spec.group > 1 else of_head(0, carry)
    folded = xla_tiles.folds_scale(refs.units.spec, k.dtype)  # then it is in q, in the kernel's units
    d_k = d_k * (1.0 / refs.units.factor if folded else spec.scale)
    for ref, grad in ((d_key_ref, d_k), (d_value_ref, d_v)):
        tiling.store(spec, ref, refs.axes["key"], grad, k=start)
