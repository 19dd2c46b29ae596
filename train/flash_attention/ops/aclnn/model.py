"""The documented behaviour of FlashAttentionScore and its gradient as a small numpy model: the judge of the mapping.

mapping -> tensors -> operator, or, where there is no NPU, -> **this model**. Written from documentation only (sources
in constraints.py), not compared with a device. It refuses what the documents forbid. What they leave open it answers
in the way that a caller may not rely on: a row without a visible key gives NaN.
"""

import numpy as np

from flash_attention.ops.aclnn.mapping import ALIBI_ROWS, COMPACT, NO_TOKENS, SCALE_MULTIPLIES_REAL_SHIFT
from flash_attention.ops.aclnn.mapping import forbidden_tokens as _forbidden

LAYOUTS = ("BSH", "BNSD", "SBH", "BSND", "TND")
STATISTICS = 8
"""Columns of softmax_max and softmax_sum; all are equal."""

HIDDEN = -3.0e38
"""What replaces a masked score."""

DROP_MASK_BITORDER = "little"
"""Bit of a drop_mask byte that belongs to its first key; the documents do not say, Ascend's vector masks are so."""


def triangle():
    """The compressed mask of sparse modes 2, 3 and 4: uint8 (2048, 2048), 1 = discard above the diagonal."""
    return np.triu(np.ones((COMPACT, COMPACT), np.uint8), 1)


def _need(holds, text):
    if not holds:
        raise ValueError("For 'FlashAttentionScore', {}.".format(text))


def to_bnsd(x, layout, heads):
    """(B, N, S, D) view of a tensor in ``layout`` other than TND."""
    if layout in ("BSH", "SBH"):
        x = x.swapaxes(0, 1) if layout == "SBH" else x
        return x.reshape(x.shape[0], x.shape[1], heads, -1).swapaxes(1, 2)
    return x.swapaxes(1, 2) if layout == "BSND" else x


def from_bnsd(x, layout):
    """The inverse of :func:`to_bnsd`."""
    if layout == "BNSD":
        return x
    x = x.swapaxes(1, 2)
    if layout == "BSND":
        return x
    x = x.reshape(x.shape[0], x.shape[1], -1)
    return x.swapaxes(0, 1) if layout == "SBH" else x


def _between(q_len, kv_len, pre, after, diagonal):
    """Boolean (Sq, Sk): keys from ``pre`` before to ``after`` behind the diagonal ``j == i + diagonal``."""
    distance = np.arange(kv_len)[None, :] - np.arange(q_len)[:, None] - diagonal
    return (distance >= -pre) & (distance <= after)


def seen(q_len, kv_len, batch, heads, mask=None, sparse_mode=0, pre=NO_TOKENS, after=NO_TOKENS, prefix=None):
    """Boolean (1|B, 1|N, Sq, Sk): what the sparse mode shows. ``after`` is next_tokens; mask: 0 keep, 1 discard.

    Raises:
        ValueError: a combination that the documentation forbids.
    """
    _need(0 <= sparse_mode <= 5, "'sparse_mode' 6, 7 and 8 are not implemented" if 6 <= sparse_mode <= 8
          else "'sparse_mode' must be in [0, 8]")  # fmt: skip
    if mask is None:  # documented: sparse_mode and the tokens are ignored
        return np.ones((1, 1, q_len, kv_len), bool)
    mask = np.asarray(mask)
    _need(mask.dtype in (np.bool_, np.uint8), "'attn_mask' must be bool or uint8")
    if sparse_mode in (0, 4):
        fault = _forbidden(pre, after, q_len, kv_len)
        _need(fault is None, fault)
    if sparse_mode in (2, 3, 4):
        _need(np.array_equal(mask, triangle()), "'attn_mask' must be the (2048, 2048) upper triangle")
        pre, after = (NO_TOKENS, 0) if sparse_mode < 4 else (pre, after)
        return _between(q_len, kv_len, pre, after, 0 if sparse_mode == 2 else kv_len - q_len)[None, None]
    full = ((batch, heads, q_len, kv_len), (batch, 1, q_len, kv_len))
    if sparse_mode == 5:
        _need(mask.shape in full, "'attn_mask' must be (B, N1, S1, S2) or (B, 1, S1, S2) with sparse_mode 5")
        _need(prefix is not None and len(prefix) == batch <= 32, "'prefix' must be (B,) with B <= 32")
        lowest = 0 if q_len > kv_len else kv_len - q_len
        _need(all(lowest <= n <= kv_len for n in prefix), "'prefix' must be in [{}, {}]".format(lowest, kv_len))
        left = np.arange(kv_len)[None, None, None, :] < np.asarray(prefix).reshape(-1, 1, 1, 1)
        shown = left | _between(q_len, kv_len, NO_TOKENS, 0, kv_len - q_len)[None, None]
        _need(np.array_equal(np.broadcast_to(~shown, mask.shape), mask.astype(bool)), "'attn_mask' must fit 'prefix'")
        return shown
    _need(mask.shape in full + ((q_len, kv_len),), "'attn_mask' must be (B, N1, S1, S2), (B, 1, S1, S2) or (S1, S2)")
    kept = ~mask.astype(bool).reshape((1,) * (4 - mask.ndim) + mask.shape)
    if sparse_mode == 0:
        inside = _between(q_len, kv_len, pre, after, 0)
        _need(not (kept & ~inside).any(), "'attn_mask' must agree with 'pre_tokens' and 'next_tokens'")
    return kept


