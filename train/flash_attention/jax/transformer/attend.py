"""Softmax attention of a JAX stack: by the core call, in query tiles that form whole rows, or by a mechanism.

``attend`` is called by ``Attention`` with heads and masks ready. All three ways drop by the same hash.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flash_attention.core import dropout, lse
from flash_attention.core.errors import invalid_type
from flash_attention.core.mechanisms.multi_query import group_heads, tile_heads
from flash_attention.core.transformer.attention import FUSED, LAYER, MECHANISM, MEMORY_SALT, QUERY_TILE
from flash_attention.jax import functional
from flash_attention.jax.mechanisms.chunks import over_chunks


class Call(NamedTuple):
    """The arrays of one call; None where absent.

    Attributes:
        query: (B, N, H, D); key, value: (B, S, Hkv, D), (B, S, Hkv, Dv).
        mem_key, mem_value: (Hkv, M, D), (Hkv, M, Dv): learned, seen by every query, without position.
        mask: keep, boolean (1|B, 1|H, 1|N, S). bias: (H, N, S). slopes: (H,).
        pre, post: (H, H), the mixing of talking heads.
        offset: position of query 0 among the keys; None = ``S - N``.
        seed: uint32; None = nothing drops.
    """

    query: Any
    key: Any
    value: Any
    mem_key: Any = None
    mem_value: Any = None
    mask: Any = None
    bias: Any = None
    slopes: Any = None
    pre: Any = None
    post: Any = None
    offset: Any = None
    seed: Any = None

    @property
    def rate(self):
        """Nothing drops without a seed."""
        return self.seed is not None


def attend(options, call, mechanism=None, return_weights=False, implementation=None):
    """``(out (B, N, H, Dv), weights (B, H, N, M + S) or None)``; weights are those after the softmax, undropped."""
    if options.tiled:
        call = _grouped(call, options.key_heads)
    weights = None
    if options.path.name == MECHANISM:
        out = _by_mechanism(options, call, mechanism)
    elif options.path.name == FUSED and not return_weights:
        out = _fused(options, call, implementation)
    else:
        out, weights = _formed(options, call, return_weights)
    if options.tiled:
        out = tile_heads(out, options.key_heads, 2)
        weights = None if weights is None else tile_heads(weights, options.key_heads, 1)
    return out, weights


def _grouped(call, kv_heads):
    """Query heads of one key/value head beside each other, as the core call has them."""

    def by(x, *axes):
        for axis in axes:
            x = x if x is None or x.shape[axis] == 1 else group_heads(x, kv_heads, axis)
        return x

    return call._replace(
        query=by(call.query, 2),
        mask=by(call.mask, 1),
        bias=by(call.bias, 0),
        slopes=by(call.slopes, 0),
        pre=by(call.pre, 0, 1),
        post=by(call.post, 0, 1),
    )


def _arguments(options, call):
    """The keywords of the core call that are set."""
    window = None if options.max_attend_past is None else (options.max_attend_past, None)
    found = {
        "mask": call.mask,
        "bias": None if call.bias is None else call.bias[None],
        "alibi_slopes": call.slopes,
        "local_window_size": window,
        "q_offset": call.offset,
        "dropout_seed": call.seed,
    }
    found = {name: x for name, x in found.items() if x is not None}
    if call.rate:
        found["dropout_rate"] = options.dropout
    return dict(found, scale=options.scale, is_causal=options.causal)


def _fused(options, call, implementation):
    out, total = _core(call.query, call.key, call.value, _arguments(options, call), implementation)
    if call.mem_key is None:
        return out.astype(call.query.dtype)
    key, value = (_for_each_row(x, call.query) for x in (call.mem_key, call.mem_value))
    dropping = {"dropout_rate": options.dropout, "dropout_seed": call.seed ^ MEMORY_SALT} if call.rate else {}
    learned = _core(call.query, key, value, dict(dropping, scale=options.scale), implementation)
    merged, _ = lse.merge(jnp, (out, learned[0]), [jnp.swapaxes(x, 1, 2) for x in (total, learned[1])])
    return merged.astype(call.query.dtype)


def _core(query, key, value, arguments, implementation):
    """The core call in float32, its heads made equally wide: ``(out (B, N, H, Dv), lse (B, H, N))``."""
    width = max(query.shape[-1], value.shape[-1])
    wide = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in (query, key, value))
    operands, call_options = functional.call_of(**arguments)
    out, total = functional.attend(LAYER, *wide, operands, call_options, implementation, wide=True)
    return out[..., : value.shape[-1]], total


def _for_each_row(x, query):
    """Learned (Hkv, M, D) as (B, M, Hkv, D)."""
    x = jnp.swapaxes(x, 0, 1).astype(query.dtype)
    return jnp.broadcast_to(x[None], query.shape[:1] + x.shape)


def _by_mechanism(options, call, mechanism):
    arguments = dict(_arguments(options, call), **dict(options.attention_options or {}))
    return mechanism(call.query, call.key, call.value, **arguments).attention_outputs


def mechanism_of(attention):
    """The :class:`AttentionImpl` of ``attention=``: a registered name (on one device), an instance, or a function.

    A function takes (query, key, value), BTHD, and keywords of the core call; those it lacks are refused.
    """
    from flash_attention.jax.distributed.mesh import make_mesh
    from flash_attention.jax.flexible import AttentionImpl, AttentionMetadata, AttentionRegistry
    from flash_attention.jax.flexible.registry import impl_of

    if isinstance(attention, AttentionImpl):
        return attention
    metadata = AttentionMetadata(mesh=make_mesh((1, 1, 1, 1), devices=jax.devices()[:1]))
    if isinstance(attention, str):
        return AttentionRegistry.create(attention, metadata)
    if callable(attention) and not isinstance(attention, type):
        return impl_of("attention", attention)(metadata)
    need = "None, a name of AttentionRegistry, an AttentionImpl or a function of (query, key, value)"
    raise invalid_type(LAYER, "attention", need, repr(attention))


def _formed(options, call, return_weights):
    """Tile after tile of queries; a tile's scores exist at one time, also in the backward pass."""
    key, value, learned = call.key, call.value, 0
    if call.mem_key is not None:
        learned = call.mem_key.shape[1]
        key, value = (
            jnp.concatenate([_for_each_row(mem, call.query), x], 1)
            for mem, x in ((call.mem_key, key), (call.mem_value, value))
        )
    rows = {"query": call.query}
    if call.mask is not None and call.mask.shape[2] > 1:
        rows["mask"] = jnp.swapaxes(call.mask, 1, 2)
    if call.bias is not None:
        rows["bias"] = jnp.swapaxes(call.bias, 0, 1)[None]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tile(carry, first, rows):
        out, weights = _tile(options, call, key, value, learned, first, rows)
        out = out.astype(call.query.dtype)
        return carry, (out, weights) if return_weights else (out,)

    found = over_chunks(tile, rows, min(QUERY_TILE, call.query.shape[1]))[1]
    return found[0], jnp.swapaxes(found[1], 1, 2) if return_weights else None


