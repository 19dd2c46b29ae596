"""Tiles of the `pallas` engine: which ones a program visits, and how their parts are loaded.

The plan, outside of the kernels, is ``core.ranges`` on arrays, as in `xla`; the scores of a tile are those of
:mod:`xla_tiles`. Here is what lies between: refs, masked loads, the loop over visited tiles.

Every operand is described by one letter an axis: b batch, n query heads, m key/value heads, q queries, k keys, d head
size, 1 and - heads and tokens that are broadcast; of axes with other letters each program sees all.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flash_attention.core.ranges import query_tiles
from flash_attention.jax.engines.pallas_arithmetic import units
from flash_attention.jax.engines.shared import dropout_origin, dropout_rows
from flash_attention.jax.engines.xla_tiles import Extras, Rows, earlier_blocks, masked_inside, visited

# --- plans -----------------------------------------------------------------------------------------------------------


def _offset(spec, operands):
    """Position of query 0, int32 (1|B, 1)."""
    offset = operands.q_offset if spec.dynamic_offset else spec.offset
    return jnp.asarray(offset, jnp.int32).reshape(-1, 1)


def positions(spec, operands):
    """Position of each query, int32 (1|B, Sq)."""
    return _offset(spec, operands) + jnp.arange(spec.q_len, dtype=jnp.int32)


def _lengths(x):
    """Lengths as int32 (B, 1), or None."""
    return None if x is None else jnp.asarray(x, jnp.int32)[:, None]


def plan_by_query(spec, operands, tiles):
    """int32 (1|B, query tiles, 4): (first, stop, inner, end) of the key tiles that each query tile visits.

    ``[first, stop)`` are visited, those in ``[inner, end)`` without a predicate.
    """
    start = jnp.arange(pl.cdiv(spec.q_len, tiles.rows), dtype=jnp.int32) * tiles.rows
    last = jnp.minimum(start + tiles.rows, spec.q_len) - 1
    offset = _offset(spec, operands)
    bounds = visited(spec, offset + start, offset + last, tiles.keys, _lengths(operands.kv_lengths))
    if spec.segments:
        ids = operands.q_segment_ids, operands.kv_segment_ids
        bounds = _meet(bounds, *_segment_tiles(*ids, tiles.rows, tiles.keys))
    return _stacked(bounds, start)


def plan_by_key(spec, operands, tiles):
    """int32 (1|B, key tiles, 4), the transposed view: the query tiles that visit each key tile."""
    start = jnp.arange(pl.cdiv(spec.kv_len, tiles.keys), dtype=jnp.int32) * tiles.keys
    last, offset = jnp.minimum(start + tiles.keys, spec.kv_len) - 1, _offset(spec, operands)
    first, stop, inner, end = query_tiles(spec.band, offset, start, last, tiles.rows)
    if spec.compact_mask:
        _, _, inner, end = query_tiles(earlier_blocks(spec.band), offset, start, last, tiles.rows)
    if masked_inside(spec):
        inner, end = first, first
    if operands.q_lengths is not None:
        stop = jnp.minimum(stop, pl.cdiv(_lengths(operands.q_lengths), tiles.rows))
    if operands.kv_lengths is not None:
        length = _lengths(operands.kv_lengths)
        stop = jnp.where(start < length, stop, first)
        end = jnp.where(last < length, end, inner)
    bounds = first, stop, inner, end
    if spec.segments:
        ids = operands.kv_segment_ids, operands.q_segment_ids
        bounds = _meet(bounds, *_segment_tiles(*ids, tiles.keys, tiles.rows))
    return _stacked(bounds, start)


def _stacked(bounds, like):
    first, stop, inner, end = (jnp.asarray(x, jnp.int32) for x in bounds)
    stop = jnp.maximum(first, stop)
    inner = jnp.clip(inner, first, stop)
    bounds = jnp.broadcast_arrays(first, stop, inner, jnp.clip(end, inner, stop), like[None])[:4]
    return jnp.stack(bounds, axis=-1)


def _meet(bounds, first, stop):
    """Bounds whose tiles all carry a predicate, restricted to ``[first, stop)``."""
    first = jnp.maximum(bounds[0], first)
    return first, jnp.minimum(bounds[1], stop), first, first


def _segment_tiles(ids, others, tile, other_tile):
    """``(first, stop)``, int32 (B, tiles) each: the others' tiles that may hold an id of a tile.

    By the smallest and largest id of each: exact for sorted ids (packed documents), never too few for any.
    """
    low, high = _extremes(ids, tile)
    other_low, other_high = _extremes(others, other_tile)
    meets = (low[:, :, None] <= other_high[:, None, :]) & (high[:, :, None] >= other_low[:, None, :])
    count, found = meets.shape[-1], meets.any(-1)
    first = jnp.where(found, jnp.argmax(meets, -1), 0)
    stop = jnp.where(found, count - jnp.argmax(meets[..., ::-1], -1), 0)
    return first.astype(jnp.int32), stop.astype(jnp.int32)


def _extremes(ids, tile):
    batch, length = ids.shape
    padded = jnp.pad(ids, ((0, 0), (0, -length % tile)), mode="edge").reshape(batch, -1, tile)
    return padded.min(-1), padded.max(-1)


# --- operands --------------------------------------------------------------------------------------------------------


def axes_of_heads(spec):
    """Axes of (query-like, key-like) tensors."""
    return ("bqnd", "bkmd") if spec.layout == "BSND" else ("bnqd", "bmkd")


def operands_of(spec, query, key, value, operands, plan, position=None):
    """``{name: (array, axes)}`` of what every kernel reads; absent ones are left out.

    ``low`` and ``high`` are the first and last key that a query sees; ``counts`` are the position of query 0, how many
    queries and keys exist, and what dropout counts keys from. ``position``: that of each query, where they do not
    follow one another.
    """
    batch, (query_axes, key_axes) = query.shape[0], axes_of_heads(spec)
    offset, kv_lengths = _offset(spec, operands), _lengths(operands.kv_lengths)
    position = positions(spec, operands) if position is None else position
    high = spec.band.last_key(position)
    found = {
        "query": (query, query_axes),
        "key": (key, key_axes),
        "value": (value, key_axes),
        "plan": (plan, "btv"),
        "low": (spec.band.first_key(position), "bq"),
        "high": (high if kv_lengths is None else jnp.minimum(high, kv_lengths - 1), "bq"),
        "counts": (_counts(spec, operands, offset, kv_lengths), "bv"),
    }
    if spec.mask_shape is not None:
        mask = (operands.mask > 0).astype(jnp.int8)  # Triton loads no single bits
        found["mask"] = (mask, "vw" if spec.compact_mask else axes_of_window(spec, spec.mask_shape))
    if spec.bias_shape is not None:
        found["bias"] = (operands.bias.astype(jnp.float32), axes_of_window(spec, spec.bias_shape))
    if spec.alibi_shape is not None:
        found["slopes"] = (operands.slopes.astype(jnp.float32).reshape(-1, spec.heads), "bn")
    if spec.sinks:
        found["sinks"] = (operands.sinks.astype(jnp.float32), "n")
    if spec.segments:
        found["q_segments"] = (operands.q_segment_ids.astype(jnp.int32), "bq")
        found["kv_segments"] = (operands.kv_segment_ids.astype(jnp.int32), "bk")
    if spec.dropout_rate:
        found["row_keys"] = (dropout_rows(spec, batch, operands), "bnq")
    return found


def axes_of_window(spec, shape):
    """Axes of a (1|B, 1|N, 1|Sq, 1|Sk) tensor."""
    full = ("n", spec.heads, "1"), ("q", spec.q_len, "-"), ("k", spec.kv_len, "-")
    return "b" + "".join(axis if size == want else one for size, (axis, want, one) in zip(shape[1:], full))


def _counts(spec, operands, offset, kv_lengths):
    """int32 (1|B, 4), see :func:`operands_of`."""
    q_lengths = _lengths(operands.q_lengths)
    queries = spec.q_len if q_lengths is None else jnp.minimum(q_lengths, spec.q_len)
    keys = spec.kv_len if kv_lengths is None else jnp.minimum(kv_lengths, spec.kv_len)
    columns = jnp.broadcast_arrays(offset, queries, keys, dropout_origin(spec, operands)[3])
    return jnp.concatenate([column.astype(jnp.int32) for column in columns], axis=1)


class Span(NamedTuple):
    """What one program covers beside its tile: so many query heads, with their key/value heads, and batch rows."""

    heads: int = 1
    batch: int = 1  # or all


def row_and_column(number, across):
    """Where item ``number`` lies when they are counted row by row, ``across`` in each."""
    if across == 1:  # jax 0.6 lowers no remainder of a division by the constant 1
        return number, 0
    return lax.div(number, across), lax.rem(number, across)


def call(spec, tiles, kernel, name, grid, found, outs, span=Span()):
    """``pallas_call`` of a kernel: ``kernel(refs, *out_refs)`` with ``refs`` a :class:`Refs`.

    Args:
        grid: (tiles, heads, batch), the last two in units of ``span``.
        found: ``{name: (array, axes)}``.
        outs: ``[(shape, dtype, axes)]``; axes q and k are cut into the program's tile. Where an output has both, tiles
            are counted row by row.
    """
    arrays = {key: array for key, (array, _) in found.items()}
    axes = {key: letters for key, (_, letters) in found.items()}
    block = functools.partial(_block, spec, tiles, span)

    def body(platform, arrays):
        seen = units(spec, platform)
        return pl.pallas_call(
            lambda refs, *out_refs: kernel(Refs(spec, tiles, span, seen, refs, axes), *out_refs),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outs],
            in_specs=[{key: block(array.shape, axes[key]) for key, array in arrays.items()}],
            out_specs=[block(shape, letters, tiled=True) for shape, _, letters in outs],
            grid=grid,
            name=name,
            interpret=platform == "cpu",
            compiler_params=_triton().CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        )(arrays)

    return body, arrays


def _block(spec, tiles, span, shape, axes, tiled=False):
    """BlockSpec of an operand: the program's batch rows and heads; of the other axes all, padded to whole tiles.

    A ``tiled`` one (an output) is cut along q or k into the program's own tile, and has one batch row.
    """
    unit = {"q": tiles.rows, "k": tiles.keys, "d": tiles.dim}
    covered = {"n": span.heads, "m": max(1, span.heads // spec.group)}
    sizes, index = [], []
    for size, axis in zip(shape, axes):
        if axis == "b" and (tiled or span.batch == 1):
            sizes.append(None)
            index.append(None if size == 1 else "b")
        elif axis in covered:
            sizes.append(covered[axis])
            index.append(axis)
        elif axis in unit:
            cut = tiled and axis != "d"
            sizes.append(unit[axis] if cut else pl.cdiv(size, unit[axis]) * unit[axis])
            index.append(axis if cut else None)
        else:
            sizes.append(size)
            index.append(None)
    across = pl.cdiv(spec.kv_len, tiles.keys) if {"q", "k"} <= set(index) else None

    def where(tile, head, batch):
        q, k = (tile, tile) if across is None else row_and_column(tile, across)
        at = {"b": batch, "n": head, "m": head // spec.group if span.heads == 1 else head, "q": q, "k": k}
        return tuple(0 if name is None else at[name] for name in index)

    return pl.BlockSpec(tuple(sizes), where)


def _triton():
    """Pallas' Triton back end, imported late: `mosaic` shares the plans above, and outlives it."""
    from jax.experimental.pallas import triton

    return triton


