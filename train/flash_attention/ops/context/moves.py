"""Moves between placements of the sequence: zig-zag for the ring, heads for tokens for Ulysses.

A shard is a query (B, N, s, D) and a pair (B, Nkv, t, 2 D), keys beside values, so that they travel in one message.
Each Cell sends its messages one after the other, also backwards: ranks must not send them in different orders.
"""

from mindspore import dtype as mstype
from mindspore import nn
from mindspore.ops import operations as P
from mindspore.ops.functional import depend

from flash_attention.ops.portable.scores import zeros_like

_halves, _join = P.Split(2, 2), P.Concat(2)


class _InTurn(nn.Cell):
    """Moves two tensors one after the other, and their gradients back in the same order.

    Args: ``there`` and ``back``, a Cell for each of the two.
    """

    def __init__(self, there, back):
        super().__init__(auto_prefix=False)
        self.first, self.second = there
        self.first_back, self.second_back = back

    def construct(self, first, second):
        first = self.first(first)
        return first, self.second(depend(second, first))

    def bprop(self, first, second, out, d_out):
        d_first = self.first_back(d_out[0])
        return d_first, self.second_back(depend(d_out[1], d_first))


class Place(_InTurn):
    """``(query, pair)``, contiguous shards -> chunks ``g`` and ``2 * ring - 1 - g`` on rank g, along axis 2."""

    def __init__(self, plan, group, back_end, q_shape, kv_shape, dtype):
        sizes = (q_shape, dtype), (kv_shape, dtype)
        super().__init__(
            [_ToZigzag(plan, group, back_end, *size) for size in sizes],
            [_FromZigzag(plan, group, back_end, *size) for size in sizes],
        )


class Return(_InTurn):
    """``(out, lse)``: the way back of a query's results, the LSE with a last axis of 1."""

    def __init__(self, plan, group, back_end, shape, dtype):
        sizes = (shape, dtype), (shape[:3] + (1,), mstype.float32)
        super().__init__(
            [_FromZigzag(plan, group, back_end, *size) for size in sizes],
            [_ToZigzag(plan, group, back_end, *size) for size in sizes],
        )


class PlaceRows(nn.Cell):
    """A mask (1|B, 1|N, s, Sk), as float, with its rows where the queries are. No gradient passes it."""

    def __init__(self, plan, group, back_end, shape, dtype):
        super().__init__(auto_prefix=False)
        self.move = _ToZigzag(plan, group, back_end, shape, dtype)

    def construct(self, mask):
        return self.move(mask)

    def bprop(self, mask, out, d_out):
        return (zeros_like(mask),)


def _permutes(plan, group, back_end, shape, dtype, back):
    """The Cells that move even and odd chunks of a shard of ``shape``."""
    half = shape[:2] + (shape[2] // 2,) + shape[3:]
    cells = []
    for odd in (0, 1):
        targets = tuple(target for _, target in plan.homes(odd))
        if back:
            targets = tuple(targets.index(rank) for rank in range(group.size))
        cells.append(back_end.Permute(group, targets, half, dtype))
    return cells


class _ToZigzag(nn.Cell):
    def __init__(self, plan, group, back_end, shape, dtype):
        super().__init__(auto_prefix=False)
        self.even, self.odd = _permutes(plan, group, back_end, shape, dtype, back=False)
        self.swap = group.rank % 2 == 1  # chunk g has the parity of g

    def construct(self, x):
        even, odd = _halves(x)
        even = self.even(even)
        odd = self.odd(depend(odd, even))
        return _join((odd, even) if self.swap else (even, odd))


class _FromZigzag(nn.Cell):
    def __init__(self, plan, group, back_end, shape, dtype):
        super().__init__(auto_prefix=False)
        self.even, self.odd = _permutes(plan, group, back_end, shape, dtype, back=True)
        self.swap = group.rank % 2 == 1

    def construct(self, x):
        first, second = _halves(x)
        even = self.even(second if self.swap else first)
        odd = self.odd(depend(first if self.swap else second, even))
        return _join((even, odd))


class Trade(_InTurn):
    """``(query, pair)`` of a rank's tokens and all heads -> all tokens and the rank's heads.

    Key/value heads that the ranks do not divide are gathered, all of them.
    """

    def __init__(self, group, back_end, split_kv):
        if split_kv:
            pair, pair_back = back_end.AllToAll(group, 1, 2), back_end.AllToAll(group, 2, 1)
        else:
            pair, pair_back = back_end.AllGather(group, 2), back_end.ReduceScatter(group, 2)
        super().__init__((back_end.AllToAll(group, 1, 2), pair), (back_end.AllToAll(group, 2, 1), pair_back))


class TradeBack(_InTurn):
    """``(out, lse)`` of all tokens and the rank's heads -> its tokens and all heads; the LSE with a last axis of 1."""

    def __init__(self, group, back_end):
        super().__init__(
            [back_end.AllToAll(group, 2, 1) for _ in range(2)], [back_end.AllToAll(group, 1, 2) for _ in range(2)]
        )
