"""Calls with keys that lie in no visited tile, for the tests that poison those keys."""

from typing import NamedTuple

import numpy as np

from flash_attention.core.alibi import alibi_slopes


class Call(NamedTuple):
    """Keys from `stop` on and before `start` are unseen and at least one tile away from any key that is seen."""

    q_len: int
    kv_len: int
    start: int
    stop: int
    options: dict
    tensors: dict = {}


# The widest compute tile of any engine is 1024 keys: what is poisoned starts at a multiple of it.
CALLS = {
    "causal, top-left": Call(300, 4096, 0, 1024, {"is_causal": True, "q_offset": 0}),
    "token window": Call(200, 4096, 2048, 3072, {"local_window_size": (100, 90), "q_offset": 2500}),
    "block window, ALiBi": Call(
        256, 4096, 1024, 2048, {"prev_block_num": 2, "next_block_num": 1, "q_offset": 1408},
        {"alibi_slopes": alibi_slopes(4)},
    ),
    "dropout": Call(200, 3072, 0, 1024, {"is_causal": True, "q_offset": 300, "dropout_rate": 0.2, "dropout_seed": 3}),
}  # fmt: skip


def poisoned(call, head_dim=16):
    """((q, k, v, d_out), (k, v) with NaN where nothing looks, boolean (Sk,) of those keys), BNSD float32."""
    rng = np.random.default_rng(0)
    q, d_out = rng.standard_normal((2, 1, 4, call.q_len, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, 2, call.kv_len, head_dim)).astype(np.float32)
    keys = np.arange(call.kv_len)
    hidden = (keys < call.start) | (keys >= call.stop)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, :, hidden], bad_v[:, :, hidden] = np.nan, np.nan
    return (q, k, v, d_out), (bad_k, bad_v), hidden