def _load(ref, index, mask=None, other=None):
    """A masked load; jax 0.6 spells it otherwise, and interprets no Python ints as indices."""
    index = tuple(jnp.int32(at) if isinstance(at, int) else at for at in index)
    if hasattr(_triton(), "load"):
        return _triton().load(ref.at[index], mask=mask, other=other)
    return pl.load(ref, index, mask=mask, other=other)


def _store(ref, index, value, mask):
    """A masked store; as :func:`_load`."""
    index = tuple(jnp.int32(at) if isinstance(at, int) else at for at in index)
    value, mask = value.astype(ref.dtype), jnp.broadcast_to(mask, value.shape)
    if hasattr(_triton(), "store"):
        _triton().store(ref.at[index], value, mask=mask)
    else:
        pl.store(ref, index, value, mask=mask)


def store(spec, ref, axes, value, **start):
    """Write a program's tile to its part of an output; the value's axes are q, k, d and - of ``axes``, in their order.

    ``start``: index of the tile's first query (q=) and key (k=). What lies beyond the end is not written.
    """
    ends = {"q": spec.q_len, "k": spec.kv_len, "d": spec.head_dim, "-": 1}
    where, mask, number = [], True, 0
    for axis in axes:
        if axis in ends:
            size = value.shape[number]
            where.append(pl.ds(0, size))
            inside = start.get(axis, 0) + jnp.arange(size, dtype=jnp.int32) < ends[axis]
            mask = mask & jnp.expand_dims(inside, [n for n in range(value.ndim) if n != number])
            number += 1
        elif axis != "b":
            where.append(0)
    _store(ref, tuple(where), value, mask)


