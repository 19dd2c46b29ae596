"""KVCache in JAX: the table of the core and a layer's arrays a layer. Eager calls are compiled once a shape."""

import jax
import numpy as np

from flash_attention.jax.sampling import sample
from flash_attention_infer.core.cache import KVCache as Base
from flash_attention_infer.jax import storage
from flash_attention_infer.jax.attention import decode, prefill

_STATIC = ("scale", "local_window_size", "prev_block_num", "block_size", "logits_soft_cap", "implementation")


class KVCache(Base):
    """A KV cache whose arrays live in ``layers``, a list of :class:`LayerCache`.

    ``cache.prefill(n, step, q, k, v)`` replaces ``cache.layers[n]``; its buffers are reused in place. In a function of
    your own under ``jax.jit``, pass ``cache.layers`` in, use the pure ``prefill`` and ``decode``, and put the new ones
    back. Make one with :meth:`paged`, :meth:`contiguous` or :meth:`sliding`.
    """

    def __init__(self, config, on_shortage=None):
        super().__init__(config, on_shortage)
        self.layers = [storage.make(config) for _ in range(config.layers)]

    def copy_blocks(self, pairs):
        """Copy blocks (from, to) in every layer."""
        self.layers = storage.copy_blocks(self.layers, pairs)

    def prefill(self, layer, step, query, key, value, **options):
        """:func:`flash_attention_infer.jax.prefill` over layer number ``layer``: the output (B, T, N, D)."""
        out, self.layers[layer] = _prefill(self.layers[layer], step, query, key, value, **options)
        return out

    def decode(self, layer, step, query, key, value, **options):
        """:func:`flash_attention_infer.jax.decode` over layer number ``layer``: the output (B, T, N, D)."""
        out, self.layers[layer] = _decode(self.layers[layer], step, query, key, value, **options)
        return out

    def sample(self, logits, seeds, positions, **sampling):
        """``flash_attention.jax.sampling.sample`` with the tokens as numpy."""
        return np.asarray(_sample(logits, seeds, positions, **sampling))


def _compiled(function, static):
    return jax.jit(function, static_argnames=static, donate_argnames="layer")


_prefill, _decode = _compiled(prefill, _STATIC), _compiled(decode, _STATIC + ("num_splits",))
_sample = jax.jit(sample, static_argnames=("temperature", "top_k", "top_p", "min_p"))
