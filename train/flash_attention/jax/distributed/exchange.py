"""Moves between placements of the sequence, inside shard_map; all of them are differentiable by JAX itself.

tokens split over devices <-> ``to_group``/``from_group`` (all-to-all) <-> ``to_zigzag``/``from_zigzag`` (two permutes).
"""

import jax
import jax.numpy as jnp
from jax import lax


def groups(plan):
    """Ranks of each group of neighbours, or None where the axis is one group."""
    if plan.ulysses == plan.parts:
        return None
    return [[g * plan.ulysses + j for j in range(plan.ulysses)] for g in range(plan.ring)]


def to_group(plan, x, heads=1, tokens=2):
    """(..., heads, ..., tokens, ...) -> fewer heads, all tokens of the group. ``heads=None``: no heads to trade."""
    if plan.ulysses == 1:
        return x
    if heads is None:
        return lax.all_gather(x, plan.sequence, axis=tokens, axis_index_groups=groups(plan), tiled=True)
    return lax.all_to_all(x, plan.sequence, heads, tokens, axis_index_groups=groups(plan), tiled=True)


def from_group(plan, x, heads=1, tokens=2):
    """The inverse of :func:`to_group` with heads."""
    if plan.ulysses == 1:
        return x
    return lax.all_to_all(x, plan.sequence, tokens, heads, axis_index_groups=groups(plan), tiled=True)


def send(plan, x, shift):
    """Every array of the tree ``x`` from each group to the one ``shift`` further along the ring."""
    pairs = [(g, (g + shift) % plan.ring) for g in range(plan.ring)]
    return _permute(plan, x, pairs)


def _permute(plan, x, pairs):
    ranks = [(a * plan.ulysses + j, b * plan.ulysses + j) for a, b in pairs for j in range(plan.ulysses)]
    return jax.tree.map(lambda part: lax.ppermute(part, plan.sequence, ranks), x)


def group_index(plan):
    """This device's group, int32."""
    return lax.axis_index(plan.sequence) // plan.ulysses if plan.ring > 1 else jnp.int32(0)


def to_zigzag(plan, x, tokens=2):
    """Contiguous shards -> chunks ``g`` and ``2 * ring - 1 - g`` on group ``g``, stacked on a new first axis."""
    if not plan.zigzag:
        return x[None]
    even, odd = (_permute(plan, part, plan.homes(number)) for number, part in enumerate(jnp.split(x, 2, axis=tokens)))
    swap = group_index(plan) % 2 == 1  # chunk g has the parity of g
    return jnp.stack([jnp.where(swap, odd, even), jnp.where(swap, even, odd)])


def from_zigzag(plan, x, tokens=2):
    """The inverse of :func:`to_zigzag`; ``tokens`` counts without the first axis."""
    if not plan.zigzag:
        return x[0]
    swap = group_index(plan) % 2 == 1
    parts = jnp.where(swap, x[1], x[0]), jnp.where(swap, x[0], x[1])
    back = [_permute(plan, part, [(b, a) for a, b in plan.homes(number)]) for number, part in enumerate(parts)]
    return jnp.concatenate(back, axis=tokens)


def own_heads(x, first, count, group, needed):
    """The ``needed`` key/value heads (axis 1) of ``count`` query heads from ``first`` (traced) on, ``group`` a head."""
    if needed == 1:
        return lax.dynamic_slice_in_dim(x, first // group, 1, axis=1)
    return jnp.take(x, (first + jnp.arange(count)) // group, axis=1)
