"""Backward pass of the portable engine (Dao 2023, algorithm 2): rows in reverse, dK^T and dV^T carried along.

(saved inputs, out, lse, cotangents) -> Inputs -> RowScores -> P -> **dS = P (dP - delta), dQ, dK, dV** (this file).
P comes from the same softmax as in the forward pass, which is as fast as exp(S - LSE) and more exact: MindSpore's exp
is up to 50 units off on the CPU, and a quotient of two cancels some of that. Sinks scale a row of P by the keys' share
of its denominator: what dS is multiplied with takes that factor, after dP - delta has cancelled what it can. The row
term -delta is an extra column of dO against a column of ones in V. dK and dV are accumulated transposed, because
products with a transposed small operand are the fast ones.
"""

from mindspore import dtype as mstype
from mindspore import nn
from mindspore.ops import operations as P

from flash_attention.ops.portable.dropout import RowKeep, RowKeys
from flash_attention.ops.portable.forward import softmax
from flash_attention.ops.portable.operand_grads import BiasGrad, BiasPart, SlopesPart
from flash_attention.ops.portable.scores import (
    Chain,
    Inputs,
    RowScores,
    Widen,
    add,
    after,
    cast,
    join_columns,
    join_rows,
    matmul,
    matmul_nt,
    maybe_dead,
    mul,
    ones_like,
    reshape,
    swap,
    take_columns,
    take_rows,
    zeros,
    zeros_like,
)

_sum = P.ReduceSum(True)
_exp = P.Exp()
_NEVER = 1e30  # stands for the LSE of a dead row: exp(score - _NEVER) is 0


