"""Softmax attention of a MindSpore stack: by the core call, or in query tiles that form whole rows.

``Fused`` and ``Formed`` take the same tensors, heads grouped, and drop by the same hash.
"""

import functools

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.spec import AttentionSpec
from flash_attention.core.transformer.attention import MEMORY_SALT, QUERY_TILE
from flash_attention.ops.functional import computable, flash_attention
from flash_attention.ops.lse import log_sum_exp
from flash_attention.ops.portable.dropout import KeepFactors
from flash_attention.ops.precision import OwnPrecision

_HIDDEN = -3e38  # a finite score; hidden places are multiplied by 0 after the exp
_depend = P.Depend()
_nn, _nt, _tn = P.BatchMatMul(), P.BatchMatMul(transpose_b=True), P.BatchMatMul(transpose_a=True)
_product, _product_nt = P.MatMul(), P.MatMul(transpose_b=True)
_softmax, _row_sum = P.Softmax(), P.ReduceSum(True)
# Primitives, because a graph's gradient has lost what composed functions (ops.where, ...) it met before.
_select, _tile, _abs = P.Select(), P.Tile(), P.Abs()
_zeros_like, _ones_like, _concat2, _concat3 = P.ZerosLike(), P.OnesLike(), P.Concat(2), P.Concat(3)


class Fused(nn.Cell):
    """The core call, and one over the learned keys, merged by LSE."""

    def __init__(self, options, engine):
        super().__init__(auto_prefix=False)
        self.scale, self.causal, self.rate = options.scale, options.causal, options.dropout
        self.window = None if options.max_attend_past is None else (options.max_attend_past, None)
        self.engine, self.value_dim = engine, options.value_dim

    def construct(self, query, key, value, mem_key, mem_value, mask, bias, slopes, pre, post, seed):
        """(B, N, H, Dv) and None; tensors as in ``Attention``."""
        rate = 0.0 if seed is None else self.rate
        width = max(query.shape[3], value.shape[3])
        dtype = query.dtype
        if mem_key is not None:  # parts that are merged are not rounded before
            query, key, value = _wide(query), _wide(key), _wide(value)
        query, key, value = padded(query, width), padded(key, width), padded(value, width)
        out, lse = flash_attention(
            query, key, value, bias, mask, scale=self.scale, is_causal=self.causal, local_window_size=self.window,
            engine=self.engine, alibi_slopes=slopes, dropout_rate=rate, dropout_seed=seed, return_lse=True,
        )  # fmt: skip
        if mem_key is not None:
            salted = None if seed is None else salt(seed)
            learned, learned_lse = flash_attention(
                query, padded(_wide(for_each_row(mem_key, query)), width),
                padded(_wide(for_each_row(mem_value, query)), width), scale=self.scale, engine=self.engine,
                dropout_rate=rate, dropout_seed=salted, return_lse=True,
            )  # fmt: skip
            _, total = log_sum_exp((lse, learned_lse))
            out = _share(lse, total) * out + _share(learned_lse, total) * learned
        if width > self.value_dim:
            out = computable(out)[..., : self.value_dim]
        return out.astype(dtype), None


class Formed(nn.Cell):
    """Tile after tile of queries, whose whole rows of weights are formed, and formed again in the backward pass.

    ``with_weights``: give the weights too, B * H * N * (M + S) numbers; without, no more than a tile of them exists.
    """

    def __init__(self, options, with_weights=False):
        super().__init__(auto_prefix=False)
        self.tiles, self.with_weights = _Tiles(options, with_weights), with_weights

    def construct(self, query, key, value, mem_key, mem_value, mask, bias, slopes, pre, post, seed):
        """(B, N, H, Dv), and the weights (B, H, N, M + S) or None."""
        dtype = query.dtype
        query, key, value = _wide(query), _wide(key), _wide(value)
        if mem_key is not None:
            key = ops.concat((_wide(for_each_row(mem_key, query)), key), 1)
            value = ops.concat((_wide(for_each_row(mem_value, query)), value), 1)
        query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
        if mask is not None:
            mask = (mask > 0).astype(mstype.float32)
        # No Parameter itself may enter a Cell that has a gradient of its own (MindSpore 2.10).
        slopes, pre, post = _tensor(slopes), _tensor(pre), _tensor(post)
        out, weights = self.tiles(query, key, value, mask, _tensor(bias), slopes, pre, post, seed), None
        if self.with_weights:
            out, weights = out
        return out.swapaxes(1, 2).astype(dtype), weights


