"""A padded batch whose padding is poisoned: what lies beyond the given lengths must not matter."""

import numpy as np

Q_LENGTHS, KV_LENGTHS = np.array([200, 129], np.int32), np.array([150, 100], np.int32)
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (40, 9)},
    "soft cap": {"logits_soft_cap": 2.0},
    "dropout": {"dropout_rate": 0.2, "dropout_seed": 3},
}


def padded(length=300, heads=4, kv_heads=2, head_dim=16):
    """((q, k, v, d_out), the same with NaN beyond the lengths), BNSD float32, as two lists."""
    rng = np.random.default_rng(0)
    clean, dirty = [], []
    for count, lengths in ((heads, Q_LENGTHS), (kv_heads, KV_LENGTHS), (kv_heads, KV_LENGTHS), (heads, Q_LENGTHS)):
        x = rng.standard_normal((len(lengths), count, length, head_dim)).astype(np.float32)
        bad = x.copy()
        for row, stop in zip(bad, lengths):
            row[:, stop:] = np.nan
        clean.append(x)
        dirty.append(bad)
    return clean, dirty


def assert_padding_is_ignored(run):
    """``run(q, k, v, d_out) -> (out, lse, dq, dk, dv)`` gives the same bits whatever the padding holds."""
    clean, dirty = padded()
    expected, found = run(*clean), run(*dirty)
    for name, a, b in zip(("out", "lse", "query", "key", "value"), expected, found):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
    for row, stop in zip(np.asarray(found[0]), Q_LENGTHS):
        assert np.abs(row[:, : stop - 1]).max() > 0 and not row[:, stop:].any()