class Backward(nn.Cell):
    """``(query, key, value, *operands, out, lse, d_out, d_lse) -> (dq, dk, dv, d_bias, d_slopes, d_sinks)``."""

    def __init__(self, spec, constants, rows):
        super().__init__(auto_prefix=False)
        self.inputs = Inputs(spec, constants, rows)
        self.queries = Widen(constants, spec.q_len, spec.q_lengths)
        self.keys = Widen(constants, spec.kv_len, spec.kv_lengths)
        self.factor = self.inputs.factor
        self.head_dim = spec.head_dim
        self.dropout = bool(spec.dropout_rate)
        self.row_keys = RowKeys(spec) if spec.dropout_rate else None
        used = [row for row in rows if row.keys][::-1]
        self.rows = nn.CellList([BackwardRow(spec, constants, row) for row in used])
        self.carries = nn.CellList(make_carries(used))
        self.none = not used
        self.extents = tuple((row.first, row.rows, bool(row.keys)) for row in rows)
        self.before = zeros(used[-1].key) if used else None
        self.after = zeros(spec.kv_len - used[0].key - used[0].keys) if used else None
        self.chain = Chain(spec)
        self.can_die = maybe_dead(spec) or any(row.alive is not None for row in rows)
        self.sinks = spec.sinks
        self.has_bias = spec.bias_shape is not None
        self.bias = BiasGrad(spec, rows) if self.has_bias else None
        self.slopes_shape = spec.alibi_shape
        self.has_slopes = spec.alibi_shape is not None

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed,
        out, lse, d_out, d_lse,
    ):  # fmt: skip
        # Graph compilers merge equal expressions: without this the scores would be kept from the forward pass.
        query, key, value = after((query, key, value), d_out)
        q, d_o = self.queries(query, q_lengths), self.queries(d_out, q_lengths)
        k, v = self.keys(key, kv_lengths), self.keys(value, kv_lengths)
        delta = _sum(d_o * cast(out, mstype.float32), 3)
        d_lse = P.ExpandDims()(d_lse, 3)
        if self.can_die or self.sinks:
            alive = P.ExpandDims()(lse, 3) > -_NEVER
            live = cast(alive, mstype.float32)
            d_o, delta = d_o * live, delta * live
            d_lse = P.Select()(alive, d_lse, zeros_like(d_lse))
            lse = P.Select()(P.Squeeze(3)(alive), lse, zeros_like(lse) + _NEVER)
        delta = delta - d_lse
        inputs = self.inputs(q, k, mask, slopes, kv_lengths, lse if self.sinks else None)
        terms = (bias, mask, q_ids, kv_ids, q_offset)
        ones = ones_like(take_columns(v, 0, 1))
        row_keys = None
        if self.dropout:
            row_keys = self.row_keys(query, seed)
        else:
            d_o, v = join_columns((d_o, -delta)), join_columns((v, ones))
        d_sinks, sink_share = None, None
        if self.sinks:
            sink_share = _exp(cast(reshape(sinks, (1, -1, 1, 1)), mstype.float32) - P.ExpandDims()(lse, 3))
            d_sinks = cast(-P.ReduceSum(False)(sink_share * delta, (0, 2, 3)), sinks.dtype)
        d_qs, d_biases, d_slopes, d_k, d_v = (), (), None, None, None
        k_done, v_done = (), ()
        for row, carry in zip(self.rows, self.carries):
            d_q, k_part, v_part, d_bias, d_slope = row(
                inputs, terms, v, d_o, delta, ones, row_keys, sink_share
            )  # fmt: skip
            d_k, k_done = carry(d_k, k_done, k_part)
            d_v, v_done = carry(d_v, v_done, v_part)
            inputs, terms, v, d_o, row_keys = self.chain(d_k, inputs, terms, v, d_o, row_keys)
            d_qs = (d_q,) + d_qs
            d_biases = (d_bias,) + d_biases
            if self.has_slopes:
                d_slopes = d_slope if d_slopes is None else d_slopes + d_slope
        d_k, d_v = (d_k,) + k_done, (d_v,) + v_done
        return self.finish(inputs[0], query, key, value, bias, slopes, d_qs, d_k, d_v, d_biases, d_slopes) + (d_sinks,)

    def finish(self, q, query, key, value, bias, slopes, d_qs, d_ks, d_vs, d_biases, d_slopes):
        """Put the rows' parts together, in the inputs' dtypes."""
        d_bias = None
        if self.has_bias:
            d_bias = self.bias(bias, d_biases)
        if self.none:
            d_slopes = zeros_like(slopes) if self.has_slopes else None
            return zeros_like(query), zeros_like(key), zeros_like(value), d_bias, d_slopes
        d_q = take_columns(self.all_queries(q, d_qs), 0, self.head_dim) * self.factor
        d_k = swap(take_rows(self.all_keys(d_ks), 0, self.head_dim))
        d_v = swap(take_rows(self.all_keys(d_vs), 0, self.head_dim))
        if self.has_slopes:
            d_slopes = d_slopes if len(self.slopes_shape) == 2 else P.ReduceSum(False)(d_slopes, 0)
            d_slopes = cast(reshape(d_slopes, self.slopes_shape), slopes.dtype)
        return cast(d_q, query.dtype), cast(d_k, key.dtype), cast(d_v, value.dtype), d_bias, d_slopes

    def all_queries(self, q, parts):
        """Join the rows' dQ, with zeros for rows that see no key."""
        whole, n = (), 0
        for first, rows, seen in self.extents:
            if seen:
                whole = whole + (parts[n],)
                n = n + 1
            else:
                whole = whole + (zeros_like(take_rows(q, first, rows)),)
        return whole[0] if len(whole) == 1 else join_rows(whole)

    def all_keys(self, parts):
        """Join the finished parts of dK^T or dV^T, with zeros for keys that no row visits."""
        column = zeros_like(take_columns(parts[0], 0, 1))
        if self.before is not None:
            parts = (column + self.before,) + parts
        if self.after is not None:
            parts = parts + (column + self.after,)
        return parts[0] if len(parts) == 1 else join_columns(parts)


