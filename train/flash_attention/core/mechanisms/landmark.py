"""Landmark attention: sections, the softmax over groups, its gradient, retrieval tables; checks; the plain formula.

Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", 2023. Landmarks cut
the keys into sections, each closed by its landmark. A query sees the ordinary keys of its own section one by one; a
past section gets the weight of its landmark, shared out inside it by a softmax of its own.

A query's own section can be seen as one more group whose logit is the LSE of what is visible of it. So a row is always
a softmax over the logits ``a`` of its groups, times a softmax ``p`` within each: w = g * p. Forward and backward below
are written on (.., rows, keys) tiles of scores; ``grouping``, three functions, knows which keys form a group:

    largest(x), total(x): (.., keys) -> (.., groups), maximum and sum;   spread(x): (.., groups) -> (.., keys).

They serve numpy, JAX and MindSpore alike: ``where``, ``exp`` and ``log`` are the framework's.
"""

import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.mechanisms.sparse import check_tensors
from flash_attention.core.validation import check_int, scale_or_default

NONE = -float("inf")
"""Logit of what is not seen."""

RETRIEVED = 2**22
"""Elements of the keys that retrieval gathers at once."""

FINITE = -3e38
"""A maximum below this is one of nothing: -inf, or the lowest number, which MindSpore gives for an empty section."""


def group_softmax(where, exp, log, grouping, scores, seen, is_landmark, past, own):
    """Weights within the groups and the groups' logits.

    Args:
        scores: (.., R, K), scaled. seen: visible ordinary keys. is_landmark: (.., K).
        past, own: (.., R, G): the group is a section before the query's, or its own.

    Returns:
        ``p`` (.., R, K), summing to 1 in each group with a visible key; ``a`` (.., R, G), -inf where nothing is seen.
    """
    largest, total, spread = grouping
    peak = largest(where(seen, scores, NONE))
    peak = where(peak > FINITE, peak, 0.0)
    e = where(seen, exp(scores - spread(peak)), 0.0)
    mass = total(e)
    alive = mass > 0.0
    mass = where(alive, mass, 1.0)
    lse = where(alive, peak + log(mass), NONE)
    landmark = total(where(is_landmark, scores, 0.0))
    return e / spread(mass), where(past, landmark, where(own, lse, NONE))


def group_gradient(where, grouping, p, g, d_w, delta, is_landmark, past):
    """``(w, dS)`` (.., R, K) from the softmax of the groups ``g`` (.., R, G) and ``d_w`` = dO V^T.

    ``delta`` (.., R, 1) is <dO, O>. With G the mean of d_w inside a past section: dS is w (d_w - delta) for own tokens,
    w (d_w - G) for tokens of past sections, g (G - delta) for their landmarks.
    """
    _, total, spread = grouping
    mean = total(p * d_w)
    w = spread(g) * p
    base = spread(where(past, mean, delta))
    d_landmark = spread(where(past, g * (mean - delta), 0.0))
    return w, where(is_landmark, d_landmark, w * (d_w - base))


def sections(is_landmark):
    """int32 (.., N): the number of landmarks strictly before each key, numpy."""
    landmark = np.asarray(is_landmark, np.int32)
    return (np.cumsum(landmark, -1, dtype=np.int32) - landmark).astype(np.int32)


def is_regular(is_landmark, block_size):
    """True when exactly the keys ``block_size - 1`` modulo ``block_size`` are landmarks; numpy."""
    return bool((is_landmark == regular(is_landmark.shape[-1], block_size)).all())


def regular(length, block_size):
    """Boolean (length,): every ``block_size``-th key is a landmark."""
    return np.arange(length) % block_size == block_size - 1


def tables(is_landmark):
    """For retrieval by sections, from a concrete pattern (B, N), numpy.

    Returns:
        ``members`` int32 (B, S + 1, L), the ordinary keys of each section, -1 where there are fewer; ``landmarks``
        int32 (B, S), the key that closes each, -1 where a batch row has fewer. The last section of a row is open.
    """
    batch, length = is_landmark.shape
    count = int(is_landmark.sum(1).max())
    section = sections(is_landmark)
    found = [[np.flatnonzero((section[b] == c) & ~is_landmark[b]) for c in range(count + 1)] for b in range(batch)]
    width = max(1, max(len(keys) for row in found for keys in row))
    members = np.full((batch, count + 1, width), -1, np.int32)
    landmarks = np.full((batch, count), -1, np.int32)
    for b, row in enumerate(found):
        places = np.flatnonzero(is_landmark[b])
        landmarks[b, : len(places)] = places
        for c, keys in enumerate(row):
            members[b, c, : len(keys)] = keys
    return members, landmarks


