"""Who takes part, which back end sends, and what the Cells of the back ends have in common.

A back end is a module with four Cell classes, whose gradients are messages too:

    Permute(group, targets, shape, dtype)   x of rank r goes to rank targets[r]; every rank gets one
    AllToAll(group, split, concat)          the n-th piece of axis ``split`` goes to rank n; pieces join on ``concat``
    AllGather(group, axis, members)         every member's x, joined on ``axis``
    ReduceScatter(group, axis, members)     the sum of all members' x, of which each keeps its piece of ``axis``

Members are ``members`` consecutive ranks, a divisor of the group's size: n of them from a multiple of n on; None = all.

A compiled graph runs what does not depend on each other in any order, and ranks may differ in it: whoever sends two
messages makes the second depend on the first.
"""

import functools
import importlib
from typing import NamedTuple

import mindspore as ms
from mindspore.communication import (
    GlobalComm,
    create_group,
    get_group_size,
    get_rank,
    get_world_rank_from_group_rank,
)
from mindspore.ops import operations as P  # a graph cannot expand functions of mindspore.ops inside a bprop

from flash_attention.core.errors import invalid_value

BACK_ENDS = ("device", "gathered")


class Group(NamedTuple):
    """This process's place in a communication group.

    Attributes:
        rank: its number in the group; size: number of processes; name: MindSpore's name of the group.
    """

    rank: int
    size: int
    name: str


ALONE = Group(0, 1, "")
"""The group of a process that has none."""


def current_group(name=None):
    """The :class:`Group` called ``name``, default all processes; one process alone without ``communication.init()``.

    Raises:
        ValueError: a name is given, and communication is not initialised.
    """
    if not GlobalComm.INITED:
        if name is not None:
            remedy = "Call mindspore.communication.init() first."
            raise invalid_value("collectives", "group", "None before communication is initialised", name, remedy)
        return ALONE
    name = GlobalComm.WORLD_COMM_GROUP if name is None else name
    return Group(get_rank(name), get_group_size(name), name)


@functools.lru_cache(maxsize=None)
def subgroup(group, members):
    """The :class:`Group` of this rank's members; None = all."""
    if members in (None, group.size):
        return group
    first = group.rank // members * members
    ranks = list(range(first, first + members))
    if group.name != GlobalComm.WORLD_COMM_GROUP:
        ranks = [get_world_rank_from_group_rank(group.name, rank) for rank in ranks]
    name = "{}_{}_{}".format(group.name, first, members)
    create_group(name, ranks)
    return Group(group.rank - first, members, name)


def choose(name=None):
    """The back end's module; None: 'gathered' on the CPU, else 'device'."""
    if name is None:
        name = "gathered" if ms.get_context("device_target") == "CPU" else "device"
    if name not in BACK_ENDS:
        raise invalid_value("collectives", "name", "None or one of {}".format(", ".join(BACK_ENDS)), repr(name))
    return importlib.import_module("flash_attention.ops.collectives." + name)


def shift(back_end, group, way, shape, dtype):
    """The Cell that moves x ``way`` ranks up the ring (down, if negative)."""
    targets = tuple((rank + way) % group.size for rank in range(group.size))
    return back_end.Permute(group, targets, shape, dtype)


def joined(whole, axis):
    """(n, ..., s, ...) -> (..., n * s, ...): the pieces of all ranks joined on ``axis``, counted without the first."""
    pieces = ()
    for number in range(whole.shape[0]):
        pieces = pieces + (whole[number],)
    return P.Concat(axis)(pieces)


def divided(x, count, axis):
    """(..., n * s, ...) -> (n, ..., s, ...): the inverse of :func:`joined`."""
    return P.Stack(0)(P.Split(axis, count)(x))
