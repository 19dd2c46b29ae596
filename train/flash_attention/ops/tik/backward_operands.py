"""What the backward kernel and the one in front of it take beside the forward kernel's arguments, and gradients from
sums, by MindSpore operators: what ``ascend/backward_arguments.py`` does in numpy, in fp32 instead of fp64.
"""

import math

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from flash_attention.ascend.backward_arguments import MOST_EXPONENT, ROOM, probability_exponent, result_factors
from flash_attention.ascend.backward_operands import KEY_SUMS, KEY_UNIT
from flash_attention.ascend.preprocess_arguments import row_statistics

_LOWEST = float(np.finfo(np.float32).min)
_cast, _select = P.Cast(), P.Select()
_sum, _kept_sum = P.ReduceSum(), P.ReduceSum(keep_dims=True)
_less, _maximum, _minimum, _reshape = P.Less(), P.Maximum(), P.Minimum(), P.Reshape()
_zeros_like, _transpose, _slice = P.ZerosLike(), P.Transpose(), P.Slice()
_highest, _lowest, _log, _ceil, _power = P.ReduceMax(), P.ReduceMin(), P.Log(), P.Ceil(), P.Pow()


def _magnitude(x):
    """Largest absolute value, fp32. Reads a tensor twice, and writes none."""
    return _maximum(_cast(_highest(x), mstype.float32), -_cast(_lowest(x), mstype.float32))


class Scaled(nn.Cell):
    """(value, lse, d_out, d_lse) -> d_out and d_lse divided by a power of two, that power, and ``factors``.

    See ``backward_arguments.cotangent_exponent`` and ``result_factors``.
    """

    def __init__(self, geometry):
        super().__init__(auto_prefix=False)
        self.products = 2.0 * geometry.spec.head_dim
        self.factors = Tensor(result_factors(geometry, 1.0))
        self.two = Tensor(2.0, mstype.float32)

    def construct(self, value, lse, d_out, d_lse):
        d_lse = _select(_less(lse, _LOWEST), _zeros_like(lse), _cast(d_lse, mstype.float32))
        bound = self.products * _magnitude(d_out) * _magnitude(value) + _magnitude(d_lse)
        exponent = _minimum(_ceil(_log(_maximum(bound / ROOM, 1.0)) / math.log(2.0)), MOST_EXPONENT)
        power = _power(self.two, exponent)
        return d_out * _cast(1.0 / power, d_out.dtype), d_lse / power, power, self.factors * power


class Statistics(nn.Cell):
    """(lse, d_lse) -> fp32 (B, N, 2, queries of whole tiles): see ``preprocess_arguments.row_statistics``.

    d_lse is that of :class:`Scaled`: fp32, and 0 where no key is seen.
    """

    def __init__(self, geometry):
        super().__init__(auto_prefix=False)
        spec = geometry.spec
        nothing = np.zeros((spec.batch, spec.heads, spec.q_len), np.float32)
        missing = row_statistics(geometry, nothing, nothing)[:1, :1]
        missing[..., : spec.q_len] = 0.0
        self.missing = Tensor(missing)
        self.shift = probability_exponent(geometry) * math.log(2.0)
        self.scale, self.kept = spec.scale, 1.0 - spec.dropout_rate
        self.row = geometry.batch_heads + (1, spec.q_len)
        self.pad = P.Pad(((0, 0), (0, 0), (0, 0), (0, missing.shape[-1] - spec.q_len)))
        self.join = P.Concat(2)

    def construct(self, lse, d_lse):
        shifted = _select(_less(lse, _LOWEST), _zeros_like(lse), self.shift - lse) / self.scale
        rows = self.join((_reshape(shifted, self.row), _reshape(d_lse * self.kept, self.row)))
        return self.pad(rows) + self.missing


class BiasGradient(nn.Cell):
    """The kernel's tiles or sums of dS -> gradient of the bias, in its shape."""

    def __init__(self, geometry):
        super().__init__(auto_prefix=False)
        spec = geometry.spec
        self.tiles = spec.bias_shape[2] > 1
        rows, columns = (1, geometry.kv_rows)
        if self.tiles:
            rows, columns = geometry.q_tiles * geometry.tiles.q, geometry.kv_tiles * geometry.tiles.kv
        self.whole = geometry.batch_heads + (rows, columns)
        self.size = (spec.batch, spec.heads, spec.q_len if self.tiles else 1, spec.kv_len)
        self.axes = tuple(axis for axis, size in enumerate(spec.bias_shape) if size == 1)
        self.factor = 1.0 / (1.0 - spec.dropout_rate)

    def construct(self, sums, bias, power):
        if self.tiles:
            sums = _transpose(sums, (0, 1, 2, 4, 6, 3, 5))
        x = _slice(_reshape(_cast(sums, mstype.float32), self.whole), (0, 0, 0, 0), self.size)
        if self.axes:
            x = _kept_sum(x, self.axes)
        return _cast(x * (self.factor * power), bias.dtype)


class SlopeGradient(nn.Cell):
    """fp32 (B, N, 3, queries) sums of +-dS (1, key // KEY_UNIT, key % KEY_UNIT) -> gradient of the slopes."""

    def __init__(self, geometry):
        super().__init__(auto_prefix=False)
        spec = geometry.spec
        position = np.arange(spec.q_len) + spec.offset
        weights = np.stack([-position, np.full_like(position, KEY_UNIT), np.ones_like(position)])
        self.weights = Tensor((weights / (1.0 - spec.dropout_rate)).astype(np.float32))
        self.size = geometry.batch_heads + (len(KEY_SUMS), spec.q_len)
        self.shared = len(spec.alibi_shape) == 1

    def construct(self, sums, slopes, power):
        # Position minus key first, query by query: the terms are far larger than their sum.
        grads = _sum(_sum(_slice(sums, (0, 0, 0, 0), self.size) * self.weights, 2), -1)
        if self.shared:
            grads = _sum(grads, 0)
        return _cast(grads * power, slopes.dtype)
