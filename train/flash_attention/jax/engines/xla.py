"""The `xla` engine: blockwise attention in plain JAX that visits only planned tiles, for CPU, GPU and TPU.

front end -> **run** -> flatten to rows -> xla_forward / xla_backward -> xla_tiles. This file holds what surrounds the
loops: the shapes, the custom derivative, and the rule for ``vmap``.
"""

import jax.numpy as jnp

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.core.spec import Operands
from flash_attention.jax.engines import cpu
from flash_attention.jax.engines import xla_tiles as tiles
from flash_attention.jax.engines.shared import (
    differentiable,
    dropout_origin,
    dropout_rows,
    padding_cleared,
    per_example,
    row_statistics,
    sink_gradient,
    slope_gradient,
    swapped,
)
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


def _heads(spec, geo, x, rows):
    """A tensor of heads as :class:`xla_tiles.Inputs` has it, ``rows`` of a head or of a stack of them.

    Loops over heads cut their tiles out of BSND as it is: a transposed copy of the cache would take longer than a
    decoding step. Where all heads are computed at once, and for stacks, it is transposed.
    """
    if spec.layout == "BSND" and rows == x.shape[1] and cpu.on_cpu() and not geo.at_once:
        return x
    return swapped(spec, x).reshape(-1, rows, spec.head_dim)


def _flatten(spec, geo, query, key, value, operands, intervals):
    """The call's tensors as :class:`xla_tiles.Inputs`."""
    mask, row_keys, key_origin = operands.mask, None, None
    if mask is not None:
        mask = mask if mask.dtype == jnp.bool_ else mask > 0
        mask = tiles.repeat_compact(spec, geo, mask) if spec.compact_mask else mask
    if spec.dropout_rate:
        key_origin = dropout_origin(spec, operands)[3]
        row_keys = dropout_rows(spec, query.shape[0], operands)

    def per_batch(x):
        return None if x is None else jnp.asarray(x, jnp.int32)

    return tiles.Inputs(
        query=_heads(spec, geo, padding_cleared(spec, query, operands.q_lengths), geo.rows),
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


@per_example
def forward_pass(spec, query, key, value, operands, intervals=None):
    geo = _geometry(spec, query.shape[0])
    inputs = _flatten(spec, geo, query, key, value, operands, intervals)
    sinks, rows = None, (query.shape[0], spec.heads, spec.q_len)
    if spec.sinks:
        sinks = operands.sinks.astype(jnp.float32).reshape(1, -1, 1)
        sinks = jnp.broadcast_to(sinks, rows).reshape(-1, geo.rows)
    out, lse = forward(spec, geo, inputs, sinks)
    return swapped(spec, out.reshape(*rows, spec.head_dim)), lse.reshape(rows)


@per_example
def backward_pass(spec, saved, cotangents, intervals=None):
    query, key, value, operands, out, lse = saved
    d_out, d_lse = cotangents
    d_out = padding_cleared(spec, d_out, operands.q_lengths)
    geo = _geometry(spec, query.shape[0])
    inputs = _flatten(spec, geo, query, key, value, operands, intervals)
    lse, delta = row_statistics(spec, out, lse, d_out, d_lse)
    flat = (-1, geo.rows)
    d_query, d_key, d_value, d_slopes, d_bias = backward(
        spec,
        geo,
        inputs,
        _heads(spec, geo, d_out, geo.rows),
        lse.reshape(flat),
        delta.reshape(flat),
    )
    if d_slopes is not None:
        d_slopes = slope_gradient(operands.slopes, d_slopes.reshape(lse.shape))
    d_sinks = sink_gradient(operands.sinks, lse, delta) if spec.sinks else None
    d_bias = None if d_bias is None else d_bias.astype(operands.bias.dtype)
    batch, dim = query.shape[0], spec.head_dim
    d_query = swapped(spec, d_query.reshape(batch, spec.heads, spec.q_len, dim))
    d_key, d_value = (swapped(spec, d.reshape(batch, spec.kv_heads, spec.kv_len, dim)) for d in (d_key, d_value))
    return d_query, d_key, d_value, d_bias, d_slopes, d_sinks


_attention = differentiable(forward_pass, backward_pass)


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
    note="blockwise; measured on CPU, same code on GPU and TPU",
    layouts=("BNSD", "BSND"),
)
