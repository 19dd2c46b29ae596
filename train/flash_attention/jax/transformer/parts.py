"""Small parts of the JAX transformer: norms, residuals, shifted tokens, seeds, and how a model prints itself."""

import math

import jax
import jax.numpy as jnp

from flash_attention.core.transformer.layers import LENGTH_EPSILON, NORM_EPSILON
from flash_attention.jax.mechanisms.layers import Layer, check_rng, dense, dense_init, standardised


class Model(Layer):
    """A layer that counts its parameters and prints itself. A subclass defines ``lines()``."""

    def num_parameters(self):
        """Number of learned numbers; forms no array."""
        shapes = jax.eval_shape(self.init, jax.random.PRNGKey(0))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

    def lines(self):
        """What ``print`` shows, a list of lines."""
        raise NotImplementedError

    def __repr__(self):
        return "\n".join(self.lines() + ["{:,} parameters".format(self.num_parameters())])


def norm_init(kind, width):
    """``{"weight": ones}``: (width,), or (1,) for ScaleNorm."""
    return {"weight": jnp.ones(1 if kind == "scalenorm" else width)}


def norm(kind, params, x, dtype):
    """'layernorm' (no bias), 'rmsnorm' or 'scalenorm' over the last axis, in float32 at least."""
    wide = x.astype(jnp.promote_types(dtype, jnp.float32))
    if kind == "layernorm":
        scaled = standardised(wide, NORM_EPSILON)
    else:
        scaled = l2_normalised(wide) * math.sqrt(x.shape[-1])
    return (scaled * params["weight"]).astype(dtype)


def l2_normalised(x):
    """``x / max(|x|, 1e-12)`` over the last axis, its gradient 0 at 0."""
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), LENGTH_EPSILON**2))


def residual_init(options, key):
    """Parameters of :func:`joined`: 'scale', and 'input', 'hidden' of the GRU cell."""
    params = {"scale": jnp.ones(options.dim)} if options.scale_residual else {}
    if options.gate_residual:
        for name, k in zip(("input", "hidden"), jax.random.split(key)):
            params[name] = dense_init(k, options.dim, 3 * options.dim)
    return params


def joined(options, params, branch, residual, dtype):
    """The residual connection: a sum, or a GRU cell whose input is the branch and whose state is the residual."""
    if options.scale_residual:
        residual = residual * params["scale"].astype(dtype)
    if not options.gate_residual:
        return branch + residual * options.residual_factor
    reset, update, new = jnp.split(dense(params["input"], branch, dtype), 3, -1)
    old_reset, old_update, old = jnp.split(dense(params["hidden"], residual, dtype), 3, -1)
    reset, update = jax.nn.sigmoid(reset + old_reset), jax.nn.sigmoid(update + old_update)
    new = jnp.tanh(new + reset * old)
    return (1.0 - update) * new + update * residual


def shifted(x, shifts, mask):
    """Equal shares of the features moved along the tokens, zeros moving in; the rest stays. Masked tokens are 0."""
    if not shifts:
        return x
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0.0)
    share, length = x.shape[-1] // len(shifts), x.shape[1]
    parts = []
    for n, by in enumerate(shifts):
        part = x[..., n * share : (n + 1) * share]
        by = max(-length, min(by, length))
        pad = jnp.zeros(part.shape[:1] + (abs(by),) + part.shape[2:], x.dtype)
        parts.append(
            jnp.concatenate([pad, part[:, : length - by]], 1) if by >= 0 else jnp.concatenate([part[:, -by:], pad], 1)
        )
    return jnp.concatenate(parts + [x[..., len(shifts) * share :]], -1)


class Seeds:
    """Seeds of one call in training, one after the other; None outside training.

    Args:
        layer: name used in the message. acts: whether anything drops. rng: PRNG key.
    """

    def __init__(self, layer, acts, rng):
        if acts:
            check_rng(layer, rng)
        self._key = rng if acts else None
        self._count = 0

    def next_key(self):
        """A PRNG key of its own, or None."""
        if self._key is None:
            return None
        self._count += 1
        return jax.random.fold_in(self._key, self._count)

    def next(self):
        """A uint32 seed, or None."""
        key = self.next_key()
        return None if key is None else jax.random.bits(key, (), "uint32")
