"""The ring: attention of one device's queries over keys that travel, forward and backward, exact.

call.py (placement) -> **circulate** -> the `xla` engine on one pair of chunks at a time. Results over different keys
are merged by their LSE; the backward recomputes each pair from the *final* LSE, while the gradients of keys and values
travel with them and go home at the end. Sending the next keys does not depend on computing with those at hand, so the
two overlap wherever the compiler sends asynchronously.
"""

import functools
from dataclasses import replace
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention.core.context import reaches
from flash_attention.core.lse import merge
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.jax.distributed.exchange import group_index, send
from flash_attention.jax.distributed.plan import Plan
from flash_attention.jax.engines import xla
from flash_attention.jax.engines.shared import add_sinks


class Static(NamedTuple):
    """What is fixed at compile time: the plan, the spec of one pair of chunks, and whether the hops are a loop."""

    plan: Plan
    spec: AttentionSpec
    scan: bool


class Shard(NamedTuple):
    """A device's tensors; P chunks on the first axis, C tokens in each. Absent ones are None."""

    query: jax.Array  # (P, b, n, C, D)
    key: jax.Array  # (P, b, k, C, D)
    value: jax.Array  # (P, b, k, C, D)
    bias: Optional[jax.Array] = None  # (1|P, 1|b, 1|n, 1|C, 1|all keys) float32
    mask: Optional[jax.Array] = None  # likewise, boolean; or compact (T, T)
    slopes: Optional[jax.Array] = None  # (n,) or (b, n) float32
    sinks: Optional[jax.Array] = None  # (n,) float32
    q_ids: Optional[jax.Array] = None  # (P, b, C)
    kv_ids: Optional[jax.Array] = None  # (P, b, C)
    q_lengths: Optional[jax.Array] = None  # (b,), of the whole sequence
    kv_lengths: Optional[jax.Array] = None  # (b,), of the whole sequence
    q_offset: Optional[jax.Array] = None  # () or (b,)
    seed: Optional[jax.Array] = None  # ()
    origin: Optional[jax.Array] = None  # (2,): global index of the first batch row and of the first head


def pair_spec(plan):
    """The spec of a pair of chunks: positions and lengths are those of the chunk, everything else is as in the call."""
    spec = plan.spec
    band, alone = spec.band, plan.strategy in ("local", "ulysses")  # then chunks begin at token 0
    placed = not band.is_dense or spec.compact_mask or spec.alibi_shape is not None
    dynamic = placed and (spec.dynamic_offset or not alone)
    batch, heads = spec.batch // plan.batch_parts, plan.ring_heads

    def shape(whole):
        if whole is None or len(whole) == 2:  # absent, or compact
            return whole
        part = (batch, heads, plan.q_chunk, plan.kv_chunk)
        return tuple(size if of_whole > 1 else 1 for of_whole, size in zip(whole, part))

    return replace(
        spec,
        batch=batch,
        heads=heads,
        kv_heads=plan.ring_kv_heads,
        q_len=plan.q_chunk,
        kv_len=plan.kv_chunk,
        q_offset=None if dynamic else (spec.offset if placed else 0),
        dynamic_offset=dynamic,
        mask_shape=shape(spec.mask_shape),
        bias_shape=shape(spec.bias_shape),
        alibi_shape=None if spec.alibi_shape is None else (batch, heads)[-len(spec.alibi_shape) :],
        kv_lengths=spec.kv_lengths or plan.kv_pad > 0,
        sinks=False,  # they join at the end
        wide=True,
    )


# --- pairs of chunks ------------------------------------------------------------------------------
class Pair(NamedTuple):
    """Indices of a query and a key chunk, and the first token of each."""

    q: jax.Array
    kv: jax.Array
    q_start: jax.Array
    kv_start: jax.Array


def _starts(plan, source):
    """First tokens of this device's query chunks and of the key chunks of group ``source``."""
    zero = jnp.int32(0)
    rank = lax.axis_index(plan.sequence) if plan.sequence is not None else zero
    q_shard = rank if plan.strategy == "gather" else group_index(plan)
    kv_shard = {"gather": zero, "merge": rank}.get(plan.strategy, source)
    return jnp.stack(plan.starts(q_shard, plan.q_chunk)), jnp.stack(plan.starts(kv_shard, plan.kv_chunk))


def _offset(static, shard, pair):
    """Position of the pair's first query, counted from its first key."""
    offset = static.plan.spec.offset if shard.q_offset is None else shard.q_offset
    return offset + pair.q_start - pair.kv_start


