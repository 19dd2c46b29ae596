"""Forward kernel of the `pallas` engine: one program a query tile and head, a loop over the key tiles it visits."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from flash_attention.jax.engines import pallas_sizes as sizes
from flash_attention.jax.engines import pallas_tiles as tiling
from flash_attention.jax.engines import xla_tiles
from flash_attention.jax.engines.xla_forward import accumulate, finish, start_of


def forward(spec, query, key, value, operands):
    """``(body, arrays)``: ``body(interpret, arrays)`` gives [out in the layout of the query, lse (B, N, Sq)]."""
    tiles = sizes.tiles_of(spec, "forward")
    plan = tiling.plan_by_query(spec, operands, tiles)
    found = tiling.operands_of(spec, query, key, value, operands, plan)
    batch, axes = query.shape[0], tiling.axes_of_heads(spec)[0]
    outs = [
        (query.shape, xla_tiles.out_dtype(spec, query), axes),
        ((batch, spec.heads, spec.q_len), jnp.float32, "bnq"),
    ]
    grid = (pl.cdiv(spec.q_len, tiles.rows), spec.heads, batch)
    return tiling.call(spec, tiles, _kernel, "flash_attention_forward", grid, found, outs)


def _kernel(refs, out_ref, lse_ref):
    spec, tiles, tile = refs.spec, refs.tiles, pl.program_id(0)
    rows, exists = refs.rows(tile)
    q = refs.heads("query", rows.start, exists)
    q = xla_tiles.load_query(spec, q, q.dtype)

    def visit(n, edge, state):
        start, column, key_exists = refs.keys(n)
        extras = refs.extras(rows, exists, start, column, key_exists, edge)
        k, v = (refs.heads(name, start, key_exists if edge else None) for name in ("key", "value"))
        return accumulate(spec, state, q, k, v, extras, rows.key)

    state = start_of(spec, tiles.rows, tiles.dim)
    state = tiling.sweep(spec, tiles, refs.bounds(tile), visit, state)
    sink = jnp.full((tiles.rows,), refs.read("sinks", n=0)) if "sinks" in refs else None
    out, lse = finish(spec, state, sink, ~exists if spec.q_lengths else None)
    tiling.store_heads(refs, out_ref, "query", out)
    tiling.store_rows(refs, lse_ref, lse)
