"""LongNet's dilated attention in MindSpore: sparsify, one core call a pattern, densify, mix by LSE. Plans: `core`.

A graph asks a ``constexpr`` for the Cell of its shapes and options, which holds the index tables; so does PyNative.
"""

import functools

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.functional import depend
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms import dilated as shared
from flash_attention.core.mechanisms.positions import rotate
from flash_attention.nn.layer.dilated_slots import Densify, Sparsify, cut
from flash_attention.nn.layer.position_dropout import PositionDropout
from flash_attention.nn.layer.projection import Projection, normal
from flash_attention.ops.collectives import ALONE, choose, current_group
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import computable, flash_attention
from flash_attention.ops.lse import log_sum_exp

LAYER = "dilated_attention"


def dilated_attention(
    query,
    key,
    value,
    segment_size,
    dilation_rate,
    *,
    is_causal=False,
    scale=None,
    rel_pos_table=None,
    use_xpos=False,
    head_offset="mod",
    stop_weight_grad=False,
    return_lse=False,
    engine=None,
    distributed=False,
    group=None
):  # fmt: skip
    """Dilated attention (Ding et al., "LongNet", 2023), linear in N at fixed patterns.

    In a pattern (w, r), tokens ``i`` with ``(i % w) % r == offset(head)`` attend to one another within their segment
    ``i // w``. Several patterns are mixed in proportion to their softmax denominators; the result is one softmax over
    all pairs, each counted as often as patterns hold it. Ragged N and w are fine.

    Args:
        query, key, value (Tensor): (B, N, H, D).
        segment_size, dilation_rate (int, tuple): w before sparsifying and r; sequences of equal length for a mixture.
        is_causal (bool): key j visible only when ``j <= i``.
        scale (float): default ``1 / sqrt(D)``.
        rel_pos_table (Tensor): (32, H) table of a T5 bias on the original distances (max distance 128, bidirectional
            unless causal); differentiable.
        use_xpos (bool): apply xPos to queries and keys at their original positions, computed in float32.
        head_offset (str): 'mod': head h keeps from token ``h % r`` (the paper); 'block': ``h // ceil(H / r)``.
        stop_weight_grad (bool): no gradient through the mixture's weights; default exact.
        return_lse (bool): also return the LSE over all patterns, float32 (B, H, N).
        engine (str): as in ``flash_attention.ops.flash_attention``.
        distributed (bool): the tensors are this rank's tokens of a sequence that the ranks of a communication group
            hold in order; the result is that of all. Keys and values of a segment that ranks share are gathered after
            sparsifying. One process alone computes as ever.
        group (str): the communication group; None = all processes.

    Returns:
        Tensor (B, N, H, D); a (token, head) that no pattern keeps gives 0 and the LSE -inf.
    """
    table_shape = None if rel_pos_table is None else rel_pos_table.shape
    options = (segment_size, dilation_rate, head_offset, is_causal, scale, use_xpos, stop_weight_grad, engine)
    cell = _cell(query.shape, key.shape, value.shape, table_shape, options, distributed, group)
    table = None if rel_pos_table is None else rel_pos_table.astype(mstype.float32)
    out, lse = cell(computable(query), computable(key), computable(value), table)
    if return_lse:
        return out.astype(value.dtype), lse
    return out.astype(value.dtype)


@constexpr
def _cell(query, key, value, table, options, distributed, name):
    segment_size, dilation_rate, head_offset = options[:3]
    sizes = shared.check_call(LAYER, segment_size, dilation_rate, head_offset)
    shared.check_tensors(LAYER, query, key, value, table)
    group = current_group(name) if distributed else ALONE
    shares = shared.make_shares(LAYER, query[1], query[2], *sizes, head_offset, group.size)
    return _build(shares, group, query[0], query[3], table is not None, options[3:])


@functools.lru_cache(maxsize=64)
def _build(shares, group, batch, dim, has_table, options):
    return _Dilated(shares, group, batch, dim, has_table, *options)