def _seen(static, shard, pair, source):
    """Whether the pair has anything to compute: False for keys out of reach, and for groups that do not exist."""
    plan, spec = static.plan, static.spec
    seen = True
    if not plan.full_turn:
        seen = (source >= 0) & (source < plan.ring)
    if spec.dynamic_offset:
        first = _offset(static, shard, pair)
        seen = seen & jnp.any(reaches(spec.band, first))
    return seen


def _over_pairs(static, shard, source, step, state):
    """``state = step(state, pair)`` for each query chunk and each key chunk of ``source`` where something is seen."""
    chunks = static.plan.chunks
    q_starts, kv_starts = _starts(static.plan, source)

    def one(number, state):
        q, kv = number // chunks, number % chunks
        pair = Pair(q, kv, q_starts[q], kv_starts[kv])
        seen = _seen(static, shard, pair, source)
        if seen is True:
            return step(state, pair)
        return lax.cond(seen, step, lambda state, pair: state, state, pair)

    return one(0, state) if chunks == 1 else lax.fori_loop(0, chunks * chunks, one, state)


def _at(x, index):
    """Chunk ``index`` of ``x``; a first axis of 1 stands for all chunks."""
    return None if x is None else lax.dynamic_index_in_dim(x, 0 if x.shape[0] == 1 else index, keepdims=False)


def _put(x, part, index):
    return lax.dynamic_update_index_in_dim(x, part.astype(x.dtype), index, 0)


def _keys_of(x, pair, count):
    """The pair's columns of a (..., 1|all keys) tensor."""
    return x if x is None or x.shape[-1] == 1 else lax.dynamic_slice_in_dim(x, pair.kv_start, count, axis=-1)


def _operands(static, shard, kv_ids, pair):
    """Operands of the engine for one pair."""
    spec, plan = static.spec, static.plan

    def length(whole, start, chunk):
        return jnp.clip(whole - start, 0, chunk).astype(jnp.int32)

    kv_lengths = None
    if spec.kv_lengths:  # padding is no key, whatever length was given
        given = plan.spec.kv_len if shard.kv_lengths is None else shard.kv_lengths
        kv_lengths = jnp.broadcast_to(jnp.minimum(given, plan.spec.kv_len), (spec.batch,))
    mask = shard.mask if spec.compact_mask else _keys_of(_at(shard.mask, pair.q), pair, spec.kv_len)
    return Operands(
        bias=_keys_of(_at(shard.bias, pair.q), pair, spec.kv_len),
        mask=mask,
        slopes=shard.slopes,
        q_segment_ids=_at(shard.q_ids, pair.q),
        kv_segment_ids=_at(kv_ids, pair.kv),
        q_lengths=length(shard.q_lengths, pair.q_start, spec.q_len) if spec.q_lengths else None,
        kv_lengths=None if kv_lengths is None else length(kv_lengths, pair.kv_start, spec.kv_len),
        q_offset=jnp.asarray(_offset(static, shard, pair), jnp.int32) if spec.dynamic_offset else None,
        dropout_seed=shard.seed,
        origin=jnp.stack([*shard.origin, pair.q_start, pair.kv_start]) if spec.dropout_rate else None,
    )


# --- the way round --------------------------------------------------------------------------------
def _go_round(static, visit, state, kv, sums):
    """``state, sums = visit(state, kv, sums, source)`` for the keys of every group that is needed, own ones first.

    ``sums`` (zeros at first) travel with the keys and come home: the second result are those of the own keys.
    """
    total = None
    for number, (way, count) in enumerate(static.plan.hops):
        state, home = _travel(static, visit, (state, kv, sums), way, count, own=number == 0)
        total = home if total is None else jax.tree.map(jnp.add, total, home)
    return state, total


def _travel(static, visit, carry, way, count, own):
    """One direction: the own keys (if ``own``), then those of ``count`` groups."""
    plan = static.plan
    me = group_index(plan)

    def source(hop):
        return (me - way * hop) % plan.ring if plan.full_turn else me - way * hop

    def hop(carry, number):
        state, kv, sums = carry
        ahead = send(plan, kv, way)  # does not wait for what follows
        state, sums = visit(state, kv, sums, source(number))
        return (state, ahead, send(plan, sums, way)), None

    if not own:
        state, kv, sums = carry
        carry = state, send(plan, kv, way), sums
    hops = range(0 if own else 1, count)
    if static.scan and len(hops) > 1:
        carry, _ = lax.scan(hop, carry, jnp.arange(hops.start, hops.stop))
    else:
        for number in hops:
            carry, _ = hop(carry, number)
    state, kv, sums = carry
    state, sums = visit(state, kv, sums, source(count))
    return state, send(plan, sums, -way * count) if count else sums


