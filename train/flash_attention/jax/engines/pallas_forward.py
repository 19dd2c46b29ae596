"""Forward kernel of the `pallas` engine: one program a query tile and head, a loop over the key tiles it visits.

Where few queries meet many keys (a step of decoding), the query heads that share a key/value head are the rows of one
tile, which reads their keys once; programs share out these keys, and their results are merged by LSE (Dao et al.,
"Flash-Decoding", 2023).
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from flash_attention.core.lse import merge
from flash_attention.jax.engines import pallas_sizes as sizes
from flash_attention.jax.engines import pallas_tiles as tiling
from flash_attention.jax.engines import xla_tiles
from flash_attention.jax.engines.shared import add_sinks, swapped
from flash_attention.jax.engines.xla_forward import accumulate, finish, start_of


def forward(spec, query, key, value, operands):
    """``(body, arrays)``: ``body(platform, arrays)`` gives (out in the layout of the query, lse (B, N, Sq))."""
    if sizes.stacks(spec):
        return _forward_of_groups(spec, query, key, value, operands)
    tiles = sizes.tiles_of(spec, "forward")
    plan = tiling.plan_by_query(spec, operands, tiles)
    found = tiling.operands_of(spec, query, key, value, operands, plan)
    return _call(spec, tiles, found, xla_tiles.out_dtype(spec, query))


def _forward_of_groups(spec, query, key, value, operands):
    """As :func:`forward`: (B, kv_heads, group * Sq) rows, the heads of a group one after the other."""
    rows, dtype = sizes.stacked(spec), xla_tiles.out_dtype(spec, query)
    tiles = sizes.tiles_of(rows, "forward")
    plan = tiling.plan_by_query(spec, operands, tiles)  # a single tile, which sees what the queries of one head see
    position = jnp.tile(tiling.positions(spec, operands), spec.group)
    found = tiling.operands_of(rows, query, key, value, operands, plan, position)
    heads_first = swapped(spec, query)
    found["query"] = heads_first.reshape(query.shape[0], spec.kv_heads, -1, spec.head_dim), "bnqd"
    body, arrays = _call(rows, tiles, found, jnp.float32 if spec.sinks else dtype)

    def whole(platform, arrays):
        arrays, sinks = arrays
        out, lse = body(platform, arrays)
        out, lse = out.reshape(heads_first.shape), lse.reshape(heads_first.shape[:3])
        if spec.sinks:
            out, lse = add_sinks(out, lse, sinks)
        return swapped(spec, out.astype(dtype)), lse

    return whole, (arrays, operands.sinks)


def _call(spec, tiles, found, dtype):
    """``(body, arrays)``: ``body(platform, arrays)`` gives (out like the query in ``found``, lse (B, N, Sq))."""
    parts, (query, axes) = sizes.parts_of(spec, tiles), found["query"]
    batch = query.shape[0]
    if parts == 1:
        outs = [(query.shape, dtype, axes), ((batch, spec.heads, spec.q_len), jnp.float32, "bnq")]
        grid = (pl.cdiv(spec.q_len, tiles.rows), spec.heads, batch)
        return tiling.call(spec, tiles, _kernel, "flash_attention_forward", grid, found, outs)

    # One query tile a head: the axis of query tiles is that of the parts.
    rows = (batch, spec.heads, parts * tiles.rows)
    outs = [(rows + (spec.head_dim,), jnp.float32, "bnqd"), (rows, jnp.float32, "bnq")]
    grid, name = (parts, spec.heads, batch), "flash_attention_forward_of_parts"
    kernel = functools.partial(_kernel, parts=parts)
    partial_results, arrays = tiling.call(spec, tiles, kernel, name, grid, found, outs)

    def body(platform, arrays):
        out, lse = (
            [x[:, :, first : first + spec.q_len] for first in range(0, parts * tiles.rows, tiles.rows)]
            for x in partial_results(platform, arrays)
        )
        out, lse = merge(jnp, out, lse)
        if spec.sinks:
            out, lse = add_sinks(out, lse, arrays["sinks"])
        out = out.astype(dtype)
        return out if axes == "bnqd" else jnp.swapaxes(out, 1, 2), lse

    return body, arrays


def _kernel(refs, out_ref, lse_ref, parts=1):
    spec, tiles = refs.spec, refs.tiles
    part, tile = (pl.program_id(0), 0) if parts > 1 else (0, pl.program_id(0))
    rows, exists = refs.rows(tile)
    q = refs.heads("query", rows.start, exists)
    in_units, factor, by = refs.units
    q = xla_tiles.load_query(in_units, q, q.dtype)

    def visit(n, edge, state):
        start, column, key_exists = refs.keys(n)
        extras = refs.extras(rows, exists, start, column, key_exists, edge)
        k, v = (refs.heads(name, start, key_exists if edge else None) for name in ("key", "value"))
        return accumulate(in_units, state, q, k, v, extras, rows.key, by)

    state, bounds = start_of(in_units, tiles.rows, tiles.dim), refs.bounds(tile)
    bounds = _part_of(bounds, part, parts) if parts > 1 else bounds
    out, peak, total = tiling.sweep(spec, tiles, bounds, visit, state)
    state = out, peak * (1.0 / factor), total
    sink = jnp.full((tiles.rows,), refs.read("sinks")) if "sinks" in refs and parts == 1 else None
    out, lse = finish(spec, state, sink, ~exists if spec.q_lengths else None)
    axes = refs.axes["query"] if parts == 1 else "bnqd"
    tiling.store(spec, out_ref, axes, out, q=rows.start)
    tiling.store(spec, lse_ref, "bnq", lse, q=rows.start)


def _part_of(bounds, number, parts):
    """The bounds of part ``number`` when the visited tiles are shared out over so many ``parts``."""
    first, stop, inner, end = bounds
    size = (stop - first + parts - 1) // parts
    low = jnp.minimum(first + number * size, stop)
    high = jnp.minimum(low + size, stop)
    return low, high, jnp.clip(inner, low, high), jnp.clip(end, low, high)
