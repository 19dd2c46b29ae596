"""Tiles of the `xla` engine: their sizes, the loop over the visited ones, and the scores of one tile.

run (xla.py) -> forward / backward (one file each) -> here. A *row* is a query of one head; where a few queries share a
key/value head (decoding with grouped heads) the rows of the whole group are stacked into one tile. A tile's first axis
is its rows in the forward and its keys in the backward direction (``flip``): that keeps every dot product in the
row-major form that XLA's CPU backend multiplies fastest.
"""

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention.core import dropout
from flash_attention.core.ranges import key_tiles
from flash_attention.jax.engines import cpu

LOWEST = float(np.finfo(np.float32).min) / 2
"""Running maximum before any key: finite, so that ``hidden - maximum`` is -inf and never NaN."""


class Geometry(NamedTuple):
    """Static sizes of one call. Tiles that would overrun the end start earlier and overlap their predecessor."""

    stack: int  # query heads in one tile
    rows: int  # rows of one (stack of) heads
    q_tile: int  # rows in a tile
    q_tiles: int
    kv_tile: int  # keys in a tile
    kv_tiles: int
    whole: int  # key tiles before the ragged one
    at_once: bool  # a single tile a head, small enough to compute all heads at once


def _even(length, most):
    """Split ``length`` into equal tiles of at most ``most`` (in multiples of 8): (tile, number of tiles)."""
    count = -(-length // most)
    tile = min(length, -(-length // (8 * count)) * 8)
    return tile, -(-length // tile)


def geometry(batch, heads, kv_heads, q_len, kv_len, head_dim, tile=None):
    """Tile sizes for a call; ``tile`` is the (rows, keys) asked for, None = 512 x 512.

    That was the best or within 3% of it from S = 1K to 8K, D = 64 and 128.

    Few rows (decoding) read longer key tiles instead: up to 2**18 elements (1 MB, what the second-level cache holds);
    with 8,192 keys of 128 the same work took twice as long.
    """
    group = heads // kv_heads
    stack = group if group * q_len <= (tile or (512,))[0] else 1
    rows = stack * q_len
    most_rows, most_keys = tile or (512, None)
    q_tile, q_tiles = _even(rows, most_rows)
    kv_tile, kv_tiles = _even(kv_len, most_keys or max(512, 2**18 // max(q_tile, head_dim)))
    small = q_tiles == kv_tiles == 1 and batch * heads * q_len * kv_len <= 2**22 and q_len * kv_len <= 2**17
    return Geometry(stack, rows, q_tile, q_tiles, kv_tile, kv_tiles, kv_len // kv_tile, small)


class Inputs(NamedTuple):
    """The call's tensors as the loops want them; T = batch * heads / stack, R = stack * Sq. Absent ones are None.

    Heads lie one after the other, or side by side (BSND): that is read as it is, see :func:`cut_head`.
    """

    query: jax.Array  # (T, R, D) or (B, Sq, N, D)
    key: jax.Array  # (batch * kv_heads, Sk, D) or (B, Sk, kv_heads, D)
    value: jax.Array  # like key
    offset: jax.Array = None  # (1|B,) int32, only when it is a run-time value
    bias: jax.Array = None  # (1|B, 1|N, 1|Sq, 1|Sk)
    mask: jax.Array = None  # bool, like bias; compact: (T + q_tile, T + kv_tile), repeated periodically
    slopes: jax.Array = None  # (1|B, N) float32
    q_segments: jax.Array = None  # (B, Sq)
    kv_segments: jax.Array = None  # (B, Sk)
    q_lengths: jax.Array = None  # (B,)
    kv_lengths: jax.Array = None  # (B,)
    row_keys: jax.Array = None  # (B, N, Sq) uint32 dropout keys
    key_origin: jax.Array = None  # what dropout counts the keys from
    intervals: tuple = None  # (first, last) visible key of each row, (T, R) int32 each, non-decreasing along R


class Rows(NamedTuple):
    """One query tile's per-row values, each (q_tile,)."""

    start: jax.Array  # scalar: first row
    index: jax.Array  # query index
    position: jax.Array
    fresh: jax.Array  # False for rows that the previous tile has done already; None when no tiles overlap
    slope: jax.Array = None
    segment: jax.Array = None
    key: jax.Array = None
    interval: tuple = None  # (first, last) visible key, where these are data


class Place(NamedTuple):
    """Where a tile lies: traced batch and (stack of) heads, and what follows from them."""

    batch: jax.Array
    head: jax.Array  # first query head
    outer: jax.Array  # (stack of) heads of Inputs.query, over all batches
    kv: jax.Array  # head of Inputs.key, over all batches
    offset: jax.Array


def at(x, index):
    """``x[index]`` for a traced index known to be in range; a leading axis of 1 is broadcast."""
    return lax.dynamic_index_in_dim(x, 0 if x.shape[0] == 1 else index, keepdims=False)


def cut(x, index, start, count):
    """``x[index, start : start + count]`` for traced ``index`` and ``start``."""
    corner = (index, start) + (jnp.int32(0),) * (x.ndim - 2)
    return lax.dynamic_slice(x, corner, (1, count) + x.shape[2:])[0]


def cut_head(x, head, start, count):
    """Rows ``start : start + count`` of one head, (count, D); ``x`` like query, key or value of :class:`Inputs`.

    A tensor of a single head is that head, whatever its index.
    """
    if x.ndim == 3:
        return cut(x, 0 if x.shape[0] == 1 else head, start, count)
    heads, dim = x.shape[2:]
    corner = (head // heads, start, head % heads, 0)
    return lax.dynamic_slice(x, corner, (1, count, 1, dim)).reshape(count, dim)


def with_own_keys(inputs, kv):
    """``inputs`` that hold the keys and values of one head alone, copied together if heads lie side by side.

    Worth it where several query tiles read them; a decoding step, which reads them once, cuts them out directly.
    """
    if inputs.key.ndim == 3:
        return inputs
    key, value = (cut_head(x, kv, 0, x.shape[1])[None] for x in (inputs.key, inputs.value))
    return inputs._replace(key=key, value=value)


def count_heads(x):
    """How many heads (or stacks of them) such a tensor holds, in all batches."""
    return x.shape[0] if x.ndim == 3 else x.shape[0] * x.shape[2]


def place(spec, geo, inputs, outer):
    """The :class:`Place` of (stack of) heads ``outer``."""
    per_batch = spec.heads // geo.stack
    batch, head = outer // per_batch, outer % per_batch * geo.stack
    kv = batch * spec.kv_heads + head // spec.group
    offset = spec.offset if inputs.offset is None else at(inputs.offset, batch)
    return Place(batch, head, outer, kv, offset)


def _stacked(geo, x):
    """(stack, Sq) or (Sq,) per-row values -> (R,)."""
    return x.reshape(-1) if x.ndim == 2 else jnp.tile(x, geo.stack)


def rows_of(spec, geo, inputs, where, tile):
    """The :class:`Rows` of query tile ``tile``."""
    start = jnp.minimum(tile * geo.q_tile, geo.rows - geo.q_tile)
    row = start + jnp.arange(geo.q_tile, dtype=jnp.int32)
    fresh = row >= tile * geo.q_tile if geo.rows % geo.q_tile else None
    index = row % spec.q_len if geo.stack > 1 else row

    def part(x):
        return lax.dynamic_slice_in_dim(_stacked(geo, x), start, geo.q_tile)

    def heads(x):  # (1|B, N, ...) -> (stack, ...)
        return lax.dynamic_slice_in_dim(at(x, where.batch), where.head, geo.stack)

    slope = segment = key = None
    if inputs.slopes is not None:
        slope = jnp.repeat(heads(inputs.slopes), geo.q_tile // geo.stack) if geo.stack > 1 else heads(inputs.slopes)
    if inputs.q_segments is not None:
        segment = part(at(inputs.q_segments, where.batch))
    if inputs.row_keys is not None:
        key = part(heads(inputs.row_keys))
    interval = None
    if inputs.intervals is not None:
        interval = tuple(cut(x, where.outer, start, geo.q_tile) for x in inputs.intervals)
    return Rows(start, index, index + where.offset, fresh, slope, segment, key, interval)


def bounds(spec, geo, inputs, where, rows):
    """Visited key tiles of a query tile and the run of them that needs no edge handling: (first, stop, inner, end).

    All four are Python ints when every tile is visited.
    """
    if rows.interval is not None:
        return _interval_bounds(geo, *rows.interval)
    if geo.stack > 1:  # the stacked heads hold the same queries
        low, high = where.offset, where.offset + spec.q_len - 1
    else:
        low, high = rows.start + where.offset, rows.start + where.offset + geo.q_tile - 1
    length = None if inputs.kv_lengths is None else at(inputs.kv_lengths, where.batch)
    return visited(spec, low, high, geo.kv_tile, length)


def visited(spec, low, high, kv_tile, length=None):
    """Key tiles that queries at positions ``low .. high`` visit: (first, stop, inner, end), as :func:`bounds` says.

    From ``core.ranges``; lengths and the ragged last tile only shorten them. With a mask tensor or segment ids the
    inner tiles carry that predicate, and the band's too.

    Args:
        low, high: integers or arrays of them.
        length: how many keys exist where that is data, broadcastable to them.
    """
    band = spec.band
    if band.is_dense:
        low = high = 0
    first, stop, inner, end = key_tiles(band, low, high, kv_tile)
    if spec.compact_mask:  # blocks strictly before the query's own are free of the mask
        _, _, inner, end = key_tiles(earlier_blocks(band), low, high, kv_tile)
    if masked_inside(spec):
        inner, end = first, stop
    whole = spec.kv_len // kv_tile
    if length is not None:
        stop = jnp.maximum(first, jnp.minimum(stop, -(-length // kv_tile)))
        whole = jnp.minimum(whole, length // kv_tile)
    if isinstance(stop, int) and isinstance(whole, int):
        return first, stop, inner, min(end, whole)
    end = jnp.clip(jnp.minimum(end, whole), first, stop)
    return first, stop, jnp.clip(inner, first, end), end


def _interval_bounds(geo, low, high):
    """:func:`bounds` of rows whose first and last visible keys, both in ascending order, are data."""
    first, last, tile = low[0], high[-1], geo.kv_tile
    stop = jnp.where(first <= last, last // tile + 1, first // tile)
    first = first // tile
    end = jnp.clip(jnp.minimum((high[0] + 1) // tile, geo.whole), first, stop)
    return first, stop, jnp.clip(-(-low[-1] // tile), first, end), end


def earlier_blocks(band):
    """``band`` less each query's own and later blocks."""
    return type(band)(band.q_len, band.kv_len, band.left, band.right, band.prev, -1, band.block_size)


def masked_inside(spec):
    """True when every visited tile needs a predicate: the mask or the segment ids are data."""
    return spec.segments or (spec.mask_shape is not None and not spec.compact_mask)


def sweep(geo, limits, visit, carry, held, widths=(1,)):
    """Run ``carry = visit(carry, held, first_tile, tiles, edge)`` over the visited tiles; ``held`` as in :func:`loop`.

    Edge tiles go one at a time; inner ones as many at a time as ``widths`` (descending, down to 1) and the count allow,
    one loop a width, so that compile time does not depend on the length.
    """
    first, stop, inner, end = limits
    static = isinstance(end - inner, int)
    if geo.kv_tiles == 1 and not static:
        return visit(carry, held, 0, 1, True)
    if geo.whole == 1 and not static:
        inner = end = stop
    before = inner - first

    def edge(n, carry, held):
        return visit(carry, held, jnp.where(n < before, first + n, end + n - before), 1, True)

    carry = loop(before + stop - end, edge, carry, held)
    for width in widths:
        # A loop over all keys at once would be loop-invariant: XLA hoists its dots and computes them for no trips too.
        if width < geo.whole + static:
            count = (end - inner) // width
            carry = loop(count, functools.partial(_inner, visit, inner, width), carry, held)
            inner = inner + count * width
    return carry


def _inner(visit, first, width, n, carry, held):
    return visit(carry, held, first + n * width, width, False)


def loop(count, body, carry, held):
    """``carry = body(n, carry, held)`` for n = 0 .. count - 1; no loop is left for the static counts 0 and 1.

    ``held`` are arrays that the body only reads. On a CPU they go through the loop behind a barrier. XLA slices a
    16-bit array there by way of float32, and would convert the whole of it once before the loop: decoding then took 4
    times as long, and twice the memory of the cache.
    """
    if isinstance(count, int) and count <= 1:
        return body(jnp.int32(0), carry, held) if count else carry
    if not cpu.on_cpu():
        return lax.fori_loop(0, count, lambda n, carry: body(n, carry, held), carry)

    def step(n, state):
        carry, held = state
        held = lax.optimization_barrier(held)
        return body(n, carry, held), held

    return lax.fori_loop(0, count, step, (carry, held))[0]


def over_heads(geo, head, count, held, carry=None):
    """``carry, out = head(index, carry, held)`` for 0 .. count - 1: the last carry and the outs, stacked.

    One after the other on a CPU, where batches of dots run at a third of the speed; all together on an accelerator, and
    for calls so small that a loop would cost more than they do (unless something is carried).
    """
    index = jnp.arange(count, dtype=jnp.int32)
    if carry is None and (geo.at_once or not cpu.on_cpu()):
        return None, jax.vmap(lambda n: head(n, None, held)[1])(index)
    dtypes = []

    def step(state, n):
        carry, held = state
        held = lax.optimization_barrier(held)
        carry, out = head(n, carry, held)
        dtypes[:] = [x.dtype for x in jax.tree.leaves(out)]
        return (carry, held), jax.tree.map(_as_bits, out)

    (carry, _), out = lax.scan(step, (carry, held), index)
    leaves, tree = jax.tree.flatten(out)
    return carry, tree.unflatten([lax.bitcast_convert_type(x, dtype) for x, dtype in zip(leaves, dtypes)])


def _as_bits(x):
    """16-bit floats as integers: XLA on a CPU would update a stacked array of them by way of float32, all of it."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


class Extras(NamedTuple):
    """What a tile's scores depend on beside q and k. Columns are (C,), rows (R,), ``low``/``high`` first/last key."""

    column: jax.Array
    position: jax.Array
    low: jax.Array = None
    high: jax.Array = None
    slope: jax.Array = None
    same: jax.Array = None  # (row segment (R,), column segment (C,))
    mask: jax.Array = None  # bool (R|1, C|1)
    bias: jax.Array = None  # (R|1, C|1)
    index: jax.Array = None  # column as dropout counts it
    base: jax.Array = None  # scalar: a position to measure distances from


def _window(spec, geo, x, where, rows, start, width):
    """The (R|1, C|1) part of a (1|B, 1|N, 1|Sq, 1|Sk) tensor that a tile needs."""
    b, n, sq, sk = x.shape
    zero = jnp.int32(0)
    at_ = (where.batch if b > 1 else zero, where.head if n > 1 else zero)
    at_ += (rows.start if sq > 1 and geo.stack == 1 else zero, start if sk > 1 else zero)
    size = (1, geo.stack if n > 1 else 1, min(sq, geo.q_tile), width if sk > 1 else 1)
    part = lax.dynamic_slice(x, at_, size)[0]
    if geo.stack > 1 and part.shape[:2] != (1, 1):
        part = jnp.broadcast_to(part, (geo.stack, spec.q_len, part.shape[-1]))
    return part.reshape(-1, part.shape[-1])


def extras_of(spec, geo, inputs, where, rows, tile, width, edge):
    """(first key index, :class:`Extras`) of ``width`` keys from key tile ``tile`` on."""
    nominal = tile * geo.kv_tile
    start = jnp.minimum(nominal, spec.kv_len - width) if edge else nominal
    column = start + jnp.arange(width, dtype=jnp.int32)
    low = high = same = mask = bias = None
    if edge or masked_inside(spec):
        low, high = rows.interval or (spec.band.first_key(rows.position), spec.band.last_key(rows.position))
        low = jnp.maximum(low, nominal)
        if inputs.kv_lengths is not None:
            high = jnp.minimum(high, at(inputs.kv_lengths, where.batch) - 1)
    if spec.segments:
        kv_segments = lax.dynamic_slice_in_dim(at(inputs.kv_segments, where.batch), start, width)
        same = (rows.segment, kv_segments)
    if spec.compact_mask:
        mask = _compact_window(spec, geo, inputs.mask, where, rows, start, width) if edge else None
    elif spec.mask_shape is not None:
        mask = _window(spec, geo, inputs.mask, where, rows, start, width)
    if spec.bias_shape is not None:
        bias = _window(spec, geo, inputs.bias, where, rows, start, width)
    index = column if inputs.key_origin is None else column + inputs.key_origin
    return start, Extras(column, rows.position, low, high, rows.slope, same, mask, bias, index, rows.position[0])


def repeat_compact(spec, geo, mask):
    """The (T, T) mask repeated until a slice of it, at (p % T, j % T), covers a tile."""
    size = spec.block_size
    rows = np.arange(geo.q_tile + size) % size
    columns = np.arange(geo.kv_tile + size) % size
    return mask[rows][:, columns]


def _compact_window(spec, geo, mask, where, rows, start, width):
    """Keep-mask (R, C) of a compact mask: it rules inside a query's own block only."""
    size = spec.block_size
    first = (0 if geo.stack > 1 else rows.start) + where.offset
    count = spec.q_len if geo.stack > 1 else geo.q_tile
    part = lax.dynamic_slice(mask, (first % size, start % size), (count, width))
    part = jnp.tile(part, (geo.stack, 1))
    column = start + jnp.arange(width, dtype=jnp.int32)
    return part | ((rows.position // size)[:, None] != (column // size)[None, :])


def distance(x, flip):
    """|p - j| of a tile in float32. Relative to the first row, so exact wherever it is below 2**24."""
    p, j = (x.position - x.base).astype(jnp.float32), (x.column - x.base).astype(jnp.float32)
    return jnp.abs(row(p, flip) - col(j, flip))


def row(x, flip):
    """Per-row values broadcast along a tile's keys."""
    return x[None, :] if flip else x[:, None]


def col(x, flip):
    """Per-key values broadcast along a tile's rows."""
    return x[:, None] if flip else x[None, :]


class Arithmetic(NamedTuple):
    """What a platform may compute in its own way."""

    exp: Callable = jnp.exp
    tanh: Callable = jnp.tanh


EXACT = Arithmetic()


def nt(a, b):
    """(M, K), (N, K) -> (M, N), float32 or wider."""
    return _dot(a, b, 1)


def nn(a, b):
    """(M, K), (K, N) -> (M, N), float32 or wider."""
    return _dot(a, b, 0)


def _dot(a, b, axis):
    """Contract the last axis of ``a`` with ``axis`` of ``b``.

    GPUs and TPUs would round float32 operands: not here, unless the caller's ``jax.default_matmul_precision`` asks.
    """
    wide = jnp.promote_types(a.dtype, jnp.float32)
    asked = a.dtype.itemsize == 2 or jax.config.jax_default_matmul_precision is not None
    precision = None if asked else lax.Precision.HIGHEST
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=wide)


def folds_scale(spec, dtype):
    """True when the scale may be multiplied into q in advance: no bits of a 16-bit q may be lost."""
    return jnp.dtype(dtype) == jnp.float32 or float(np.frexp(abs(spec.scale))[0]) == 0.5


def load_query(spec, x, dtype):
    """A query tile in the dtype of the dots, scaled where that is free."""
    x = x.astype(dtype)
    return x * jnp.asarray(spec.scale, dtype) if folds_scale(spec, dtype) else x


def scores(spec, q, k, x, flip=False, by=EXACT):
    """Scores of a tile, hidden ones -inf, and tanh's value (for the soft cap's derivative, else None).

    Args: q (R, D) from :func:`load_query`, k (C, D), x an :class:`Extras`. Returns (R, C), or (C, R) when ``flip``.
    """
    s = nt(k, q) if flip else nt(q, k)
    if not folds_scale(spec, q.dtype):
        s = s * spec.scale
    squashed = None
    if spec.soft_cap is not None:
        squashed = by.tanh(s * (1.0 / spec.soft_cap))
        s = squashed * spec.soft_cap
    if x.bias is not None:
        s = s + (x.bias.T if flip else x.bias).astype(jnp.float32)
    if x.slope is not None:
        s = s - row(x.slope, flip) * distance(x, flip)
    seen = visibility(x, flip)
    return (s if seen is None else jnp.where(seen, s, -jnp.inf)), squashed


def visibility(x, flip):
    """Boolean tile of what is visible, or None when everything is."""
    seen = []
    if x.low is not None:
        j = col(x.column, flip)
        seen += [j >= row(x.low, flip), j <= row(x.high, flip)]
    if x.same is not None:
        seen.append(row(x.same[0], flip) == col(x.same[1], flip))
    if x.mask is not None:
        seen.append(x.mask.T if flip else x.mask)
    return functools.reduce(jnp.logical_and, seen) if seen else None


def clean(x, extras, flip=False):
    """Zero the keys or values (C, D) outside the tile's range: what no row sees must not reach 0 * NaN in a dot.

    ``flip``: x is (D, C).
    """
    if extras.low is None:
        return x
    # Rows are in ascending order (once for each stacked head), and so are their bounds.
    inside = (extras.column >= extras.low[0]) & (extras.column <= extras.high[-1])
    return jnp.where(inside[None, :] if flip else inside[:, None], x, jnp.zeros_like(x))


def kept(spec, row_key, x, flip):
    """Boolean tile of what dropout keeps."""
    return dropout.keep_from_keys(jnp, row(row_key, flip), col(dropout.col_key(jnp, x.index), flip), spec.dropout_rate)


def out_dtype(spec, x):
    """dtype of the output and the gradients for an input ``x``."""
    return jnp.float32 if spec.wide else x.dtype
