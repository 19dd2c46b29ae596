"""One asymmetric mask for every public call: whoever mistakes its polarity, layout or axes gives another result."""

import numpy as np

B, N, KV, SQ, SK, D = 2, 4, 2, 12, 20, 8


def draws():
    """query, key, value (BNSD float32) and the keep mask (B, N, Sq, Sk), different in every batch, head, row."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal((B, N, SQ, D)).astype(np.float32)
    k, v = rng.standard_normal((2, B, KV, SK, D)).astype(np.float32)
    keep = rng.random((B, N, SQ, SK)) < 0.4
    keep[..., 0] = True
    return q, k, v, keep


def expected():
    """Softmax over the kept keys, written out; BNSD float64."""
    q, k, v, keep = draws()
    k, v = (np.repeat(x.astype(np.float64), N // KV, axis=1) for x in (k, v))
    scores = np.einsum("bnid,bnjd->bnij", q.astype(np.float64), k) / np.sqrt(D)
    weights = np.where(keep, np.exp(scores), 0.0)
    return np.einsum("bnij,bnjd->bnid", weights / weights.sum(-1, keepdims=True), v)


def takes_any_mask(call):
    """True for attention calls of (query, key, value) whose mask may differ in every batch, head, query and key."""
    return "N,Sq,Sk" in call.mask_shapes and not call.layout.startswith("x")


KINDS = ("bool", "float", "int")


def mask_of(polarity, kind, keep):
    """The keep mask as a call of that polarity takes it; entries that hide or show are not only 0 and 1."""
    shown = ~keep if polarity == "non-zero = discard" else keep
    return shown if kind == "bool" else shown * (np.float32(0.5) if kind == "float" else np.int32(7))
