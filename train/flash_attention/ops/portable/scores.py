"""A row's scores: one matrix product a piece, constants on partial pieces, run-time masks on the whole row.

Row (geometry) -> **RowScores** (this file) -> softmax in forward.py, recomputed in backward.py.

Layout: a row tile is "grouped", (B, Nkv, group * rows, keys): the query heads that share a key head lie under each
other, so keys are never repeated. Terms of rank one (lengths, ALiBi, the LSE) are extra columns of query and key, which
cost next to nothing in the product; anything else is added. Broadcasting is avoided where a full-shape constant fits.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.functional import depend

from flash_attention.core.ranges import visible
from flash_attention.ops.portable.geometry import FULL_SHAPE_LIMIT, HIDDEN

matmul = P.BatchMatMul()
matmul_nt = P.BatchMatMul(transpose_b=True)
join_columns = P.Concat(3)
join_rows = P.Concat(2)
reshape = P.Reshape()
transpose = P.Transpose()
cast = P.Cast()
add = P.Add()
mul = P.Mul()
ones_like = P.OnesLike()
zeros_like = P.ZerosLike()
_slice = P.Slice()
_tile = P.Tile()


def take_rows(x, first, count):
    """``x[:, :, first : first + count]`` as one kernel (no view, which PyNative would copy slowly later)."""
    return _slice(x, (0, 0, first, 0), (-1, -1, count, -1))


def take_columns(x, first, count):
    """``x[..., first : first + count]``."""
    return _slice(x, (0, 0, 0, first), (-1, -1, -1, count))


def swap(x):
    """Swap the last two axes."""
    return transpose(x, (0, 1, 3, 2))


def zeros(count):
    """(1, 1, 1, count) constant, None for count == 0."""
    return Tensor(np.zeros((1, 1, 1, count), np.float32)) if count else None


def after(tensors, event):
    """The tensors (None allowed), but not before ``event`` has been computed."""
    result = ()
    for x in tensors:
        result = result + (None if x is None else depend(x, event),)
    return result


class Chain(nn.Cell):
    """``(event, inputs, terms, *more) -> (inputs, terms, *more)``, all of them not before ``event`` has been computed.

    Without it a graph runs breadth first and holds the score tiles of all rows at once.
    """

    def __init__(self, spec):
        super().__init__(auto_prefix=False)
        # Query, key and value are the expensive ones to touch early; the rest only where it is made into tiles.
        self.tiles = bool(needs_terms(spec) or spec.dropout_rate or spec.soft_cap is not None or spec.compact_mask)

    def construct(self, event, inputs, terms, v, d_o, row_keys):
        if self.tiles:
            v, d_o, row_keys = after((v, d_o, row_keys), event)
            return after(inputs, event), after(terms, event), v, d_o, row_keys
        q, k, v = depend(inputs[0], event), depend(inputs[1], event), depend(v, event)
        return (q, k) + inputs[2:], terms, v, d_o, row_keys


class Constants:
    """Full-shape constants of one engine Cell, each stored once however many rows use it."""

    def __init__(self, spec):
        self._spec = spec
        self._store = {}

    def grouped(self, values):
        """(rows, keys) -> grouped tile constant, at full shape when that is affordable."""
        if values is None:
            return None
        spec = self._spec
        shape = (1, 1)
        if spec.batch > 0 and spec.batch * spec.heads * values.size <= FULL_SHAPE_LIMIT:
            shape = (spec.batch, spec.kv_heads)
        return self._tensor(np.tile(values, shape + (spec.group, 1)))

    def plain(self, values):
        """Any array, stored once."""
        return None if values is None else self._tensor(np.ascontiguousarray(values))

    def _tensor(self, array):
        key = (array.shape, array.dtype.str, array.tobytes())
        if key not in self._store:
            self._store[key] = Tensor(array)
        return self._store[key]


class Widen(nn.Cell):
    """``(x (B, N, S, C), lengths (B,)) -> x`` in fp32, where ``padded`` with zeros from each length on.

    Padding may hold anything, and a NaN there would reach every product: 0 * NaN is NaN.
    """

    def __init__(self, constants, length, padded):
        super().__init__(auto_prefix=False)
        self.padded = padded
        self.index = constants.plain(np.arange(length, dtype=np.int32).reshape(1, 1, -1, 1))

    def construct(self, x, lengths):
        x = cast(x, mstype.float32)
        if self.padded:
            x = ops.where(self.index < reshape(lengths, (-1, 1, 1, 1)), x, zeros_like(x))
        return x


class Inputs(nn.Cell):
    """What all rows share, made once a call; a tuple, see the return line of ``construct``.

    Query and key come in fp32; the scale goes into the query. Rank-one terms go in as extra columns, or, when a soft
    cap comes between the product and those terms, stay apart as ``extra_*``. ``alibi_q`` (B, N, tile, 4) is ALiBi's
    query side, the same for every row because distances are taken from the row's first query. ``own`` holds the compact
    mask as values to add, and a last 0 for keys outside the query's own block.
    """

    def __init__(self, spec, constants, rows):
        super().__init__(auto_prefix=False)
        cap = spec.soft_cap
        self.factor = spec.scale if cap is None else spec.scale / cap
        self.capped = cap is not None
        self.kv_lengths = spec.kv_lengths
        self.alibi = spec.alibi_shape is not None
        self.linear = linear_alibi(spec)
        self.compact = spec.compact_mask
        self.tile = rows[0].rows
        self.heads = (-1, spec.heads, 1, 1)
        self.key_index = constants.plain(np.arange(spec.kv_len, dtype=np.int32).reshape(1, 1, -1, 1))
        t = np.arange(self.tile, dtype=np.float32)
        self.line = constants.plain(np.stack([np.ones_like(t), -t], axis=1).reshape(1, 1, -1, 2))
        self.visible = constants.plain(np.zeros((1,), np.float32))

    def construct(self, query, key, mask, slopes, kv_lengths, lse):
        q, k = query * self.factor, key
        extra_q, extra_k, alibi_q, own = None, None, None, None
        if self.kv_lengths:
            hidden = cast(self.key_index >= reshape(kv_lengths, (-1, 1, 1, 1)), mstype.float32) * HIDDEN
            extra_q = ones_like(take_columns(q, 0, 1))
            extra_k = zeros_like(take_columns(k, 0, 1)) + hidden
        if lse is not None:
            minus = -P.ExpandDims()(lse, 3)
            ones = ones_like(take_columns(k, 0, 1))
            extra_q = minus if extra_q is None else join_columns((extra_q, minus))
            extra_k = ones if extra_k is None else join_columns((extra_k, ones))
        if self.alibi:
            slopes = cast(reshape(slopes, self.heads), mstype.float32)
        if self.linear:
            # A slope of 12 bits times a distance is exact in fp32, and so is the difference of two such products, which
            # come first in the sum: the large terms far from the row's first query cost no accuracy.
            high = slopes * 4097.0
            high = high - (high - slopes)
            line = join_columns((high * self.line, (slopes - high) * self.line))
            alibi_q = zeros_like(take_columns(take_rows(q, 0, self.tile), 0, 1)) + line
        if extra_q is not None and not self.capped:
            q, k = join_columns((q, extra_q)), join_columns((k, extra_k))
            extra_q, extra_k = None, None
        if self.compact:
            own = P.Concat(0)((reshape(hide_unless(mask), (-1,)), self.visible))
        return q, k, extra_q, extra_k, alibi_q, slopes, own


def linear_alibi(spec):
    """True when ALiBi's distances are known on the host; else they are formed at run time, tile by tile."""
    return spec.alibi_shape is not None and not spec.dynamic_offset


