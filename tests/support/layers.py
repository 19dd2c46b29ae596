"""A JAX layer in float64 by autodiff: the judge of a layer and its weights, from a plain formula in jax.numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.jax_engines import in_float64

from flash_attention.core.mechanisms.weights import flatten_params
from tolerances import Draw, assert_draws_close


def judge(formula, params, arrays, d_out):
    """`(out, input gradients, {name: gradient})` of `formula(params, *arrays)` in float64."""
    with in_float64():
        return _run(formula, params, arrays, d_out, jnp.float64)


@functools.lru_cache(maxsize=None)
def _compiled(formula, dtype):
    """One compilation instead of one a primitive."""
    del dtype  # float64 traces differently

    @jax.jit
    def run(params, arrays, d_out):
        out, pullback = jax.vjp(lambda params, *arrays: formula(params, *arrays), params, *arrays)
        return out, pullback(d_out)

    return run


def _run(formula, params, arrays, d_out, dtype):
    params, arrays = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), (params, list(arrays)))
    out, (d_params, *grads) = _compiled(formula, dtype)(params, arrays, jnp.asarray(d_out, dtype))
    named = {name: np.asarray(x) for name, x in flatten_params(d_params).items()}
    return np.asarray(out), [np.asarray(x) for x in grads], named


def check_layer(got, formula, params, arrays, d_out):
    """Output, input gradients and parameter gradients against the judge; naive: the formula in float32."""
    check_draws([(got, arrays, d_out)], formula, params)


def check_draws(runs, formula, params):
    """`check_layer` of several draws ``(got, arrays, d_out)`` by `tolerances.assert_draws_close`."""
    draws = []
    for got, arrays, d_out in runs:
        want, naive = judge(formula, params, arrays, d_out), _run(formula, params, arrays, d_out, jnp.float32)
        draws.append(Draw(_named(got), _named(want), [_named(naive)]))
        assert set(draws[-1].got) == set(draws[-1].want)
    assert_draws_close(draws, "float32")


def _named(results):
    out, grads, d_params = results
    return dict(d_params, out=out, **{"input {}".format(n): x for n, x in enumerate(grads)})


def dense(params, x):
    """`x @ weight.T + bias`."""
    return x @ params["weight"].T + params.get("bias", 0.0)


def attention(q, k, v, bias=0.0, seen=True, scale=None):
    """Plain softmax attention, (B, N, H, D); `bias` and `seen` broadcast to (B, H, Nq, Nk)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.where(seen, jnp.einsum("bihd,bjhd->bhij", q, k) * scale + bias, -jnp.inf)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, -1), v)


def split(x, heads):
    """(B, N, H * D) -> (B, N, H, D)."""
    return x.reshape(x.shape[:2] + (heads, -1))
