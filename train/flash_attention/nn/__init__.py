"""MindSpore Cells; ``flash_attention.nn.FlashAttention`` is the public contract."""

from flash_attention.nn.layer.flash_attention import FlashAttention

__all__ = ["FlashAttention"]
