"""CoLT5's router in JAX: soft top-k by coordinate descent, and the choice of the tokens that take the heavy branch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flash_attention.core.mechanisms import colt5 as shared
from flash_attention.jax.mechanisms.layers import Layer

ROUTER = "CoordinateDescentRouter"


def coor_descent(s, n_iters, k, eps=0.1, eps_init=None, eps_decay=1.0, mask=None):
    """Soft top-k (Wright, 2015, "Coordinate descent algorithms"; CoLT5): scores in [0, 1] whose sum tends to ``k``.

    Args:
        s: (..., n) scores; differentiable. Computed in float32, float64 for float64.
        n_iters: iterations.
        k: how many are wanted, a number > 0.
        eps: smallest temperature: lower = harder.
        eps_init, eps_decay: temperature of the first iteration (None = eps), and its factor from one to the next.
        mask: (..., n), keep where True or > 0; the others give 0.

    Returns:
        (..., n), non-decreasing in ``s``.
    """
    shared.check_descent("coor_descent", n_iters, k, eps, eps_init, eps_decay)
    s = jnp.asarray(s)
    shared.check_descent_shapes("coor_descent", s.shape, None if mask is None else jnp.shape(mask))
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    kept = jnp.ones(s.shape, bool) if mask is None else jnp.asarray(mask) > 0
    s = jnp.where(kept, s, 0.0)
    schedule, final = shared.epsilons(n_iters, eps, eps_init, eps_decay)

    def step(state, current):
        a = shared.descend(jnp, s, state[1], kept, k, current)
        return (a, -jnp.maximum(s + a, 0.0)), None

    (a, b), _ = jax.lax.scan(step, (jnp.zeros_like(s[..., :1]), -s), jnp.asarray(schedule, s.dtype))
    return jnp.where(kept, jnp.exp((s + a + b) / final), 0.0)


class Routed(NamedTuple):
    """The tokens that R routing tokens chose.

    Attributes:
        tokens: (B, R, m, dim).
        indices: int32 (B, R, m), positions in increasing order; None where all were taken.
        gates: (B, R, m), float32: what the heavy branch is multiplied with.
        mask: boolean (B, R, m), the mask at these tokens, or None.
    """

    tokens: jax.Array
    indices: jax.Array
    gates: jax.Array
    mask: jax.Array


class CoordinateDescentRouter(Layer):
    """Chooses the tokens with the largest products with a learned vector; its gates carry the gradient to that vector.

    Args:
        dim: width of the tokens.
        straight_through: gates are exactly 1 in the forward and have the soft score's gradient in the backward pass;
            False: the soft score itself.
        n_iters, eps, eps_decay, eps_init: of :func:`coor_descent`.
        fetch_k_ratio: the soft top-k aims at ``num_tokens * fetch_k_ratio``.
        num_routing_tokens: R learned vectors, each with a choice of its own.
    """

    def __init__(
        self,
        dim,
        straight_through=True,
        n_iters=20,
        fetch_k_ratio=9 / 8,
        eps=0.03,
        eps_decay=0.7,
        eps_init=4.0,
        num_routing_tokens=1,
    ):
        shared.check_router(
            ROUTER, dim, straight_through, n_iters, fetch_k_ratio, eps, eps_decay, eps_init, num_routing_tokens
        )
        self.dim, self.straight_through, self.n_iters = dim, straight_through, n_iters
        self.fetch_k_ratio, self.eps, self.eps_decay, self.eps_init = fetch_k_ratio, eps, eps_decay, eps_init
        self.num_routing_tokens = num_routing_tokens

    def init(self, key):
        """New parameters: 'weight' (R, dim), standard normal."""
        return {"weight": jax.random.normal(key, (self.num_routing_tokens, self.dim))}

    def __call__(self, x, num_tokens, mask=None, *, params=None):
        """Choose ``num_tokens`` of x (B, N, dim), valid ones first; all, with gates of 1, where there are no more.

        ``mask`` (B, N): keep where True or > 0. Returns :class:`Routed`.
        """
        shared.check_sizes(ROUTER, {"num_tokens": num_tokens})
        shared.check_inputs(ROUTER, x.shape, None if mask is None else jnp.shape(mask), self.dim)
        weight = (self.params if params is None else params)["weight"]
        batch, length = x.shape[:2]
        sets = self.num_routing_tokens
        mask = None if mask is None else jnp.broadcast_to(jnp.asarray(mask)[:, None] > 0, (batch, sets, length))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if length <= num_tokens:
            tokens = jnp.broadcast_to(x[:, None], (batch, sets, length, self.dim))
            return Routed(tokens, None, jnp.ones((batch, sets, length), wide), mask)
        scores = jnp.einsum("bnd,rd->brn", x.astype(wide), weight.astype(wide))
        soft = coor_descent(
            scores, self.n_iters, min(num_tokens * self.fetch_k_ratio, length), self.eps, self.eps_init,
            self.eps_decay, mask,
        )  # fmt: skip
        ranked = jax.lax.stop_gradient(scores if mask is None else jnp.where(mask, scores, -jnp.inf))
        indices = jnp.sort(jax.lax.top_k(ranked, num_tokens)[1], -1)
        gates = jnp.take_along_axis(soft, indices, -1)
        if self.straight_through:
            gates = 1.0 + (gates - jax.lax.stop_gradient(gates))
        if mask is not None:
            mask = jnp.take_along_axis(mask, indices, -1)
            gates = jnp.where(mask, gates, 0.0)
        tokens = jnp.take_along_axis(x[:, None], indices[..., None], 2)
        return Routed(tokens, indices, gates, mask)


def put_back(rows, indices, fallback):
    """(B, m, dim) rows at their ``indices`` (B, m) of a sequence, ``fallback`` (B, N, dim) everywhere else."""
    if indices is None:
        return rows
    return fallback.at[jnp.arange(rows.shape[0])[:, None], indices].set(rows)
