"""KV caches in JAX: ``KVCache`` keeps the arrays, ``prefill`` and ``decode`` are pure functions for use under jit."""

from flash_attention_infer.core.generation import generate, stream
from flash_attention_infer.core.scheduler import Scheduler
from flash_attention_infer.jax.attention import decode, prefill
from flash_attention_infer.jax.cache import KVCache
from flash_attention_infer.jax.storage import LayerCache

__all__ = ["KVCache", "LayerCache", "Scheduler", "decode", "generate", "prefill", "stream"]
