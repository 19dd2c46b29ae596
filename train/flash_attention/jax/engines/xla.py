"""The `xla` engine: blockwise attention in plain JAX that visits only planned tiles, for CPU, GPU and TPU.

front end -> **run** -> flatten to rows -> xla_forward / xla_backward -> xla_tiles. This file holds what surrounds the
loops: the shapes, the custom derivative, and the rule for ``vmap``.
"""

import functools

import jax
import jax.numpy as jnp

from flash_attention.core import dropout
from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.core.spec import Operands
from flash_attention.jax.engines import cpu
from flash_attention.jax.engines import xla_tiles as tiles
from flash_attention.jax.engines.xla_backward import backward
from flash_attention.jax.engines.xla_forward import forward


def run(spec, query, key, value, operands=Operands(), intervals=None):
    """FlashAttention-2 in JAX.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec`.
        query: (B, N, Sq, D); key, value: (B, Nkv, Sk, D); or all of them BSND, as ``spec.layout`` says. float16,
            bfloat16 or float32.
        operands: :class:`~flash_attention.core.spec.Operands` of arrays or None.
        intervals: None, or run-time ``(low, high)``, int32 (B, N, Sq) each: a query sees the keys low .. high only,
            none where low > high. Neither may decrease along the queries: then tiles outside the intervals are never
            visited. For mechanisms that order the tokens by data; as many heads of keys as of queries, a spec without
            causality and windows.

    Returns:
        ``(out like the query, lse (B, N, Sq) float32)``. Both are differentiable (reverse mode) in
        query, key, value, bias, slopes and sinks. Extra memory: O(S) a head.
    """
    return _attention(spec, query, key, value, operands, intervals)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, query, key, value, operands, intervals):
    return forward_pass(spec, query, key, value, operands, intervals)


def _attention_fwd(spec, query, key, value, operands, intervals):
    out, lse = forward_pass(spec, query, key, value, operands, intervals)
    return (out, lse), ((query, key, value, operands, out, lse), intervals)


def _attention_bwd(spec, saved, cotangents):
    saved, intervals = saved
    query, key, value = saved[:3]
    d_query, d_key, d_value, d_bias, d_slopes, d_sinks = backward_pass(spec, saved, cotangents, intervals)
    grads = (grad.astype(x.dtype) for grad, x in ((d_query, query), (d_key, key), (d_value, value)))
    # None is a zero: masks, lengths and other integers have no gradient.
    return (*grads, Operands(bias=d_bias, slopes=d_slopes, sinks=d_sinks), None)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _per_example(function):
    """``function(spec, *arrays)`` compiled once a spec; ``vmap`` runs the examples one after the other.

    On a CPU a mapped tile would become a batch of small dots, at half their speed, and a mapped loop bound would make
    every example visit the tiles of all.
    """

    @functools.partial(jax.jit, static_argnums=0)
    @functools.wraps(function)
    def call(spec, *arrays):
        return jax.custom_batching.sequential_vmap(functools.partial(function, spec))(*arrays)

    return call


def _swapped(spec, x):
    """From ``spec.layout`` to heads before rows, or back."""
    return jnp.swapaxes(x, 1, 2) if spec.layout == "BSND" else x


def _heads(spec, geo, x, rows):
    """A tensor of heads as :class:`xla_tiles.Inputs` has it, ``rows`` of a head or of a stack of them.

    Loops over heads cut their tiles out of BSND as it is: a transposed copy of the cache would take longer than a
    decoding step. Where all heads are computed at once, and for stacks, it is transposed.
    """
    if spec.layout == "BSND" and rows == x.shape[1] and cpu.on_cpu() and not geo.at_once:
        return x
    return _swapped(spec, x).reshape(-1, rows, spec.head_dim)


def _padding_cleared(spec, x, lengths):
    """``x``, rows of queries, with zeros from each length (B,) on: padding may hold NaN, and 0 * NaN is NaN."""
    if lengths is None:
        return x
    inside = jnp.arange(spec.q_len) < jnp.asarray(lengths)[:, None]
    return jnp.where(jnp.expand_dims(inside, (2, 3) if spec.layout == "BSND" else (1, 3)), x, jnp.zeros_like(x))


