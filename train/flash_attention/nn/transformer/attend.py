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

_HIDDEN = -3e38  # a finite score; hidden places are multiplied by 0 after the exp
_depend = P.Depend()


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
    """Tile after tile of queries; in graph mode a tile's scores are computed again in the backward pass."""

    def __init__(self, options):
        super().__init__(auto_prefix=False)
        self.tile = _Tile(options)
        self.tile.recompute()
        self.rate = options.dropout

    def construct(self, query, key, value, mem_key, mem_value, mask, bias, slopes, pre, post, seed):
        """(B, N, H, Dv), and the weights (B, H, N, M + S)."""
        dtype, learned = query.dtype, 0
        query, key, value = _wide(query), _wide(key), _wide(value)
        keys = key.shape[1]
        if mem_key is not None:
            learned = mem_key.shape[1]
            key = ops.concat((_wide(for_each_row(mem_key, query)), key), 1)
            value = ops.concat((_wide(for_each_row(mem_value, query)), value), 1)
        query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
        if mask is not None:
            mask = (mask > 0).astype(mstype.float32)
        length = query.shape[2]
        outs, weights = (), ()
        for first in range(0, length, QUERY_TILE):
            last = min(first + QUERY_TILE, length)
            rows = query[:, :, first:last]
            if outs:  # tiles one after the other, else a graph holds all of them at once
                rows = _depend(rows, outs[-1])
            out, weight = self.tile(
                rows, key, value, _rows_of(mask, first, last), None if bias is None else bias[:, :, first:last],
                slopes, pre, post, self.factors(rows, keys, learned, first, seed), first + keys - length, learned,
            )  # fmt: skip
            outs = outs + (out,)
            weights = weights + (weight,)
        out = ops.concat(outs, 2) if len(outs) > 1 else outs[0]
        weight = ops.concat(weights, 2) if len(weights) > 1 else weights[0]
        return out.swapaxes(1, 2).astype(dtype), weight

    def factors(self, rows, keys, learned, first, seed):
        """The core call's keep factors, of the learned columns with the seed that their own call has; None without."""
        if seed is None:
            return None
        shape = (rows.shape[0], rows.shape[1], rows.shape[2])
        own = _keep(shape, keys, first, self.rate)(rows, seed)
        if learned:
            own = ops.concat((_keep(shape, learned, first, self.rate)(rows, salt(seed)), own), 3)
        return ops.stop_gradient(own)


class _Tile(nn.Cell):
    """The rows of one tile, float32, BNSD: outputs and weights."""

    def __init__(self, options):
        super().__init__(auto_prefix=False)
        self.scale, self.causal, self.past = options.scale, options.causal, options.max_attend_past
        self.kv_heads, self.top = options.key_heads, options.sparse_topk
        self.scores, self.apply = P.BatchMatMul(transpose_b=True), P.BatchMatMul()
        self.top_k, self.largest, self.sum = P.TopK(sorted=True), P.ReduceMax(True), P.ReduceSum(True)

    def construct(self, query, key, value, mask, bias, slopes, pre, post, factors, first, learned):
        batch, heads, length, width = query.shape
        columns = key.shape[2]
        rows = heads // self.kv_heads * length
        s = self.scores(query.reshape((batch, self.kv_heads, rows, width)), key) * self.scale
        s = s.reshape((batch, heads, length, columns))
        distance = _positions(first, length, 2) - _positions(0, columns - learned, 3)
        visible = ops.ones_like(distance)
        if self.causal:
            visible = visible * (distance >= 0).astype(mstype.float32)
        if self.past is not None:
            visible = visible * (distance <= self.past).astype(mstype.float32)
        if mask is not None:
            visible = visible * mask
        added = bias
        if slopes is not None:
            far = -slopes.reshape((1, heads, 1, 1)) * ops.abs(distance)
            added = far if bias is None else bias + far
        if learned:
            visible = ops.concat((ops.ones_like(visible[..., :1]).tile((1, 1, 1, learned)), visible), 3)
            if added is not None:
                added = ops.concat((ops.zeros_like(added[..., :1]).tile((1, 1, 1, learned)), added), 3)
        if added is not None:
            s = s + added
        if pre is not None:
            s = _mixed(pre, s)
        weights = self.softmax(s, visible)
        kept = weights if factors is None else weights * factors
        if post is not None:
            kept = _mixed(post, kept)
        out = self.apply(kept.reshape((batch, self.kv_heads, rows, columns)), value)
        return out.reshape((batch, heads, length, value.shape[3])), weights

    def softmax(self, s, visible):
        """Softmax over the visible places, or over the largest of them; a row without any is 0."""
        s = ops.where(visible > 0, s, ops.full_like(s, _HIDDEN))
        if self.top is not None and self.top < s.shape[3]:
            least = self.top_k(ops.stop_gradient(s), self.top)[0][..., self.top - 1 :]
            visible = visible * (s >= least).astype(mstype.float32)
            s = ops.where(visible > 0, s, ops.full_like(s, _HIDDEN))
        weights = ops.exp(s - ops.stop_gradient(self.largest(s, 3))) * visible
        total = self.sum(weights, 3)
        return weights / (total + (total == 0).astype(mstype.float32))


def _mixed(matrix, s):
    """``sum_h matrix[g, h] s[b, h]``."""
    batch, heads, length, columns = s.shape
    flat = s.reshape((batch, heads, length * columns))
    return ops.matmul(matrix.astype(mstype.float32), flat).reshape(s.shape)


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
