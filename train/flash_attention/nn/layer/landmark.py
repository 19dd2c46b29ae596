"""Landmark attention in MindSpore: tiles of queries against the keys up to them; retrieval of the best sections.

Idea, formulas and checks: `core.mechanisms.landmark`. A graph asks a ``constexpr`` for the Cell of its shapes and
options; so does PyNative, which also looks at the pattern.
"""

import functools

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import landmark as shared
from flash_attention.core.validation import check_int
from flash_attention.nn.layer.sparse import rows as rows_of
from flash_attention.ops.functional import computable, flash_attention, info
from flash_attention.ops.host import is_eager
from flash_attention.ops.portable.scores import join_rows, matmul, matmul_nt, swap, take_rows, zeros_like

LAYER = "fused_landmark_attention"
ROWS = 256  # queries of a tile
_RETRIEVED = 2**22  # elements of the keys that retrieval gathers at once
_largest, _total = P.ReduceMax(), P.ReduceSum()
_softmax, _transpose, _reshape = P.Softmax(-1), P.Transpose(), P.Reshape()


def fused_landmark_attention(q, k, v, is_mem, sm_scale=None, block_size=64, top_k_blocks=None):
    """Landmark attention (Mohtashami and Jaggi, 2023), causal; queries are the last Nq of the Nk positions.

    A landmark closes its section. A query sees the ordinary tokens of its own section up to itself, one by one, and
    each past section with the weight of its landmark, shared out by a softmax inside the section. Landmarks give no
    value. Without landmarks this is causal attention.

    Cost: the pairs of causal attention. With ``top_k_blocks`` (Nk / block_size + (k + 1) * block_size) pairs a query in
    PyNative, and what is not chosen is not read.

    Args:
        q (Tensor): (B, H, Nq, D); k, v: (B, H, Nk, D), Nq <= Nk; float16, bfloat16 or float32.
        is_mem (Tensor): which keys are landmarks, bool or int (Nk,) or (B, Nk). PyNative looks whether it is the
            pattern "last of every block_size keys"; a graph, which cannot, computes all Nq * Nk pairs and reads all
            keys: use the Cell ``FusedLandmarkAttention`` there.
        sm_scale (float): factor on the scores; default ``1 / sqrt(D)``.
        block_size (int): of the regular pattern, at least 2. It matters to speed only.
        top_k_blocks (int): a query sees only the k past sections whose landmarks score highest (the earlier one on
            ties); None = all. The choice has no gradient.

    Returns:
        Tensor (B, H, Nq, D) in v's dtype. A query that sees nothing (a landmark first of all) gives 0.

    Raises:
        ValueError, TypeError: shapes that do not fit, a block size below 2.
    """
    shapes, dtypes = (q.shape, k.shape, v.shape, is_mem.shape), (q.dtype, k.dtype, v.dtype, is_mem.dtype)
    scale = _check(LAYER, shapes, dtypes, sm_scale, block_size, top_k_blocks)
    if is_eager():
        cell = _cell_of_pattern(is_mem, shapes, scale, block_size, top_k_blocks)
    else:
        cell = _general(shapes[0], shapes[1], scale, top_k_blocks)
    mem = is_mem.astype(mstype.int32)
    return cell(q, k, v, mem).astype(v.dtype)


class FusedLandmarkAttention(nn.Cell):
    r"""Landmark attention of the regular pattern: the last of every ``block_size`` keys is a landmark.

    Args:
        n_prefix_q (int): blocks of keys before the first query, (Nk - Nq) / block_size, checked at every call.
            Default: None, any number of keys may precede.
        sm_scale (float): factor on the scores. Default: None, ``1 / sqrt(D)``.
        block_size (int): keys of a block with its landmark, at least 2. Default: 64.
        top_k_blocks (int): keyword only; as in ``fused_landmark_attention``, in both modes. Default: None.

    Inputs:
        - **q** (Tensor) - (B, H, Nq, D); **k**, **v** - (B, H, Nk, D), Nq <= Nk.

    Outputs:
        Tensor (B, H, Nq, D) in v's dtype.

    Raises:
        ValueError, TypeError: bad argument.
    """

    def __init__(self, n_prefix_q=None, sm_scale=None, block_size=64, *, top_k_blocks=None):
        super().__init__()
        check_int("FusedLandmarkAttention", "block_size", block_size, 2)
        if n_prefix_q is not None:
            check_int("FusedLandmarkAttention", "n_prefix_q", n_prefix_q, 0)
        self.n_prefix_q, self.sm_scale = n_prefix_q, sm_scale
        self.block_size, self.top_k_blocks = block_size, top_k_blocks

    def construct(self, q, k, v):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
        scale = _check("FusedLandmarkAttention", shapes, dtypes, self.sm_scale, self.block_size, self.top_k_blocks)
        cell = _regular(shapes[0], shapes[1], scale, self.block_size, self.top_k_blocks, self.n_prefix_q)
        return cell(q, k, v, None).astype(v.dtype)


