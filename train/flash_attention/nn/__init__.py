"""MindSpore Cells; ``flash_attention.nn.FlashAttention`` is the public contract, the mechanisms stand beside it."""

from flash_attention.core.lazy import lazy_names
from flash_attention.nn.layer import MECHANISMS
from flash_attention.nn.layer.flash_attention import FlashAttention

__all__ = ["FlashAttention"]
__getattr__, __dir__ = lazy_names("flash_attention.nn.layer", MECHANISMS, globals())
