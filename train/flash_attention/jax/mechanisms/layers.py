"""What the JAX layers share: parameters as a plain pytree of dicts, projections and norms, dropout by position.

Names and axes are those of the MindSpore Cells, so that ``core.mechanisms.weights`` carries weights across.
"""

import math

import jax
import jax.numpy as jnp

from flash_attention.core import dropout
from flash_attention.core.errors import invalid_value

DEFAULT_SEED = 0


class Layer:
    """A layer with parameters. ``layer(x)`` uses its own; ``layer(x, params=tree)`` is a pure function of ``tree``.

    A subclass defines ``init(key) -> params`` and ``__call__(..., params=None)``.
    """

    _params = None

    @property
    def params(self):
        """Nested dict of arrays; made from a default seed when first asked for. Assign to it to load weights."""
        if self._params is None:
            with jax.ensure_compile_time_eval():
                self._params = self.init(jax.random.PRNGKey(DEFAULT_SEED))
        return self._params

    @params.setter
    def params(self, params):
        self._params = params


def dense_init(key, n_in, n_out, bias=True, std=None):
    """``{"weight": (n_out, n_in), "bias": (n_out,)}``, float32.

    Uniform within ``1 / sqrt(n_in)``, as nn.Dense; with ``std`` normal weights and zero biases.
    """
    weight_key, bias_key = jax.random.split(key)
    bound = 1.0 / math.sqrt(n_in)
    if std is None:
        params = {"weight": jax.random.uniform(weight_key, (n_out, n_in), minval=-bound, maxval=bound)}
        return (
            dict(params, bias=jax.random.uniform(bias_key, (n_out,), minval=-bound, maxval=bound)) if bias else params
        )
    params = {"weight": std * jax.random.normal(weight_key, (n_out, n_in))}
    return dict(params, bias=jnp.zeros(n_out)) if bias else params


def dense(params, x, dtype):
    """``x @ weight.T + bias`` in ``dtype``."""
    out = x.astype(dtype) @ params["weight"].astype(dtype).T
    return out + params["bias"].astype(dtype) if "bias" in params else out


def standardised(x, epsilon):
    """x with mean 0 and variance 1 over the last axis. A root divides: XLA's reciprocal root is coarser on the CPU."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)


def layer_norm(params, x, epsilon, dtype):
    """LayerNorm over the last axis, in float32 at least: ``params`` holds 'weight' and 'bias'."""
    wide = x.astype(jnp.promote_types(dtype, jnp.float32))
    return (standardised(wide, epsilon) * params["weight"] + params["bias"]).astype(dtype)


def norm_init(width):
    """Parameters of :func:`layer_norm`."""
    return {"weight": jnp.ones(width), "bias": jnp.zeros(width)}


def check_rng(layer, rng):
    """Raise where a PRNG key is missing."""
    if rng is None:
        raise invalid_value(layer, "dropout_rng", "a PRNG key when dropout acts", None)


def seed_of(layer, rng):
    """The uint32 dropout seed of a PRNG key; raises when there is none."""
    check_rng(layer, rng)
    return jax.random.bits(rng, (), "uint32")


def dropped(x, rate, seed, first=0):
    """Inverted dropout of x (B, N, E) by batch row, token and feature: the same however the sequence is cut.

    Args:
        seed: uint32, None = nothing drops; not used where ``rate`` is 0.
        first: number of x's token 0 in the whole sequence.
    """
    if not rate or seed is None:
        return x
    b, i, j = jnp.ogrid[: x.shape[0], : x.shape[1], : x.shape[2]]
    keep = dropout.keep(jnp, seed, b, 0, i + first, j, rate)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
