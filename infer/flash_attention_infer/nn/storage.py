"""LayerCache: the Parameters of one layer's cache, and how a Step's indices read and write them.

Tokens come before heads in a block, (blocks, block_size, K, D): what ReshapeAndCache, PagedAttention and
incre_flash_attention take. Behind the blocks that the table knows are two more places: one takes the padding of a step,
one is never written. Reading a token that is not there means reading that one, so one gather brings the keys into the
layout of the attention and zeros into their end. (A mask on all of them is many times slower on the CPU, and hidden NaN
would still reach 0 * NaN.)
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_value
from flash_attention.ops.functional import on_cpu
from flash_attention.ops.host import is_eager
from flash_attention_infer.core.quantize import LARGEST
from flash_attention_infer.nn import host_memory
from flash_attention_infer.nn.host_memory import in_host_memory

LARGEST_SCATTERED = 2**31 - 1
"""Bytes of a pool that a graph can write to on the CPU: its scatter copies the pool, and cannot copy more."""


def held_dtype(name):
    """dtype of a pool. The CPU cannot write into a bfloat16 tensor: there float32 holds the rounded values."""
    if name == "bfloat16" and on_cpu():
        return mstype.float32
    return getattr(mstype, name)


class LayerCache(nn.Cell):
    """One layer's pool.

    Parameters ``key`` and ``value``: (blocks + 1, block_size, K, D), floating or int8; ``key_scale`` and
    ``value_scale``: float32 (blocks + 1, block_size) with int8. They are no trainable parameters. (With blocks of one
    token the two places more are two blocks.)

    Args:
        config (CacheConfig): sizes and dtype.
        name (str): prefix of the Parameters' names.
    """

    def __init__(self, config, name="cache"):
        super().__init__(auto_prefix=False)
        extra = 1 if config.block_size > 1 else 2
        shape = (config.num_blocks + extra, config.block_size, config.kv_heads, config.head_dim)
        dtype = held_dtype(config.dtype)
        self.block_size, self.scratch = config.block_size, config.num_blocks * config.block_size
        self.zero = self.scratch + 1
        self.rounded, self.quantized = getattr(mstype, config.dtype), config.quantized
        self.key = _parameter(shape, dtype, name + ".key")
        self.value = _parameter(shape, dtype, name + ".value")
        if self.quantized:
            self.key_scale = _parameter(shape[:2], mstype.float32, name + ".key_scale")
            self.value_scale = _parameter(shape[:2], mstype.float32, name + ".value_scale")
        self.update = P.ScatterNdUpdate()

    def encode(self, x):
        """(B, T, K, D) as the pool holds it, and its scales (B, T) or None."""
        if not self.quantized:
            return x.astype(self.rounded).astype(self.key.dtype), None
        x = x.astype(mstype.float32)
        scale = P.ReduceMax(False)(ops.abs(x), (2, 3)) / LARGEST
        safe = ops.maximum(scale, Tensor(1e-38, mstype.float32))  # a token of zeros stays zeros
        q = ops.round(x / ops.reshape(safe, scale.shape + (1, 1)))
        return q.astype(mstype.int8), scale

    def decode(self, x, scale, dtype):
        """The inverse of :meth:`encode` in ``dtype``; the scale has the leading axes of ``x``, (B, T) or (B, 1, T)."""
        if not self.quantized:
            return x.astype(dtype)
        x = x.astype(mstype.float32) * ops.reshape(scale, scale.shape + (1,) * (x.ndim - scale.ndim))
        return x.astype(dtype)

    def write(self, slots, key, key_scale, value, value_scale):
        """Put encoded tokens (B, T, K, D) at ``slots`` (B, T), in place; slot -1 goes to the place for padding."""
        if is_eager() and in_host_memory():
            host_memory.write(self.pools(), slots, (key, value, key_scale, value_scale))
            return
        _check_pool(self.key.shape, self.key.dtype)
        slots = ops.reshape(slots, (-1,))
        slots = ops.where(slots < 0, ops.full_like(slots, self.scratch), slots)
        index = ops.stack((slots // self.block_size, slots % self.block_size), 1)
        tokens = self.key.shape[2:]
        self.update(self.key, index, ops.reshape(key, (-1,) + tokens))
        self.update(self.value, index, ops.reshape(value, (-1,) + tokens))
        if self.quantized:
            self.update(self.key_scale, index, ops.reshape(key_scale, (-1,)))
            self.update(self.value_scale, index, ops.reshape(value_scale, (-1,)))

    def read_tables(self, tables, lengths, dtype, heads_first=False, parts=1):
        """Keys and values of the blocks (B, n) in order, zeros from each length (B,) on.

        Returns:
            a pair (B * parts, S / parts, K, D) with S = n * block_size, or with ``heads_first`` (.., K, S / parts, D);
            the parts of a sequence follow one another.
        """
        batch, size = tables.shape[0], tables.shape[1] * self.block_size
        slots = ops.expand_dims(tables, 2) * self.block_size + span(0, self.block_size)
        slots = self._present(ops.reshape(slots, (batch, size)), span(0, size) < ops.reshape(lengths, (-1, 1)))
        return self._read(ops.reshape(slots, (batch * parts, size // parts)), dtype, heads_first)

    def read_slots(self, slots, there, dtype, heads_first=False):
        """Keys and values of the tokens at ``slots`` (B, n), zeros where ``there`` (B, n) is False.

        Returns:
            a pair (B, n, K, D), or with ``heads_first`` (B, K, n, D).
        """
        return self._read(self._present(slots, there), dtype, heads_first)

    def _present(self, slots, there):
        """The slots, that of the zeros where there is no token."""
        return ops.where(there, slots, ops.full_like(slots, self.zero))

    def _read(self, slots, dtype, heads_first):
        heads, head_dim = self.key.shape[2:]
        if heads_first:
            slots = ops.expand_dims(slots, 1)
            index, row = slots * heads + ops.reshape(span(0, heads), (1, heads, 1)), (-1, head_dim)
        else:
            index, row = slots, (-1, heads, head_dim)
        pairs = ((self.key, self.key_scale), (self.value, self.value_scale)) if self.quantized else (
            (self.key, None), (self.value, None))  # fmt: skip
        found = ()
        for pool, scales in pairs:
            x = ops.gather(self._rows(pool, row), index, 0)
            scale = None if scales is None else ops.gather(self._rows(scales, (-1,)), slots, 0)
            found = found + (self.decode(x, scale, dtype),)
        return found

    def _rows(self, pool, shape):
        """The pool in another shape."""
        if is_eager() and in_host_memory():
            return host_memory.view(pool, shape)
        return ops.reshape(pool, shape)

    def copy_blocks(self, pairs):
        """Copy blocks from ``pairs[:, 0]`` to ``pairs[:, 1]``, int32 (c, 2), in place."""
        if is_eager() and in_host_memory():
            host_memory.copy_blocks(self.pools(), pairs)
            return
        for pool in self.pools():
            self.update(pool, pairs[:, 1:], ops.gather(pool, pairs[:, 0], 0))

    def pools(self):
        """The Parameters."""
        return (self.key, self.value) + ((self.key_scale, self.value_scale) if self.quantized else ())


@constexpr
def span(first, stop):
    """int32 (1, n): first .. stop - 1."""
    return Tensor(np.arange(first, stop, dtype=np.int32)[None, :])


@constexpr(check=False)
def _check_pool(shape, dtype):
    """Refuse what MindSpore refuses with an error that names no remedy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(str(dtype).lower()).itemsize
    if on_cpu() and size > LARGEST_SCATTERED:
        need = "small enough for pools of 2 GiB, the most that a graph can write to on a CPU"
        got = "a pool of {:.2f} GiB ({} blocks of {} tokens)".format(size / 2**30, shape[0], shape[1])
        remedy = "Take fewer blocks, dtype 'float16' or 'int8', or PyNative mode."
        raise invalid_value("KVCache", "num_blocks", need, got, remedy)


def _parameter(shape, dtype, name):
    host = np.int8 if dtype == mstype.int8 else np.float16 if dtype == mstype.float16 else np.float32
    return Parameter(Tensor(np.zeros(shape, host)).astype(dtype), name=name, requires_grad=False)
