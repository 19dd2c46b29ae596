"""How wrong a result is: float64 on three groups of query rows of the last head, so that any length can be judged."""

from dataclasses import replace

import numpy as np

from flash_attention.core import dropout, reference
from flash_attention.core.mechanisms import landmark
from flash_attention.core.spec import Operands
from flash_attention.tools.bench.cases import LANDMARK_BLOCK, SEED, pair_counts

_ROWS = 8  # a group


def _groups(q_len):
    rows = min(_ROWS, q_len)
    return sorted({0, (q_len - rows) // 2, q_len - rows}), rows


def _sliced(case, start, rows):
    """Spec and operands of ``rows`` query rows of the last batch entry and head alone."""
    spec = case.spec()
    spec = replace(
        spec,
        batch=1,
        heads=1,
        kv_heads=1,
        q_len=rows,
        q_offset=spec.offset + start,
        alibi_shape=(1,) if case.alibi else None,
        dropout_rate=0.0,
    )
    given = case.operands()
    slopes, ids = given.get("alibi_slopes"), given.get("q_segment_ids")
    return spec, Operands(
        mask=given.get("mask"),
        slopes=None if slopes is None else slopes[-1:],
        q_segment_ids=None if ids is None else ids[-1:, start : start + rows],
        kv_segment_ids=None if ids is None else given["kv_segment_ids"][-1:],
    )


def _dropped(case, probs, start, rows):
    """Apply the call's own dropout mask, whose indices are global."""
    if not case.dropout:
        return probs
    i, j = np.arange(start, start + rows)[:, None], np.arange(probs.shape[-1])[None, :]
    keep = dropout.keep(np, np.uint32(SEED), case.batch - 1, case.heads - 1, i, j, case.dropout)
    return np.where(keep, probs, 0.0) / (1.0 - case.dropout)


def _exact(case, candidate, tensors, start, rows):
    """float64 ``(out, d_query)`` of ``rows`` query rows; the latter None where dropout acts."""
    q, k, v, d_out = tensors
    if candidate == "landmark":
        seen = slice(0, start + rows)  # queries are the last of the keys
        pattern = landmark.regular(start + rows, LANDMARK_BLOCK)
        found = landmark.formula(np, q, k[:, :, seen], v[:, :, seen], pattern, d_out)
        return found["out"], found["query"]
    spec, operands = _sliced(case, start, rows)
    counts = pair_counts(case, candidate, start, rows)
    if counts is not None:
        spec = replace(spec, mask_shape=counts.shape, bias_shape=counts.shape)
        operands = operands._replace(mask=counts > 0, bias=np.log(np.maximum(counts, 1)))
    probs = reference.forward(np, spec, q, k, v, operands).probs
    out = np.matmul(_dropped(case, probs, start, rows), v)
    return out, None if case.dropout else reference.attention_grad(spec, q, k, v, operands, d_out)["query"]


def error(case, arrays, out, d_query=None, candidate=""):
    """Largest difference from float64, relative to the largest reference value.

    Args:
        case: :class:`~flash_attention.tools.bench.cases.Case`; arrays: its ``arrays()``.
        out, d_query: results in BNSD, any float dtype; each may be None.
        candidate: name of the mechanism that computed them, where that is none of the plain formula's.

    Returns:
        dict with 'out' and 'd_query', those that were given; no 'd_query' where dropout acts.
    """
    starts, rows = _groups(case.q_len)
    worst, largest = {}, {}
    for start in starts:
        part = slice(start, start + rows)
        q, d_out = (np.asarray(arrays[name][-1:, -1:, part], np.float64) for name in ("query", "d_out"))
        k, v = (np.asarray(arrays[name][-1:, -1:], np.float64) for name in ("key", "value"))
        want = dict(zip(("out", "d_query"), _exact(case, candidate, (q, k, v, d_out), start, rows)))
        for name, got in (("out", out), ("d_query", d_query)):
            if got is None or want[name] is None:
                continue
            difference = np.abs(np.asarray(got[-1:, -1:, part], np.float64) - want[name]).max()
            worst[name] = max(worst.get(name, 0.0), float(difference))
            if not np.isfinite(difference):
                worst[name] = float("inf")
            largest[name] = max(largest.get(name, 0.0), float(np.abs(want[name]).max()))
    return {name: worst[name] / largest[name] for name in worst}
