"""MindSpore Cells; ``flash_attention.nn.FlashAttention`` is the public contract, the mechanisms stand beside it.

``flash_attention.nn.transformer`` holds transformers over all of them.
"""

from flash_attention.core.lazy import lazy_names
from flash_attention.nn.layer import MECHANISMS
from flash_attention.nn.layer.flash_attention import FlashAttention
from flash_attention.nn.transformer import TRANSFORMER

__all__ = ["FlashAttention"]
_LAZY = {"layer." + module: names for module, names in MECHANISMS.items()}
_LAZY.update(("transformer." + module, names) for module, names in TRANSFORMER.items())
__getattr__, __dir__ = lazy_names("flash_attention.nn", _LAZY, globals())