def far_queries(spec):
    """True when a query that sees keys may be far from all of them, so that ALiBi dwarfs the products.

    ALiBi comes first in a shared sum: exact near the diagonal, but every product added to a large term is rounded to
    its size.
    """
    return spec.offset < 0 and spec.band.right != 0 or spec.offset + spec.q_len > spec.kv_len


def maybe_dead(spec):
    """True when run-time tensors may leave a query without any key."""
    return bool(spec.has_data_mask or spec.bias_shape is not None or spec.dynamic_offset)


def accurate_tanh(x):
    """tanh(x) from tanh(x / 2): MindSpore's CPU kernel alone saturates at 0.9999, an error of 1e-4; so it is 2e-7."""
    t = P.Tanh()(x * 0.5)
    return P.RealDiv()(t * 2.0, t * t + 1.0)  # the operator / keeps four tiles of memory a call, this one none


class PieceScores(nn.Cell):
    """Scores of one piece, grouped; with a soft cap also tanh of the uncapped ones (else None).

    Conditions are attributes, so that the graph parser drops the other branch at once: parsing is most of compilation.
    """

    def __init__(self, spec, constants, row, piece, apart):
        super().__init__(auto_prefix=False)
        self.start, self.length = piece.start, piece.length
        self.whole = piece.length == spec.kv_len
        self.cap = spec.soft_cap
        self.capped = spec.soft_cap is not None
        self.apart = apart
        self.hidden = constants.grouped(piece.hidden)
        self.hides = piece.hidden is not None
        self.known_batch = spec.batch > 0
        if self.hides:
            shape = self.hidden.shape
            self.spread_hidden = shape[0] * shape[1] < spec.batch * spec.kv_heads
            self.kv_copies = (max(1, spec.batch), spec.kv_heads, 1, 1)
        self.copies = (max(1, spec.batch), spec.heads, 1, 1)
        self.alibi = linear_alibi(spec)
        self.alibi_apart = self.alibi and (self.capped or far_queries(spec))
        self.line, bend = alibi_tables(spec, row, piece) if self.alibi else (None, None)
        self.line, self.bend = constants.plain(self.line), constants.plain(bend)
        self.bends = bend is not None
        self.own_index = constants.plain(piece.own)
        self.owns = piece.own is not None
        self.plain_shape = (-1, spec.heads, row.rows, piece.length)
        self.grouped_shape = (-1, spec.kv_heads, spec.group * row.rows, piece.length)

    def construct(self, q, k, extra_q, extra_k, alibi_q, slopes, own):
        if not self.whole:
            k = take_rows(k, self.start, self.length)
        if self.capped:
            return self.capped_scores(q, k, extra_q, extra_k, alibi_q, slopes, own)
        if self.alibi and not self.alibi_apart:
            line = add(zeros_like(take_columns(k, 0, 1)), self.line)
            q, k = join_columns((alibi_q, q)), join_columns((line, k))
        return self.finish(matmul_nt(q, k), alibi_q, k, slopes, own), None

    def capped_scores(self, q, k, extra_q, extra_k, alibi_q, slopes, own):
        """The soft cap comes before every other term, so these cannot share the product."""
        tanh = accurate_tanh(matmul_nt(q, k))
        s = tanh * self.cap
        if self.apart:
            s = add(s, matmul_nt(extra_q, take_rows(extra_k, self.start, self.length)))
        return self.finish(s, alibi_q, k, slopes, own), tanh

    def finish(self, s, alibi_q, k, slopes, own):
        """Terms that are added."""
        if self.alibi_apart:
            s = add(s, matmul_nt(alibi_q, add(zeros_like(take_columns(k, 0, 1)), self.line)))
        if self.bends:
            s = self.add_plain(s, slopes * self.bend)
        if self.owns:
            term = P.Gather()(own, self.own_index, 0)
            s = self.add_plain(s, _tile(term, self.copies) if self.known_batch else term)
        if self.hides:
            # A sum that broadcasts keeps 16 bytes an element as long as the graph lives: copies are cheaper. depend()
            # stops the compiler from storing the copies as a constant of every row.
            s = add(s, _tile(depend(self.hidden, s), self.kv_copies) if self.spread_hidden else self.hidden)
        return s

    def add_plain(self, s, term):
        return reshape(add(reshape(s, self.plain_shape), term), self.grouped_shape)


