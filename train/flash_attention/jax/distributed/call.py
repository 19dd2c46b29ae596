"""Attention over a mesh: the functional call with ``mesh=``. Inputs and outputs are whole (global) arrays.

user call -> spec -> plan.py -> **shard_map** -> exchange.py (placement) -> ring.py -> back.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flash_attention.core.spec import Operands
from flash_attention.jax.distributed import exchange
from flash_attention.jax.distributed.mesh import Axes, index_along, shard_map
from flash_attention.jax.distributed.plan import make_plan
from flash_attention.jax.distributed.ring import Shard, Static, circulate, pair_spec
from flash_attention.jax.engines import xla
from flash_attention.jax.engines.shared import add_sinks
from flash_attention.jax.functional import call_of, prepare

LAYER = "distributed.attention"


def attention(
    query,
    key,
    value,
    *,
    mesh,
    axes=Axes(),
    strategy=None,
    ulysses=None,
    scan=True,
    layout="BSND",
    return_lse=False,
    **arguments,
):
    """Exact attention with batch, heads and sequence split over a mesh; equal to ``flash_attention`` up to rounding.

    Args:
        query: (B, T, N, D); key, value: (B, S, K, D): whole arrays, best sharded as (batch, sequence, heads, None).
        mesh: ``jax.sharding.Mesh``.
        axes: :class:`Axes`, the mesh's axes by role. What an axis does not divide is replicated over it, which the
            logger 'flash_attention' says once.
        strategy: how the sequence is split; None chooses by what is sent:
            'ring': keys and values travel, N and K may be anything (Liu et al., 2023, zig-zag when causal);
            'ulysses': an all-to-all trades tokens for heads (Jacobs et al., 2023), the heads of a device divide by it;
            'ring+ulysses': groups of ``ulysses`` neighbours trade heads, keys travel from group to group;
            'gather': every device gathers all keys and values, once;
            'merge': keys stay, every device takes all queries, results are merged (decoding).
        scan: the hops of a ring in one loop, compiled once; False: one after the other. Then XLA may keep the keys that
            travelled forward for the backward (jax 0.10 does): less is sent, but a device holds all keys.
        layout, return_lse: as in ``flash_attention``.
        arguments: any other keyword of ``flash_attention.jax.flash_attention`` that describes the attention.

    Returns:
        as ``flash_attention``. Differentiable in the same tensors; works inside ``jax.jit``.

    Raises:
        ValueError, TypeError: bad argument. UnsupportedError: the strategy cannot run this call, with the reason.
    """
    spec, operands = prepare(LAYER, query, key, value, *call_of(layout=layout, **arguments))
    reason = xla.supports(spec)
    if reason is not None:
        raise reason.error(LAYER)
    plan = make_plan(LAYER, spec, mesh, axes, strategy, ulysses)
    for note in plan.notes:
        _say(note)
    out, lse = _run(plan, mesh, scan, layout, *map(jnp.asarray, (query, key, value)), operands)
    return (out, lse) if return_lse else out


def explain(query, key, value, *, mesh, axes=Axes(), strategy=None, ulysses=None, layout="BSND", **arguments):
    """The :class:`~flash_attention.jax.distributed.plan.Plan` that :func:`attention` would follow; ``print`` it.

    Shapes are enough: query, key and value may be ``jax.ShapeDtypeStruct``.
    """
    spec, _ = prepare(LAYER, query, key, value, *call_of(layout=layout, **arguments))
    return make_plan(LAYER, spec, mesh, axes, strategy, ulysses)


@functools.lru_cache(maxsize=None)
def _say(note):
    logging.getLogger("flash_attention").warning("%s: %s", LAYER, note)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(plan, mesh, scan, layout, query, key, value, operands):
    if layout == "BSND":
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    tensors = dict(_padded(plan, query, key, value, operands))
    specs = _specs(plan, tensors)
    rows = PartitionSpec(*specs["query"][:3])
    function = shard_map(functools.partial(_on_device, plan, scan), mesh, (specs,), (specs["query"], rows))
    out, lse = function(tensors)
    out, lse = out[:, :, : plan.spec.q_len], lse[:, :, : plan.spec.q_len]
    return (jnp.swapaxes(out, 1, 2) if layout == "BSND" else out), lse


def _padded(plan, query, key, value, operands):
    """Pairs (name, array) of what is there, padded to equal chunks; padded keys are hidden by their number."""

    def pad(x, tokens):  # {axis: tokens added}, where the axis is not broadcast
        widths = [(0, tokens.get(axis, 0) if size > 1 or x.ndim == 2 else 0) for axis, size in enumerate(x.shape)]
        return jnp.pad(x, widths) if any(after for _, after in widths) else x

    yield "query", jnp.pad(query, [(0, 0), (0, 0), (0, plan.q_pad), (0, 0)])
    for name, x in (("key", key), ("value", value)):
        yield name, jnp.pad(x, [(0, 0), (0, 0), (0, plan.kv_pad), (0, 0)])
    for name, x in zip(Operands._fields, operands):
        if x is None:
            continue
        if name in ("bias", "mask") and x.ndim == 4:
            x = pad(x, {2: plan.q_pad, 3: plan.kv_pad})
        elif name == "q_segment_ids":
            x = pad(x, {1: plan.q_pad})
        elif name == "kv_segment_ids":
            x = pad(x, {1: plan.kv_pad})
        yield name, x.astype(jnp.float32) if name in ("bias", "slopes", "sinks") else x


def _specs(plan, tensors):
    """PartitionSpec of each tensor."""
    batch, heads, keys = plan.batch, plan.heads, plan.sequence
    rows = None if plan.strategy == "merge" else keys

    def per_score(x):
        if x.ndim == 2:  # compact
            return PartitionSpec(None, None)
        axes = (batch, heads, rows, None)
        return PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, x.shape)))

    known = {
        "query": PartitionSpec(batch, heads, rows, None),
        "key": PartitionSpec(batch, plan.kv_heads, keys, None),
        "value": PartitionSpec(batch, plan.kv_heads, keys, None),
        "sinks": PartitionSpec(heads),
        "q_segment_ids": PartitionSpec(batch, rows),
        "kv_segment_ids": PartitionSpec(batch, keys),
        "q_lengths": PartitionSpec(batch),
        "kv_lengths": PartitionSpec(batch),
        "dropout_seed": PartitionSpec(),
    }
    if "slopes" in tensors:
        known["slopes"] = PartitionSpec(heads) if tensors["slopes"].ndim == 1 else PartitionSpec(batch, heads)
    if "q_offset" in tensors:
        known["q_offset"] = PartitionSpec(batch) if tensors["q_offset"].ndim else PartitionSpec()
    return {name: known[name] if name in known else per_score(x) for name, x in tensors.items()}


def _on_device(plan, scan, tensors):
    """One device's part: ``(out (b, n, T, D), lse (b, n, T))`` of its queries."""
    shard = _shard(plan, tensors)
    merged = plan.strategy == "merge"
    sinks = shard.sinks if merged else None
    out, lse = circulate(Static(plan, pair_spec(plan), scan), shard._replace(sinks=None) if merged else shard)
    out, lse = (exchange.from_group(plan, exchange.from_zigzag(plan, x)) for x in (out, lse))
    if merged:
        out, lse = _merged(plan.sequence, out, lse)
        out, lse = (out, lse) if sinks is None else add_sinks(out, lse, sinks)
    return out.astype(tensors["query"].dtype), lse