class Refs:
    """What a program sees of the operands: parts are read by name and by the slices of their axes.

    ``head`` and ``batch`` are those of the program's :class:`Span` that are read; :meth:`at` chooses others.
    """

    def __init__(self, spec, tiles, span, units, refs, axes, head=0, batch=0):
        self.spec, self.tiles, self.span, self.units, self.refs, self.axes = spec, tiles, span, units, refs, axes
        self.head, self.batch = head, batch

    def at(self, head, batch=0):
        """The same, reading another query head and batch row of the span."""
        return Refs(self.spec, self.tiles, self.span, self.units, self.refs, self.axes, head, batch)

    def __contains__(self, name):
        return name in self.refs

    def read(self, name, mask=None, other=0, **where):
        """Part of an operand; ``where`` gives an index or ``pl.ds`` an axis. Masked elements are ``other``."""
        ref, where = self.refs[name], {"-": pl.ds(0, 1), "1": 0, "n": self.head, **where}
        where["m"] = self.head // self.spec.group if self.span.heads > self.spec.group else 0
        where["b"] = self.batch if ref.shape[0] > 1 else 0
        index = [where[axis] for axis in self.axes[name] if axis != "b" or self.span.batch > 1]
        shape = [x.size for x in index if isinstance(x, pl.Slice)]
        if mask is None:
            return _load(ref, tuple(index))
        other = float(other) if jnp.issubdtype(ref.dtype, jnp.floating) else other
        return _load(ref, tuple(index), jnp.broadcast_to(mask, shape), other)

    def count(self, number):
        """Entry of ``counts``."""
        return self.read("counts", v=number)

    def bounds(self, tile):
        """(first, stop, inner, end) of the program's tile."""
        return [self.read("plan", t=tile, v=number) for number in range(4)]

    def rows(self, tile):
        """``(Rows of a query tile, which of them exist (R,))``."""
        size = self.tiles.rows
        start = tile * size
        index = start + jnp.arange(size, dtype=jnp.int32)
        exists, part = index < self.count(1), pl.ds(start, size)
        low, high = self.read("low", exists, q=part), self.read("high", exists, -1, q=part)
        slope = jnp.full((1,), self.read("slopes") * self.units.factor) if "slopes" in self else None
        segment = self.read("q_segments", exists, q=part) if "q_segments" in self else None
        key = self.read("row_keys", exists, q=part) if "row_keys" in self else None
        return Rows(start, index, index + self.count(0), None, slope, segment, key, (low, high)), exists

    def per_row(self, name, rows, exists, other=0.0):
        """(R,) values of a (B, N, Sq) operand."""
        return self.read(name, exists, other, q=pl.ds(rows.start, self.tiles.rows))

    def heads(self, name, start, exists):
        """(R|C, D) of a tensor of heads from row ``start`` on; what does not exist is 0. ``exists`` None = all do."""
        axis = "k" if "k" in self.axes[name] else "q"
        size, dim = self.tiles.keys if axis == "k" else self.tiles.rows, self.tiles.dim
        mask = None if exists is None else exists[:, None]
        if dim != self.spec.head_dim:
            inside = (jnp.arange(dim, dtype=jnp.int32) < self.spec.head_dim)[None, :]
            mask = inside if mask is None else mask & inside
        return self.read(name, mask, d=pl.ds(0, dim), **{axis: pl.ds(start, size)})

    def keys(self, tile):
        """``(first key, key indices (C,), which of them exist (C,))`` of a key tile."""
        start = tile * self.tiles.keys
        column = start + jnp.arange(self.tiles.keys, dtype=jnp.int32)
        return start, column, column < self.count(2)

    def extras(self, rows, exists, start, column, key_exists, edge):
        """:class:`Extras` of the tile where ``rows`` meet the keys from ``start`` on."""
        spec = self.spec
        low, high = rows.interval if edge or masked_inside(spec) else (None, None)
        same = mask = bias = None
        part = {"q": pl.ds(rows.start, self.tiles.rows), "k": pl.ds(start, self.tiles.keys)}
        if spec.segments:
            same = (rows.segment, self.read("kv_segments", key_exists, k=part["k"]))
        if spec.compact_mask:
            mask = self._compact(rows, column) if edge else None
        elif spec.mask_shape is not None:
            mask = self._window("mask", exists, key_exists, part) > 0
        if spec.bias_shape is not None:
            bias = self._window("bias", exists, key_exists, part) * self.units.factor
        index = column + self.count(3) if spec.dropout_rate else column
        base = rows.start + self.count(0)
        return Extras(column, rows.position, low, high, rows.slope, same, mask, bias, index, base)

    def _window(self, name, exists, key_exists, part):
        """(R|1, C|1) of a (1|B, 1|N, 1|Sq, 1|Sk) operand."""
        mask = exists[:, None] if "q" in self.axes[name] else None
        if "k" in self.axes[name]:
            mask = key_exists[None, :] if mask is None else mask & key_exists[None, :]
        return self.read(name, mask, **part)

    def _compact(self, rows, column):
        """Keep-mask (R, C) of a compact mask: it rules inside a query's own block only."""
        size = self.spec.block_size
        p, j = rows.position[:, None], column[None, :]
        shape = (self.tiles.rows, self.tiles.keys)
        index = jnp.broadcast_to(p % size, shape), jnp.broadcast_to(j % size, shape)
        return (_load(self.refs["mask"], index) > 0) | (p // size != j // size)


def has_edges(spec, tiles):
    """False when no visited tile of the call needs a predicate."""
    ragged = spec.kv_len % tiles.keys or spec.kv_lengths
    return bool(ragged) or masked_inside(spec) or not spec.band.is_dense


def sweep(spec, tiles, bounds, visit, carry):
    """``carry = visit(tile, edge, carry)`` over the visited tiles, those that need a predicate first."""
    first, stop, inner, end = bounds
    if masked_inside(spec):
        return lax.fori_loop(first, stop, lambda n, carry: visit(n, True, carry), carry)
    if has_edges(spec, tiles):
        before = inner - first

        def edge(n, carry):
            return visit(jnp.where(n < before, first + n, end + n - before), True, carry)

        carry = lax.fori_loop(0, before + stop - end, edge, carry)
    return lax.fori_loop(inner, end, lambda n, carry: visit(n, False, carry), carry)
