"""The ring: a rank's queries meet keys that travel; results are merged by LSE. Forward and backward, exact.

(query, pair) placed by moves.py -> **Ring** -> the chosen engine on one pair of chunks at a time -> (out, lse).

The backward sends the keys round again, and their gradients with them, which go home at the end: nothing of other ranks
is kept. With ``alpha = exp(part's LSE - LSE)`` a part's probabilities are ``alpha P_part``, so an engine that is given
``(alpha dO, out, alpha dLSE)`` of the whole and the LSE of the part forms ``delta' = alpha delta`` and with it the
part's share of the exact gradients.
"""

from mindspore import dtype as mstype
from mindspore import nn
from mindspore.ops import operations as P
from mindspore.ops.functional import depend

from flash_attention.ops.collectives import shift
from flash_attention.ops.lse import known, log_sum_exp
from flash_attention.ops.portable.scores import after, cast, zeros_like

_slice, _join, _expand, _exp = P.Slice(), P.Concat(2), P.ExpandDims(), P.Exp()


class Ring(nn.Cell):
    """``(query (B, N, s, D), pair (B, Nkv, t, 2 D), mask, slopes, seed) -> (out, lse, LSEs of the parts ...)``.

    The gradient reaches query, pair and slopes, of the slopes this rank's queries' share, from ``out`` and ``lse``.

    Args:
        plan: :class:`~flash_attention.core.context.RingPlan`.
        group, back_end: as in ``ops.collectives``.
        cell_of: ``cell_of(spec)``, the :class:`AttentionCell` of a pair of chunks.
        kv_shape: shape of ``pair``; dtype: of the inputs.
    """

    def __init__(self, plan, group, back_end, cell_of, kv_shape, dtype):
        super().__init__(auto_prefix=False)
        rounds = plan.rounds(group.rank)
        cells = [[_PairCells(plan, pair, cell_of(pair.spec), kv_shape[3] // 2) for pair in r.pairs] for r in rounds]
        keys = [_Move(group, back_end, r.way, kv_shape, dtype) for r in rounds]
        self.forward_rounds = nn.CellList([_ForwardRound(*each) for each in zip(rounds, keys, cells)])
        backward, first = [], 0
        for r, move, pairs in zip(rounds, keys, cells):
            sums = [_Move(group, back_end, way or 0, kv_shape, mstype.float32) for way in (r.way, r.home)]
            backward.append(_BackwardRound(r, move, sums, pairs, first, plan.chunks))
            first += len(pairs)
        self.backward_rounds = nn.CellList(backward)
        self.chunks, self.q_chunk = plan.chunks, plan.q_chunk

    def construct(self, query, pair, mask, slopes, seed):
        outs, lses, parts = (), (), ()
        for number in range(self.chunks):
            rows = cast(_rows(query, number, self.q_chunk), mstype.float32)
            outs = outs + (zeros_like(rows),)
            lses = lses + (zeros_like(rows[..., 0]) - float("inf"),)
        here, before = pair, outs
        for one in self.forward_rounds:
            started = outs
            here, outs, lses, found = one(pair, here, before, query, mask, slopes, seed, outs, lses)
            before, parts = started, parts + found
        # A rank that sees nothing of the last keys must take part in their message all the same.
        out = depend(cast(_join(outs), query.dtype), here)
        return (out, _join(lses)) + parts

    def bprop(self, query, pair, mask, slopes, seed, results, d_results):
        # Graph compilers merge equal expressions: without this the keys that travelled would be kept from the forward.
        # And no message of this pass may overtake one of the forward pass on some of the ranks.
        query, pair = after((query, pair), (d_results[0], results[0]))
        d_out, d_lse = cast(d_results[0], mstype.float32), d_results[1]
        d_queries = ()
        for number in range(self.chunks):
            d_queries = d_queries + (zeros_like(cast(_rows(query, number, self.q_chunk), mstype.float32)),)
        d_slopes = None if slopes is None else zeros_like(slopes)
        call, cotangents = (query, mask, slopes, seed), (d_out, d_lse)
        d_pair, here, sums, before = None, pair, None, d_queries
        for one in self.backward_rounds:
            started = d_queries
            here, sums, d_pair, d_queries, d_slopes = one(
                call, results, cotangents, pair, (here, before, sums), (d_pair, d_queries, d_slopes)
            )
            before = started
        d_pair = depend(d_pair, here)
        d_mask = None if mask is None else zeros_like(mask)
        d_seed = None if seed is None else zeros_like(seed)
        return cast(_join(d_queries), query.dtype), cast(d_pair, pair.dtype), d_mask, d_slopes, d_seed


class _Move(nn.Cell):
    """``way`` ranks up the ring, not before ``event`` has been computed; 0 stays.

    Keys for the next round leave while this one is computed, but not before the last one has been: a graph would
    otherwise gather the keys of all ranks first.
    """

    def __init__(self, group, back_end, way, shape, dtype):
        super().__init__(auto_prefix=False)
        self.stays = way % group.size == 0
        self.shift = None if self.stays else shift(back_end, group, way, shape, dtype)

    def construct(self, x, event):
        if self.stays:
            return x
        return self.shift(depend(x, event))


class _PairCells(nn.Cell):
    """One pair of chunks: its parts of the tensors, and the engine's two passes."""

    def __init__(self, plan, pair, cell, head_dim):
        super().__init__(auto_prefix=False)
        self.q, self.kv = pair.q, pair.kv
        self.q_chunk, self.kv_chunk, self.kv_start = plan.q_chunk, plan.kv_chunk, pair.kv_start
        self.head_dim = head_dim
        self.forward, self.backward = cell.forward, cell.backward
        shape = pair.spec.mask_shape
        self.mask_rows, self.mask_columns = shape is not None and shape[2] > 1, shape is not None and shape[3] > 1

    def construct(self, query, pair, mask, slopes, seed):
        """``(out, lse)`` of the part."""
        return self.forward(*self.part(query, pair, mask, slopes, seed))

    def part(self, query, pair, mask, slopes, seed):
        """The tensors of an AttentionCell."""
        pair = _rows(pair, self.kv, self.kv_chunk)
        key = _slice(pair, (0, 0, 0, 0), (-1, -1, -1, self.head_dim))
        value = _slice(pair, (0, 0, 0, self.head_dim), (-1, -1, -1, self.head_dim))
        if self.mask_rows:
            mask = _rows(mask, self.q, self.q_chunk)
        if self.mask_columns:
            mask = _slice(mask, (0, 0, 0, self.kv_start), (-1, -1, -1, self.kv_chunk))
        if mask is not None:
            mask = mask > 0
        return (
            _rows(query, self.q, self.q_chunk), key, value, None, mask, slopes, None, None, None, None, None, None, seed
        )  # fmt: skip


class _ForwardRound(nn.Cell):
    def __init__(self, plan_round, move, pairs):
        super().__init__(auto_prefix=False)
        self.restart, self.move = plan_round.restart, move
        self.pairs = nn.CellList(pairs)

    def construct(self, own, here, before, query, mask, slopes, seed, outs, lses):
        here = self.move(own if self.restart else here, (here, before))
        found = ()
        for pair in self.pairs:
            out, lse = pair(query, here, mask, slopes, seed)
            found = found + (lse,)
            total, finite = log_sum_exp((lses[pair.q], lse))
            old, new = _exp(lses[pair.q] - finite), _exp(lse - finite)
            merged = _expand(old, -1) * outs[pair.q] + _expand(new, -1) * cast(out, mstype.float32)
            outs, lses = _put(outs, pair.q, merged), _put(lses, pair.q, total)
        return here, outs, lses, found


class _BackwardRound(nn.Cell):
    def __init__(self, plan_round, move, moves_of_sums, pairs, first, chunks):
        super().__init__(auto_prefix=False)
        self.restart, self.ends = plan_round.restart, plan_round.home is not None
        self.move = move
        self.move_sums, self.bring_home = moves_of_sums
        self.pairs, self.first, self.chunks = nn.CellList(pairs), first, chunks

    def construct(self, call, results, cotangents, own, carry, totals):
        """Pass keys and sums on, add this round's gradients.

        Args:
            call: (query, mask, slopes, seed). results: what :class:`Ring` returned. cotangents: (d_out, d_lse).
            own: the rank's own keys and values.
            carry: (keys and values at hand, what the next message waits for, their gradients so far).
            totals: (d_pair of the own keys, d_queries a chunk, d_slopes).
        """
        here, before, sums = carry
        d_pair, d_queries, d_slopes = totals
        if self.restart:
            here, sums = self.move(own, (here, before)), None
        else:
            here = self.move(here, (sums, before))
            sums = self.move_sums(sums, here)
        added, index = (), 2 + self.first
        for _ in range(self.chunks):
            added = added + (None,)
        for pair in self.pairs:
            grads = _pair_grads(pair, here, call, results, results[index], cotangents)
            index = index + 1
            d_queries = _put(d_queries, pair.q, d_queries[pair.q] + grads[0])
            added = _put(added, pair.kv, _sum(added[pair.kv], grads[1]))
            if grads[2] is not None:
                d_slopes = d_slopes + grads[2]
        sums = _sum(sums, _joined(added, here, self.chunks))
        if self.ends:
            brought = self.bring_home(sums, here)
            d_pair = _sum(d_pair, brought)
            here = depend(here, brought)
        return here, sums, d_pair, d_queries, d_slopes


def _pair_grads(pair, here, call, results, part_lse, cotangents):
    """``(d_query, d_pair, d_slopes)`` of one pair of chunks, fp32 but the slopes'."""
    query, mask, slopes, seed = call
    tensors = pair.part(query, here, mask, slopes, seed)
    out, lse = _rows(results[0], pair.q, pair.q_chunk), _lse_rows(results[1], pair.q, pair.q_chunk)
    d_out, d_lse = _rows(cotangents[0], pair.q, pair.q_chunk), _lse_rows(cotangents[1], pair.q, pair.q_chunk)
    alpha = _exp(part_lse - known(lse))
    d_part = cast(_expand(alpha, -1) * d_out, query.dtype)
    grads = pair.backward(*(tensors + (out, part_lse, d_part, alpha * d_lse)))
    d_pair = P.Concat(3)((cast(grads[1], mstype.float32), cast(grads[2], mstype.float32)))
    return cast(grads[0], mstype.float32), d_pair, grads[4]


def _sum(a, b):
    return b if a is None else a + b


def _joined(added, here, chunks):
    """The chunks' sums along axis 2, zeros where there is none."""
    whole = ()
    for number in range(chunks):
        part = added[number]
        if part is None:
            part = zeros_like(cast(_rows(here, number, here.shape[2] // chunks), mstype.float32))
        whole = whole + (part,)
    return _join(whole)


def _rows(x, number, count):
    """Chunk ``number`` of ``count`` rows of axis 2; x itself where it is the only one."""
    if x.shape[2] == count:
        return x
    return _slice(x, (0, 0, number * count, 0), (-1, -1, count, -1))


def _lse_rows(x, number, count):
    if x.shape[2] == count:
        return x
    return _slice(x, (0, 0, number * count), (-1, -1, count))


def _put(items, index, item):
    """The tuple with one entry replaced."""
    result = ()
    for number in range(len(items)):
        result = result + (item if number == index else items[number],)
    return result
