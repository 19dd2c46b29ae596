"""Collectives of the device's own operators: Send, Receive, AlltoAll, AllGather, ReduceScatter. Not run on device."""

import itertools

from mindspore import nn, ops
from mindspore.ops.functional import depend

from flash_attention.ops.collectives.base import divided, joined, subgroup

_expand = ops.ExpandDims()
_tags = itertools.count()  # every process builds the same Cells in the same order


def receives_first(targets, rank):
    """Whether a rank waits for its message before it sends its own: the smallest rank of each cycle does.

    A Send ends when its peer receives. If all ranks of a cycle sent first they would wait for each other for ever; one
    that receives first lets its predecessor finish, which then receives, and so on backwards around the cycle.
    """
    member, smallest = targets[rank], rank
    while member != rank:
        member, smallest = targets[member], min(member, smallest)
    return smallest == rank


class Permute(nn.Cell):
    """See :mod:`~flash_attention.ops.collectives.base`."""

    def __init__(self, group, targets, shape, dtype):
        super().__init__(auto_prefix=False)
        back = tuple(targets.index(rank) for rank in range(group.size))
        self.forward = _Exchange(group, targets, shape, dtype)
        self.backward = _Exchange(group, back, shape, dtype)

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, d_out):
        return (self.backward(d_out),)


class _Exchange(nn.Cell):
    """One Send and one Receive in an order that cannot block."""

    def __init__(self, group, targets, shape, dtype):
        super().__init__(auto_prefix=False)
        rank, tag = group.rank, next(_tags)
        self.stays = targets[rank] == rank
        self.first = receives_first(targets, rank)
        self.send = ops.Send(tag, targets[rank], group.name)
        self.receive = ops.Receive(tag, targets.index(rank), list(shape), dtype, group.name)

    def construct(self, x):
        if self.stays:
            return x
        if self.first:
            got = self.receive(x)  # the argument is not read: it gives Receive its place in the order
            return depend(got, self.send(depend(x, got)))
        return self.receive(depend(x, self.send(x)))


class AllToAll(nn.Cell):
    """See :mod:`~flash_attention.ops.collectives.base`."""

    def __init__(self, group, split, concat):
        super().__init__(auto_prefix=False)
        self.forward = ops.AlltoAll(group.size, split, concat, group.name)
        self.backward = ops.AlltoAll(group.size, concat, split, group.name)

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, d_out):
        return (self.backward(d_out),)


class AllGather(nn.Cell):
    """See :mod:`~flash_attention.ops.collectives.base`."""

    def __init__(self, group, axis, members=None):
        super().__init__(auto_prefix=False)
        group = subgroup(group, members)
        self.gather = ops.AllGather(group.name)
        self.scatter = ops.ReduceScatter(group=group.name)
        self.size, self.axis = group.size, axis

    def construct(self, x):
        return self.all_of(x)

    def bprop(self, x, out, d_out):
        return (self.sum_of(d_out),)

    def all_of(self, x):
        """Every rank's x."""
        return joined(self.gather(_expand(x, 0)), self.axis)

    def sum_of(self, x):
        """This rank's piece of the sum."""
        return self.scatter(divided(x, self.size, self.axis))[0]


class ReduceScatter(AllGather):
    """See :mod:`~flash_attention.ops.collectives.base`."""

    def construct(self, x):
        return self.sum_of(x)

    def bprop(self, x, out, d_out):
        return (self.all_of(d_out),)
