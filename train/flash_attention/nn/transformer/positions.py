"""Positions inside a MindSpore stack: rotation of queries and keys, and the bias by distance that its layers share."""

import functools
import math

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import positions as tables
from flash_attention.nn.layer.projection import Projection
from flash_attention.nn.transformer.parts import learned, numbers

NO_ROTATION = (0, None, 0, None)


def rotated(x, first, length, rotation, downscale):
    """x (B, N, H, D) whose token 0 stands at ``first`` of ``length`` positions.

    Args:
        rotation: (features that turn, xPos's base, places, index): with a cache its places, instead of ``length``, and
            the tokens in it, an int32 Tensor: there token 0 stands.
    """
    dims, base, places, index = rotation
    if dims == 0:
        return x
    count, dtype = x.shape[1], str(x.dtype).lower()
    if places > 0:
        length = places
    if index is None:
        cos, sin = _rotation(first, count, length, dims, base, downscale, dtype)
    else:
        cos, sin = _rotation(0, length, length, dims, base, downscale, dtype)
        where = index + numbers(count)
        cos, sin = ops.gather(cos, where, 0), ops.gather(sin, where, 0)
    wide = x.astype(mstype.float32)
    turned = tables.rotate(ops.stack, wide[..., :dims], cos, sin, False)
    if dims < x.shape[3]:
        turned = ops.concat((turned, wide[..., dims:]), 3)
    return turned.astype(x.dtype)


@constexpr
@functools.lru_cache(maxsize=64)
def _rotation(first, count, length, dims, base, downscale, dtype):
    positions = np.arange(first, first + count, dtype=np.float64)
    if base is None:
        found = tables.rotary_tables(np, positions, dims)
    else:
        tables.check_xpos("AttentionLayers", dims, length, dtype, downscale, base, None)
        found = tables.xpos_tables(np, positions, length // 2, dims, downscale, base)
    return tuple(Tensor(table[:, None].astype(np.float32)) for table in found)


def distance_bias(stack):
    """The Cell ``(q_len, kv_len) -> (1, heads, q_len, kv_len)``, float32, that the stack's options ask for."""
    return TableBias(stack) if stack.layers.rel_pos_bias else NetworkBias(stack)


class TableBias(nn.Cell):
    """T5's table, 'weight' (buckets, heads), times ``sqrt(dim_head)``."""

    def __init__(self, stack):
        super().__init__()
        options = stack.layers
        self.factor = math.sqrt(stack.attention.dim_head)
        self.buckets = (not options.causal, options.rel_pos_num_buckets, options.rel_pos_max_distance)
        table = np.random.standard_normal((options.rel_pos_num_buckets, options.heads))
        self.weight = Parameter(learned(table), name="weight")

    def construct(self, q_len, kv_len):
        """The bias of q_len queries at the end of kv_len positions."""
        values = ops.gather(self.weight, _bucket_of_distance(kv_len, self.buckets), 0) * self.factor
        return _for_pairs(values, q_len, kv_len)


class NetworkBias(nn.Cell):
    """A network of the distance; its layers are named '0', '1', ..., so that its weights are 'bias.0.weight' as in JAX.

    A CellList would give the same names, but a graph cannot call one.
    """

    def __init__(self, stack):
        super().__init__()
        options = stack.layers
        self.logarithm = options.dynamic_pos_bias_log_distance
        sizes = [1] + [max(options.dim // 4, 1)] * options.dynamic_pos_bias_num_layers + [options.heads]
        self.names = tuple(str(n) for n in range(len(sizes) - 1))
        for name, size in zip(self.names, zip(sizes, sizes[1:])):
            self.insert_child_to_cell(name, Projection(*size))

    def construct(self, q_len, kv_len):
        """The bias of q_len queries at the end of kv_len positions."""
        values = _distances(kv_len, self.logarithm)
        for name in self.names:
            if name != "0":
                values = values * ops.sigmoid(values)
            values = getattr(self, name)(values)
        return _for_pairs(values, q_len, kv_len)


def _for_pairs(values, q_len, kv_len):
    """Values (2 kv_len - 1, heads) by distance as (1, heads, q_len, kv_len)."""
    return ops.expand_dims(ops.gather(values.swapaxes(0, 1), _places(q_len, kv_len), 1), 0)


@constexpr
@functools.lru_cache(maxsize=16)
def _bucket_of_distance(kv_len, options):
    return Tensor(tables.t5_buckets(np.arange(1 - kv_len, kv_len), *options))


@constexpr
@functools.lru_cache(maxsize=16)
def _distances(kv_len, logarithm):
    distance = -np.arange(1 - kv_len, kv_len, dtype=np.float64)
    if logarithm:
        distance = np.sign(distance) * np.log1p(np.abs(distance))
    return Tensor(distance[:, None].astype(np.float32))


@constexpr
@functools.lru_cache(maxsize=16)
def _places(q_len, kv_len):
    query = np.arange(q_len)[:, None] + kv_len - q_len
    return Tensor((np.arange(kv_len)[None, :] - query + kv_len - 1).astype(np.int32))
