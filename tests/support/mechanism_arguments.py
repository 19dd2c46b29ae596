"""One value for every argument of a mechanism, in numpy, for the registries of both frameworks."""

import functools

import numpy as np

from flash_attention.core.alibi import alibi_slopes

B, T, N, K, D = 2, 24, 4, 2, 8


@functools.lru_cache(maxsize=None)
def draws(kv_len=T):
    """query (B, T, N, D), key, value (B, kv_len, K, D), float32."""
    rng = np.random.default_rng(3)
    shapes = (B, T, N, D), (B, kv_len, K, D), (B, kv_len, K, D)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def examples():
    """{argument of a mechanism: keywords that set it to something that changes the result}."""
    rng = np.random.default_rng(4)
    ids = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)
    return {
        "bias": {"bias": rng.standard_normal((B, N, T, T)).astype(np.float32)},
        "mask": {"mask": rng.random((B, 1, T, T)) < 0.5},
        "scale": {"scale": 0.7},
        "is_causal": {"is_causal": True},
        "query_seq_lengths": {"query_seq_lengths": np.array([20, 24], np.int32)},
        "key_value_seq_lengths": {"key_value_seq_lengths": np.array([13, 24], np.int32)},
        "local_window_size": {"local_window_size": (5, 2)},
        "prev_block_num": {"prev_block_num": 1, "block_size": 4},
        "next_block_num": {"next_block_num": 0, "block_size": 4},
        "block_size": {"block_size": 8, "prev_block_num": 0},
        "alibi_slopes": {"alibi_slopes": alibi_slopes(N).astype(np.float32)},
        "dropout_rate": {"dropout_rate": 0.4, "dropout_seed": np.uint32(7)},
        "dropout_seed": {"dropout_seed": np.uint32(8), "dropout_rate": 0.4},
        "logits_soft_cap": {"logits_soft_cap": 1.5},
        "sinks": {"sinks": rng.standard_normal(N).astype(np.float32)},
        "q_segment_ids": {"q_segment_ids": ids, "kv_segment_ids": ids},
        "kv_segment_ids": {"kv_segment_ids": np.ascontiguousarray(ids[:, ::-1]), "q_segment_ids": ids},
        "q_offset": {"q_offset": np.int32(-3), "is_causal": True},
    }
