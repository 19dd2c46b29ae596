"""Adapter: a JAX function of arrays and its gradients, as numpy. The MindSpore one is `in_mindspore.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from support.jax_engines import Functions

from flash_attention.core.mechanisms.weights import flatten_params

FUNCTIONS = Functions


def run(call, arrays, d_out=None, dtype="float32"):
    """`(out, gradients)` of `call(*arrays)`, jitted; float64 numpy.

    Args:
        arrays: numpy arrays or None; float ones are cast to `dtype` and have gradients, in order.
        d_out: cotangent of the output; None = no gradients.
    """
    arrays = [_to(x, dtype) for x in arrays]
    floats = [n for n, x in enumerate(arrays) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]

    def of_floats(*given):
        every = list(arrays)
        for n, x in zip(floats, given):
            every[n] = x
        return call(*every)

    given = [arrays[n] for n in floats]
    if d_out is None:
        return _wide(jax.jit(of_floats)(*given)), []
    out, grads = jax.jit(lambda given, d_out: _with_gradients(of_floats, given, d_out))(given, d_out)
    for x, grad in zip(given, grads):
        assert grad.dtype == x.dtype, "a gradient has the dtype of its input"
    return _wide(out), [_wide(grad) for grad in grads]


def run_eagerly(call, arrays, d_out=None):
    """:func:`run` in float32 without a `jit` of its own: calls of the same shapes share what `call` compiles inside."""
    arrays = [_to(x, "float32") for x in arrays]
    floats = [n for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
    if d_out is None:
        return _wide(call(*arrays)), []

    def of_floats(*given):
        return call(*(given[floats.index(n)] if n in floats else x for n, x in enumerate(arrays)))

    out, grads = _with_gradients(of_floats, [arrays[n] for n in floats], d_out)
    return _wide(out), [_wide(grad) for grad in grads]


def run_layer(layer, arrays, d_out, dtype="float32"):
    """`(out, input gradients, {name: gradient of a parameter})` of a layer with `.params`; float64 numpy."""
    arrays = [_to(x, dtype) for x in arrays]

    @jax.jit
    def both(params, arrays):
        out, pullback = jax.vjp(lambda params, *arrays: layer(*arrays, params=params), params, *arrays)
        return out, pullback(jnp.asarray(d_out, jnp.float32).astype(out.dtype))

    out, (d_params, *grads) = both(layer.params, arrays)
    return _wide(out), [_wide(grad) for grad in grads], {name: _wide(x) for name, x in flatten_params(d_params).items()}


def _with_gradients(function, given, d_out):
    out, pullback = jax.vjp(function, *given)
    return out, pullback(jnp.asarray(d_out, jnp.float32).astype(out.dtype))


def _to(x, dtype):
    if x is None:
        return None
    x = np.asarray(x)
    return jnp.asarray(x, jnp.float32).astype(getattr(jnp, dtype)) if x.dtype.kind == "f" else jnp.asarray(x)


def _wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)