class _Dilated(nn.Cell):
    """``(query, key, value, table) -> (out (B, N, H, D), lse (B, H, N))`` of fixed shapes and options."""

    def __init__(self, shares, group, batch, dim, has_table, causal, scale, use_xpos, stop_weight_grad, engine):
        super().__init__(auto_prefix=False)
        parts = [_Pattern(s, group, batch, dim, has_table, causal, scale, use_xpos, engine) for s in shares]
        self.parts = nn.CellList(parts, auto_prefix=False)
        self.single = len(parts) == 1
        self.stop_weight_grad = stop_weight_grad

    def construct(self, query, key, value, table):
        token = ops.zeros((1,), mstype.float32)  # hands the right to send from pattern to pattern
        if self.single:
            out, lse, token = self.parts[0](query, key, value, table, token)
            total = self.parts[0].densify_lse(lse)
            return self.parts[0].densify(out), total[..., 0].swapaxes(1, 2)
        outs, lses, dense = (), (), ()
        for part in self.parts:
            out, lse, token = part(query, key, value, table, token)
            outs = outs + (out,)
            lses = lses + (lse,)
            dense = dense + (part.densify_lse(lse),)
        total, known = log_sum_exp(dense)
        mixed, index = 0.0, 0
        for part in self.parts:
            weight = ops.exp(lses[index] - part.sparsify(known))
            if self.stop_weight_grad:
                weight = ops.stop_gradient(weight)
            mixed = mixed + part.densify(weight * outs[index])
            index = index + 1
        return mixed, total[..., 0].swapaxes(1, 2)


