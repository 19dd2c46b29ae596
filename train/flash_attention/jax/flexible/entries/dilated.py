"""'dilated': LongNet's dilated attention as a mechanism of (query, key, value)."""

from flash_attention.core.registry import dilated_refusal
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry, output_of
from flash_attention.jax.mechanisms.dilated import dilated_attention


@AttentionRegistry.register
class Dilated(AttentionImpl):
    """LongNet (Ding et al., 2023): segments of ``segment_size`` tokens, of which every ``dilation_rate``-th is kept."""

    names = "dilated"
    exact = False
    takes = ("segment_size", "dilation_rate")

    def forward_native(self, query, key, value, *, is_causal=False, scale=None):
        key, value = self.repeat_kv_heads(key, value, query.shape[2] // key.shape[2])
        sizes = self.metadata.segment_size, self.metadata.dilation_rate
        return output_of(dilated_attention(query, key, value, *sizes, is_causal=is_causal, scale=scale))

    def supports(self, query, key, value, arguments):
        sizes = self.metadata.segment_size, self.metadata.dilation_rate
        return dilated_refusal(*sizes, query.shape[1], key.shape[1])
