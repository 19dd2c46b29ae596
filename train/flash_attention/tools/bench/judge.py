"""How wrong a result is: float64 on three groups of query rows of the last head, so that any length can be judged."""

from dataclasses import replace

import numpy as np

from flash_attention.core import dropout, reference
from flash_attention.core.spec import Operands
from flash_attention.tools.bench.cases import SEED

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


def error(case, arrays, out, d_query=None):
    """Largest difference from float64, relative to the largest reference value.

    Args:
        case: :class:`~flash_attention.tools.bench.cases.Case`; arrays: its ``arrays()``.
        out, d_query: results in BNSD, any float dtype; each may be None.

    Returns:
        dict with 'out' and 'd_query', those that were given; no 'd_query' where dropout acts.
    """
    starts, rows = _groups(case.q_len)
    worst, largest = {}, {}
    for start in starts:
        spec, operands = _sliced(case, start, rows)
        part = slice(start, start + rows)
        q, d_out = (np.asarray(arrays[name][-1:, -1:, part], np.float64) for name in ("query", "d_out"))
        k, v = (np.asarray(arrays[name][-1:, -1:], np.float64) for name in ("key", "value"))
        probs = reference.forward(np, spec, q, k, v, operands).probs
        pairs = {}
        if out is not None:
            pairs["out"] = np.matmul(_dropped(case, probs, start, rows), v), out
        if d_query is not None and not case.dropout:
            pairs["d_query"] = (reference.attention_grad(spec, q, k, v, operands, d_out)["query"], d_query)
        for name, (want, got) in pairs.items():
            difference = np.abs(np.asarray(got[-1:, -1:, part], np.float64) - want).max()
            worst[name] = max(worst.get(name, 0.0), float(difference))
            if not np.isfinite(difference):
                worst[name] = float("inf")
            largest[name] = max(largest.get(name, 0.0), float(np.abs(want).max()))
    return {name: worst[name] / largest[name] for name in worst}
