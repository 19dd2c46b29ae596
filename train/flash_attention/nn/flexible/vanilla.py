"""'vanilla': the plain formula in MindSpore's operators, O(T * S) memory; the only mechanism that forms the weights."""

import functools
from dataclasses import replace

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.ranges import visible
from flash_attention.core.registry import ARGUMENTS
from flash_attention.core.spec import AttentionSpec
from flash_attention.core.validation import check_window
from flash_attention.nn.flexible.registry import Mechanism, MechanismRegistry
from flash_attention.ops.functional import computable, keep
from flash_attention.ops.portable.dropout import KeepFactors
from flash_attention.ops.precision import OwnPrecision

_HIDDEN = -1e30  # exp() of it is exactly 0, and it breeds no NaN


@MechanismRegistry.register
class Vanilla(Mechanism):
    """Scores, softmax, product with the values. ``q_offset`` excepted it takes every argument."""

    names = "vanilla"
    takes = tuple(name for name in ARGUMENTS if name != "q_offset")
    forms_weights = True

    def construct(
        self, query, key, value, bias, mask, alibi_slopes, sinks, q_segment_ids, kv_segment_ids, query_seq_lengths,
        key_value_seq_lengths, q_offset, dropout_seed,
    ):  # fmt: skip
        static = (
            self.scale, self.is_causal, self.local_window_size, self.prev_block_num, self.next_block_num,
            self.block_size, self.logits_soft_cap, 0.0 if dropout_seed is None else self.dropout_rate,
        )  # fmt: skip
        formula = _formula(query.shape, key.shape, static)
        ids, lengths = (q_segment_ids, kv_segment_ids), (query_seq_lengths, key_value_seq_lengths)
        tensors = (computable(query), computable(key), computable(value))
        out, weights = formula(tensors, bias, mask, alibi_slopes, sinks, ids, lengths, dropout_seed)
        return out.astype(query.dtype), weights.astype(query.dtype)


@constexpr
def _formula(query, key, static):
    return _build(query, key, static[:2] + (check_window("vanilla", static[2]),) + static[3:])


@functools.lru_cache(maxsize=64)
def _build(query, key, static):
    scale, causal, window, prev, following, block, cap, rate = static
    return _Formula(
        AttentionSpec(
            query[0], query[2], key[2], query[1], key[1], query[3], scale=scale, causal=causal,
            local_window_size=window, prev_block_num=prev, next_block_num=following, block_size=block, soft_cap=cap,
            dropout_rate=rate,
        )
    )  # fmt: skip


class _Formula(OwnPrecision):
    """The formula of one spec on BTND tensors; band and distances are constants."""

    def __init__(self, spec):
        super().__init__()
        position, index = np.arange(spec.q_len)[:, None] + spec.offset, np.arange(spec.kv_len)[None, :]
        seen = np.broadcast_to(visible(spec.band, position, index), (spec.q_len, spec.kv_len))
        self.band = Tensor(np.ascontiguousarray(seen[None, None]))
        self.distance = Tensor(np.abs(position - index).astype(np.float32)[None, None])
        self.i = Tensor(np.arange(spec.q_len, dtype=np.int32).reshape(1, 1, -1, 1))
        self.j = Tensor(np.arange(spec.kv_len, dtype=np.int32).reshape(1, 1, 1, -1))
        self.scale, self.cap, self.heads = spec.scale, spec.soft_cap, spec.heads
        self.grouped = (spec.kv_heads, spec.group * spec.q_len)
        self.keep = KeepFactors(replace(spec, kv_heads=spec.heads)) if spec.dropout_rate else None
        self.product, self.product_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)

    def construct(self, tensors, bias, mask, slopes, sinks, ids, lengths, seed):
        query, key, value = tensors
        batch, q_len, _, dim = query.shape
        grouped = query.swapaxes(1, 2).reshape((batch,) + self.grouped + (dim,))
        scores = self.product_nt(grouped, key.swapaxes(1, 2)) * self.scale
        scores = scores.reshape((batch, self.heads, q_len, -1))
        if self.cap is not None:
            scores = ops.tanh(scores / self.cap) * self.cap
        if bias is not None:
            scores = scores + computable(bias)
        if slopes is not None:
            scores = scores - computable(slopes).reshape((-1, self.heads, 1, 1)) * self.distance
        seen = self.seen(mask, ids, lengths)
        weights = self.softmax(ops.where(seen, scores, _HIDDEN), sinks) * seen.astype(mstype.float32)
        if seed is not None:
            weights = weights * self.keep(query, seed)
        out = self.product(weights.reshape((batch,) + self.grouped + (-1,)), value.swapaxes(1, 2))
        return out.reshape((batch, self.heads, q_len, dim)).swapaxes(1, 2), weights

    def seen(self, mask, ids, lengths):
        """What each query sees, boolean (1|B, 1|N, 1|T, S)."""
        seen = self.band
        if mask is not None:
            seen = ops.logical_and(seen, keep(mask))
        if ids[0] is not None:
            seen = ops.logical_and(seen, ids[0].expand_dims(1).expand_dims(3) == ids[1].expand_dims(1).expand_dims(1))
        if lengths[0] is not None:
            seen = ops.logical_and(seen, self.i < lengths[0].reshape((-1, 1, 1, 1)))
        if lengths[1] is not None:
            seen = ops.logical_and(seen, self.j < lengths[1].reshape((-1, 1, 1, 1)))
        return seen

    def softmax(self, scores, sinks):
        """Over the keys; sinks (N,) join the denominator."""
        if sinks is None:
            return ops.softmax(scores, -1)
        column = ops.broadcast_to(computable(sinks).reshape((1, -1, 1, 1)), scores.shape[:3] + (1,))
        return ops.softmax(ops.concat((scores, column), -1), -1)[..., :-1]