class _Pattern(nn.Cell):
    """One pattern: ``(query, key, value, table, token) -> (out, lse, token)``.

    out is (B * segments, slots, H, D), lse (.., 1).
    """

    def __init__(self, share, group, batch, dim, has_table, causal, scale, use_xpos, engine):
        super().__init__(auto_prefix=False)
        pattern, segment = share.local, share.segment
        self.slots, self.dim = pattern.slots, dim
        first = group.rank % share.members * pattern.slots  # slot of the first query in its segment
        self.gather = _Gather(group, share.members) if share.members > 1 else None
        self.q_offset = first if causal and share.members > 1 else None
        self.sparsify = Sparsify(pattern)
        self.densify, self.densify_lse = Densify(pattern, 0.0), Densify(pattern, -float("inf"))
        self.causal, self.scale, self.engine = causal, scale, engine
        self.mask = None
        if shared.needs_mask(pattern, causal):
            self.mask = Tensor(np.tile(pattern.occupied(), (batch, 1, 1))[:, :, None, :])
        self.ring_index = Tensor(np.roll(shared.bucket_ring(segment, causal), first)) if has_table else None
        self.has_table, self.tiles = has_table, ()
        if use_xpos and share.members > 1:
            shared.check_shared_xpos(LAYER, segment)
            self.tiles = (_xpos_tile(segment, dim, (first, first + pattern.slots), segment.slots, segment.slots // 2),)
        elif use_xpos:
            self.tiles = _xpos_constants(pattern, dim, causal)

    def construct(self, query, key, value, table, token):
        query, key, value = self.sparsify(query), self.sparsify(key), self.sparsify(value)
        if self.gather is not None:
            pair, token = self.gather(ops.concat((key, value), -1), token)
            key, value = pair[..., : self.dim], pair[..., self.dim :]
        bias = None
        if self.has_table:
            ring = ops.gather(table, self.ring_index, 0).swapaxes(0, 1)
            bias = shared.toeplitz(ops.tile, ring, self.slots)
        if self.tiles:
            out, lse = self.attend_xpos(query, key, value, bias)
        else:
            out, lse = self.attend(query, key, value, bias)
        return out, ops.expand_dims(lse.swapaxes(1, 2), -1), token

    def attend(self, query, key, value, bias):
        """The core call of every segment."""
        return flash_attention(
            query, key, value, bias, self.mask, scale=self.scale, is_causal=self.causal, return_lse=True,
            q_offset=self.q_offset, engine=self.engine,
        )  # fmt: skip

    def attend_xpos(self, query, key, value, bias):
        """The core call with xPos; long segments in tiles of queries, each with a centre of its own."""
        query, key, value = query.astype(mstype.float32), key.astype(mstype.float32), value.astype(mstype.float32)
        outs, lses = (), ()
        for first, stop, last, q_cos, q_sin, k_cos, k_sin in self.tiles:
            q = rotate(ops.stack, query[:, first:stop], q_cos, q_sin)
            k = rotate(ops.stack, cut(key, last), k_cos, k_sin)
            part = None if bias is None else bias[:, :, first:stop, :last]
            out, lse = self.attend(q, k, cut(value, last), part)
            outs = outs + (out,)
            lses = lses + (lse,)
        if len(outs) == 1:
            return outs[0], lses[0]
        return ops.concat(outs, 1), ops.concat(lses, 2)


class _Gather(nn.Cell):
    """``(pair, token)``: the sparsified keys and values of all ranks that share this one's segment.

    The token orders the messages of several patterns, its gradient those of the backward: ranks must send alike.
    """

    def __init__(self, group, members):
        super().__init__(auto_prefix=False)
        back_end = choose()
        self.gather, self.scatter = back_end.AllGather(group, 1, members), back_end.ReduceScatter(group, 1, members)

    def construct(self, pair, token):
        gathered = self.gather(depend(pair, token))
        return gathered, depend(token, gathered)

    def bprop(self, pair, token, out, d_out):
        d_pair = self.scatter(depend(d_out[0], d_out[1]))
        return d_pair, depend(d_out[1], d_pair)


def _xpos_constants(pattern, dim, causal):
    """:func:`_xpos_tile` of each of the pattern's query tiles."""
    tiles = ()
    for first, stop in shared.xpos_tiles(LAYER, pattern, causal):
        last = stop if causal else pattern.slots
        tiles += ((first, stop) + _xpos_tile(pattern, dim, (first, stop), last, (first + stop) // 2)[2:],)
    return tiles


def _xpos_tile(pattern, dim, queries, last, centre):
    """``(0, queries, keys, cos and sin of the queries, of the keys)`` of the slots ``queries`` and keys before last."""
    first, stop = queries
    q = shared.slot_tables(pattern, first, stop, centre, dim, False)
    k = shared.slot_tables(pattern, 0, last, centre, dim, True)
    return (0, stop - first, last) + tuple(Tensor(table.astype(np.float32)) for table in q + k)


class DilatedAttention(nn.Cell):
    r"""LongNet's self-attention layer: projections around ``dilated_attention``.

    Args:
        dim (int): width E (alias ``d_model``).
        heads (int): number of heads H, a divisor of dim (alias ``num_heads``).
        dilation_rate (int, tuple): r, one a pattern. Default: 1.
        segment_size (int, tuple): w before sparsifying, one a pattern. Default: 2048.
        dropout (float): on the attention output, before the output projection; in [0, 1); acts in training mode.
            Default: 0.0.
        causal (bool): key j visible only when ``j <= i`` (alias ``casual``, as it is sometimes printed).
            Default: False.
        use_xpos (bool): xPos on queries and keys. Default: False.
        use_rel_pos_bias (bool): T5 bias on the original distances, one table a layer. Default: False.
        Distributed (bool): x holds this rank's tokens of a sequence that the ranks of ``group`` hold in order; the
            result is that of all. One process alone computes as ever. Default: False.
        dtype: keyword only; of the computation and the output; parameters are float32. Default: float32.
        recompute (bool): keyword only; keep no intermediate of the attention for the backward pass. Default: False.
        head_offset (str), stop_weight_grad (bool): keyword only; as in ``dilated_attention``.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.
        group (str): keyword only; the communication group of ``Distributed``; None = all processes. Default: None.

    Inputs:
        - **x** (Tensor) - (B, N, dim), any N.

    Outputs:
        Tensor (B, N, dim) in ``dtype``.

    Raises:
        ValueError, TypeError: sizes that do not fit, lists of unequal length, an alias that contradicts its name.
    """

    def __init__(
        self,
        dim=None,
        heads=None,
        dilation_rate=1,
        segment_size=2048,
        dropout=0.0,
        causal=None,
        use_xpos=False,
        use_rel_pos_bias=False,
        Distributed=False,
        *,
        dtype=mstype.float32,
        recompute=False,
        head_offset="mod",
        stop_weight_grad=False,
        d_model=None,
        num_heads=None,
        casual=None,
        engine=None,
        group=None
    ):  # fmt: skip
        super().__init__()
        names = {
            "dim": (dim, "d_model", d_model, None),
            "heads": (heads, "num_heads", num_heads, None),
            "causal": (causal, "casual", casual, False),
        }
        flags = {"use_xpos": use_xpos, "use_rel_pos_bias": use_rel_pos_bias, "recompute": recompute}
        flags["stop_weight_grad"] = stop_weight_grad
        self.dim, self.heads, causal = shared.check_layer("DilatedAttention", names, flags, dropout, Distributed)
        sizes = shared.check_call("DilatedAttention", segment_size, dilation_rate, head_offset)
        ENGINES.check_name(engine, "DilatedAttention")
        self.to_q = Projection(self.dim, self.dim, dtype=dtype)
        self.to_k = Projection(self.dim, self.dim, dtype=dtype)
        self.to_v = Projection(self.dim, self.dim, dtype=dtype)
        self.to_out = Projection(self.dim, self.dim, dtype=dtype)
        self.rel_pos_bias = _Table(self.heads) if use_rel_pos_bias else None
        self.use_rel_pos_bias = use_rel_pos_bias
        distribution = _check_group(Distributed, group)
        self.attention = _Attention(sizes, causal, use_xpos, head_offset, stop_weight_grad, engine, *distribution)
        self.rank = current_group(group).rank if Distributed else 0
        if recompute:
            self.attention.recompute()
        self.drop = PositionDropout(dropout) if dropout else None

    def construct(self, x):
        """Attend; shape and meaning of the input are in the class's documentation."""
        _check_input(x.shape, self.dim)
        shape = x.shape[:2] + (self.heads, self.dim // self.heads)
        query, key, value = self.to_q(x).reshape(shape), self.to_k(x).reshape(shape), self.to_v(x).reshape(shape)
        table = None
        if self.use_rel_pos_bias:
            table = self.rel_pos_bias.weight
        out = self.attention(query, key, value, table).reshape(x.shape)
        if self.drop is not None:
            out = self.drop(out, self.rank * x.shape[1])
        return self.to_out(out)


class _Table(nn.Cell):
    """The T5 table (32, H), named 'rel_pos_bias.weight'."""

    def __init__(self, heads):
        super().__init__()
        self.weight = Parameter(normal((shared.NUM_BUCKETS, heads)), name="weight")


class _Attention(nn.Cell):
    """``dilated_attention`` with its options bound: what ``recompute`` applies to."""

    def __init__(self, sizes, causal, use_xpos, head_offset, stop_weight_grad, engine, distributed, group):
        super().__init__()
        self.distributed, self.group = distributed, group
        self.sizes, self.causal, self.use_xpos = sizes, causal, use_xpos
        self.head_offset, self.stop_weight_grad, self.engine = head_offset, stop_weight_grad, engine

    def construct(self, query, key, value, table):
        return dilated_attention(
            query, key, value, self.sizes[0], self.sizes[1], is_causal=self.causal, rel_pos_table=table,
            use_xpos=self.use_xpos, head_offset=self.head_offset, stop_weight_grad=self.stop_weight_grad,
            engine=self.engine, distributed=self.distributed, group=self.group,
        )  # fmt: skip


def _check_group(distributed, group):
    """Raise where a group is given without ``Distributed``; returns both."""
    if group is not None and not distributed:
        raise invalid_value("DilatedAttention", "group", "None with Distributed=False", repr(group))
    return distributed, group


@constexpr
def _check_input(shape, dim):
    if len(shape) != 3 or shape[2] != dim:
        raise invalid_value("DilatedAttention", "x", "of shape (B, N, {})".format(dim), "shape {}".format(shape))
