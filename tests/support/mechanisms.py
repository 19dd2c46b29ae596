"""Mechanisms of the registry as the tests see them: one value for every argument, and a conformance adapter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.jax_engines import JaxEngine

from flash_attention.core.alibi import alibi_slopes
from flash_attention.jax import AttentionMetadata, AttentionRegistry

B, T, N, K, D = 2, 24, 4, 2, 8


@functools.lru_cache(maxsize=None)
def one_device():
    """Metadata of a mesh of one device, with small tiles so that several are visited."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("dp", "fsdp", "tp", "sp"))
    return AttentionMetadata(mesh=mesh, blocksize_q=16, blocksize_k=8)


@functools.lru_cache(maxsize=None)
def draws(kv_len=T):
    """query (B, T, N, D), key, value (B, kv_len, K, D), float32."""
    rng = np.random.default_rng(3)
    shapes = (B, T, N, D), (B, kv_len, K, D), (B, kv_len, K, D)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def examples():
    """{argument of a mechanism: keywords that set it to something that changes the result}."""
    rng = np.random.default_rng(4)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1), jnp.int32)
    return {
        "bias": {"bias": jnp.asarray(rng.standard_normal((B, N, T, T)), jnp.float32)},
        "mask": {"mask": jnp.asarray(rng.random((B, 1, T, T)) < 0.5)},
        "scale": {"scale": 0.7},
        "is_causal": {"is_causal": True},
        "query_seq_lengths": {"query_seq_lengths": jnp.array([20, 24], jnp.int32)},
        "key_value_seq_lengths": {"key_value_seq_lengths": jnp.array([13, 24], jnp.int32)},
        "local_window_size": {"local_window_size": (5, 2)},
        "prev_block_num": {"prev_block_num": 1, "block_size": 4},
        "next_block_num": {"next_block_num": 0, "block_size": 4},
        "block_size": {"block_size": 8, "prev_block_num": 0},
        "alibi_slopes": {"alibi_slopes": jnp.asarray(alibi_slopes(N))},
        "dropout_rate": {"dropout_rate": 0.4, "dropout_seed": jnp.uint32(7)},
        "dropout_seed": {"dropout_seed": jnp.uint32(8), "dropout_rate": 0.4},
        "logits_soft_cap": {"logits_soft_cap": 1.5},
        "sinks": {"sinks": jnp.asarray(rng.standard_normal(N), jnp.float32)},
        "q_segment_ids": {"q_segment_ids": ids, "kv_segment_ids": ids},
        "kv_segment_ids": {"kv_segment_ids": ids[:, ::-1], "q_segment_ids": ids},
        "q_offset": {"q_offset": jnp.int32(-3), "is_causal": True},
    }


class Mechanism(JaxEngine):
    """A mechanism in the conformance suite: it gives what an engine gives, less the LSE."""

    def attend(self, query, key, value, layout="BSND", **arguments):
        swap = (lambda x: jnp.swapaxes(x, 1, 2)) if layout == "BNSD" else (lambda x: x)
        impl = AttentionRegistry.create(self.name, one_device())
        out = impl(*map(swap, (query, key, value)), **arguments).attention_outputs
        return swap(out), jnp.zeros((out.shape[0], out.shape[2], out.shape[1]), jnp.float32)

    def run(self, case):
        results = super().run(case)
        del results["lse"]
        return results
