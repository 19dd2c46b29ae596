"""Forward and backward of engine 'aclnn': the vendor's two operators and what our contract adds around them.

tensors -> **passes** -> AttentionCell. From documentation only, not run on a device. What is added:

* LSE = softmax_max + log(softmax_sum).
* A row without a visible key becomes output 0, LSE -inf, gradient 0, whatever the operator gives for it.
* Sinks join afterwards through the LSE: the output shrinks by exp(LSE - logaddexp(LSE, sink)), which is exact.
* The gradient operator takes statistics (LSE, 1) instead of the forward's (max, sum): exp(s - max) / sum is the same,
  nothing else need be saved, and sinks are included.
* The LSE's cotangent enters delta = <dO, O> - dLSE through one more column, which the padding of head_dim has room for
  (a multiple of 16 grows by 16 for it): 0 in query, key and value, 1 in the output, -dLSE in its cotangent.
* Bias and slopes: the operator's d(real_shift) is documented as unused, so their gradients are formed here by the
  plain formula, ROWS queries at a time. Graph mode drops this when nobody asks for them; PyNative computes it.
"""

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from flash_attention.ops.aclnn.mapping import padded
from flash_attention.ops.aclnn.tensors import Arguments

ROWS = 1024
"""Queries whose scores exist at once in the gradient of bias and slopes."""

_NEVER = 1.0e30  # the LSE of a row that sees nothing, as a softmax_max: exp(s - it) is 0


def forward_operator(spec, mapped):
    """The vendor's forward primitive of one spec."""
    from mindspore.ops.operations.nn_ops import FlashAttentionScore

    return FlashAttentionScore(*_attributes(spec, mapped))


def backward_operator(spec, mapped):
    """The vendor's gradient primitive of one spec."""
    from mindspore.ops.operations._grad_ops import FlashAttentionScoreGrad

    return FlashAttentionScoreGrad(*_attributes(spec, mapped))


def _attributes(spec, mapped):
    """head_num, keep_prob, scale_value, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode."""
    keep = float(1.0 - spec.dropout_rate)
    return (spec.heads, keep, float(spec.scale), mapped.pre_tokens, mapped.next_tokens, 0, "BNSD", mapped.sparse_mode)


class Forward(Arguments):
    """``(query, key, value, *operands) -> (out, lse)``."""

    def __init__(self, spec, operator=forward_operator):
        super().__init__(spec)
        self.operator = operator(spec, self.map)
        self.width = padded(spec.head_dim)

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed
    ):
        keep = None
        if self.explicit:
            keep = self.keep(0, self.sizes[2], mask, q_ids, kv_ids, kv_lengths, q_offset)
        peak, total, _, out = self.operator(
            self.widen(query, self.width),
            self.widen(key, self.width),
            self.widen(value, self.width),
            self.real_shift(bias, slopes, q_offset),
            self.drop_mask(seed),
            None,
            self.attn_mask(keep),
            None,
            None,
            None,
        )
        lse = peak[:, :, :, 0] + ops.log(total[:, :, :, 0])
        if self.width != self.head_dim:
            out = out[:, :, :, : self.head_dim]
        dead = self.dead(keep, q_lengths)
        if dead is not None:
            out = ops.masked_fill(out, P.ExpandDims()(dead, -1), 0.0)
            lse = ops.masked_fill(lse, dead, float("-inf"))
        if self.sinks:
            out, lse = self.join_sinks(out, lse, sinks, dead)
        return out, lse

    def join_sinks(self, out, lse, sinks, dead):
        """The sink as one more key of value 0; dead rows stay dead."""
        sink = ops.cast(ops.reshape(sinks, (1, -1, 1)), mstype.float32)
        top = ops.maximum(lse, sink)
        joined = top + ops.log(ops.exp(lse - top) + ops.exp(sink - top))
        share = P.ExpandDims()(ops.exp(lse - joined), -1)
        out = ops.cast(ops.cast(out, mstype.float32) * share, self.dtype)
        if dead is not None:
            joined = ops.masked_fill(joined, dead, float("-inf"))
        return out, joined


