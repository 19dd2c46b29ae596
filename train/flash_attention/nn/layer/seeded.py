"""A Cell that drops: where the seed of each training call comes from."""

import itertools

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.ops.precision import OwnPrecision

_GOLDEN = 0x9E3779B9  # consecutive steps give seeds far apart
_MIX = 0x85EBCA6B  # odd, so that Cells and global seeds are spread likewise
_cells = itertools.count()  # construction order, the same in every process that builds the same model


class SeededCell(nn.Cell):
    """Base of the Cells with dropout on the softmax weights; owns ``dropout_step``, the number of training calls."""

    def __init__(self, dropout_rate):
        super().__init__()
        self.dropout_rate = dropout_rate
        if dropout_rate:
            self.dropout_step = Parameter(Tensor(0, mstype.int32), name="dropout_step", requires_grad=False)
            self.advance = ops.AssignAdd()
            self.one = Tensor(1, mstype.int32)
            self.salt = Tensor(_cell_seed(next(_cells)), mstype.int32)

    def next_seed(self, query):
        """A seed that differs between Cells and between training calls; int32, its bits are a uint32."""
        if self._has_config_recompute:
            # A graph recomputes side effects too, so a counter would move between the two forward passes.
            return seed_from(query) + self.salt
        step = self.dropout_step + 0
        self.advance(self.dropout_step, self.one)
        return step * _signed(_GOLDEN) + self.salt


class _SeedFrom(OwnPrecision):
    """A seed without a state, int32: another training step has another query, and a recomputed layer the very same."""

    def __init__(self):
        super().__init__()
        self.tiny = Tensor(1e-30, mstype.float32)  # a query of zeros has a direction too

    def construct(self, query):
        row = query[0, 0, -1].astype(mstype.float32)
        peak = ops.maximum(ops.abs(row).max(), self.tiny)
        direction = (row / peak * _weights(row.shape[0])).sum()  # within two times the head size
        return ((direction + ops.log(peak)) * 2.0**20).astype(mstype.int32)


seed_from = _SeedFrom()


@constexpr
def _weights(count):
    """Distinct factors in [1, 2)."""
    return Tensor((1.0 + np.arange(count) * 0.6180339887 % 1.0).astype(np.float32))


def _signed(value):
    """The int32 with the bits of ``value`` modulo 2**32."""
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def _cell_seed(index):
    """Seed of the ``index``-th Cell of this process: no two layers of a model drop the same places."""
    return _signed((ms.get_seed() or 0) * _MIX + index * _MIX * _MIX)
