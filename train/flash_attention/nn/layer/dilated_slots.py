"""``core.mechanisms.dilated``'s sparsify and densify as MindSpore Cells whose gradients are gathers, not scatters."""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

_slice = P.Slice()
_join = P.Concat(2)
_gather = P.Gather()
_zeros_like = P.ZerosLike()  # primitives: a graph cannot expand the functions of these names inside a bprop


class _Select(nn.Cell):
    """Kept (token, head) pairs of each slot, along axis 2. Its gradient is a gather too, not a scatter."""

    def __init__(self, pattern):
        super().__init__(auto_prefix=False)
        self.select, self.inverse = _index(pattern.select), _index(pattern.spread)

    def construct(self, x):
        return _gather(x, self.select, 2)

    def bprop(self, x, out, d_out):
        return (_spread(d_out, self.inverse, 0.0),)


class _Spread(nn.Cell):
    """The transpose of :class:`_Select`: ``fill`` where nothing is kept."""

    def __init__(self, pattern, fill):
        super().__init__(auto_prefix=False)
        self.spread, self.inverse, self.fill = _index(pattern.spread), _index(pattern.select), fill

    def construct(self, x):
        return _spread(x, self.spread, self.fill)

    def bprop(self, x, out, d_out):
        return (_gather(d_out, self.inverse, 2),)


def _index(numbers):
    return Tensor(np.asarray(numbers, np.int32))


def _spread(x, spread, fill):
    beyond = _zeros_like(_slice(x, (0, 0, 0, 0), (-1, -1, 1, -1))) + fill
    return _gather(_join((x, beyond)), spread, 2)


def _pad(x, count):
    """Append ``count`` zero rows to axis 1."""
    if count == 0:
        return x
    return ops.concat((x, ops.zeros((x.shape[0], count, x.shape[2], x.shape[3]), x.dtype)), 1)


def cut(x, count):
    """The first ``count`` rows of axis 1."""
    return x if x.shape[1] == count else x[:, :count]


class Sparsify(nn.Cell):
    """(B, N, H, D) -> (B * segments, slots, H, D): ``core``'s ``sparsify`` with MindSpore's operators."""

    def __init__(self, pattern):
        super().__init__(auto_prefix=False)
        self.tail = pattern.segments * pattern.segment - pattern.length
        self.inner = pattern.slots * pattern.rate - pattern.segment
        self.segment, self.slots, self.pairs = pattern.segment, pattern.slots, pattern.rate * pattern.heads
        self.sparse = pattern.rate > 1
        self.select = _Select(pattern)

    def construct(self, x):
        heads, dim = x.shape[2], x.shape[3]
        x = _pad(x, self.tail).reshape((-1, self.segment, heads, dim))
        x = _pad(x, self.inner)
        if self.sparse:
            x = self.select(x.reshape((-1, self.slots, self.pairs, dim)))
        return x


class Densify(nn.Cell):
    """The transpose of :class:`Sparsify`, with ``fill`` where nothing is kept."""

    def __init__(self, pattern, fill):
        super().__init__(auto_prefix=False)
        self.length, self.segment = pattern.length, pattern.segment
        self.padded, self.whole = pattern.slots * pattern.rate, pattern.segments * pattern.segment
        self.sparse = pattern.rate > 1
        self.spread = _Spread(pattern, fill)

    def construct(self, x):
        heads, dim = x.shape[2], x.shape[3]
        if self.sparse:
            x = self.spread(x)
        x = cut(x.reshape((-1, self.padded, heads, dim)), self.segment)
        return cut(x.reshape((-1, self.whole, heads, dim)), self.length)
