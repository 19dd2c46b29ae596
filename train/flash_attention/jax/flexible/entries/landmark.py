"""'landmark': landmark attention of the regular pattern as a mechanism of (query, key, value)."""

import jax.numpy as jnp

from flash_attention.core.mechanisms.landmark import regular
from flash_attention.core.registry import ARGUMENTS, landmark_refusal
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry, output_of
from flash_attention.jax.mechanisms.landmark import fused_landmark_attention


@AttentionRegistry.register
class Landmark(AttentionImpl):
    """Landmark attention (Mohtashami and Jaggi, 2023): causal, the last of every ``block_size`` keys is a landmark."""

    names = "landmark"
    exact = False

    def forward_native(self, query, key, value, *, is_causal, scale=None, block_size=128):
        del is_causal  # always, see supports
        key, value = self.repeat_kv_heads(key, value, query.shape[2] // key.shape[2])
        by_head = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        out = fused_landmark_attention(*by_head, regular(key.shape[1], block_size), scale, block_size)
        return output_of(jnp.swapaxes(out, 1, 2))

    def supports(self, query, key, value, arguments):
        lengths, block_size = (query.shape[1], key.shape[1]), arguments.get("block_size", ARGUMENTS["block_size"])
        return landmark_refusal(arguments.get("is_causal"), *lengths, block_size)