class _Tiles(OwnPrecision):
    """Tile after tile, float32, BNSD: outputs, and weights ``with_weights``.

    The gradient is written out: MindSpore's own would keep every tile's scores, a dozen times over.
    """

    def __init__(self, options, with_weights):
        super().__init__()
        self.with_weights, self.rate, self.learned = with_weights, options.dropout, options.num_mem_kv
        self.scale, self.causal, self.past = options.scale, options.causal, options.max_attend_past
        self.kv_heads, self.top, self.top_k = options.key_heads, options.sparse_topk, P.TopK(sorted=True)

    def construct(self, query, key, value, mask, bias, slopes, pre, post, seed):
        outs, weights = (), ()
        for first, last in _extents(query.shape[2]):
            rows = query[:, :, first:last]
            if outs:  # one after the other, else a graph holds all tiles at once
                rows = _depend(rows, outs[-1])
            _, w, factors = self.weights(rows, key, mask, bias, slopes, pre, seed, first, query.shape[2])
            kept = w if factors is None else w * factors
            outs = outs + (self.of_values(kept if post is None else _mixed(post, kept), value),)
            if self.with_weights:
                weights = weights + (w,)
        return (_joined(outs), _joined(weights)) if self.with_weights else _joined(outs)

    def bprop(self, query, key, value, mask, bias, slopes, pre, post, seed, out, d_out):
        d_weights = None
        if self.with_weights:
            d_out, d_weights = d_out
        length = query.shape[2]
        d_query, d_biases, d_key, d_value, d_slopes, d_pre, d_post = (), (), None, None, None, None, None
        for first, last in _extents(length):
            d_o = d_out[:, :, first:last]
            # Behind the tile before; and not the forward pass's own scores, which a graph would keep for it.
            rows = _depend(query[:, :, first:last], d_out if d_key is None else d_key)
            s, w, factors = self.weights(rows, key, mask, bias, slopes, pre, seed, first, length)
            kept = w if factors is None else w * factors
            used = kept if post is None else _mixed(post, kept)
            d_value = _sum(d_value, _tn(self.grouped(used), self.grouped(d_o)))
            d_w = _nt(self.grouped(d_o), value).reshape(w.shape)
            if post is not None:
                d_post = _sum(d_post, _mixing(d_w, kept))
                d_w = _mixed(post.swapaxes(0, 1), d_w)
            d_w = d_w if factors is None else d_w * factors
            if d_weights is not None:
                d_w = d_w + d_weights[:, :, first:last]
            d_s = w * (d_w - _spread(_row_sum(w * d_w, 3), w.shape))
            if pre is not None:
                d_pre = _sum(d_pre, _mixing(d_s, s))
                d_s = _mixed(pre.swapaxes(0, 1), d_s)
            if bias is not None:
                d_biases = d_biases + (_like(d_s[..., self.learned :], bias.shape),)
            if slopes is not None:
                far = _spread(_abs(self.distance(first, length, w.shape)), d_s[..., self.learned :].shape)
                d_slopes = _sum(d_slopes, -_over_all_but_heads(d_s[..., self.learned :] * far))
            d_s = self.grouped(d_s)
            d_query = d_query + (_nn(d_s, key).reshape(rows.shape) * self.scale,)
            d_key = _sum(d_key, _tn(d_s, self.grouped(rows)) * self.scale)
        return (
            _joined(d_query), d_key, d_value, _zeros(mask),
            None if bias is None else _joined(d_biases),
            None if slopes is None else d_slopes.reshape(slopes.shape),
            d_pre, d_post, _zeros(seed),
        )  # fmt: skip

    def weights(self, rows, key, mask, bias, slopes, pre, seed, first, length):
        """(B, H, n, M + S): scores before ``pre``, weights before dropout; and dropout's factors or None."""
        batch, heads, count, _ = rows.shape
        shape = (batch, heads, count, key.shape[2])
        s = _nt(self.grouped(rows), key).reshape(shape) * self.scale
        # With this tile: a graph would compute what depends on no input once, and keep it for all tiles.
        distance = _depend(self.distance(first, length, shape), rows)
        added = None if bias is None else bias[:, :, first : first + count]
        if slopes is not None:
            far = -slopes.reshape((1, heads, 1, 1)) * _abs(distance)
            added = far if bias is None else added + far
        if added is not None:
            s = s + _spread(self.behind_learned(added, 0.0), shape)
        visible = _ones_like(distance)
        if self.causal:
            visible = visible * (distance >= 0).astype(mstype.float32)
        if self.past is not None:
            visible = visible * (distance <= self.past).astype(mstype.float32)
        if mask is not None:
            visible = visible * _rows_of(mask, first, first + count)
        visible = _spread(self.behind_learned(visible, 1.0), shape)
        weights = self.softmax(s if pre is None else _mixed(pre, s), visible)
        return s, weights, self.factors(rows, key.shape[2] - self.learned, first, seed)

    def softmax(self, s, visible):
        """Softmax over the visible places, or over the largest of them; a row without any is 0."""
        s = _select(visible > 0, s, _zeros_like(s) + _HIDDEN)
        if self.top is not None and self.top < s.shape[3]:
            least = self.top_k(s, self.top)[0][..., self.top - 1 :]
            visible = visible * (s >= _spread(least, s.shape)).astype(mstype.float32)
            s = _select(visible > 0, s, _zeros_like(s) + _HIDDEN)
        return _softmax(s) * visible

    def distance(self, first, length, shape):
        """Position of a query less that of a key, (1, 1, n, S)."""
        keys = shape[3] - self.learned
        return _positions(first + keys - length, shape[2], 2) - _positions(0, keys, 3)

    def behind_learned(self, x, value):
        """(.., S) with a value for each of the learned keys in front of it."""
        if not self.learned:
            return x
        return _concat3((_tile(_zeros_like(x[..., :1]) + value, (1, 1, 1, self.learned)), x))

    def factors(self, rows, keys, first, seed):
        """The core call's keep factors, of the learned columns with the seed that their own call has; None without."""
        if seed is None:
            return None
        shape = (rows.shape[0], rows.shape[1], rows.shape[2])
        own = _keep(shape, keys, first, self.rate)(rows, seed)
        if self.learned:
            own = _concat3((_keep(shape, self.learned, first, self.rate)(rows, salt(seed)), own))
        return own

    def grouped(self, x):
        """(B, H, n, X) with the query heads of a key/value head as rows of it."""
        batch, heads, count, width = x.shape
        return x.reshape((batch, self.kv_heads, heads // self.kv_heads * count, width))

    def of_values(self, weights, value):
        """The weights' sums of the values, (B, H, n, Dv)."""
        return _nn(self.grouped(weights), value).reshape(weights.shape[:3] + (value.shape[3],))


def _tensor(x):
    return None if x is None else _wide(x + 0.0)


def _mixed(matrix, s):
    """``sum_h matrix[g, h] s[b, h]``."""
    batch, heads, length, columns = s.shape
    mixed = _product(matrix, _heads_first(s))
    return mixed.reshape((heads, batch, length, columns)).swapaxes(0, 1)


def _mixing(d_mixed, s):
    """Gradient of :func:`_mixed`'s matrix."""
    return _product_nt(_heads_first(d_mixed), _heads_first(s))


def _heads_first(s):
    return s.swapaxes(0, 1).reshape((s.shape[1], s.shape[0] * s.shape[2] * s.shape[3]))


def _joined(tiles):
    """Tiles of queries as one tensor."""
    return _concat2(tiles) if len(tiles) > 1 else tiles[0]


def _sum(total, part):
    return part if total is None else total + part


def _zeros(x):
    """The gradient of a tensor that has none."""
    return None if x is None else _zeros_like(x)


def _like(x, shape):
    """(B, H, n, S) summed over the first two axes where ``shape`` has 1."""
    for axis in (0, 1):
        if shape[axis] == 1 and x.shape[axis] > 1:
            x = _row_sum(x, axis)
    return x


def _over_all_but_heads(x):
    return P.ReduceSum(False)(x, (0, 2, 3))


def _spread(x, shape):
    """x repeated to ``shape``: an operator that broadcasts takes several times the time of one that does not."""
    return x if x.shape == shape else _tile(x, _times(x.shape, shape))


def _wide(x):
    return x.astype(mstype.float32)


def padded(x, width):
    """x with zeros behind its features, up to ``width`` of them."""
    if x.shape[3] == width:
        return x
    zeros = ops.zeros(x.shape[:3] + (width - x.shape[3],), mstype.float32)
    return ops.concat((_wide(x), zeros), 3).astype(x.dtype)


def for_each_row(x, query):
    """Learned (Hkv, M, D) as float32 (B, M, Hkv, D)."""
    rows = ops.expand_dims(_wide(x).swapaxes(0, 1), 0)
    return rows + ops.zeros((query.shape[0], 1, 1, 1), mstype.float32)


def salt(seed):
    """The seed of the call over the learned keys."""
    return P.BitwiseXor()(seed.astype(mstype.int32), _salt())


def _share(lse, total):
    """``exp(lse - total)`` as (B, N, H, 1)."""
    return ops.expand_dims(ops.exp(lse - total).swapaxes(1, 2), -1)


def _rows_of(mask, first, last):
    """The mask's rows of a tile; a mask of one row serves all."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask[:, :, first:last]


@constexpr
def _salt():
    return Tensor(np.int32(MEMORY_SALT))


@constexpr
def _extents(length):
    """(first, last) of each tile of queries."""
    return tuple((first, min(first + QUERY_TILE, length)) for first in range(0, length, QUERY_TILE))


@constexpr
def _times(small, large):
    return tuple(b // a for a, b in zip(small, large))


@constexpr
def _positions(first, count, axis):
    shape = [1, 1, 1, 1]
    shape[axis] = count
    return Tensor(np.arange(first, first + count, dtype=np.float32).reshape(shape))


@constexpr
def _keep(shape, columns, first, rate):
    return _build(shape, columns, first, rate)


@functools.lru_cache(maxsize=64)
def _build(shape, columns, first, rate):
    batch, heads, rows = shape
    return KeepFactors(AttentionSpec(batch, heads, heads, rows, columns, 1, dropout_rate=rate, origin=(0, 0, first, 0)))
