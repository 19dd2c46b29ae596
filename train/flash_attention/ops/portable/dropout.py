"""``core.dropout`` in MindSpore operators: the keep factors of one row, from the same hash on global indices.

CPU kernels exist for uint32 multiply, xor, shift and compare; constants and column keys come from ``core.dropout``.
"""

from collections import namedtuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from flash_attention.core import dropout
from flash_attention.ops.host import HostFunction
from flash_attention.ops.portable.scores import cast, ones_like, reshape, take_columns, take_rows

_Rows = namedtuple("_Rows", "first rows key keys")  # what RowKeep reads of a row tile
_xor = P.BitwiseXor()
_shift = P.RightShift()


def _u32(value):
    return Tensor(np.full((1, 1, 1, 1), value, np.uint32))


class Mix(nn.Cell):
    """``core.dropout``'s avalanche of one uint32; shifts take the shape of their operand."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.s15, self.s16 = _u32(15), _u32(16)
        self.m1, self.m2 = _u32(dropout._M1), _u32(dropout._M2)

    def construct(self, x):
        x = _xor(x, _shift(x, self.s16)) * self.m1
        x = _xor(x, _shift(x, self.s15)) * self.m2
        return _xor(x, _shift(x, self.s16))


class RowKeys(nn.Cell):
    """(query, seed) -> uint32 row keys (B, N, Sq, 1) of every query."""

    def __init__(self, spec):
        super().__init__(auto_prefix=False)
        self.mix = Mix()
        self.golden, self.one = _u32(dropout._GOLDEN), _u32(1)
        first_row, first_head, first_query, _ = spec.origin
        self.first_row = float(first_row)
        self.h = Tensor(np.arange(first_head, first_head + spec.heads, dtype=np.uint32).reshape(1, -1, 1, 1))
        self.i = Tensor(np.arange(first_query, first_query + spec.q_len, dtype=np.uint32).reshape(1, 1, -1, 1))

    def construct(self, query, seed):
        # The batch may be known only at run time: its indices are a running count of ones.
        ones = ones_like(cast(take_columns(take_rows(query, 0, 1), 0, 1), mstype.float32))[:, :1]
        b = cast(P.CumSum()(ones, 0) + (self.first_row - 1.0), mstype.uint32)
        state = self.mix(reshape(cast(seed, mstype.uint32), (1, 1, 1, 1)))
        for index in (b, self.h, self.i):
            state = self.mix(_xor(state, (index + self.one) * self.golden))
        return state


class RowKeep(nn.Cell):
    """One row's keep factors: 1 / (1 - rate) where kept, else 0; fp32, grouped (B, Nkv, group * rows, keys).

    On the CPU numpy makes them: MindSpore's integer products there hold 16 bytes an element for as long as
    the graph lives, 88 KB a token and head instead of 10, and take eight passes at a tenth of numpy's speed.
    """

    def __init__(self, spec, row):
        super().__init__(auto_prefix=False)
        first = spec.origin[3] + row.key
        column = dropout.col_key(np, np.arange(first, first + row.keys)).reshape(1, -1)
        self.column = Tensor(column[None, None])
        self.s15 = _u32(15)
        self.m1, self.m2 = _u32(dropout._M1), _u32(dropout._M2)
        self.threshold = _u32(dropout.threshold(spec.dropout_rate))
        self.factor = 1.0 / (1.0 - spec.dropout_rate)
        self.first, self.rows = row.first, row.rows
        self.shape = (-1, spec.kv_heads, spec.group * row.rows, row.keys)
        self.hosted = spec.batch > 0 and ms.get_context("device_target") == "CPU"
        if self.hosted:
            shape = (spec.batch,) + self.shape[1:]

            def host(row_keys):
                return host_keep(row_keys, column, spec.dropout_rate).reshape(shape)

            self.on_host = HostFunction(host, 1, lambda keys: shape, lambda keys: mstype.float32)

    def construct(self, row_keys):
        row_keys = take_rows(row_keys, self.first, self.rows)
        if self.hosted:
            return self.on_host(row_keys)
        x = _xor(row_keys, self.column) * self.m1
        x = _xor(x, _shift(x, self.s15)) * self.m2
        kept = cast(P.GreaterEqual()(x, self.threshold), mstype.float32) * self.factor
        return reshape(kept, self.shape)


class KeepFactors(nn.Cell):
    """``(x, seed)`` -> keep factors of a whole call, fp32 (B, N, Sq, Sk); of x (B, ...) only the batch matters."""

    def __init__(self, spec):
        super().__init__(auto_prefix=False)
        self.keys, self.keep = RowKeys(spec), RowKeep(spec, _Rows(0, spec.q_len, 0, spec.kv_len))
        self.shape = (-1, spec.heads, spec.q_len, spec.kv_len)

    def construct(self, x, seed):
        return reshape(self.keep(self.keys(x, seed)), self.shape)


def host_keep(row_keys, column, rate):
    """Keep factors in numpy: uint32 (B, N, rows, 1), (1, keys) -> float32 (B, N, rows, keys), a head at a time."""
    batch, heads, rows, _ = row_keys.shape
    kept = np.empty((batch * heads, rows, column.shape[1]), np.float32)
    for head, keys in zip(kept, row_keys.reshape(-1, rows, 1)):
        np.multiply(dropout.keep_from_keys(np, keys, column, rate), np.float32(1.0 / (1.0 - rate)), out=head)
    return kept