def expand_shift(shift, batch, heads, q_len, kv_len, lower_triangle):
    """real_shift (1|B, N, Sq | 1024, Sk) as (1|B, N, Sq, Sk).

    The compressed form holds the last 1024 rows of a bias that depends on ``j - i`` only (the ALiBi rule).
    """
    shift = np.asarray(shift)
    _need(shift.ndim == 4 and shift.shape[0] in (1, batch) and shift.shape[1] == heads and shift.shape[3] == kv_len,
          "'real_shift' must be (B, N1, S1, S2), (1, N1, S1, S2) or those with 1024 rows")  # fmt: skip
    if shift.shape[2] == q_len:
        return shift
    _need(shift.shape[2] == ALIBI_ROWS and q_len > ALIBI_ROWS, "'real_shift' must have S1 rows, or 1024 of more")
    _need(q_len == kv_len, "the compressed 'real_shift' needs S1 == S2")
    _need(lower_triangle, "the compressed 'real_shift' needs a lower triangle")
    i = np.arange(q_len)
    row = np.minimum(i, ALIBI_ROWS - 1)
    column = np.arange(kv_len)[None, :] + (q_len - ALIBI_ROWS + row - i)[:, None]
    return shift[:, :, row[:, None], np.clip(column, 0, kv_len - 1)]  # clipped ones lie above the diagonal