def _flatten(spec, geo, query, key, value, operands, intervals):
    """The call's tensors as :class:`xla_tiles.Inputs`."""
    batch = query.shape[0]
    mask, row_keys, key_origin = operands.mask, None, None
    if mask is not None:
        mask = mask if mask.dtype == jnp.bool_ else mask > 0
        mask = tiles.repeat_compact(spec, geo, mask) if spec.compact_mask else mask
    if spec.dropout_rate:
        first = jnp.asarray(spec.origin, jnp.int32) if operands.origin is None else operands.origin
        key_origin = first[3]
        indices = jnp.ogrid[:batch, : spec.heads, : spec.q_len]
        row_keys = dropout.row_key(jnp, operands.dropout_seed, *(x + first[axis] for axis, x in enumerate(indices)))

    def per_batch(x):
        return None if x is None else jnp.asarray(x, jnp.int32)

    return tiles.Inputs(
        query=_heads(spec, geo, _padding_cleared(spec, query, operands.q_lengths), geo.rows),
        key=_heads(spec, geo, key, spec.kv_len),
        value=_heads(spec, geo, value, spec.kv_len),
        offset=per_batch(operands.q_offset).reshape(-1) if spec.dynamic_offset else None,
        bias=operands.bias,
        mask=mask,
        slopes=None if operands.slopes is None else operands.slopes.astype(jnp.float32).reshape(-1, spec.heads),
        q_segments=per_batch(operands.q_segment_ids),
        kv_segments=per_batch(operands.kv_segment_ids),
        q_lengths=per_batch(operands.q_lengths),
        kv_lengths=per_batch(operands.kv_lengths),
        row_keys=row_keys,
        key_origin=key_origin,
        intervals=None if intervals is None else tuple(x.reshape(-1, geo.rows) for x in intervals),
    )


def _geometry(spec, batch):
    return tiles.geometry(batch, spec.heads, spec.kv_heads, spec.q_len, spec.kv_len, spec.head_dim, spec.tile)


@_per_example
def forward_pass(spec, query, key, value, operands, intervals=None):
    geo = _geometry(spec, query.shape[0])
    inputs = _flatten(spec, geo, query, key, value, operands, intervals)
    sinks, rows = None, (query.shape[0], spec.heads, spec.q_len)
    if spec.sinks:
        sinks = operands.sinks.astype(jnp.float32).reshape(1, -1, 1)
        sinks = jnp.broadcast_to(sinks, rows).reshape(-1, geo.rows)
    out, lse = forward(spec, geo, inputs, sinks)
    return _swapped(spec, out.reshape(*rows, spec.head_dim)), lse.reshape(rows)


@_per_example
def backward_pass(spec, saved, cotangents, intervals=None):
    query, key, value, operands, out, lse = saved
    d_out, d_lse = cotangents
    d_out = _padding_cleared(spec, d_out, operands.q_lengths)
    geo = _geometry(spec, query.shape[0])
    inputs = _flatten(spec, geo, query, key, value, operands, intervals)
    dead = lse == -jnp.inf
    delta = _swapped(spec, (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1))
    delta = delta - jnp.where(dead, 0.0, d_lse)
    flat = (-1, geo.rows)
    d_query, d_key, d_value, d_slopes, d_bias = backward(
        spec,
        geo,
        inputs,
        _heads(spec, geo, d_out, geo.rows),
        jnp.where(dead, jnp.inf, lse).reshape(flat),
        delta.reshape(flat),
    )
    if d_slopes is not None:
        d_slopes = d_slopes.reshape(lse.shape).sum(-1)
        d_slopes = d_slopes if operands.slopes.ndim == 2 else d_slopes.sum(0)
        d_slopes = d_slopes.astype(operands.slopes.dtype)
    d_sinks = None
    if spec.sinks:
        # The sink's share of the softmax acts like one more key whose value is 0.
        share = jnp.where(dead, 0.0, jnp.exp(operands.sinks.astype(jnp.float32)[None, :, None] - lse))
        d_sinks = -(share * delta).sum((0, 2)).astype(operands.sinks.dtype)
    d_bias = None if d_bias is None else d_bias.astype(operands.bias.dtype)
    batch, dim = query.shape[0], spec.head_dim
    d_query = _swapped(spec, d_query.reshape(batch, spec.heads, spec.q_len, dim))
    d_key, d_value = (_swapped(spec, d.reshape(batch, spec.kv_heads, spec.kv_len, dim)) for d in (d_key, d_value))
    return d_query, d_key, d_value, d_bias, d_slopes, d_sinks


def supports(spec):
    """Every spec but float64: statistics and sums are float32 here."""
    if spec.dtype == "float64":
        need = "float16, bfloat16 or float32"
        return Reason("dtype", spec.dtype, need, "Use implementation='reference' for float64.")
    return None


ENGINE = Engine(
    "xla",
    run,
    supports,
    order=0,
    note="blockwise; measured on CPU, same code on GPU and TPU",
    layouts=("BNSD", "BSND"),
)
