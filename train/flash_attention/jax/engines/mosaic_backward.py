"""Backward kernels of the `mosaic` engine: probabilities are recomputed tile by tile from the saved LSE.

One kernel for dQ (and the slopes' rows), a block a tile of queries over its key tiles; one for dK and dV, a block a
tile of keys over its query tiles and the query heads that share it, on transposed tiles (keys x queries), so that each
left operand of a product is in registers already. No two blocks add to the same memory: a gradient is the same bit for
bit on every run.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention.jax.engines import mosaic_sizes as sizes
from flash_attention.jax.engines import mosaic_tiles as tiling
from flash_attention.jax.engines import pallas_tiles
from flash_attention.jax.engines.mosaic_forward import copy_keys
from flash_attention.jax.engines.mosaic_operations import COLUMN, ROW, along, filled


def query_gradient(spec, ops, query, key, value, operands, d_out, lse, delta):
    """``[dQ like the query]``, and with ALiBi the slopes' rows, float32 (B, N, Sq).

    Args:
        ops: as :func:`mosaic_forward.forward`.
        d_out: like the query. lse, delta: float32 (B, N, Sq), see :func:`shared.row_statistics`.
    """
    tiles = sizes.tiles_of(spec, "query")
    plan = pallas_tiles.plan_by_query(spec, operands, tiles)
    found = _operands(spec, ops, tiles, query, key, value, operands, plan, d_out, lse, delta)
    grid = plan.shape[1], spec.heads, query.shape[0]
    outs = [jax.ShapeDtypeStruct(found["query"].shape, query.dtype)]
    if spec.alibi_shape is not None:
        outs.append(jax.ShapeDtypeStruct(found["lse"].shape, jnp.float32))
    name = "flash_attention_query_gradient"
    d_query, *d_slopes = tiling.call(spec, ops, tiles, "query", _query_kernel, name, grid, found, outs)
    return [tiling.cut(spec, d_query, spec.q_len)] + [x[:, :, : spec.q_len] for x in d_slopes]


def key_gradients(spec, ops, query, key, value, operands, d_out, lse, delta):
    """``[dK, dV]`` like the key. Args as :func:`query_gradient`."""
    tiles = sizes.tiles_of(spec, "key")
    plan = pallas_tiles.plan_by_key(spec, operands, tiles)
    found = _operands(spec, ops, tiles, query, key, value, operands, plan, d_out, lse, delta)
    grid = plan.shape[1], spec.kv_heads, key.shape[0]
    outs = [jax.ShapeDtypeStruct(found["key"].shape, key.dtype)] * 2
    name = "flash_attention_key_gradients"
    found = tiling.call(spec, ops, tiles, "key", _key_kernel, name, grid, found, outs)
    return [tiling.cut(spec, x, spec.kv_len) for x in found]


def _operands(spec, ops, tiles, query, key, value, operands, plan, d_out, lse, delta):
    found = tiling.operands_of(spec, ops, tiles, query, key, value, operands, plan, d_out=d_out, lse=lse, delta=delta)
    found.pop("sinks", None)  # their gradient needs no tile
    return found


def _probabilities(s, lse, rows, key_start, edge):
    """Probabilities of a tile from its products, and tanh's value; ``lse`` is a vector of the rows, natural."""
    _, factor, by = rows.program.units
    s, squashed = tiling.scores(s, rows, key_start, edge)
    return by.exp(s - along(lse * factor, s.shape, rows.axis)), squashed


def _score_gradients(p, squashed, d_p, delta, axis):
    """Gradients of the scores behind and before the soft cap, as :func:`xla_backward.score_grads`."""
    d_s = p * (d_p - along(delta, p.shape, axis))
    return d_s, d_s if squashed is None else d_s * (1.0 - squashed * squashed)