# --- which Cell computes a call -------------------------------------------------------------------------------------
@constexpr
def _check(layer, shapes, dtypes, sm_scale, block_size, top_k_blocks):
    infos = list(map(info, shapes, dtypes))
    is_mem = infos[3] if len(infos) > 3 else None
    return shared.check_call(layer, *infos[:3], is_mem, sm_scale, block_size, top_k_blocks)


@constexpr
def _regular(query, key, scale, block, top_k, n_prefix_q):
    if n_prefix_q is not None:
        shared.check_prefix("FusedLandmarkAttention", query, key, n_prefix_q, block)
    return _regular_cell(query, key, scale, block, top_k)


@functools.lru_cache(maxsize=64)
def _regular_cell(query, key, scale, block, top_k):
    pattern = shared.regular(key[2], block)
    if not pattern.any():
        return _Causal(scale)
    if top_k is not None and top_k < pattern.sum():
        return _InFloat32(_Best(query, np.broadcast_to(pattern, (query[0], key[2])), scale, top_k))
    return _InFloat32(_Landmark(query[2], key[2], scale, block, None))


@constexpr
def _general(query, key, scale, top_k):
    return _general_cell(query[2], key[2], scale, top_k)


@functools.lru_cache(maxsize=64)
def _general_cell(q_len, kv_len, scale, top_k):
    return _InFloat32(_Landmark(q_len, kv_len, scale, 0, top_k))


@constexpr(check=False)
def _cell_of_pattern(is_mem, shapes, scale, block, top_k):
    """PyNative only: the Cell for a pattern whose values can be seen."""
    pattern = is_mem.asnumpy() != 0
    query, key = shapes[:2]
    if not pattern.any():
        return _Causal(scale)
    if shared.is_regular(pattern, block):
        return _regular_cell(query, key, scale, block, top_k)
    if top_k is not None and top_k < np.atleast_2d(pattern).sum(1).max():
        return _InFloat32(_Best(query, np.broadcast_to(pattern, (query[0], key[2])), scale, top_k))
    return _general_cell(query[2], key[2], scale, None)


class _Causal(nn.Cell):
    """No landmark anywhere: the core call."""

    def __init__(self, scale):
        super().__init__(auto_prefix=False)
        self.scale = scale

    def construct(self, q, k, v, mem):
        q, k, v = computable(q), computable(k), computable(v)
        return flash_attention(q, k, v, is_causal=True, scale=self.scale, layout="BNSD")


class _InFloat32(nn.Cell):
    """``cell`` on float32 copies of the tensors: softmax and sums are not for 16 bits."""

    def __init__(self, cell):
        super().__init__(auto_prefix=False)
        self.cell = cell

    def construct(self, q, k, v, mem):
        return self.cell(q.astype(mstype.float32), k.astype(mstype.float32), v.astype(mstype.float32), mem)