class Backward(Arguments):
    """``(query, key, value, *operands, out, lse, d_out, d_lse) -> (dq, dk, dv, d_bias, d_slopes, d_sinks)``."""

    def __init__(self, spec, operator=backward_operator):
        super().__init__(spec)
        self.operator = operator(spec, self.map)
        self.width = padded(spec.head_dim + 1)
        self.chunks = tuple((first, min(ROWS, spec.q_len - first)) for first in range(0, spec.q_len, ROWS))
        self.bias_axes = ()
        if spec.bias_shape is not None:
            self.bias_axes = tuple(a for a in range(4) if spec.bias_shape[a] == 1 and self.sizes[a] != 1)
        self.slopes_per_batch = spec.alibi_shape is not None and len(spec.alibi_shape) == 2
        self.ones = Tensor(np.ones((1, 1, 1, 8), np.float32))

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed, out,
        lse, d_out, d_lse,
    ):  # fmt: skip
        lse = P.ExpandDims()(ops.cast(lse, mstype.float32), -1)
        d_lse = P.ExpandDims()(ops.cast(d_lse, mstype.float32), -1)
        dead = lse == float("-inf")
        d_out = ops.masked_fill(d_out, dead, 0.0)
        d_lse = ops.masked_fill(d_lse, dead, 0.0)
        peak = ops.masked_fill(lse, dead, _NEVER)
        keep = None
        if self.explicit:
            keep = self.keep(0, self.sizes[2], mask, q_ids, kv_ids, kv_lengths, q_offset)
        d_query, d_key, d_value, _ = self.operator(
            self.widen(query, self.width),
            self.widen(key, self.width),
            self.widen(value, self.width),
            self.widen(d_out, self.width, ops.cast(-d_lse, self.dtype)),
            self.real_shift(bias, slopes, q_offset),
            self.drop_mask(seed),
            None,
            self.attn_mask(keep),
            peak * self.ones,
            ops.ones_like(peak) * self.ones,
            None,
            self.widen(out, self.width, ops.cast(ops.ones_like(peak), self.dtype)),
            None,
            None,
            None,
        )
        delta = None
        if self.sinks or self.bias_shape is not None or self.alibi:
            wide = ops.cast(d_out, mstype.float32) * ops.cast(out, mstype.float32)
            delta = P.ReduceSum(True)(wide, -1) - d_lse
        d_sinks = None
        if self.sinks:
            share = ops.exp(ops.cast(ops.reshape(sinks, (1, -1, 1, 1)), mstype.float32) - peak)
            d_sinks = ops.cast(-P.ReduceSum()(share * delta, (0, 2, 3)), sinks.dtype)
        d_bias, d_slopes = None, None
        if self.bias_shape is not None or self.alibi:
            d_bias, d_slopes = self.added_grads(
                query, key, value, bias, mask, slopes, q_ids, kv_ids, kv_lengths, q_offset, seed, peak, delta, d_out
            )
        d = self.head_dim
        return d_query[:, :, :, :d], d_key[:, :, :, :d], d_value[:, :, :, :d], d_bias, d_slopes, d_sinks

    def added_grads(
        self, query, key, value, bias, mask, slopes, q_ids, kv_ids, kv_lengths, q_offset, seed, peak, delta, d_out
    ):
        """Gradients of bias and slopes from dS, recomputed by the plain formula in float32."""
        key, value = self.per_head(key), self.per_head(value)
        d_bias, parts, d_slopes = None, (), None
        for first, rows in self.chunks:
            stop = first + rows
            scores = P.BatchMatMul(transpose_b=True)(ops.cast(query[:, :, first:stop], mstype.float32), key)
            scores = scores * self.scale + self.added(first, rows, bias, slopes, q_offset)
            weights = ops.exp(scores - peak[:, :, first:stop])
            keep = self.keep(first, rows, mask, q_ids, kv_ids, kv_lengths, q_offset)
            weights = ops.masked_fill(weights, ops.logical_not(keep), 0.0)
            d_scores = P.BatchMatMul(transpose_b=True)(ops.cast(d_out[:, :, first:stop], mstype.float32), value)
            if self.rate:
                kept = ops.cast(self.kept(first, rows, seed), mstype.float32)
                d_scores = d_scores * kept / (1.0 - self.rate)
            d_scores = weights * (d_scores - delta[:, :, first:stop])
            if self.bias_shape is not None:
                part = P.ReduceSum(True)(d_scores, self.bias_axes) if self.bias_axes else d_scores
                if self.bias_shape[2] == 1:
                    d_bias = part if d_bias is None else d_bias + part
                else:
                    parts = parts + (part,)
            if self.alibi:
                part = -P.ReduceSum()(d_scores * self.distance(first, rows, q_offset), (2, 3))
                d_slopes = part if d_slopes is None else d_slopes + part
        if self.bias_shape is not None:
            if self.bias_shape[2] != 1:
                d_bias = parts[0] if len(parts) == 1 else P.Concat(2)(parts)
            d_bias = ops.cast(d_bias, bias.dtype)
        if self.alibi:
            d_slopes = d_slopes if self.slopes_per_batch else P.ReduceSum()(d_slopes, 0)
            d_slopes = ops.cast(d_slopes, slopes.dtype)
        return d_bias, d_slopes

    def per_head(self, x):
        """Keys or values in float32, once for each query head."""
        x = ops.cast(x, mstype.float32)
        if self.group == 1:
            return x
        batch, heads, _, kv_len = self.sizes
        x = ops.broadcast_to(P.ExpandDims()(x, 2), (batch, self.kv_heads, self.group, kv_len, self.head_dim))
        return ops.reshape(x, (batch, heads, kv_len, self.head_dim))
