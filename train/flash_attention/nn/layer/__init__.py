"""One file a Cell."""

from flash_attention.nn.layer.flash_attention import FlashAttention

__all__ = ["FlashAttention"]
