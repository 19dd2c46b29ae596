"""Forward kernel of the `pallas` engine: one program a query tile and head, a loop over the key tiles it visits.

Where few queries meet many keys (a step of decoding), programs share out the keys of a head, and their results are
merged by LSE (Dao et al., "Flash-Decoding", 2023).
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
    """``(body, arrays)``: ``body(interpret, arrays)`` gives (out in the layout of the query, lse (B, N, Sq))."""
    tiles = sizes.tiles_of(spec, "forward")
    parts = sizes.parts_of(spec, tiles)
    plan = tiling.plan_by_query(spec, operands, tiles)
    found = tiling.operands_of(spec, query, key, value, operands, plan)
    batch, dtype, axes = query.shape[0], xla_tiles.out_dtype(spec, query), tiling.axes_of_heads(spec)[0]
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

    def body(interpret, arrays):
        out, lse = (
            [x[:, :, first : first + spec.q_len] for first in range(0, parts * tiles.rows, tiles.rows)]
            for x in partial_results(interpret, arrays)
        )
        out, lse = merge(jnp, out, lse)
        if spec.sinks:
            out, lse = add_sinks(out, lse, arrays["sinks"])
        return swapped(spec, out.astype(dtype)), lse

    return body, arrays


def _kernel(refs, out_ref, lse_ref, parts=1):
    spec, tiles = refs.spec, refs.tiles
    part, tile = (pl.program_id(0), 0) if parts > 1 else (0, pl.program_id(0))
    rows, exists = refs.rows(tile)
    q = refs.heads("query", rows.start, exists)
    q = xla_tiles.load_query(spec, q, q.dtype)

    def visit(n, edge, state):
        start, column, key_exists = refs.keys(n)
        extras = refs.extras(rows, exists, start, column, key_exists, edge)
        k, v = (refs.heads(name, start, key_exists if edge else None) for name in ("key", "value"))
        return accumulate(spec, state, q, k, v, extras, rows.key)

    state, bounds = start_of(spec, tiles.rows, tiles.dim), refs.bounds(tile)
    bounds = _part_of(bounds, part, parts) if parts > 1 else bounds
    state = tiling.sweep(spec, tiles, bounds, visit, state)
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