def weights(q_len, is_landmark, scores=None):
    """Weight of every key for every query, (q_len, N) float64; all scores 0 unless given. For pictures."""
    length = len(is_landmark)
    scores = np.zeros((q_len, length)) if scores is None else scores
    p, g, (_, _, spread), _ = _rows(np, scores, np.asarray(is_landmark, bool), None)
    return spread(g) * p


def _members(section):
    """The grouping of numpy tiles by section number."""
    parts = [np.flatnonzero(section == c) for c in range(int(section.max()) + 1)]

    def reduce(x, by):
        return np.stack([getattr(x[..., part], by)(-1) for part in parts], -1)

    return (lambda x: reduce(x, "max")), (lambda x: reduce(x, "sum")), (lambda x: x[..., section])


def _rows(xp, scores, is_landmark, top_k_blocks):
    """``(p, g, grouping, past)`` of a dense (.., Nq, N) matrix of scores."""
    q_len, length = scores.shape[-2:]
    section, row = sections(is_landmark), np.arange(q_len) + length - q_len
    grouping, group = _members(section), np.arange(int(section.max()) + 1)
    past, own = (test(group[None, :], section[row][:, None]) for test in (np.less, np.equal))
    seen = ~is_landmark & (np.arange(length)[None, :] <= row[:, None])
    p, a = group_softmax(np.where, xp.exp, xp.log, grouping, scores, seen, is_landmark, past, own)
    if top_k_blocks is not None:
        order = np.argsort(np.where(past, -a, np.inf), axis=-1, kind="stable")
        place = np.argsort(order, axis=-1)
        a = np.where(past & (place >= top_k_blocks), NONE, a)
    peak = a.max(-1, keepdims=True)
    e = xp.exp(a - np.where(peak > FINITE, peak, 0.0))
    total = e.sum(-1, keepdims=True)
    return p, e / np.where(total > 0, total, 1.0), grouping, past


def formula(xp, query, key, value, is_landmark, d_out, scale=None, top_k_blocks=None):
    """The judge: ``{'out', 'query', 'key', 'value'}`` of BHND tensors in the precision of ``xp``, O(Nq * Nk) memory.

    ``is_landmark``: boolean (N,) or (B, N).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pattern = np.broadcast_to(np.asarray(is_landmark, bool), (len(query), key.shape[2]))
    rows = [_one(xp, *row, scale=scale, top_k=top_k_blocks) for row in zip(query, key, value, d_out, pattern)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _one(xp, q, k, v, d_o, is_landmark, scale, top_k):
    p, g, grouping, past = _rows(xp, xp.matmul(q, k.swapaxes(-1, -2)) * scale, is_landmark, top_k)
    out = xp.matmul(grouping[2](g) * p, v)
    delta = (d_o * out).sum(-1, keepdims=True)
    d_w = xp.matmul(d_o, v.swapaxes(-1, -2))
    w, d_s = group_gradient(np.where, grouping, p, g, d_w, delta, is_landmark, past)
    return {
        "out": out,
        "query": xp.matmul(d_s, k) * scale,
        "key": xp.matmul(d_s.swapaxes(-1, -2), q) * scale,
        "value": xp.matmul(w.swapaxes(-1, -2), d_o),
    }


# --- checks ---------------------------------------------------------------------------------------------------------
def check_call(layer, query, key, value, is_mem, sm_scale, block_size, top_k_blocks):
    """Raise unless a call is possible; tensors are TensorInfo, BHND; returns the scale."""
    check_tensors(layer, query, key, value, axis=2)
    batch, _, q_len, _ = query.shape
    length = key.shape[2]
    if q_len > length:
        raise invalid_value(layer, "q", "at most as long as k (queries are the last {} keys)".format(length), q_len)
    if is_mem is not None:
        if is_mem.dtype != "bool" and "int" not in is_mem.dtype:
            raise invalid_type(layer, "is_mem", "of bool or integer dtype", is_mem.dtype)
        if tuple(is_mem.shape) not in ((length,), (batch, length)):
            need = "of shape ({},) or ({}, {})".format(length, batch, length)
            raise invalid_value(layer, "is_mem", need, "shape {}".format(tuple(is_mem.shape)))
    check_int(layer, "block_size", block_size, 2)
    if top_k_blocks is not None:
        check_int(layer, "top_k_blocks", top_k_blocks, 1)
    return scale_or_default(layer, "sm_scale", sm_scale, query.shape[3])


def check_prefix(layer, query, key, n_prefix_q, block_size):
    """Raise unless ``n_prefix_q`` blocks of keys lie before the queries; ``query`` and ``key`` are shapes, BHND."""
    check_int(layer, "n_prefix_q", n_prefix_q, 0)
    ahead = key[2] - query[2]
    if n_prefix_q * block_size != ahead:
        need = "{} keys before the queries / block_size {}".format(ahead, block_size)
        raise invalid_value(layer, "n_prefix_q", need, n_prefix_q, "It counts blocks, not tokens.")
