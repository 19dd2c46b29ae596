"""Forward pass of the portable engine: a row at a time, one softmax over all keys that the row visits.

Inputs -> RowScores -> **softmax, P V, LSE** (this file) -> (out, lse). The LSE costs one arg-max pass: it is the
largest score minus the log of that key's probability. A graph that uses no LSE drops that pass.
"""

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn
from mindspore.ops import operations as P

from flash_attention.ops.portable.dropout import RowKeep, RowKeys
from flash_attention.ops.portable.geometry import DEAD
from flash_attention.ops.portable.scores import (
    Chain,
    Inputs,
    RowScores,
    Widen,
    cast,
    join_rows,
    matmul,
    maybe_dead,
    mul,
    reshape,
    take_columns,
    take_rows,
    zeros_like,
)

softmax = P.Softmax(-1)
_arg_max = P.ArgMaxWithValue(-1, True)
_gather = P.GatherD()
_log = P.Log()
_exp = P.Exp()


class Forward(nn.Cell):
    """``(query, key, value, *operands) -> (out, lse)`` of one spec; see :class:`AttentionCell`."""

    def __init__(self, spec, constants, rows):
        super().__init__(auto_prefix=False)
        self.inputs = Inputs(spec, constants, rows)
        self.queries = Widen(constants, spec.q_len, spec.q_lengths)
        self.keys = Widen(constants, spec.kv_len, spec.kv_lengths)
        self.dropout = bool(spec.dropout_rate)
        self.row_keys = RowKeys(spec) if self.dropout else None
        cells = [ForwardRow(spec, constants, row) if row.keys else EmptyRow(row) for row in rows]
        self.rows = nn.CellList(cells)
        self.single = len(rows) == 1
        self.chain = Chain(spec)

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed
    ):
        q, k, v = self.queries(query, q_lengths), self.keys(key, kv_lengths), self.keys(value, kv_lengths)
        inputs = self.inputs(q, k, mask, slopes, kv_lengths, None)
        terms = (bias, mask, q_ids, kv_ids, q_offset)
        row_keys = None
        if self.dropout:
            row_keys = self.row_keys(query, seed)
        if self.single:
            out, lse = self.rows[0](query, inputs, terms, v, sinks, q_lengths, row_keys)
            return cast(out, query.dtype), P.Squeeze(3)(lse)
        outs, lses = (), ()
        for row in self.rows:
            out, lse = row(query, inputs, terms, v, sinks, q_lengths, row_keys)
            outs = outs + (out,)
            lses = lses + (lse,)
            inputs, terms, v, _, row_keys = self.chain(out, inputs, terms, v, None, row_keys)
        return cast(join_rows(outs), query.dtype), P.Squeeze(3)(join_rows(lses))


class ForwardRow(nn.Cell):
    """Output (B, N, rows, D) and LSE (B, N, rows, 1) of one row, fp32."""

    def __init__(self, spec, constants, row):
        super().__init__(auto_prefix=False)
        self.scores = RowScores(spec, constants, row)
        self.dropout = bool(spec.dropout_rate)
        self.keep = RowKeep(spec, row) if self.dropout else None
        self.key, self.keys = row.key, row.keys
        self.whole = row.keys == spec.kv_len
        self.out_shape = (-1, spec.heads, row.rows, spec.head_dim)
        self.lse_shape = (-1, spec.heads, row.rows, 1)
        self.sinks = spec.sinks
        self.alive = None if row.alive is None else constants.plain(row.alive[None, None])
        self.maybe_dead = maybe_dead(spec)
        self.can_die = self.maybe_dead or row.alive is not None
        self.q_lengths = spec.q_lengths
        self.index = constants.plain(np.arange(row.first, row.first + row.rows, dtype=np.int32).reshape(1, 1, -1, 1))

    def construct(self, query, inputs, terms, v, sinks, q_lengths, row_keys):
        s, _ = self.scores(inputs, terms)
        p = softmax(s)
        where, top = _arg_max(s)
        lse = reshape(top - _log(_gather(p, -1, where)), self.lse_shape)
        if self.dropout:
            p = mul(p, self.keep(row_keys))
        if not self.whole:
            v = take_rows(v, self.key, self.keys)
        out = reshape(matmul(p, v), self.out_shape)
        if self.sinks:
            out, lse = with_sinks(out, lse, cast(reshape(sinks, (1, -1, 1, 1)), mstype.float32))
        if self.can_die:
            alive = self.living(top, q_lengths)
            out, lse = out * alive, lse + _log(alive)  # log(0) = -inf
        return out, lse

    def living(self, top, q_lengths):
        """1 where a query sees a key, else 0; fp32."""
        alive = self.alive
        if self.maybe_dead:
            alive = times(alive, cast(reshape(top, self.lse_shape) > DEAD, mstype.float32))
        if self.q_lengths:
            alive = times(alive, cast(self.index < reshape(q_lengths, (-1, 1, 1, 1)), mstype.float32))
        return alive


class EmptyRow(nn.Cell):
    """A row whose queries see no key: output 0, LSE -inf."""

    def __init__(self, row):
        super().__init__(auto_prefix=False)
        self.first, self.rows = row.first, row.rows

    def construct(self, query, inputs, terms, v, sinks, q_lengths, row_keys):
        out = zeros_like(cast(take_rows(query, self.first, self.rows), mstype.float32))
        return out, _log(take_columns(out, 0, 1))


def times(a, b):
    """Product where the first may be absent."""
    return b if a is None else a * b


def with_sinks(out, lse, sink):
    """Let the sink's logit join the denominator: ``lse' = logaddexp(lse, sink)``; out shrinks by the keys' share of it.

    The share is formed from the ratio of the two, not from ``lse - lse'``: MindSpore's exp and log are 10 to 50 units
    off on the CPU, and only the sink's part of the error should reach the output.
    """
    peak = P.Maximum()(lse, sink)
    total = peak + _log(_exp(lse - peak) + _exp(sink - peak))
    return P.RealDiv()(out, _exp(sink - lse) + 1.0), total