def _query_kernel(program, outs, resident, arrived, row, rings):
    visits, (keys, values) = program.visits(), rings
    spec, ops = program.spec, program.ops

    def compute():
        (q, d_o), barrier = tiling.fetch(program, ("query", "d_out"), resident, arrived)
        rows = tiling.Rows(program, program.start, program.own, ROW, program.head, held=True)
        lse, delta = (program.vector(name, program.start, program.own, program.head) for name in ("lse", "delta"))
        plgpu.barrier_wait(barrier)

        def visit(n, tile, edge, carry):
            d_q, d_slope = carry
            start = tile * program.streamed
            k = keys.wait(n)
            p, squashed = _probabilities(ops.product(q, k), lse, rows, start, edge)
            d_p = ops.product(d_o, values.wait(n))
            values.release(n)
            d_s, d_raw = _score_gradients(p, squashed, d_p, delta, ROW)
            if len(outs) > 1:
                d_slope = d_slope - (d_s * tiling.distance(rows, start, d_s.shape)).sum(axis=1)
            d_q = ops.add_product(d_q, d_raw.astype(q.dtype), k)
            keys.release(n)
            return d_q, d_slope

        carry = filled(ops, (program.own, spec.head_dim)), filled(ops, (program.own,))
        d_q, d_slope = visits.sweep(visit, carry)
        q[...] = (d_q * spec.scale).astype(q.dtype)
        if len(outs) > 1:
            row[program.warpgroup] = d_slope
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, program.heads(outs[0], *program.place))
        if len(outs) > 1:
            part = pl.ds(program.start, program.own)
            plgpu.copy_smem_to_gmem(row.at[program.warpgroup], outs[1].at[program.batch, program.head, part])
        plgpu.wait_smem_to_gmem(0)

    tiling.by_role(program, compute, lambda: copy_keys(program, visits, keys, values, spec.group))


def _key_kernel(program, outs, resident, arrived, row, rings):
    visits, (queries, cotangents) = program.visits(), rings
    spec, ops = program.spec, program.ops

    def over_heads(visit, carry):
        """``carry = visit(step, tile, edge, carry, query head)`` over the heads that share the keys."""

        def of_head(number, carry):
            head, before = program.head * spec.group + number, number * visits.count
            return visits.sweep(lambda n, tile, edge, carry: visit(before + n, tile, edge, carry, head), carry)

        return lax.fori_loop(0, spec.group, of_head, carry) if spec.group > 1 else of_head(0, carry)

    def compute():
        (k, v), barrier = tiling.fetch(program, ("key", "value"), resident, arrived)
        plgpu.barrier_wait(barrier)

        def visit(n, tile, edge, carry, head):
            d_k, d_v = carry
            rows = tiling.Rows(program, tile * program.streamed, program.streamed, COLUMN, head)
            q = queries.wait(n)
            lse = ops.load(queries.values_of(n), COLUMN)
            p, squashed = _probabilities(ops.product(k, q), lse, rows, program.start, edge)
            d_o = cotangents.wait(n)
            d_v = ops.add_product(d_v, p.astype(k.dtype), d_o)
            d_p = ops.product(v, d_o)
            delta = ops.load(cotangents.values_of(n), COLUMN)
            cotangents.release(n)
            _, d_raw = _score_gradients(p, squashed, d_p, delta, COLUMN)
            d_k = ops.add_product(d_k, d_raw.astype(k.dtype), q)
            queries.release(n)
            return d_k, d_v

        zero = filled(ops, (program.own, spec.head_dim))
        d_k, d_v = over_heads(visit, (zero, zero))
        for buffer, grad, out in ((k, d_k * spec.scale, outs[0]), (v, d_v, outs[1])):
            buffer[...] = grad.astype(buffer.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, program.heads(out, *program.place))
        plgpu.wait_smem_to_gmem(0)

    def copy():
        def copy(n, tile, edge, carry, head):
            part = tile * program.streamed, program.streamed
            for name, values, ring in (("query", "lse", queries), ("d_out", "delta", cotangents)):
                ring.copy(n, program.heads(name, head, *part), program.values(values, *part, head))
            return carry

        over_heads(copy, None)
        for ring in rings:
            ring.drain(spec.group * visits.count)

    tiling.by_role(program, compute, copy)
