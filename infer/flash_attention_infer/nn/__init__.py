"""KV caches in MindSpore: ``KVCache`` keeps a Cell a layer, whose Parameters are written in place, in both modes."""

from flash_attention_infer.core.generation import generate, stream
from flash_attention_infer.core.scheduler import Scheduler
from flash_attention_infer.nn.attention import CachedAttention
from flash_attention_infer.nn.cache import KVCache
from flash_attention_infer.nn.storage import LayerCache

__all__ = ["CachedAttention", "KVCache", "LayerCache", "Scheduler", "generate", "stream"]
