"""The arrays of one layer's cache, and how a Step's indices read and write them. Pure functions of pytrees.

Tokens come before heads in a block: writing a token touches one run of memory, a contiguous cache is (B, S, K, D) as it
is, and the `xla` engine reads that layout without moving anything.
"""

from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_infer.core.quantize import dequantize, quantize
from flash_attention_infer.core.step import Step

_ARRAYS = ("starts", "counts", "slots", "tables", "history", "sinks")
_STATIC = ("fresh", "whole")  # copies and ids are of no use under jit: they would be compiled in


def _flatten(step):
    return [getattr(step, name) for name in _ARRAYS], tuple(getattr(step, name) for name in _STATIC)


def _unflatten(static, arrays):
    return Step(**dict(zip(_ARRAYS, arrays)), **dict(zip(_STATIC, static)))


jax.tree_util.register_pytree_node(Step, _flatten, _unflatten)


class LayerCache(NamedTuple):
    """One layer's pool.

    Attributes:
        key, value: (blocks, block_size, K, D), floating or int8.
        key_scale, value_scale: float32 (blocks, block_size) with int8, else None.
    """

    key: jax.Array
    value: jax.Array
    key_scale: Optional[jax.Array] = None
    value_scale: Optional[jax.Array] = None

    @property
    def block_size(self):
        """Tokens of a block."""
        return self.key.shape[1]


def make(config):
    """An empty :class:`LayerCache` for a ``CacheConfig``."""
    shape = (config.num_blocks, config.block_size, config.kv_heads, config.head_dim)
    dtype = jnp.dtype(getattr(jnp, config.dtype))
    pools = [jnp.zeros(shape, dtype) for _ in range(2)]
    scales = [jnp.zeros(shape[:2], jnp.float32) if config.quantized else None for _ in range(2)]
    return LayerCache(*pools, *scales)


def encode(layer, key, value):
    """Keys and values (B, T, K, D) as the pool holds them: a :class:`LayerCache` of that shape."""
    if layer.key_scale is None:
        return LayerCache(key.astype(layer.key.dtype), value.astype(layer.value.dtype))
    (key, key_scale), (value, value_scale) = quantize(jnp, key), quantize(jnp, value)
    return LayerCache(key, value, key_scale, value_scale)


def decoded(stored, dtype):
    """The inverse of :func:`encode`: ``(keys, values)`` in ``dtype``."""
    if stored.key_scale is None:
        return stored.key.astype(dtype), stored.value.astype(dtype)
    pairs = (stored.key, stored.key_scale), (stored.value, stored.value_scale)
    return tuple(dequantize(jnp, q, scale).astype(dtype) for q, scale in pairs)


def write(layer, slots, new):
    """The layer with the tokens ``new`` (a LayerCache of (B, T, ...)) at ``slots`` (B, T); slot -1 is nowhere."""
    block, offset = slots // layer.block_size, slots % layer.block_size
    block = jnp.where(slots < 0, layer.key.shape[0], block)  # out of range: dropped (negative ones would wrap)
    return jax.tree.map(lambda pool, x: _put(pool, (block, offset), x), layer, new)


def _put(pool, index, x):
    """``pool`` with ``x`` at ``index``.

    16-bit floats go as integers: XLA on a CPU would convert all of the pool to float32 and back. It still copies it.
    """
    if pool.dtype.itemsize != 2:
        return pool.at[index].set(x, mode="drop")
    bits = [lax.bitcast_convert_type(one, jnp.uint16) for one in (pool, x)]
    return lax.bitcast_convert_type(bits[0].at[index].set(bits[1], mode="drop"), pool.dtype)


def read_slots(layer, slots, dtype):
    """``(keys, values)`` (B, n, K, D) of the tokens at ``slots`` (B, n)."""
    block, offset = slots // layer.block_size, slots % layer.block_size
    return decoded(jax.tree.map(lambda pool: pool[block, offset], layer), dtype)


def read_tables(layer, step, dtype):
    """``(keys, values)`` (B, n * block_size, K, D) of the sequences of a step, in order."""

    def join(pool):
        x = pool[step.tables]  # (B, n, block_size, ...)
        return x.reshape(x.shape[:1] + (-1,) + x.shape[3:])

    return decoded(layer if step.whole else jax.tree.map(join, layer), dtype)


@jax.jit
def copy_blocks(layers, pairs):
    """Layers with blocks copied from ``pairs[:, 0]`` to ``pairs[:, 1]``."""
    return jax.tree.map(lambda pool: pool.at[pairs[:, 1]].set(pool[pairs[:, 0]]), layers)