def alibi_tables(spec, row, piece):
    """ALiBi's key side ``line`` (1, 1, keys, 4), and ``bend``, which turns p - j into |p - j| on the diagonal.

    With t = query - row.first and u = key - position of the row's first query: -slope * |p - j| is
    slope * (u - t) left of the diagonal, its negative right of it: columns u and 1, once for each half of the slope.
    """
    u = (np.arange(piece.start, piece.start + piece.length) - (row.first + spec.offset)).astype(np.float32)
    sign = -1.0 if piece.side < 0 else 1.0
    line = np.stack([u, np.ones_like(u)] * 2, axis=1).reshape(1, 1, -1, 4) * np.float32(sign)
    if piece.side != 0 or spec.band.right == 0:
        return line, None
    t = np.arange(row.rows, dtype=np.float32)
    ahead = np.maximum(u[None, :] - t[:, None], 0.0)
    return line, (-2.0 * ahead).reshape(1, 1, row.rows, piece.length) if ahead.any() else None


class RowScores(nn.Cell):
    """All scores of one row: ``(scores, tanh or None)``, grouped (B, Nkv, group * rows, keys).

    ``with_lse``: the inputs carry an LSE column (backward pass with sinks).
    """

    def __init__(self, spec, constants, row, with_lse=False):
        super().__init__(auto_prefix=False)
        self.apart = spec.soft_cap is not None and (spec.kv_lengths or with_lse)
        self.pieces = nn.CellList([PieceScores(spec, constants, row, piece, self.apart) for piece in row.pieces])
        self.single = len(row.pieces) == 1
        self.has_terms = needs_terms(spec)
        self.terms = RowTerms(spec, constants, row) if self.has_terms else None
        self.whole = row.rows == spec.q_len
        self.first, self.rows = row.first, row.rows
        self.batch = spec.batch
        self.group_shape = (spec.batch, spec.kv_heads, spec.group * row.rows)
        self.capped = spec.soft_cap is not None
        self.alibi = linear_alibi(spec)
        self.plain_shape = (-1, spec.heads, row.rows, row.keys)
        self.grouped_shape = (-1, spec.kv_heads, spec.group * row.rows, row.keys)

    def group(self, x):
        """This row's part of a (B, N, Sq, C) tensor, grouped: (B, Nkv, group * rows, C)."""
        if not self.whole:
            x = take_rows(x, self.first, self.rows)
        return self.regroup(x)

    def regroup(self, x):
        """(B, N, rows, C) -> (B, Nkv, group * rows, C)."""
        if self.batch > 0:
            return reshape(x, self.group_shape + (-1,))
        return reshape(x, self.group_shape + (x.shape[3],))

    def construct(self, inputs, terms):
        q, k, extra_q, extra_k, alibi_q, slopes, own = inputs
        q = self.group(q)
        if self.apart:
            extra_q = self.group(extra_q)
        if self.alibi:
            alibi_q = self.regroup(take_rows(alibi_q, 0, self.rows))
        if self.single:
            s, tanh = self.pieces[0](q, k, extra_q, extra_k, alibi_q, slopes, own)
        else:
            s, tanh = self.join(q, k, extra_q, extra_k, alibi_q, slopes, own)
        if self.has_terms:
            s = reshape(add(reshape(s, self.plain_shape), self.terms(slopes, terms)), self.grouped_shape)
        return s, tanh

    def join(self, q, k, extra_q, extra_k, alibi_q, slopes, own):
        """The pieces side by side."""
        scores, tanhs = (), ()
        for piece in self.pieces:
            s, tanh = piece(q, k, extra_q, extra_k, alibi_q, slopes, own)
            scores = scores + (s,)
            tanhs = tanhs + (tanh,)
        if self.capped:
            return join_columns(scores), join_columns(tanhs)
        return join_columns(scores), None


