"""Inference on top of `flash_attention`: KV caches, prefill and decode belong here.

It imports flash_attention, never the reverse.
"""

from flash_attention import __version__

__all__ = ["__version__"]