def _tile(options, call, key, value, learned, first, rows):
    """Outputs (B, t, H, Dv) and weights (B, t, H, M + S) of the queries from ``first`` on."""
    wide = jnp.promote_types(call.query.dtype, jnp.float32)
    batch, length, heads, _ = rows["query"].shape
    query = rows["query"].astype(wide).reshape(batch, length, options.key_heads, -1, rows["query"].shape[-1])
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key.astype(wide)) * options.scale
    scores = scores.reshape(batch, heads, length, -1)
    keys = scores.shape[-1] - learned
    index = first + jnp.arange(length)[:, None]
    offset = keys - call.query.shape[1] if call.offset is None else call.offset
    distance = index + offset - jnp.arange(keys)[None, :]
    added = 0.0
    if "bias" in rows:
        added = jnp.swapaxes(rows["bias"], 1, 2).astype(wide)
    if call.slopes is not None:
        added = added - call.slopes.astype(wide)[:, None, None] * jnp.abs(distance)
    scores = jnp.concatenate([scores[..., :learned], scores[..., learned:] + added], -1)
    if call.pre is not None:
        scores = jnp.einsum("gh,bhts->bgts", call.pre.astype(wide), scores)
    visible = _visible(options, call, rows, distance, learned)
    weights = _softmax(jnp.where(visible, scores, -jnp.inf), options.sparse_topk)
    mixed = weights
    if call.rate:
        mixed = jnp.where(_kept(options, call, index, weights.shape, learned), mixed / (1.0 - options.dropout), 0.0)
    if call.post is not None:
        mixed = jnp.einsum("gh,bhts->bgts", call.post.astype(wide), mixed)
    mixed = mixed.reshape(batch, options.key_heads, -1, length, mixed.shape[-1])
    out = jnp.einsum("bkgts,bskd->btkgd", mixed, value.astype(wide))
    return out.reshape(batch, length, heads, -1), jnp.swapaxes(weights, 1, 2)


def _visible(options, call, rows, distance, learned):
    """Boolean, broadcastable to (B, H, t, M + S); the learned columns are always visible."""
    visible = jnp.ones_like(distance, bool)
    if options.causal:
        visible &= distance >= 0
    if options.max_attend_past is not None:
        visible &= distance <= options.max_attend_past
    visible = visible[None, None]
    if call.mask is not None:
        visible = visible & (jnp.swapaxes(rows["mask"], 1, 2) if "mask" in rows else call.mask)
    return jnp.pad(visible, ((0, 0), (0, 0), (0, 0), (learned, 0)), constant_values=True)


def _softmax(scores, top):
    """Softmax of a row whose hidden scores are -inf, over its ``top`` largest; a row without any is 0."""
    if top is not None and top < scores.shape[-1]:
        largest, places = jax.lax.top_k(jax.lax.stop_gradient(scores), top)
        # XLA may compute the compared scores with other roundings than the ranked ones: those stay by place.
        found = jnp.put_along_axis(jnp.zeros(scores.shape, bool), places, True, -1, inplace=False)
        scores = jnp.where(found | (scores >= largest[..., -1:]), scores, -jnp.inf)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def _kept(options, call, index, shape, learned):
    """The core call's keep mask, of the learned columns with the seed that their own call has."""
    batch, heads, _, columns = shape
    b, h = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None, None]
    keep = functools.partial(dropout.keep, jnp, b=b, h=h, i=index, rate=options.dropout)
    parts = [keep(seed=call.seed ^ MEMORY_SALT, j=jnp.arange(learned))] if learned else []
    return jnp.concatenate(parts + [keep(seed=call.seed, j=jnp.arange(columns - learned))], -1)
