"""Landmark attention tile by tile in JAX, forward and backward: O(N * D) memory, future tiles never visited.

landmark.py -> **forward / backward** -> core.mechanisms.landmark (one tile's softmax over groups and its gradient). The
groups of a tile are blocks of the regular pattern; with any other pattern a tile holds all keys, and its groups are the
sections. Heads come one after the other on a CPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention.core.mechanisms import landmark as shared
from flash_attention.jax.engines import cpu, xla_tiles

ROWS = 512  # queries of a tile
KEYS = 512  # keys of a tile of the regular pattern, or one block if that is longer
SCORES = 2**20  # elements of a tile that holds all keys, at most, unless 16 queries have more


class Static(NamedTuple):
    """What does not change during a call."""

    heads: int
    q_len: int
    kv_len: int
    scale: float
    block: int  # of the regular pattern; 0 for any other
    top_k: int = None
    at_once: bool = False  # see xla_tiles.over_heads

    @property
    def q_tile(self):
        """Rows of a tile."""
        most = ROWS if self.block else max(16, min(ROWS, SCORES // self.kv_len))
        return min(most, self.q_len)

    @property
    def kv_tile(self):
        """Keys of a tile: whole blocks, or all."""
        if not self.block:
            return self.kv_len
        count = max(1, KEYS // self.block)
        return self.block * min(count, -(-self.kv_len // self.block))

    @property
    def q_tiles(self):
        """Number of tiles of queries."""
        return -(-self.q_len // self.q_tile)

    @property
    def kv_tiles(self):
        """Number of tiles of keys."""
        return -(-self.kv_len // self.kv_tile)


class Held(NamedTuple):
    """Arrays that the loops read; T = batch * heads. Lengths are padded to whole tiles."""

    query: jax.Array  # (T, q_tiles * q_tile, D)
    key: jax.Array  # (T, kv_tiles * kv_tile, D)
    value: jax.Array
    section: jax.Array = None  # (B, Nk) int32, without a regular pattern
    is_landmark: jax.Array = None  # (B, Nk)
    d_out: jax.Array = None  # (T, q_tiles * q_tile, D)
    lse: jax.Array = None  # (T, q_tiles * q_tile), inf for padding and empty rows
    delta: jax.Array = None


def _blocks(size):
    """Grouping by ``size`` consecutive keys."""

    def split(x):
        return x.reshape(x.shape[:-1] + (-1, size))

    return (lambda x: split(x).max(-1)), (lambda x: split(x).sum(-1)), (lambda x: jnp.repeat(x, size, axis=-1))


def _sections(section):
    """Grouping by the ascending section number of each key."""

    def reduce(by, x):
        return by(x.T, section, section.shape[0], indices_are_sorted=True).T

    return (
        functools.partial(reduce, jax.ops.segment_max),
        functools.partial(reduce, jax.ops.segment_sum),
        lambda x: jnp.take(x, section, axis=-1),
    )


class _Tile(NamedTuple):
    """What the scores of a tile mean."""

    grouping: tuple  # see the core
    seen: jax.Array  # (R, K)
    is_landmark: jax.Array  # (K,)
    past: jax.Array  # (R, G)
    own: jax.Array  # (R, G)


def _tile(static, held, outer, row, first):
    """The :class:`_Tile` of queries at positions ``row`` (R,) and the keys from ``first`` on."""
    key = first + jnp.arange(static.kv_tile, dtype=jnp.int32)
    if static.block:
        grouping, is_landmark = _blocks(static.block), key % static.block == static.block - 1
        group = (first + jnp.arange(0, static.kv_tile, static.block, dtype=jnp.int32)) // static.block
        section = row // static.block
    else:
        batch = outer // static.heads
        of_keys, is_landmark = xla_tiles.at(held.section, batch), xla_tiles.at(held.is_landmark, batch)
        grouping, group = _sections(of_keys), jnp.arange(static.kv_len, dtype=jnp.int32)
        section = jnp.take(of_keys, jnp.minimum(row, static.kv_len - 1))
    seen = ~is_landmark & (key[None, :] <= row[:, None])
    past, own = group[None, :] < section[:, None], group[None, :] == section[:, None]
    return _Tile(grouping, seen, is_landmark, past, own)


def _softmax(static, tile, scores):
    """``(p, a)`` of a tile, see :func:`shared.group_softmax`; only the best ``top_k`` past sections count."""
    p, a = shared.group_softmax(
        jnp.where, jnp.exp, jnp.log, tile.grouping, scores, tile.seen, tile.is_landmark, tile.past, tile.own
    )
    if static.top_k is not None and static.top_k < a.shape[-1]:
        _, best = lax.top_k(jnp.where(tile.past, a, -jnp.inf), static.top_k)
        chosen = jnp.put_along_axis(jnp.zeros(a.shape, bool), best, True, axis=-1, inplace=False)
        a = jnp.where(tile.past & ~chosen, -jnp.inf, a)
    return p, a


def _rows(static, i):
    """(first row, positions (R,)) of tile ``i`` of the queries."""
    start = (i * static.q_tile).astype(jnp.int32)
    return start, start + jnp.arange(static.q_tile, dtype=jnp.int32) + static.kv_len - static.q_len


def _visits(static, row):
    """Number of key tiles that begin at or before the last query of a tile."""
    if static.kv_tiles == 1:
        return 1
    return jnp.minimum(row[-1] // static.kv_tile + 1, static.kv_tiles)


def _dot_dtype(static, held):
    dtype = held.query.dtype
    return dtype if dtype == jnp.float64 else cpu.dot_dtype(dtype, static.q_tile)


def _load(static, held, outer, start, dtype):
    return xla_tiles.cut(held.query, outer, start, static.q_tile).astype(dtype)


def forward(static, held):
    """``(out (T, R, D), lse (T, R))`` in the dtype of sums, R = padded rows; -inf for rows that see nothing."""
    wide, dim = jnp.promote_types(held.query.dtype, jnp.float32), held.query.shape[-1]
    dtype = _dot_dtype(static, held)

    def head(outer, carry, held):
        def one(i, done, held):
            start, row = _rows(static, i)
            q = _load(static, held, outer, start, dtype)

            def visit(n, state, held):
                first = (n * static.kv_tile).astype(jnp.int32)
                k, v = (xla_tiles.cut(x, outer, first, static.kv_tile).astype(dtype) for x in (held.key, held.value))
                return _accumulate(static, _tile(static, held, outer, row, first), state, q, k, v)

            state = (
                jnp.zeros((static.q_tile, dim), wide),
                jnp.full((static.q_tile,), xla_tiles.LOWEST, wide),
                jnp.zeros((static.q_tile,), wide),
            )
            out, peak, total = xla_tiles.loop(_visits(static, row), visit, state, held)
            alive = total > 0
            safe = jnp.where(alive, total, 1.0)
            out, lse = out / safe[:, None], jnp.where(alive, peak + jnp.log(safe), -jnp.inf)
            return (
                lax.dynamic_update_slice_in_dim(done[0], out, start, axis=0),
                lax.dynamic_update_slice_in_dim(done[1], lse, start, axis=0),
            )

        done = (
            jnp.zeros((static.q_tiles * static.q_tile, dim), wide),
            jnp.zeros((static.q_tiles * static.q_tile,), wide),
        )
        return carry, xla_tiles.loop(static.q_tiles, one, done, held)

    return xla_tiles.over_heads(static, head, held.query.shape[0], held)[1]


def _accumulate(static, tile, state, q, k, v):
    """Add the groups of a tile to the running softmax over groups."""
    out, peak, total = state
    p, a = _softmax(static, tile, xla_tiles.nt(q, k) * static.scale)
    new = jnp.maximum(peak, a.max(-1))
    g, shrink = jnp.exp(a - new[:, None]), jnp.exp(peak - new)
    w = (tile.grouping[2](g) * p).astype(v.dtype)
    return out * shrink[:, None] + xla_tiles.nn(w, v), new, total * shrink + g.sum(-1)


def backward(static, held):
    """``(d_query, d_key, d_value)`` like the padded query, key and value, in the dtype of sums."""
    wide = jnp.promote_types(held.query.dtype, jnp.float32)
    dtype = _dot_dtype(static, held)

    def head(outer, carry, held):
        def one(i, grads, held):
            start, row = _rows(static, i)
            q = _load(static, held, outer, start, dtype)
            d_o = xla_tiles.cut(held.d_out, outer, start, static.q_tile).astype(dtype)
            lse, delta = (xla_tiles.cut(x, outer, start, static.q_tile)[:, None] for x in (held.lse, held.delta))

            def visit(n, carry, held):
                d_q, d_k, d_v = carry
                first = (n * static.kv_tile).astype(jnp.int32)
                k, v = (xla_tiles.cut(x, outer, first, static.kv_tile).astype(dtype) for x in (held.key, held.value))
                tile = _tile(static, held, outer, row, first)
                p, a = _softmax(static, tile, xla_tiles.nt(q, k) * static.scale)
                w, d_s = shared.group_gradient(
                    jnp.where, tile.grouping, p, jnp.exp(a - lse), xla_tiles.nt(d_o, v), delta, tile.is_landmark,
                    tile.past,
                )  # fmt: skip
                d_s, w = (d_s * static.scale).astype(dtype), w.astype(dtype)
                d_k, d_v = (_add(x, xla_tiles.nn(y.T, z), first) for x, y, z in ((d_k, d_s, q), (d_v, w, d_o)))
                return d_q + xla_tiles.nn(d_s, k), d_k, d_v

            d_query, d_key, d_value = grads
            state = jnp.zeros(q.shape, wide), d_key, d_value
            d_q, d_key, d_value = xla_tiles.loop(_visits(static, row), visit, state, held)
            return lax.dynamic_update_slice_in_dim(d_query, d_q, start, axis=0), d_key, d_value

        grads = tuple(jnp.zeros(x.shape[1:], wide) for x in (held.query, held.key, held.value))
        return carry, xla_tiles.loop(static.q_tiles, one, grads, held)

    return xla_tiles.over_heads(static, head, held.query.shape[0], held)[1]


def _add(x, part, first):
    return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, first, part.shape[0]) + part, first, axis=0)