def _merged(axis, out, lse):
    """Results over the keys of each device -> over all keys, by their LSE; dead rows stay 0 and -inf."""
    peak = lax.pmax(lax.stop_gradient(lse), axis)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weight = jnp.exp(lse - peak)
    total, out = lax.psum(weight, axis), lax.psum(weight[..., None] * out, axis)
    dead = total == 0.0
    total = jnp.where(dead, 1.0, total)
    return out / total[..., None], jnp.where(dead, -jnp.inf, peak + jnp.log(total))


def _shard(plan, tensors):
    """The device's tensors where the ring wants them: own heads, all tokens of the group, chunks."""
    spec, rank = plan.spec, index_along(plan.sequence)
    head = index_along(plan.heads) * plan.local_heads  # first head of this device, of all heads
    neighbour = rank % plan.ulysses * plan.ring_heads  # and after the all-to-all, of those
    key, value = tensors["key"], tensors["value"]
    if plan.head_parts > 1 and plan.kv_heads is None:
        own = (head, plan.local_heads, spec.group, plan.local_kv_heads)
        key, value = (exchange.own_heads(x, *own) for x in (key, value))
    key, value = (_keys_to_group(plan, x, neighbour) for x in (key, value))
    kv_ids = tensors.get("kv_segment_ids")
    if plan.strategy == "gather":
        key, value = (lax.all_gather(x, plan.sequence, axis=2, tiled=True) for x in (key, value))
        kv_ids = None if kv_ids is None else lax.all_gather(kv_ids, plan.sequence, axis=1, tiled=True)

    def heads_of(x):  # (..., n): those of this neighbour
        return None if x is None else lax.dynamic_slice_in_dim(x, neighbour, plan.ring_heads, axis=-1)

    def ids(x):
        if x is None:
            return None
        gathered = x if plan.strategy in ("gather", "merge") else exchange.to_group(plan, x, None, 1)
        return exchange.to_zigzag(plan, gathered, 1)

    return Shard(
        query=exchange.to_zigzag(plan, exchange.to_group(plan, tensors["query"])),
        key=exchange.to_zigzag(plan, key),
        value=exchange.to_zigzag(plan, value),
        bias=_scores(plan, tensors.get("bias"), neighbour),
        mask=_scores(plan, tensors.get("mask"), neighbour),
        slopes=heads_of(tensors.get("slopes")),
        sinks=heads_of(tensors.get("sinks")),
        q_ids=ids(tensors.get("q_segment_ids")),
        kv_ids=ids(kv_ids),
        q_lengths=tensors.get("q_lengths"),
        kv_lengths=tensors.get("kv_lengths"),
        q_offset=tensors.get("q_offset"),
        seed=tensors.get("dropout_seed"),
        origin=jnp.stack([
            jnp.int32(index_along(plan.batch) * (spec.batch // plan.batch_parts)), jnp.int32(head + neighbour)
        ]),
    )  # fmt: skip


def _keys_to_group(plan, x, neighbour):
    """Keys or values through the all-to-all; heads that it cannot split are gathered, and the needed ones kept."""
    if plan.local_kv_heads % plan.ulysses == 0:
        return exchange.to_group(plan, x)
    x = exchange.to_group(plan, x, None)
    group = plan.local_heads // plan.local_kv_heads
    return exchange.own_heads(x, neighbour, plan.ring_heads, group, plan.ring_kv_heads)


def _scores(plan, x, neighbour):
    """A bias or mask (1|b, 1|n, 1|rows, 1|keys) with its rows where the queries are, chunks first."""
    if x is None or x.ndim == 2:
        return x
    by_head, by_row = x.shape[1] > 1, x.shape[2] > 1
    if by_row:
        return exchange.to_zigzag(plan, exchange.to_group(plan, x, 1 if by_head else None))
    if by_head and plan.ulysses > 1:
        x = lax.dynamic_slice_in_dim(x, neighbour, plan.ring_heads, axis=1)
    return x[None]
