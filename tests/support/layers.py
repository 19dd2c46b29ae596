"""A JAX layer in float64 by autodiff: the judge of a layer and its weights, from a plain formula in jax.numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.jax_engines import in_float64

from flash_attention.core.mechanisms.weights import flatten_params
from tolerances import FORWARD, GRADIENTS, assert_close


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


def check_layer(got, formula, params, arrays, d_out, dtype="float32"):
    """Output, input gradients and parameter gradients against the judge; naive: the formula in float32."""
    check_draws([(got, arrays, d_out)], formula, params, dtype)


def check_draws(runs, formula, params, dtype="float32"):
    """`check_layer` of several draws ``(got, arrays, d_out)``: the largest error of all, of the naive formula's too."""
    want = [judge(formula, params, arrays, d_out) for _, arrays, d_out in runs]
    naive = [_run(formula, params, arrays, d_out, jnp.float32) for _, arrays, d_out in runs]
    for part, direction in ((0, FORWARD), (1, GRADIENTS)):
        select = [_stacked(results, part) for results in ([got for got, _, _ in runs], want, naive)]
        assert set(select[0]) == set(select[1])
        assert_close(select[0], select[1], [select[2]], dtype, direction)


def _stacked(runs, part):
    named = [_named(results, part) for results in runs]
    return {name: np.stack([np.asarray(results[name]) for results in named]) for name in named[0]}


def _named(results, part):
    out, grads, d_params = results
    if part == 0:
        return {"out": out}
    return dict(d_params, **{"input {}".format(n): x for n, x in enumerate(grads)})


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