def needs_terms(spec):
    """True when something must be formed at run time and added to a whole row."""
    mask = spec.mask_shape is not None and not spec.compact_mask
    return bool(mask or spec.bias_shape is not None or spec.segments or spec.dynamic_offset)


class RowTerms(nn.Cell):
    """The run-time part of a row's scores, (1|B, 1|N, rows|1, keys|1): bias, mask, segments, run-time positions."""

    def __init__(self, spec, constants, row):
        super().__init__(auto_prefix=False)
        self.spec_mask = None if spec.compact_mask else spec.mask_shape
        self.bias_shape = spec.bias_shape
        self.row, self.rows, self.key, self.keys = row.first, row.rows, row.key, row.keys
        self.segments = spec.segments
        self.dynamic = spec.dynamic_offset
        self.alibi = spec.alibi_shape is not None
        self.band = spec.band
        self.hides = self.dynamic and not spec.band.is_dense
        self.i = constants.plain(np.arange(row.first, row.first + row.rows, dtype=np.int32).reshape(1, 1, -1, 1))
        self.j = constants.plain(np.arange(row.key, row.key + row.keys, dtype=np.int32).reshape(1, 1, 1, -1))

    def cut(self, x, shape):
        """This row's tile of a (1|B, 1|N, 1|Sq, 1|Sk) operand."""
        first, rows = (0, 1) if shape[2] == 1 else (self.row, self.rows)
        key, keys = (0, 1) if shape[3] == 1 else (self.key, self.keys)
        return _slice(x, (0, 0, first, key), (-1, -1, rows, keys))

    def construct(self, slopes, terms):
        bias, mask, q_ids, kv_ids, q_offset = terms
        term = None
        if self.bias_shape is not None:
            term = P.Maximum()(cast(self.cut(bias, self.bias_shape), mstype.float32), HIDDEN)
        if self.spec_mask is not None:
            term = plus(term, hide_unless(self.cut(mask, self.spec_mask)))
        if self.segments:
            q_part = reshape(q_ids, (-1, 1, q_ids.shape[1], 1))
            kv_part = reshape(kv_ids, (-1, 1, 1, kv_ids.shape[1]))
            same = P.Equal()(take_rows(q_part, self.row, self.rows), take_columns(kv_part, self.key, self.keys))
            term = plus(term, hide_unless(same))
        if self.dynamic:
            p = reshape(q_offset, (-1, 1, 1, 1)) + self.i
            if self.hides:
                term = plus(term, hide_unless(visible(self.band, p, self.j)))
            if self.alibi:
                term = plus(term, slopes * cast(-P.Abs()(p - self.j), mstype.float32))
        # A dense band with a run-time offset and nothing else has no term; zero keeps the caller simple.
        return zeros_like(cast(self.j, mstype.float32)) if term is None else term


def plus(term, other):
    """Sum where the first may be absent."""
    return other if term is None else term + other


def hide_unless(keep):
    """Keep mask (bool, or any number: > 0 keeps) -> 0 or HIDDEN in fp32."""
    if keep.dtype != mstype.bool_:
        keep = cast(keep, mstype.float32) > 0
    return (cast(keep, mstype.float32) - 1.0) * (-HIDDEN)