class BackwardRow(nn.Cell):
    """One row's ``(dQ / factor, dK^T, dV^T, d_bias, d_slopes)``, fp32; the last two None when not asked for.

    dQ is (B, N, rows, D + e), dK^T (B, Nkv, D + e, keys), dV^T (B, Nkv, D | D + 1, keys): extra columns are cut later.
    """

    def __init__(self, spec, constants, row):
        super().__init__(auto_prefix=False)
        self.scores = RowScores(spec, constants, row, with_lse=spec.sinks)
        self.dropout = bool(spec.dropout_rate)
        self.keep = RowKeep(spec, row) if self.dropout else None
        self.sinks = spec.sinks
        self.cap = spec.soft_cap
        self.capped = spec.soft_cap is not None
        self.key, self.keys = row.key, row.keys
        self.whole = row.keys == spec.kv_len
        self.batch = spec.batch
        self.plain_shape = (spec.batch, spec.heads, row.rows)
        self.has_bias, self.has_slopes = spec.bias_shape is not None, spec.alibi_shape is not None
        self.bias = BiasPart(spec, row) if self.has_bias else None
        self.slopes = SlopesPart(spec, constants, row) if self.has_slopes else None

    def construct(self, inputs, terms, v, d_o, delta, ones, row_keys, sink_share):
        s, tanh = self.scores(inputs, terms)
        p = softmax(s)
        d_o, delta = self.scores.group(d_o), self.scores.group(delta)
        k = inputs[1]
        if not self.whole:
            v, k, ones = (
                take_rows(v, self.key, self.keys),
                take_rows(k, self.key, self.keys),
                take_rows(ones, self.key, self.keys),
            )
        d_s, kept = matmul_nt(d_o, v), p
        if self.dropout:
            keep = self.keep(row_keys)
            kept = mul(p, keep)
            row_term = matmul_nt(delta, ones)
            d_s = mul(kept, d_s) - mul(p, row_term)
        else:
            d_s = mul(p, d_s)  # -delta is already in the product
        q, share = self.scores.group(inputs[0]), None
        if self.sinks:
            share = matmul(_exp(s), ones)  # with the sink's it is 1 but for exp's errors; 0 for a dead row
            share = P.RealDiv()(share, share + self.scores.group(sink_share) + 1.0 / _NEVER)
            q, d_o = q * share, d_o * share
        d_v = matmul(swap(d_o), kept)
        d_bias, d_slopes = None, None
        if self.has_bias or self.has_slopes:
            whole_d_s = mul(d_s, matmul_nt(share, ones)) if self.sinks else d_s
            if self.has_bias:
                d_bias = self.bias(whole_d_s)
            if self.has_slopes:
                d_slopes = self.slopes(whole_d_s, terms[4])
        if self.capped:
            d_s = mul(d_s, (1.0 - mul(tanh, tanh)) * self.cap)
        d_q = matmul(d_s, k)
        if self.sinks:
            d_q = d_q * share
        return self.ungroup(d_q), matmul(swap(q), d_s), d_v, d_bias, d_slopes

    def ungroup(self, d_q):
        """(B, Nkv, group * rows, C) -> (B, N, rows, C)."""
        if self.batch > 0:
            return reshape(d_q, self.plain_shape + (-1,))
        return reshape(d_q, self.plain_shape + (d_q.shape[3],))


def make_carries(rows):
    """One :class:`Carry` a row, for ``rows`` in reverse order (their key ranges never move right)."""
    carried = [(row.key, row.key + row.keys) for row in rows]
    return [Carry(before, now) for before, now in zip([None] + carried, carried)]


class Carry(nn.Cell):
    """Adds one row's dK^T (or dV^T) to the running sum over the keys that earlier rows of the sequence may still touch.

    ``(carry, done, part) -> (carry, done)``: keys that no other row visits move to the tuple ``done``, in key order.

    Args:
        before: (begin, end) keys of ``carry``, None at the start.
        now: (first, stop) keys of ``part`` and of the new carry.
    """

    def __init__(self, before, now):
        super().__init__(auto_prefix=False)
        self.start = before is None
        begin, end = now if before is None else before
        first, stop = now
        self.kept = max(0, stop - begin)  # carried keys that this row visits too
        self.finished = end - begin - self.kept
        self.gap = zeros(max(0, begin - stop))
        self.has_gap = self.gap is not None
        self.ahead = min(begin, stop) - first  # this row's keys before the carried ones

    def construct(self, carry, done, part):
        if self.start:
            return part, done
        if self.finished:
            done = (take_columns(carry, self.kept, self.finished),) + done
        if not self.kept:
            if self.has_gap:
                done = (zeros_like(take_columns(part, 0, 1)) + self.gap,) + done
            return part, done
        if self.finished:
            carry = take_columns(carry, 0, self.kept)
        if not self.ahead:
            return add(carry, part), done
        shared = add(take_columns(part, self.ahead, self.kept), carry)
        return join_columns((take_columns(part, 0, self.ahead), shared)), done