# --- forward and backward -------------------------------------------------------------------------
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def circulate(static, shard):
    """Attention of the device's queries: ``(out (P, b, n, C, D), lse (P, b, n, C) float32)``.

    The output has the query's dtype, float32 with strategy 'merge'. Differentiable in query, key, value, bias, slopes
    and sinks, also through the LSE.
    """
    return _forward(static, shard)


def _forward(static, shard):
    def visit(state, kv, sums, source):
        def step(state, pair):
            key, value, kv_ids = kv
            operands = _operands(static, shard, kv_ids, pair)
            part = xla.forward_pass(
                static.spec, _at(shard.query, pair.q), _at(key, pair.kv), _at(value, pair.kv), operands
            )
            out, lse = merge(jnp, *zip((_at(state[0], pair.q), _at(state[1], pair.q)), part))
            return _put(state[0], out, pair.q), _put(state[1], lse, pair.q)

        return _over_pairs(static, shard, source, step, state), sums

    rows = shard.query.shape[:-1]
    state = jnp.zeros(shard.query.shape, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    (out, lse), _ = _go_round(static, visit, state, (shard.key, shard.value, shard.kv_ids), None)
    if shard.sinks is not None:
        out, lse = add_sinks(out, lse, shard.sinks)
    return out.astype(jnp.float32 if static.plan.strategy == "merge" else shard.query.dtype), lse


def _circulate_fwd(static, shard):
    out, lse = _forward(static, shard)
    return (out, lse), (shard, out, lse)


def _circulate_bwd(static, saved, cotangents):
    shard, out, lse = saved
    d_out, d_lse = cotangents

    kv = shard.key, shard.value, shard.kv_ids

    def visit(state, kv, sums, source):
        def step(carry, pair):
            return _pair_backward(static, shard, kv, (out, lse), (d_out, d_lse), carry, pair)

        return _over_pairs(static, shard, source, step, (state, sums))

    def zeros(x):
        return None if x is None else jnp.zeros(x.shape, jnp.float32)

    state = zeros(shard.query), zeros(shard.bias), zeros(shard.slopes)
    (d_query, d_bias, d_slopes), (d_key, d_value) = _go_round(
        static, visit, state, kv, (zeros(shard.key), zeros(shard.value))
    )
    d_sinks = None
    if shard.sinks is not None:
        # The sink's share of the softmax acts like one more key whose value is 0.
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
        share = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(shard.sinks[:, None] - lse))
        d_sinks = -jnp.where(share == 0.0, 0.0, share * delta).sum((0, 1, 3))
    grads = (grad.astype(shard.query.dtype) for grad in (d_query, d_key, d_value))
    # None is a zero: masks, lengths and other integers have no gradient.
    nothing = Shard(None, None, None)
    return (nothing._replace(**dict(zip(Shard._fields, grads)), bias=d_bias, slopes=d_slopes, sinks=d_sinks),)


def _pair_backward(static, shard, kv, results, cotangents, carry, pair):
    """Add one pair's gradients to ``carry = ((query, bias, slopes), (key, value))``."""
    (d_query, d_bias, d_slopes), (d_key, d_value) = carry
    key, value, kv_ids = kv
    operands = _operands(static, shard, kv_ids, pair)
    tensors = _at(shard.query, pair.q), _at(key, pair.kv), _at(value, pair.kv), operands
    saved = (*tensors, *(_at(x, pair.q) for x in results))
    parts = xla.backward_pass(static.spec, saved, tuple(_at(x, pair.q) for x in cotangents))
    d_query = _add(d_query, parts[0], pair.q)
    d_key, d_value = _add(d_key, parts[1], pair.kv), _add(d_value, parts[2], pair.kv)
    if d_bias is not None:
        corner = (jnp.int32(0 if d_bias.shape[0] == 1 else pair.q), 0, 0, 0)
        corner += (0 if d_bias.shape[-1] == 1 else pair.kv_start,)
        old = lax.dynamic_slice(d_bias, corner, (1, *parts[3].shape))
        d_bias = lax.dynamic_update_slice(d_bias, old + parts[3], corner)
    if d_slopes is not None:
        d_slopes = d_slopes + parts[4]
    return (d_query, d_bias, d_slopes), (d_key, d_value)


def _add(x, part, index):
    return _put(x, _at(x, index) + part, index)


circulate.defvjp(_circulate_fwd, _circulate_bwd)