# --- all pairs ------------------------------------------------------------------------------------------------------
class _Landmark(nn.Cell):
    """``(q, k, v, mem) -> out`` of fixed lengths, float32; scores are formed again for the gradient, tile by tile.

    Args:
        block: of the regular pattern, where ``mem`` is None; 0 = ``mem`` int32 (Nk,) or (B, Nk) is given.
        top_k: None, or how many past sections count (``block`` = 0 only).
    """

    def __init__(self, q_len, kv_len, scale, block, top_k):
        super().__init__(auto_prefix=False)
        self.scale, self.kv_len, self.block = scale, kv_len, block
        first, self.tiles = kv_len - q_len, ()
        for begin in range(0, q_len, ROWS):
            count = min(ROWS, q_len - begin)
            stop = first + begin + count  # keys up to the tile's last query, in whole blocks
            keys = -(-stop // block) * block if block else kv_len
            position = Tensor(np.arange(first + begin, stop, dtype=np.int32)[:, None])
            self.tiles += ((begin, count, keys, position),)
        self.padded = self.tiles[-1][2]
        self.pad = None
        if self.padded > kv_len:
            self.pad = Tensor(np.zeros((1, 1, self.padded - kv_len, 1), np.float32))
        self.key = Tensor(np.arange(self.padded, dtype=np.int32)[None])
        self.pattern = Tensor(shared.regular(self.padded, block)) if block else None
        self.zeros = Tensor(np.zeros((block,), np.float32)) if block else None
        self.best = _KeepBest(top_k) if top_k is not None and top_k < kv_len else None

    def construct(self, q, k, v, mem):
        """The output."""
        k, v, pattern, section = self.prepare(k, v, mem)
        outs = ()
        for begin, count, keys, position in self.tiles:
            k_part, v_part = take_rows(k, 0, keys), take_rows(v, 0, keys)
            p, g, grouping, _ = self.weights(take_rows(q, begin, count), k_part, position, keys, pattern, section)
            outs = outs + (matmul(grouping[2](g) * p, v_part),)
        return outs[0] if len(outs) == 1 else join_rows(outs)

    def bprop(self, q, k, v, mem, out, d_out):
        """Gradients, the last tile first: its keys include those of all others."""
        k, v, pattern, section = self.prepare(k, v, mem)
        delta = _total(d_out * out, -1)
        d_qs, d_k, d_v, after = (), None, None, 0
        for begin, count, keys, position in self.tiles[::-1]:
            k_part, v_part, q_part = take_rows(k, 0, keys), take_rows(v, 0, keys), take_rows(q, begin, count)
            d_o = take_rows(d_out, begin, count)
            p, g, grouping, past = self.weights(q_part, k_part, position, keys, pattern, section)
            d_w = matmul_nt(d_o, v_part)
            row = take_rows(_reshape(delta, delta.shape + (1,)), begin, count)
            w, d_s = shared.group_gradient(ops.where, grouping, p, g, d_w, row, self.columns(pattern, keys), past)
            d_s = d_s * self.scale
            d_qs = (matmul(d_s, k_part),) + d_qs
            d_k = self.collect(d_k, matmul(swap(d_s), q_part), keys, after)
            d_v = self.collect(d_v, matmul(swap(w), d_o), keys, after)
            after = keys
        d_q = d_qs[0] if len(d_qs) == 1 else join_rows(d_qs)
        d_mem = None if mem is None else zeros_like(mem)
        return d_q, take_rows(d_k, 0, self.kv_len), take_rows(d_v, 0, self.kv_len), d_mem

    def collect(self, total, part, keys, length):
        """``total`` (of ``length`` keys or more) plus ``part``, which covers its first ``keys``."""
        if total is None:
            return part
        if self.padded == keys:
            return total + part
        return join_rows((take_rows(total, 0, keys) + part, take_rows(total, keys, self.padded - keys)))

    def prepare(self, k, v, mem):
        """Keys and values of whole blocks, landmarks' values 0; the pattern (1|B, 1, 1, K) and sections (B, K)."""
        if self.block:
            pattern, section = self.pattern, None
        else:
            mem = mem + zeros_like(mem) if mem.ndim == 2 else mem + ops.zeros((k.shape[0], 1), mstype.int32)
            pattern = _reshape(mem, (k.shape[0], 1, 1, self.kv_len)) > 0
            section = ops.cumsum(mem, -1) - mem
        if self.pad is not None:
            pad = zeros_like(take_rows(k, 0, 1)) + self.pad
            k, v = join_rows((k, pad)), join_rows((v, pad))
        values = _reshape(pattern, (-1, 1, self.padded, 1))
        return k, ops.where(values, zeros_like(v), v), pattern, section

    def columns(self, pattern, keys):
        """The pattern of the first ``keys`` keys."""
        return pattern[:keys] if self.block else pattern

    def weights(self, q, k, position, keys, pattern, section):
        """``(p, g, grouping, past)`` of a tile, see the core."""
        scores = matmul_nt(q, k) * self.scale
        is_landmark, key = self.columns(pattern, keys), self.key[:, :keys]
        if self.block:
            group, own_section = self.key[:, : keys // self.block], position // self.block
            grouping = self.by_block()
        else:
            group = key
            own_section = ops.gather(section, _reshape(position, (-1,)), 1)
            own_section = _reshape(own_section, (section.shape[0], 1, -1, 1))
            grouping = _by_section(section)
        seen = ops.logical_and(ops.logical_not(is_landmark), key <= position)
        past, own = group < own_section, group == own_section
        p, a = shared.group_softmax(ops.where, ops.exp, ops.log, grouping, scores, seen, is_landmark, past, own)
        if self.best is not None:
            a = self.best(a, past)
        peak = _largest(a, -1)
        peak = _reshape(ops.where(peak > shared.FINITE, peak, 0.0), peak.shape + (1,))
        e = ops.exp(a - peak)
        mass = _reshape(_total(e, -1), peak.shape)
        return p, e / ops.where(mass > 0.0, mass, 1.0), grouping, past

    def by_block(self):
        """Grouping by blocks of consecutive keys."""
        size, zeros = self.block, self.zeros

        def split(x):
            return _reshape(x, x.shape[:3] + (-1, size))

        def largest(x):
            return _largest(split(x), -1)

        def total(x):
            return _total(split(x), -1)

        def spread(x):
            return _reshape(_reshape(x, x.shape + (1,)) + zeros, x.shape[:3] + (-1,))

        return largest, total, spread


@constexpr
def _row_starts(batch, length):
    """(B, 1): where each batch row begins among all of them."""
    return Tensor((np.arange(batch, dtype=np.int32) * length)[:, None])


def _by_section(section):
    """Grouping by the section number (B, K) of each key, along the first axis of a transposed tile."""
    batch, length = section.shape
    index = _reshape(section + _row_starts(batch, length), (-1,))

    def turned(x):
        x = _transpose(x, (0, 3, 1, 2))
        return _reshape(x, (batch * length,) + x.shape[2:])

    def back(x):
        return _transpose(_reshape(x, (batch, length) + x.shape[1:]), (0, 2, 3, 1))

    def largest(x):
        return back(ops.unsorted_segment_max(turned(x), index, batch * length))

    def total(x):
        return back(ops.unsorted_segment_sum(turned(x), index, batch * length))

    def spread(x):
        return back(ops.gather(turned(x), index, 0))

    return largest, total, spread


class _KeepBest(nn.Cell):
    """Logits (.., S) with -inf for past sections beyond the ``top_k`` best; the earlier one on ties."""

    def __init__(self, top_k):
        super().__init__(auto_prefix=False)
        self.top_k = top_k

    def construct(self, a, past):
        chosen = self.chosen(ops.where(past, a, shared.NONE))
        return ops.where(ops.logical_and(past, ops.logical_not(chosen)), shared.NONE, a)

    def chosen(self, x):
        """Boolean (.., S): the ``top_k`` largest, -inf never; MindSpore's own top-k breaks ties freely."""
        best, _ = ops.topk(x, self.top_k)
        worst = best[..., self.top_k - 1 :]
        ahead = x > worst
        tie = ops.logical_and(x == worst, x > shared.FINITE)
        room = self.top_k - ahead.astype(mstype.int32).sum(-1, keepdims=True)
        return ops.logical_or(ahead, ops.logical_and(tie, ops.cumsum(tie.astype(mstype.int32), -1) <= room))


# --- the best sections only -----------------------------------------------------------------------------------------
class _Best(nn.Cell):
    """``(q, k, v, mem) -> out``: only the ``top_k`` best past sections of each query are gathered, and its own."""

    def __init__(self, query, pattern, scale, top_k):
        super().__init__(auto_prefix=False)
        members, landmarks = shared.tables(pattern)
        batch, heads, q_len, dim = query
        length = pattern.shape[1]
        self.scale, self.top_k, self.length = scale, top_k, length
        self.count, self.width = landmarks.shape[1], members.shape[2]
        landmarks = np.where(landmarks < 0, length, landmarks)[:, None].repeat(heads, 1)
        self.landmarks = Tensor(landmarks.astype(np.int32))  # (B, H, S), N where there is none
        self.exists = Tensor(landmarks[:, :, None] < length)
        self.members = Tensor(np.where(members < 0, length, members).reshape(-1, members.shape[2]))
        self.row_of_batch = Tensor((np.arange(batch, dtype=np.int32) * members.shape[1])[:, None, None, None])
        self.order = Tensor(np.arange(self.count, dtype=np.int32))
        self.best = _KeepBest(top_k)
        section, step = shared.sections(pattern)[:, None, :, None], _RETRIEVED // ((top_k + 1) * self.width * dim)
        step, self.tiles = max(1, min(q_len, step // (batch * heads))), ()
        for begin in range(0, q_len, step):
            row = np.arange(begin, min(begin + step, q_len), dtype=np.int32)
            place = row + length - q_len
            own = Tensor(np.ascontiguousarray(section[:, :, place].repeat(heads, 1)))
            self.tiles += ((begin, len(row), own, Tensor(place[:, None, None])),)

    def construct(self, q, k, v, mem):
        """The output, a tile of queries after the other."""
        keys = rows_of(k, self.landmarks)
        outs = ()
        for begin, count, own, place in self.tiles:
            outs = outs + (self.tile(q[:, :, begin : begin + count], k, v, keys, own, place),)
        return outs[0] if len(outs) == 1 else join_rows(outs)

    def tile(self, q, k, v, landmark_keys, own, place):
        """Queries (B, H, R, D) of sections ``own`` (B, H, R, 1) at ``place`` (R, 1, 1)."""
        batch, heads, count, dim = q.shape
        logits = matmul_nt(q, landmark_keys) * self.scale
        past = ops.logical_and(self.order < own, self.exists)
        chosen = self.best.chosen(ops.stop_gradient(ops.where(past, logits, shared.NONE)))
        index, _ = ops.sort(ops.where(chosen, self.order, self.count))  # the chosen ones first
        index = index[..., : self.top_k]
        valid = index < self.count
        logit = ops.gather_elements(logits, 3, ops.minimum(index, self.count - 1))
        group = ops.concat((own, index), -1) + self.row_of_batch  # (B, H, R, k + 1)
        token = _reshape(ops.gather(self.members, _reshape(group, (-1,)), 0), group.shape + (self.width,))
        valid = ops.concat((own >= 0, valid), -1)
        seen = ops.logical_and(
            ops.logical_and(token < self.length, token <= place), _reshape(valid, valid.shape + (1,))
        )
        token = _reshape(ops.where(seen, token, self.length), (batch, heads, -1))
        shape = (batch * heads * count, 1, (self.top_k + 1) * self.width, dim)
        k, v = _reshape(rows_of(k, token), shape), _reshape(rows_of(v, token), shape)
        scores = matmul_nt(_reshape(q, (-1, 1, 1, dim)), k) * self.scale
        p, lse = _safe_softmax(_reshape(scores, seen.shape), seen)
        a, alive = ops.concat((lse[..., :1], logit), -1), ops.concat((seen[..., :1, :].any(-1), valid[..., 1:]), -1)
        g, _ = _safe_softmax(a, alive)
        w = _reshape(_reshape(g, g.shape + (1,)) * p, (batch * heads * count, 1, 1, -1))
        return _reshape(matmul(w, v), q.shape)


def _safe_softmax(x, seen):
    """``(softmax, LSE)`` along the last axis over what is seen; 0 where nothing is. Gradients are finite."""
    x = ops.where(seen, x, -1e30)
    peak = ops.stop_gradient(x.max(-1, keepdims=True))
    e = ops.where(seen, ops.exp(x - peak), 0.0)
    mass = e.sum(-1, keepdims=True)
    mass = ops.where(mass > 0.0, mass, 1.0)
    lse = peak + ops.log(mass)
    return e / mass, lse.squeeze(-1)
