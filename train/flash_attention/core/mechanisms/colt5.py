"""CoLT5's conditional routing (Ainslie et al., 2023): soft top-k by coordinate descent in numpy, and the checks.

Every token takes a light branch; a router picks the few that also take a heavy one. Scores -> **soft top-k** -> gates;
the largest scores -> indices -> gather -> heavy branch -> times the gates -> scatter.
"""

import math

import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import check_bool, check_int, check_positive

NORM_EPSILON = 1e-12  # added to the mean square in RMSNorm
LAYER_NORM_EPSILON = 1e-5


def epsilons(n_iters, eps, eps_init, eps_decay):
    """``(eps of every iteration, the final one)``: from ``max(eps_init, eps)`` down to ``eps`` by ``eps_decay``."""
    current = max(eps if eps_init is None else eps_init, eps)
    schedule = []
    for _ in range(n_iters):
        schedule.append(current)
        current = max(current * eps_decay, eps)
    return schedule, current


def coor_descent(xp, s, n_iters, k, eps=0.1, eps_init=None, eps_decay=1.0, mask=None):
    """The iteration as one writes it, over numpy or jax.numpy; arguments as ``flash_attention.jax.coor_descent``."""
    schedule, final = epsilons(n_iters, eps, eps_init, eps_decay)
    kept = xp.ones(s.shape, dtype=bool) if mask is None else xp.asarray(mask) > 0
    s = xp.where(kept, s, xp.zeros_like(s))
    a, b = xp.zeros_like(s[..., :1]), -s
    for current in schedule:
        a = descend(xp, s, b, kept, k, current)
        b = -xp.maximum(s + a, 0.0)
    return xp.where(kept, xp.exp((s + a + b) / final), xp.zeros_like(s))


def descend(xp, s, b, kept, k, eps):
    """``eps * (ln k - logsumexp((s + b) / eps))`` over the kept entries of the last axis, which stays as 1."""
    scaled = (s + b) / eps
    peak = xp.max(xp.where(kept, scaled, -xp.inf), axis=-1, keepdims=True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    total = xp.sum(xp.where(kept, xp.exp(xp.where(kept, scaled - peak, 0.0)), 0.0), axis=-1, keepdims=True)
    total = xp.where(total > 0, total, xp.ones_like(total))  # nothing is kept: whatever a is, the result is 0
    return eps * (math.log(k) - peak - xp.log(total))


def check_descent(layer, n_iters, k, eps, eps_init, eps_decay):
    """Raise unless the iteration is defined."""
    check_int(layer, "n_iters", n_iters, 1)
    for name, value in (("k", k), ("eps", eps), ("eps_decay", eps_decay)):
        if value is None:
            raise invalid_type(layer, name, "a float > 0", None)
        check_positive(layer, name, value)
    check_positive(layer, "eps_init", eps_init)


def check_descent_shapes(layer, scores, mask):
    """Raise unless the mask has the shape of the scores (..., n); arguments are shapes."""
    if len(scores) < 1:
        raise invalid_value(layer, "s", "of shape (..., n)", "shape {}".format(tuple(scores)))
    if mask is not None and tuple(mask) != tuple(scores):
        raise invalid_value(layer, "mask", "of the scores' shape {}".format(tuple(scores)), tuple(mask))


def check_router(layer, dim, straight_through, n_iters, ratio, eps, eps_decay, eps_init, tokens):
    """Raise unless the router's arguments are possible."""
    check_int(layer, "dim", dim, 1)
    check_bool(layer, "straight_through", straight_through)
    check_int(layer, "num_routing_tokens", tokens, 1)
    check_descent(layer, n_iters, 1, eps, eps_init, eps_decay)
    if check_positive(layer, "fetch_k_ratio", ratio) is None or ratio < 1:
        raise invalid_value(layer, "fetch_k_ratio", "a float >= 1", ratio)


def check_sizes(layer, sizes, flags=None):
    """Raise unless ``sizes`` (``{name: value}``) are ints >= 1 and ``flags`` are bools."""
    for name, size in sizes.items():
        check_int(layer, name, size, 1)
    for name, flag in (flags or {}).items():
        check_bool(layer, name, flag)


def routed_flags(straight_through, multiply_keys, multiply_queries, null_queries):
    """The flags of routed attention by their published names."""
    return {
        "router_straight_through": straight_through,
        "multiply_keys_by_score": multiply_keys,
        "multiply_queries_by_score": multiply_queries,
        "use_null_q_tokens": null_queries,
    }


def check_groups(layer, heads, groups, name="num_routed_kv"):
    """Raise unless the heads can be split into ``groups`` equal groups, one a set of routed keys."""
    if heads % groups:
        need = "a divisor of the {} heavy heads".format(heads)
        raise invalid_value(layer, name, need, groups)


def inner_width(layer, name, dim, mult):
    """``int(dim * mult)``, the width of a branch's hidden layer; raises where that is no layer at all."""
    if check_positive(layer, name, mult) is None:
        raise invalid_type(layer, name, "a float > 0", None)
    width = int(dim * mult)
    if width < 1:
        raise invalid_value(layer, name, "at least 1 / dim = 1 / {}".format(dim), mult)
    return width


def check_inputs(layer, x, mask, dim, name="x"):
    """Raise unless the tokens are (B, N, dim) and their mask (B, N) or None; arguments are shapes."""
    if len(x) != 3 or x[2] != dim:
        raise invalid_value(layer, name, "of shape (B, N, {})".format(dim), "shape {}".format(tuple(x)))
    if mask is not None and tuple(mask) != tuple(x[:2]):
        argument = "mask" if name == "x" else name + "_mask"
        raise invalid_value(
            layer, argument, "of shape ({}, {})".format(*x[:2]), "shape {}".format(tuple(mask))
        )  # fmt: skip


def selection(scores, count, mask=None):
    """Indices of the ``count`` largest of (..., n), valid entries first, the lower index of equal ones; sorted."""
    scores = np.asarray(scores, np.float64)
    scores = scores if mask is None else np.where(np.asarray(mask) > 0, scores, -np.inf)
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def pairs(length, window, routed_q, routed_kv):
    """Query-key pairs a head of both branches: light within the window, heavy between the routed tokens."""
    side = window // 2
    position = np.arange(length, dtype=np.int64)
    light = np.minimum(position + side, length - 1) - np.maximum(position - side, 0) + 1
    return int(light.sum()), min(routed_q, length) * (min(routed_kv, length) + 1)
