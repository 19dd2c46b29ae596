"""Forward kernel of the `mosaic` engine: a block a tile of queries and head, over the key tiles that it visits."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention.jax.engines import mosaic_sizes as sizes
from flash_attention.jax.engines import mosaic_tiles as tiling
from flash_attention.jax.engines import pallas_tiles
from flash_attention.jax.engines.mosaic_operations import ROW, along, filled
from flash_attention.jax.engines.xla_forward import bounded
from flash_attention.jax.engines.xla_tiles import LOWEST


def forward(spec, ops, query, key, value, operands):
    """``(out like the query, lse (B, N, Sq) float32)``.

    Args:
        ops: :class:`mosaic_operations.Hopper`, or what interprets it.
    """
    tiles = sizes.tiles_of(spec, "forward")
    plan = pallas_tiles.plan_by_query(spec, operands, tiles)
    found = tiling.operands_of(spec, ops, tiles, query, key, value, operands, plan)
    grid = plan.shape[1], spec.heads, query.shape[0]
    outs = [
        jax.ShapeDtypeStruct(found["query"].shape, query.dtype),
        jax.ShapeDtypeStruct((query.shape[0], spec.heads, plan.shape[1] * tiles.rows), jnp.float32),
    ]
    name = "flash_attention_forward"
    out, lse = tiling.call(spec, ops, tiles, "forward", _kernel, name, grid, found, outs)
    return tiling.cut(spec, out, spec.q_len), lse[:, :, : spec.q_len]


def _kernel(program, outs, resident, arrived, row, rings):
    visits, (keys, values) = program.visits(), rings
    spec = program.spec

    def compute():
        (q,), barrier = tiling.fetch(program, ("query",), resident, arrived)
        row_of = row.at[program.warpgroup]
        rows = tiling.Rows(program, program.start, program.own, ROW, program.head, held=True)
        plgpu.barrier_wait(barrier)

        def visit(n, tile, edge, state):
            return _accumulate(rows, state, q, keys, values, n, tile * program.streamed, edge)

        out, lse = _finish(rows, visits.sweep(visit, _start(program)))
        q[...] = out.astype(q.dtype)
        row_of[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, program.heads(outs[0], *program.place))
        part = pl.ds(program.start, program.own)
        plgpu.copy_smem_to_gmem(row_of, outs[1].at[program.batch, program.head, part])
        plgpu.wait_smem_to_gmem(0)

    tiling.by_role(program, compute, lambda: copy_keys(program, visits, keys, values, spec.group))


def copy_keys(program, visits, keys, values, group):
    """The copying warpgroup's work where keys are streamed."""
    head = program.head // group if group > 1 else program.head

    def copy(n, tile, edge, carry):
        for name, ring in (("key", keys), ("value", values)):
            ring.copy(n, program.heads(name, head, tile * program.streamed, program.streamed))
        return carry

    visits.sweep(copy, None)
    for ring in (keys, values):
        ring.drain(visits.count)


def _start(program):
    """(unnormalised output, running maximum, running sum) before any key, as :func:`xla_forward.start_of`."""
    peak = 0.0 if bounded(program.units.spec) else LOWEST
    rows = (program.own,)
    return (
        filled(program.ops, rows + (program.spec.head_dim,)),
        filled(program.ops, rows, peak),
        filled(program.ops, rows),
    )


def _accumulate(rows, state, q, keys, values, n, key_start, edge):
    """Add the keys of step ``n`` to the running softmax of a warpgroup's rows."""
    (out, peak, total), program = state, rows.program
    exp = program.units.arithmetic.exp
    s = program.ops.product(q, keys.wait(n))
    keys.release(n)
    s, _ = tiling.scores(s, rows, key_start, edge)
    if bounded(program.units.spec):
        p = exp(s)
    else:
        new = jnp.maximum(peak, s.max(axis=1))
        p = exp(s - along(new, s.shape, ROW))
        shrink = exp(peak - new)
        out, total, peak = out * along(shrink, out.shape, ROW), total * shrink, new
    total = total + p.sum(axis=1)
    out = program.ops.add_product(out, p.astype(q.dtype), values.wait(n))
    values.release(n)
    return out, peak, total


def _finish(rows, state):
    """Normalised ``(out, lse)``, the LSE natural; rows that see no key give 0 and -inf."""
    (out, peak, total), program = state, rows.program
    exp, factor = program.units.arithmetic.exp, program.units.factor
    dead = total == 0.0
    if program.spec.q_lengths:  # rows beyond them met the keys of tiles without a predicate
        dead = dead | (rows["low"] > rows["high"])
    if "sinks" in program:  # one more key, whose value is 0
        sink = program.ops.vector(jnp.full(peak.shape, program.scalar("sinks", program.head) * factor))
        new = jnp.maximum(peak, sink)
        shrink = exp(peak - new)
        out, total, peak = out * along(shrink, out.shape, ROW), total * shrink + exp(sink - new), new
    safe = jnp.where(dead, 1.0, total)
    lse = jnp.where(dead, -jnp.inf, peak * (1.0 / factor) + jnp.log(safe))
    share = jnp.where(dead, 0.0, 1.0 / safe)
    return out * along(share, out.shape, ROW), lse
