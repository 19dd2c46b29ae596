"""CacheConfig: sizes and dtype of a cache, checked; and the checks of what is given to prefill and decode."""

from dataclasses import dataclass
from typing import Optional

from flash_attention.core.errors import invalid_value
from flash_attention.core.spec import NO_LIMIT
from flash_attention.core.validation import check_int, check_window
from flash_attention_infer.core.quantize import DTYPE as INT8
from flash_attention_infer.core.ring import Ring

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, INT8: 1}


@dataclass(frozen=True)
class CacheConfig:
    """What a cache is made of.

    Attributes:
        layers: attention layers, each with a pool of its own; all follow one table.
        num_blocks, block_size: blocks of a pool, and tokens of a block.
        kv_heads, head_dim: sizes of a token's key and value.
        dtype: 'float32', 'float16', 'bfloat16', or 'int8' with a float32 scale a token.
        max_blocks: most blocks of one sequence; None = the pool.
        ring: :class:`Ring` of a sliding-window cache, or None.
    """

    layers: int
    num_blocks: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    max_blocks: Optional[int] = None
    ring: Optional[Ring] = None

    def __post_init__(self):
        for name in ("layers", "num_blocks", "block_size", "kv_heads", "head_dim"):
            check_int("KVCache", name, getattr(self, name), 1)
        if self.dtype not in BYTES:
            raise invalid_value("KVCache", "dtype", "one of {}".format(", ".join(map(repr, BYTES))), repr(self.dtype))

    @property
    def quantized(self):
        """True when keys and values are int8."""
        return self.dtype == INT8

    @property
    def bytes_per_token(self):
        """Bytes of one token in all layers, keys and values, scales included."""
        scale = 4 if self.quantized else 0
        return 2 * self.layers * (self.kv_heads * self.head_dim * BYTES[self.dtype] + scale)

    @property
    def bytes(self):
        """Bytes of the whole cache."""
        return self.num_blocks * self.block_size * self.bytes_per_token


def check_call(layer, step, query, key, value, kv_heads, head_dim):
    """Raise unless the shapes fit: query (B, T, N, D); key, value (B, T, K, D).

    Args:
        step: (B, T), sequences and tokens of the step.
    """
    want, query, key, value = (tuple(shape) for shape in (step, query, key, value))
    if len(query) != 4 or query[:2] != want or query[3] != head_dim or query[2] % kv_heads:
        need = "of shape ({}, {}, a multiple of {}, {})".format(want[0], want[1], kv_heads, head_dim)
        raise invalid_value(layer, "query", need, "shape {}".format(query))
    for name, shape in (("key", key), ("value", value)):
        if shape != want + (kv_heads, head_dim):
            raise invalid_value(
                layer, name, "of shape {}".format(want + (kv_heads, head_dim)), "shape {}".format(shape)
            )


def left_window(layer, local_window_size, ring_window):
    """``local_window_size`` of the core call; its right side means nothing to a causal one.

    Raises:
        ValueError: not the ring's own window, where there is a ring.
    """
    window = check_window(layer, local_window_size)
    left = None if window is None else window[0]
    if ring_window is None:
        return None if left is None else (left, None)
    if left not in (None, ring_window):
        need = "None or the ring's window {}".format(ring_window)
        raise invalid_value(layer, "local_window_size", need, local_window_size)
    return (ring_window, None)


def check_blocks(layer, prev_block_num, block_size, ring, part=None):
    """Raise where a window of blocks (``prev_block_num`` of ``block_size`` tokens) cannot be counted.

    Args:
        part: tokens of a part when the keys are split, whose positions are then counted from its own start.
    """
    if prev_block_num == NO_LIMIT:
        return
    if ring:
        need = "{} with a ring (it has its own window)".format(NO_LIMIT)
        raise invalid_value(layer, "prev_block_num", need, prev_block_num)
    if part is not None and part % block_size:
        need = "such that parts are whole blocks of {}".format(block_size)
        raise invalid_value(layer, "num_splits", need, "parts of {}".format(part))


def check_splits(layer, num_splits, tokens, ring):
    """Raise unless the keys of a view of ``tokens`` can be cut into ``num_splits`` equal parts; returns it."""
    num_splits = check_int(layer, "num_splits", num_splits, 1)
    if num_splits > 1 and ring:
        raise invalid_value(layer, "num_splits", "1 with a ring (its window is short)", num_splits)
    if tokens % num_splits:
        need = "a divisor of the {} places of the longest sequence's blocks".format(tokens)
        raise invalid_value(layer, "num_splits", need, num_splits)
    return num_splits
