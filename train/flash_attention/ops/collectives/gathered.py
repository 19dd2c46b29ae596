"""Collectives of AllGather, AllReduce and slicing: what MindSpore can run on the CPU, in both modes, with gradients.

Every rank receives what all have, and keeps its part: right, and good for tests; 'device' is what a cluster needs.
"""

from mindspore import nn, ops

from flash_attention.ops.collectives.base import divided, joined

_expand, _sum = ops.ExpandDims(), ops.ReduceSum()


class Permute(nn.Cell):
    """See :mod:`~flash_attention.ops.collectives.base`."""

    def __init__(self, group, targets, shape, dtype):
        super().__init__(auto_prefix=False)
        del shape, dtype  # AllGather asks the tensor
        self.gather = ops.AllGather(group.name)
        self.source, self.target = targets.index(group.rank), targets[group.rank]

    def construct(self, x):
        return self.gather(_expand(x, 0))[self.source]

    def bprop(self, x, out, d_out):
        return (self.gather(_expand(d_out, 0))[self.target],)


class AllToAll(nn.Cell):
    """See :mod:`~flash_attention.ops.collectives.base`."""

    def __init__(self, group, split, concat):
        super().__init__(auto_prefix=False)
        self.gather = ops.AllGather(group.name)
        self.rank, self.size = group.rank, group.size
        self.split, self.concat = split, concat

    def construct(self, x):
        return self.trade(x, self.split, self.concat)

    def bprop(self, x, out, d_out):
        return (self.trade(d_out, self.concat, self.split),)

    def trade(self, x, split, concat):
        """Pieces of ``split`` for pieces of ``concat``."""
        mine = self.gather(_expand(divided(x, self.size, split), 0))[:, self.rank]
        return joined(mine, concat)


class AllGather(nn.Cell):
    """See :mod:`~flash_attention.ops.collectives.base`. The CPU gathers over all processes: members pick theirs."""

    def __init__(self, group, axis, members=None):
        super().__init__(auto_prefix=False)
        members = group.size if members is None else members
        self.gather, self.add = ops.AllGather(group.name), ops.AllReduce(group=group.name)
        self.first, self.members, self.axis = group.rank // members * members, members, axis
        self.number, self.all = group.rank % members, members == group.size

    def construct(self, x):
        return self.all_of(x)

    def bprop(self, x, out, d_out):
        return (self.sum_of(d_out),)

    def all_of(self, x):
        """Every member's x."""
        return joined(self.gather(_expand(x, 0))[self.first : self.first + self.members], self.axis)

    def sum_of(self, x):
        """This rank's piece of the sum."""
        if self.all:
            return divided(self.add(x), self.members, self.axis)[self.number]
        pieces = self.gather(_expand(divided(x, self.members, self.axis), 0))
        return _sum(pieces[self.first : self.first + self.members, self.number], 0)


class ReduceScatter(AllGather):
    """See :mod:`~flash_attention.ops.collectives.base`."""

    def construct(self, x):
        return self.sum_of(x)

    def bprop(self, x, out, d_out):
        return (self.all_of(d_out),)
