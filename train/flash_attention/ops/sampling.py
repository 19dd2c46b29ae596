"""Sampling in MindSpore: logits -> token, the same draws as the JAX twin's for the same seed. See core/sampling.py."""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core import dropout
from flash_attention.core.sampling import Sampling, check_logits
from flash_attention.ops.portable.dropout import Mix


def sample(logits, seed=0, position=0, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Choose a token a row, in PyNative and graph mode.

    Args:
        logits (Tensor): (B, V), any float dtype.
        seed (int, Tensor): uint32, a scalar for the batch or (B,), one a row; the latter makes a row independent of its
            batch.
        position (int, Tensor): scalar or (B,), number of the token in its sequence. Every position draws anew.
        temperature, top_k, top_p, min_p: see :class:`flash_attention.core.sampling.Sampling`; temperature 0 is greedy.

    Returns:
        Tensor int32 (B,).

    Raises:
        ValueError, TypeError: bad argument.

    Supported Platforms:
        ``Ascend`` ``GPU`` ``CPU`` (proven on the CPU)
    """
    cell = _cell(logits.shape, temperature, top_k, top_p, min_p)
    return cell(logits, _tensor(seed), _tensor(position))


def _tensor(value):
    return value if isinstance(value, Tensor) else _constant(value)


@constexpr(check=False)
def _constant(value):
    return Tensor(np.asarray(value, np.uint32))


_CELLS = {}


@constexpr(check=False)
def _cell(shape, *options):
    check_logits(shape)
    key = (shape[1],) + options
    if key not in _CELLS:
        _CELLS[key] = _Sample(shape[1], Sampling(*options))
    return _CELLS[key]


class _Sample(nn.Cell):
    """``(logits, seed, position) -> token`` of one vocabulary and one :class:`Sampling`."""

    def __init__(self, vocabulary, sampling):
        super().__init__(auto_prefix=False)
        self.greedy, self.temperature = sampling.greedy, sampling.temperature
        self.sorts, self.nucleus, self.top_p = sampling.sorts(vocabulary), sampling.nucleus, sampling.top_p
        self.kept = min(sampling.top_k or vocabulary, vocabulary)
        self.least_share = math.log(sampling.min_p) if sampling.min_p else None
        self.top_k, self.softmax, self.arg_max = P.TopK(sorted=True), P.Softmax(-1), P.Argmax(-1)
        self.noise = _Gumbel(vocabulary)

    def construct(self, logits, seed, position):
        x = logits.astype(mstype.float32)
        if self.greedy:
            return self.arg_max(x)
        x = x / self.temperature
        if self.sorts:
            x = self.at_least(x, self.least(self.top_k(x, self.kept)[0]))
        if self.least_share is not None:
            x = self.at_least(x, P.ReduceMax(True)(x, -1) + self.least_share)
        return self.arg_max(x + self.noise(seed, position, logits.shape[0]))

    def least(self, ordered):
        """The smallest logit that stays, (B, 1), of those in descending order."""
        if not self.nucleus:
            return ordered[:, self.kept - 1 :]
        share = self.softmax(ordered)
        before = P.CumSum()(share, -1) - share
        return P.ReduceMin(True)(ops.where(before < self.top_p, ordered, ops.full_like(ordered, 3e38)), -1)

    @staticmethod
    def at_least(x, least):
        """-inf where ``x`` is below ``least``."""
        return ops.where(x >= least, x, ops.full_like(x, -float("inf")))


class _Gumbel(nn.Cell):
    """``core.sampling.gumbel``: float32 (B, V)."""

    def __init__(self, vocabulary):
        super().__init__(auto_prefix=False)
        self.mix = Mix()
        column = dropout.col_key(np, np.arange(vocabulary)).reshape(1, 1, 1, -1)
        self.column, self.vocabulary = Tensor(column), vocabulary
        self.golden, self.zero, self.one, self.s9, self.s15, self.m1, self.m2 = [
            Tensor(np.full((1, 1, 1, 1), value, np.uint32))
            for value in (dropout._GOLDEN, 0, 1, 9, 15, dropout._M1, dropout._M2)
        ]

    def construct(self, seed, position, rows):
        row = _rows(rows, seed.ndim == 0)
        state = self.mix(ops.reshape(seed.astype(mstype.uint32), (-1, 1, 1, 1)))
        for index in (ops.reshape(position.astype(mstype.uint32), (-1, 1, 1, 1)), row, self.zero):
            state = self.mix(P.BitwiseXor()(state, (index + self.one) * self.golden))
        x = P.BitwiseXor()(state, self.column) * self.m1
        x = P.BitwiseXor()(x, P.RightShift()(x, self.s15)) * self.m2
        uniform = (P.RightShift()(x, self.s9).astype(mstype.float32) + 0.5) * 2.0**-23
        return ops.reshape(-ops.log(-ops.log(uniform)), (-1, self.vocabulary))


@constexpr
def _rows(count, told_apart):
    """uint32 (B, 1, 1, 1): the rows' numbers, or zeros."""
    return Tensor((np.arange(count, dtype=np.uint32) * np.uint32(told_apart)).reshape(-1, 1, 1, 1))
