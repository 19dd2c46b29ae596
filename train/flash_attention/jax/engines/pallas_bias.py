"""Backward kernel of the `pallas` engine for the bias: one program a tile of the bias, over everything that adds to it.

A bias (1|B, 1|N, 1|Sq, 1|Sk) meets several tiles of scores where an axis is broadcast; its program visits all of them,
those of the plan alone, and writes the sum once: no copy of the gradient a head, and the same bits on every run.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flash_attention.jax.engines import pallas_sizes as sizes
from flash_attention.jax.engines import pallas_tiles as tiling
from flash_attention.jax.engines.pallas_backward import of_query_tile, operands_of
from flash_attention.jax.engines.xla_backward import score_grads


def bias_gradient(spec, query, key, value, operands, d_out, lse, delta):
    """``(body, arrays)``: ``body(platform, arrays)`` gives [dBias like the bias, float32].

    Args as ``pallas_backward.query_gradient``.
    """
    tiles = sizes.tiles_of(spec, "bias")
    plan = tiling.plan_by_query(spec, operands, tiles)
    found = operands_of(spec, query, key, value, operands, plan, d_out, lse, delta)
    batch, heads = spec.bias_shape[:2]
    axes = tiling.axes_of_window(spec, spec.bias_shape)
    down, across = _tiles_of_bias(spec, tiles, axes)
    span = tiling.Span(spec.heads // heads, query.shape[0] // batch)
    grid, outs = (down * across, heads, batch), [(spec.bias_shape, jnp.float32, axes)]
    return tiling.call(spec, tiles, _kernel, "flash_attention_bias_gradient", grid, found, outs, span)


def _tiles_of_bias(spec, tiles, axes):
    """Tiles of the bias along the queries and along the keys."""
    return (
        pl.cdiv(spec.q_len, tiles.rows) if "q" in axes else 1,
        pl.cdiv(spec.kv_len, tiles.keys) if "k" in axes else 1,
    )


def _kernel(refs, d_bias_ref):
    spec, tiles, span, axes = refs.spec, refs.tiles, refs.span, refs.axes["bias"]
    _, across = _tiles_of_bias(spec, tiles, axes)
    down, right = tiling.row_and_column(pl.program_id(0), across)
    rows = (down, down + 1) if "q" in axes else (0, pl.cdiv(spec.q_len, tiles.rows))
    columns = (right, right + 1) if "k" in axes else (0, pl.cdiv(spec.kv_len, tiles.keys))
    broadcast = [axis for axis, letter in enumerate(axes[2:]) if letter == "-"]

    def of_head(number, total):
        batch, head = tiling.row_and_column(number, span.heads)
        own = refs.at(head, batch)

        def of_rows(tile, total):
            given = of_query_tile(own, tile)
            first, stop, _, _ = own.bounds(tile)

            def visit(n, total):
                d_s = _score_gradient(own, n, *given)
                for axis in broadcast:
                    d_s = d_s.sum(axis=axis, keepdims=True)
                return total + d_s

            return lax.fori_loop(jnp.maximum(first, columns[0]), jnp.minimum(stop, columns[1]), visit, total)

        return lax.fori_loop(*rows, of_rows, total)

    shape = [1 if axis in broadcast else size for axis, size in enumerate((tiles.rows, tiles.keys))]
    total = jnp.zeros(shape, jnp.float32)
    count = span.heads * span.batch
    total = lax.fori_loop(0, count, of_head, total) if count > 1 else of_head(0, total)
    tiling.store(spec, d_bias_ref, axes, total, q=down * tiles.rows, k=right * tiles.keys)


def _score_gradient(refs, n, rows, exists, q, d_o, lse, delta):
    """dS (R, C), behind the soft cap, of a query tile and key tile ``n``."""
    start, column, key_exists = refs.keys(n)
    extras = refs.extras(rows, exists, start, column, key_exists, True)
    k, v = (refs.heads(name, start, key_exists) for name in ("key", "value"))
    spec, _, by = refs.units
    return score_grads(spec, q, k, v, d_o, lse, delta, extras, rows.key, False, by)[1]
