"""Position encodings in MindSpore: rotary, xPos, T5's relative bias, ALiBi's dense bias. Tables: core.mechanisms.

Tables of known positions are made by numpy in float64 while a graph is compiled, and kept.
"""

import functools

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import positions as tables
from flash_attention.nn.layer.projection import normal


class Rotary(nn.Cell):
    r"""Rotary position encoding (Su et al., 2021): pair ``m`` turns by ``position * base ** (-2 m / d)``.

    Args:
        base (float): of the frequencies. Default: 10000.0.
        interleaved (bool): pairs (2m, 2m + 1); False: half-split pairs (m, m + d / 2). Default: True.
        dims (int): rotate the first so many features only (even); None = all. Default: None.

    Inputs:
        - **x** (Tensor) - (..., n, d), any float dtype; the angles and the product are float32.
        - **positions** (Tensor) - (n,) or broadcastable to (..., n); None = 0 .. n - 1. Default: None.

    Outputs:
        Tensor like x.
    """

    def __init__(self, base=10000.0, interleaved=True, dims=None):
        super().__init__()
        tables.check_rotary("Rotary", 2**30, base, interleaved, dims)
        self.base, self.interleaved, self.dims = base, interleaved, dims

    def construct(self, x, positions=None):
        """Rotate; shapes and meaning of the inputs are in the class's documentation."""
        dims = _rotated(x.shape[-1], self.base, self.interleaved, self.dims)
        if positions is None:
            cos, sin = _rotary_constants(x.shape[-2], dims, self.base)
        else:
            angles = ops.expand_dims(positions.astype(mstype.float32), -1) * _frequencies(dims, self.base)
            cos, sin = ops.cos(angles), ops.sin(angles)
        if dims == x.shape[-1]:
            return _apply(x, cos, sin, self.interleaved)
        wide = x.astype(mstype.float32)  # the CPU cuts only float32 in the backward pass
        turned = _apply(wide[..., :dims], cos, sin, self.interleaved)
        return ops.concat((turned, wide[..., dims:]), -1).astype(x.dtype)


class XPos(nn.Cell):
    r"""xPos (Sun et al., 2022): rotary, times ``zeta ** ((p - centre) / scale_base)``, or its inverse for keys.

    The product of a query and a downscaled key depends on the difference of their positions alone. The tensor holds
    the last n of n + offset positions; the centre is ``ceil((n + offset) / 2)``.

    Args:
        downscale (bool): False for queries; True for keys. Default: False.
        scale_base (float): larger = slower decay. Default: 512.
        segment (int): None, or the range of positions within which queries and keys meet: each range has a centre of
            its own. Needed where n + offset is above about 8,100 in float16 or 65,000 otherwise. Default: None.

    Inputs:
        - **x** (Tensor) - (..., n, d), d even, interleaved pairs.
        - **offset** (int) - positions before x. Default: 0.

    Outputs:
        Tensor like x.

    Raises:
        ValueError: an odd d, or a length at which the factors overflow.
    """

    def __init__(self, downscale=False, scale_base=512, segment=None):
        super().__init__()
        tables.check_xpos("XPos", 2, None, "float32", downscale, scale_base, segment)
        self.options = (downscale, scale_base, segment)

    def construct(self, x, offset=0):
        """Rotate and scale; shapes and meaning of the inputs are in the class's documentation."""
        cos, sin = _xpos_constants(x.shape[-2], offset, x.shape[-1], x.dtype, self.options)
        return _apply(x, cos, sin, True)


class T5Bias(nn.Cell):
    r"""T5's relative position bias (Raffel et al., 2020), to be added to the scaled scores.

    Args:
        heads (int): number of heads.
        bidirectional (bool): half of the buckets for keys after the query; False: such keys share bucket 0.
            Default: True.
        num_buckets (int): rows of the table. Default: 32.
        max_distance (int): from here on all distances share the last bucket. Default: 128.

    Inputs:
        - **q_len** (int), **kv_len** (int) - lengths.
        - **step** (int) - position of query 0. Default: 0.

    Outputs:
        Tensor (heads, q_len, kv_len), float32; differentiable in ``weight`` (num_buckets, heads).
    """

    def __init__(self, heads, bidirectional=True, num_buckets=32, max_distance=128):
        super().__init__()
        tables.check_t5("T5Bias", num_buckets, max_distance, bidirectional)
        self.options = (bidirectional, num_buckets, max_distance)
        self.weight = Parameter(normal((num_buckets, heads)), name="weight")

    def construct(self, q_len, kv_len, step=0):
        """The bias; shapes and meaning of the inputs are in the class's documentation."""
        buckets = _bucket_constant(q_len, kv_len, step, self.options)
        return ops.gather(self.weight.swapaxes(0, 1), buckets, 1)


def alibi_bias(heads, q_len, kv_len, alibi_num_heads=None):
    """ALiBi's bias as a Tensor, float32 (heads, q_len, kv_len); queries are the last of the positions.

    ``flash_attention(alibi_slopes=...)`` computes the same without a tensor of this size.
    """
    return _alibi_constant(heads, q_len, kv_len, alibi_num_heads)


def _apply(x, cos, sin, interleaved):
    return tables.rotate(ops.stack, x.astype(mstype.float32), cos, sin, interleaved).astype(x.dtype)


@constexpr
def _rotated(dim, base, interleaved, dims):
    return tables.check_rotary("Rotary", dim, base, interleaved, dims)


@constexpr
def _frequencies(dims, base):
    return Tensor(tables.frequencies(dims, base).astype(np.float32))


@constexpr
@functools.lru_cache(maxsize=16)
def _rotary_constants(length, dims, base):
    return _float32(tables.rotary_tables(np, np.arange(length, dtype=np.float64), dims, base))


@constexpr
@functools.lru_cache(maxsize=16)
def _xpos_constants(length, offset, dim, dtype, options):
    downscale, scale_base, segment = options
    tables.check_xpos("XPos", dim, length + offset, str(dtype).lower(), downscale, scale_base, segment)
    positions = np.arange(length, dtype=np.float64) + offset
    centre = tables.xpos_centre(positions, length + offset, segment)
    return _float32(tables.xpos_tables(np, positions, centre, dim, downscale, scale_base))


@constexpr
@functools.lru_cache(maxsize=16)
def _bucket_constant(q_len, kv_len, step, options):
    tables.check_lengths("T5Bias", q_len, kv_len, step)
    return Tensor(tables.t5_bucket_table(q_len, kv_len, step, *options))


@constexpr
@functools.lru_cache(maxsize=16)
def _alibi_constant(heads, q_len, kv_len, alibi_num_heads):
    tables.check_lengths("alibi_bias", q_len, kv_len)
    return Tensor(tables.alibi_bias_array(heads, q_len, kv_len, alibi_num_heads))


def _float32(arrays):
    return tuple(Tensor(array.astype(np.float32)) for array in arrays)
