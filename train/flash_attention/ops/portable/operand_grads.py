"""Gradients of the bias and of ALiBi's slopes, from the dS tiles of the backward pass."""

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn
from mindspore.ops import operations as P

from flash_attention.ops.portable.scores import (
    cast,
    join_columns,
    join_rows,
    matmul,
    ones_like,
    reshape,
    swap,
    take_columns,
    take_rows,
    zeros,
    zeros_like,
)

_sum = P.ReduceSum(True)


class BiasPart(nn.Cell):
    """One row's dS (grouped) summed over the bias's broadcast axes: (1|B, 1|N, 1|rows, 1|Sk)."""

    def __init__(self, spec, row):
        super().__init__(auto_prefix=False)
        self.plain_shape = (-1, spec.heads, row.rows, row.keys)
        sizes = (spec.batch, spec.heads, spec.q_len, spec.kv_len)
        self.axes = tuple(a for a in range(4) if spec.bias_shape[a] == 1 and sizes[a] != 1)
        self.before = self.after = None
        if spec.bias_shape[3] != 1:
            self.before = zeros(row.key)
            self.after = zeros(spec.kv_len - row.key - row.keys)

    def construct(self, d_s):
        d_bias = reshape(d_s, self.plain_shape)
        if self.axes:
            d_bias = _sum(d_bias, self.axes)
        column = zeros_like(take_columns(d_bias, 0, 1))
        if self.before is not None:
            d_bias = join_columns((column + self.before, d_bias))
        if self.after is not None:
            d_bias = join_columns((d_bias, column + self.after))
        return d_bias


class BiasGrad(nn.Cell):
    """The bias's gradient from the parts of the rows that see keys."""

    def __init__(self, spec, rows):
        super().__init__(auto_prefix=False)
        self.extents = tuple((row.first, row.rows, bool(row.keys)) for row in rows)
        self.per_query = spec.bias_shape[2] != 1

    def construct(self, bias, parts):
        total, whole, n = None, (), 0
        for first, rows, seen in self.extents:
            if seen:
                part = parts[n]
                n = n + 1
                total = part if total is None or self.per_query else total + part
                whole = whole + (part,)
            elif self.per_query:
                whole = whole + (zeros_like(cast(take_rows(bias, first, rows), mstype.float32)),)
        if total is None:
            return zeros_like(bias)
        if self.per_query:
            total = whole[0] if len(whole) == 1 else join_rows(whole)
        return cast(total, bias.dtype)


class SlopesPart(nn.Cell):
    """One row's share of the slopes' gradient, ``-sum |p - j| dS``: (B, N)."""

    def __init__(self, spec, constants, row):
        super().__init__(auto_prefix=False)
        self.plain_shape = (-1, spec.heads, row.rows, row.keys)
        self.dynamic = spec.dynamic_offset
        p = np.arange(row.first, row.first + row.rows, dtype=np.int32) + np.int32(spec.offset or 0)
        self.p = constants.plain(p.reshape(1, 1, -1, 1))
        self.j = constants.plain(np.arange(row.key, row.key + row.keys, dtype=np.int32).reshape(1, 1, 1, -1))

    def construct(self, d_s, q_offset):
        p = self.p
        if self.dynamic:
            p = p + reshape(q_offset, (-1, 1, 1, 1))
        weighted = reshape(d_s, self.plain_shape) * cast(-P.Abs()(p - self.j), mstype.float32)
        ones = ones_like(swap(take_rows(weighted, 0, 1)))
        return P.ReduceSum(False)(matmul(weighted, ones), (2, 3))