def unpack_drop_mask(drop, batch, heads, q_len, kv_len):
    """Boolean (B, N, Sq, Sk), True = keep, of the packed uint8 (B, N, Sq, Sk // 8)."""
    drop = np.asarray(drop)
    if drop.dtype == np.bool_:  # one TND sequence, unpacked by _varlen
        return drop
    _need(kv_len % 8 == 0, "'S2' must be a multiple of 8 with 'drop_mask'")
    shape = (batch, heads, q_len, kv_len // 8)
    _need(drop.dtype == np.uint8 and drop.shape == shape, "'drop_mask' must be uint8 {}".format(shape))
    return np.unpackbits(drop, axis=-1, bitorder=DROP_MASK_BITORDER).astype(bool)


def _check(query, key, value, heads, keep_prob, drop, layout, padding_mask):
    _need(layout in LAYOUTS, "'input_layout' must be one of {}".format(LAYOUTS))
    _need(query.dtype == key.dtype == value.dtype, "'query', 'key' and 'value' must have the same dtype")
    _need(str(query.dtype) in ("float16", "bfloat16"), "'query' must be float16 or bfloat16")
    _need(key.shape == value.shape, "'key' and 'value' must have the same shape")
    _need(0.0 < keep_prob <= 1.0, "'keep_prob' must be in (0, 1]")
    _need((drop is None) == (keep_prob == 1.0), "'drop_mask' must be given exactly when 'keep_prob' < 1")
    _need(padding_mask is None, "'padding_mask' is not implemented")
    _need(1 <= heads <= 256, "'head_num' must be in [1, 256]")


class Scores:
    """The first step that forward and backward share: float32 operands, masked scores, kept probabilities' mask."""

    def __init__(self, query, key, value, shift, drop, mask, prefix, heads, keep_prob, scale, pre, after, sparse_mode):
        batch, n, q_len, dim = query.shape
        kv_heads, kv_len = key.shape[1:3]
        _need(n == heads, "'head_num' must be the heads of 'query'")
        _need(heads % kv_heads == 0, "the heads of 'key' must divide 'head_num'")
        _need(key.shape[3] == dim, "'query' and 'key' must have the same head size")
        self.group = heads // kv_heads
        self.q, self.k, self.v = [np.asarray(x, np.float32) for x in (query, key, value)]
        self.k, self.v = [np.repeat(x, self.group, axis=1) for x in (self.k, self.v)]
        self.scale, self.keep_prob = scale, keep_prob
        scores = np.matmul(self.q, self.k.swapaxes(-1, -2))
        pse = np.float32(0)
        if shift is not None:
            _need(np.asarray(shift).dtype == query.dtype, "'real_shift' must have the dtype of 'query'")
            lower = mask is not None and sparse_mode in (2, 3)
            pse = np.asarray(expand_shift(shift, batch, heads, q_len, kv_len, lower), np.float32)
        scores = scale * (scores + pse) if SCALE_MULTIPLIES_REAL_SHIFT else scale * scores + pse
        self.seen = seen(q_len, kv_len, batch, heads, mask, sparse_mode, pre, after, prefix)
        self.scores = np.where(self.seen, scores, np.float32(HIDDEN))
        self.kept = True if drop is None else unpack_drop_mask(drop, batch, heads, q_len, kv_len)

    def drop(self, x):
        """Inverted dropout."""
        return np.where(self.kept, x, 0) / np.float32(self.keep_prob)


def flash_attention_score(
    query, key, value, head_num, real_shift=None, drop_mask=None, padding_mask=None, attn_mask=None, prefix=None,
    actual_seq_qlen=None, actual_seq_kvlen=None, keep_prob=1.0, scale_value=1.0, pre_tokens=NO_TOKENS,
    next_tokens=NO_TOKENS, inner_precise=0, input_layout="BSH", sparse_mode=0,
):  # fmt: skip
    """The primitive on numpy arrays, same arguments: (softmax_max, softmax_sum, None, attention_out).

    softmax_max, softmax_sum: float32 (B, N1, S1, 8), for TND (T1, N1, 8). attention_out: like ``query``.

    Raises:
        ValueError: what the documentation forbids.
    """
    _check(query, key, value, head_num, keep_prob, drop_mask, input_layout, padding_mask)
    lengths = (actual_seq_qlen, actual_seq_kvlen)
    if input_layout == "TND":
        _need(prefix is None, "'prefix' must be None with TND")
        return _varlen(query, key, value, head_num, real_shift, drop_mask, attn_mask, lengths, keep_prob, scale_value,
                       pre_tokens, next_tokens, sparse_mode)  # fmt: skip
    _need(lengths == (None, None), "'actual_seq_qlen' and 'actual_seq_kvlen' must be None unless TND")
    kv_heads = _kv_heads(query, key, head_num, input_layout)
    q, k, v = [to_bnsd(x, input_layout, n) for x, n in ((query, head_num), (key, kv_heads), (value, kv_heads))]
    s = Scores(q, k, v, real_shift, drop_mask, attn_mask, prefix, head_num, keep_prob, scale_value, pre_tokens,
               next_tokens, sparse_mode)  # fmt: skip
    peak = s.scores.max(-1, keepdims=True)
    weights = np.exp(s.scores - peak)
    total = weights.sum(-1, keepdims=True)
    out = np.matmul(s.drop(weights / total), s.v)
    alive = np.broadcast_to(s.seen.any(-1, keepdims=True), peak.shape)
    peak, total, out = [np.where(alive, x, np.float32(np.nan)) for x in (peak, total, out)]
    statistics = [np.repeat(x, STATISTICS, axis=-1) for x in (peak, total)]
    return statistics[0], statistics[1], None, from_bnsd(out.astype(query.dtype), input_layout)


def _kv_heads(query, key, heads, layout):
    if layout in ("BSH", "SBH"):
        _need(query.shape[2] % heads == 0, "'head_num' must divide H1")
        dim = query.shape[2] // heads
        _need(key.shape[2] % dim == 0, "H2 must be a multiple of the head size")
        return key.shape[2] // dim
    return key.shape[1] if layout == "BNSD" else key.shape[2]


def _varlen(query, key, value, heads, shift, drop, mask, lengths, keep_prob, scale, pre, after, sparse_mode):
    _need(lengths[0] is not None and lengths[1] is not None, "TND needs 'actual_seq_qlen' and 'actual_seq_kvlen'")
    ends_q, ends_k = list(lengths[0]), list(lengths[1])
    sizes_q, sizes_k = [np.diff([0] + ends) for ends in (ends_q, ends_k)]
    _need(len(ends_q) == len(ends_k) <= 1024, "TND needs at most 1024 sequences, as many of keys as of queries")
    _need((sizes_q >= 0).all() and (sizes_k >= 0).all(), "the ends of TND sequences must not decrease")
    _need(ends_q[-1] == query.shape[0] and ends_k[-1] == key.shape[0], "the last end must be T1 (T2)")
    _need((sizes_k > 0).all(), "no sequence of keys may be empty")
    _need(mask is not None and sparse_mode in (2, 3), "TND needs sparse_mode 2 or 3 and its mask")
    _need(after == 0 and pre >= sizes_q.max(), "TND needs next_tokens 0 and pre_tokens >= the longest query")
    _need(sparse_mode == 2 or (sizes_q <= sizes_k).all(), "sparse_mode 3 with TND needs S1 <= S2 in each sequence")
    area = int((sizes_q * sizes_k).sum())
    if drop is not None:
        _need(drop.shape == (area * heads // 8,), "'drop_mask' must be (qk_pointer * N1 // 8,)")
        drop = np.unpackbits(drop, bitorder=DROP_MASK_BITORDER)
    if shift is not None:
        _need((sizes_q == sizes_k).all() and sizes_q.max() > ALIBI_ROWS, "'real_shift' with TND needs equal lengths "
              "with one above 1024")  # fmt: skip
        raise NotImplementedError("real_shift with TND")
    rows, start_q, start_k, used = [], 0, 0, 0
    for q_len, kv_len in zip(sizes_q, sizes_k):
        q = query[start_q : start_q + q_len].swapaxes(0, 1)[None]
        k, v = [x[start_k : start_k + kv_len].swapaxes(0, 1)[None] for x in (key, value)]
        bits = None
        if drop is not None:
            bits = drop[used : used + heads * q_len * kv_len].reshape(1, heads, q_len, kv_len).astype(bool)
        rows.append(flash_attention_score(q, k, v, heads, None, bits, None, mask, keep_prob=keep_prob,
                                          scale_value=scale, input_layout="BNSD", sparse_mode=sparse_mode))  # fmt: skip
        start_q, start_k, used = start_q + q_len, start_k + kv_len, used + heads * q_len * kv_len
    joined = [np.concatenate([row[part][0].swapaxes(0, 1) for row in rows]) for part in (0, 1, 3)]
    return joined[0], joined[1], None, joined[2]


def flash_attention_score_grad(
    query, key, value, dy, pse_shift=None, drop_mask=None, padding_mask=None, atten_mask=None, softmax_max=None,
    softmax_sum=None, softmax_in=None, attention_in=None, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None,
    head_num=1, keep_prob=1.0, scale_value=1.0, pre_tokens=NO_TOKENS, next_tokens=NO_TOKENS, inner_precise=0,
    input_layout="BNSD", sparse_mode=0,
):  # fmt: skip
    """FlashAttentionScoreGrad for BNSD, by the six steps of CANN's design document: (dq, dk, dv, None).

    The fourth output, d(pse), is documented as unused. Statistics may be any whose ``exp(s - max) / sum`` is wanted.
    """
    _check(query, key, value, head_num, keep_prob, drop_mask, input_layout, padding_mask)
    _need(input_layout == "BNSD", "the model's gradient takes BNSD")
    _need(dy.shape == query.shape == attention_in.shape, "'dy' and 'attention_in' must be like 'query'")
    shape = query.shape[:3] + (STATISTICS,)
    _need(softmax_max.shape == softmax_sum.shape == shape, "'softmax_max' and 'softmax_sum' must be {}".format(shape))
    s = Scores(query, key, value, pse_shift, drop_mask, atten_mask, prefix, head_num, keep_prob, scale_value,
               pre_tokens, next_tokens, sparse_mode)  # fmt: skip
    dy, out = np.asarray(dy, np.float32), np.asarray(attention_in, np.float32)
    p = np.exp(s.scores - softmax_max[..., :1]) / softmax_sum[..., :1]
    dp = s.drop(np.matmul(dy, s.v.swapaxes(-1, -2)))
    ds = p * (dp - (dy * out).sum(-1, keepdims=True))
    dq = np.matmul(ds, s.k) * s.scale
    dk = np.matmul(ds.swapaxes(-1, -2), s.q) * s.scale
    dv = np.matmul(s.drop(p).swapaxes(-1, -2), dy)
    shape = key.shape[:2] + (s.group,) + key.shape[2:]
    dk, dv = [x.reshape(shape).sum(2) for x in (dk, dv)]
    return tuple(x.astype(query.dtype) for x in (dq, dk, dv)) + (None,)
