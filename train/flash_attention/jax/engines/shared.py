"""What the blockwise engines share outside of their tiles: the custom derivative, row statistics, small gradients.

An engine's file calls :func:`differentiable` once; its two directions call the other functions.
"""

import functools

import jax
import jax.numpy as jnp

from flash_attention.core import dropout
from flash_attention.core.spec import Operands


def differentiable(forward_pass, backward_pass):
    """``attention(spec, query, key, value, operands, *rest) -> (out, lse)`` whose derivative is ``backward_pass``.

    Args:
        forward_pass: ``(spec, query, key, value, operands, *rest) -> (out, lse)``.
        backward_pass: ``(spec, (query, key, value, operands, out, lse), (d_out, d_lse), *rest)`` -> gradients of query,
            key, value, bias, slopes and sinks; None where an operand is absent. ``rest`` has no gradient.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attention(spec, query, key, value, operands, *rest):
        return forward_pass(spec, query, key, value, operands, *rest)

    def forward(spec, query, key, value, operands, *rest):
        out, lse = forward_pass(spec, query, key, value, operands, *rest)
        return (out, lse), ((query, key, value, operands, out, lse), rest)

    def backward(spec, saved, cotangents):
        saved, rest = saved
        d_query, d_key, d_value, d_bias, d_slopes, d_sinks = backward_pass(spec, saved, cotangents, *rest)
        grads = (grad.astype(x.dtype) for grad, x in zip((d_query, d_key, d_value), saved))
        # None is a zero: masks, lengths and other integers have no gradient.
        return (*grads, Operands(bias=d_bias, slopes=d_slopes, sinks=d_sinks), *(None for _ in rest))

    attention.defvjp(forward, backward)
    return attention


def gradients_by_kernels(spec, saved, cotangents, query_gradient, key_gradients, bias_gradient=None):
    """What a ``backward_pass`` of :func:`differentiable` returns, from kernels that recompute the probabilities.

    Args:
        query_gradient, key_gradients, bias_gradient: functions of ``(spec, query, key, value, operands, d_out, lse,
            delta)``, see :func:`row_statistics`, that give lists: dQ and, with ALiBi, the slopes' rows; dK and dV; the
            gradient of the bias (None: the engine takes no bias).
    """
    query, key, value, operands, out, lse = saved
    d_out, d_lse = cotangents
    d_out = padding_cleared(spec, d_out, operands.q_lengths)
    lse, delta = row_statistics(spec, out, lse, d_out, d_lse)
    inputs = spec, query, key, value, operands, d_out, lse, delta
    d_query, *d_slopes = query_gradient(*inputs)
    d_key, d_value = key_gradients(*inputs)
    d_slopes = slope_gradient(operands.slopes, d_slopes[0]) if d_slopes else None
    d_sinks = sink_gradient(operands.sinks, lse, delta) if spec.sinks else None
    d_bias = None
    if spec.bias_shape is not None:  # a kernel of its own, which the compiler drops where the bias is a constant
        (d_bias,) = bias_gradient(*inputs)
        d_bias = d_bias.astype(operands.bias.dtype)
    return d_query, d_key, d_value, d_bias, d_slopes, d_sinks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lse_of(run, spec, query, key, value, operands):
    """The LSE alone, by an engine's ``run``, for engines whose kernel gives none.

    Nothing is computed where nothing uses it, backward included. Differentiable in query, key and value.
    """
    return run(spec, query, key, value, operands)[1]


def _lse_forward(run, spec, *inputs):
    inputs = jax.tree.map(lambda x: x.value, inputs, is_leaf=lambda x: hasattr(x, "perturbed"))
    return lse_of(run, spec, *inputs), inputs


def _lse_backward(run, spec, inputs, d_lse):
    if isinstance(d_lse, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    *tensors, operands = inputs
    _, pullback = jax.vjp(lambda *tensors: run(spec, *tensors, operands)[1], *tensors)
    return (*pullback(d_lse), None)


lse_of.defvjp(_lse_forward, _lse_backward, symbolic_zeros=True)


def per_example(function):
    """``function(spec, *arrays)`` compiled once a spec; ``vmap`` runs the examples one after the other.

    On a CPU a mapped tile would become a batch of small dots, at half their speed, and a mapped loop bound would make
    every example visit the tiles of all. On a GPU a mapped kernel would need more than three axes of programs.
    """

    @functools.partial(jax.jit, static_argnums=0)
    @functools.wraps(function)
    def call(spec, *arrays):
        return jax.custom_batching.sequential_vmap(functools.partial(function, spec))(*arrays)

    return call


def swapped(spec, x):
    """From ``spec.layout`` to heads before rows, or back."""
    return jnp.swapaxes(x, 1, 2) if spec.layout == "BSND" else x


def padding_cleared(spec, x, lengths):
    """``x``, a tensor of heads, with zeros from each length (B,) on: padding may hold NaN, and 0 * NaN is NaN."""
    if lengths is None:
        return x
    rows, others = (1, (2, 3)) if spec.layout == "BSND" else (2, (1, 3))
    inside = jnp.arange(x.shape[rows]) < jnp.asarray(lengths)[:, None]
    return jnp.where(jnp.expand_dims(inside, others), x, jnp.zeros_like(x))


def row_statistics(spec, out, lse, d_out, d_lse):
    """``(lse, delta)``, float32 (B, N, Sq), as a backward pass wants them.

    The LSE is +inf for rows that see no key, so that their recomputed probabilities are 0; delta is the row sum of
    dO * O, less the cotangent of the LSE. ``d_out`` holds no NaN (:func:`padding_cleared`).
    """
    dead = lse == -jnp.inf
    delta = swapped(spec, (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1))
    return jnp.where(dead, jnp.inf, lse), delta - jnp.where(dead, 0.0, d_lse)


def slope_gradient(slopes, rows):
    """Gradient of the slopes (N,) or (B, N) from that of each row, float32 (B, N, Sq)."""
    total = rows.sum(-1)
    return (total if slopes.ndim == 2 else total.sum(0)).astype(slopes.dtype)


def sink_gradient(sinks, lse, delta):
    """Gradient of the sinks (N,) from :func:`row_statistics`."""
    # The sink's share of the softmax acts like one more key whose value is 0.
    share = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
    return -(share * delta).sum((0, 2)).astype(sinks.dtype)


def add_sinks(out, lse, sinks):
    """Let the logits ``sinks`` (n,) join the denominators of (..., n, C, D), (..., n, C); dead rows stay dead."""
    dead = jnp.isneginf(lse)
    safe = jnp.where(dead, 0.0, lse)
    joint = jnp.logaddexp(safe, sinks[:, None])
    return out * jnp.exp(safe - joint)[..., None], jnp.where(dead, -jnp.inf, joint)


def dropout_origin(spec, operands):
    """int32 (4,): what dropout counts batch rows, heads, queries and keys from."""
    return jnp.asarray(spec.origin if operands.origin is None else operands.origin, jnp.int32)


def dropout_rows(spec, batch, operands):
    """uint32 (B, N, Sq): dropout's key of each row."""
    first = dropout_origin(spec, operands)
    indices = jnp.ogrid[:batch, : spec.heads, : spec.q_len]
    return dropout.row_key(jnp, operands.dropout_seed, *(x + first[axis] for axis, x in enumerate(indices)))
