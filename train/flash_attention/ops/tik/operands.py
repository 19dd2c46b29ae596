"""A call's tensors as the kernels take them, by ordinary MindSpore operators: what ``ascend/host.py`` does in numpy.

Query, key and value need nothing: the framework itself converts them to FRACTAL_NZ. Tiles are made of mask, bias and
dropout's keep mask; tables and bounds depend on no tensor and are constants, made once a spec by ``ascend/host.py``.
"""

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from flash_attention.ascend.host import compact_places
from flash_attention.ascend.signature import mask_axes, tile_axes
from flash_attention.ascend.tile_ops.masks import DISCARD
from flash_attention.ops.portable.dropout import KeepFactors


class PackTiles(nn.Cell):
    """(1|B, 1|N, 1|Sq, 1|Sk) -> transposed tiles of ``axes``, as ``host.pack_tiles``; zeros beyond Sq and Sk.

    Args:
        shape: of the operand. axes: of the packed one, from ``signature.tile_axes``.
    """

    def __init__(self, shape, axes):
        super().__init__(auto_prefix=False)
        q_tiles, kv_tiles, groups, keys, lanes = axes[2:]
        size = (q_tiles * groups * lanes, kv_tiles * keys)
        self.repeat = (1, 1) + tuple(whole if given == 1 else 1 for whole, given in zip(size, shape[2:]))
        missing = tuple((0, 0 if given == 1 else whole - given) for whole, given in zip(size, shape[2:]))
        self.repeats, self.pads = max(self.repeat) > 1, missing != ((0, 0), (0, 0))
        self.pad = P.Pad(((0, 0), (0, 0)) + missing)
        self.tile, self.transpose, self.reshape = P.Tile(), P.Transpose(), P.Reshape()
        self.split = tuple(axes[:2]) + (q_tiles, groups, lanes, kv_tiles, keys)

    def construct(self, x):
        if self.repeats:
            x = self.tile(x, self.repeat)
        if self.pads:
            x = self.pad(x)
        return self.transpose(self.reshape(x, self.split), (0, 1, 2, 5, 3, 6, 4))


class PackMask(nn.Cell):
    """A keep mask, dense or compact -> fp16 tiles of ``kept`` and DISCARD."""

    def __init__(self, geometry, kept):
        super().__init__(auto_prefix=False)
        spec = geometry.spec
        self.kept = kept
        self.compact = spec.compact_mask
        self.cast, self.greater, self.reshape = P.Cast(), P.Greater(), P.Reshape()
        if self.compact:
            self.places = Tensor(compact_places(geometry))
            self.gather, self.concat = P.Gather(), P.Concat(0)
            self.beside = Tensor(np.zeros(1, np.float16))  # what the compact mask says nothing of is kept
        else:
            self.pack = PackTiles(spec.mask_shape, mask_axes(geometry))

    def construct(self, keep):
        if keep.dtype != mstype.bool_:
            keep = self.greater(keep, 0)
        discard = 1.0 - self.cast(keep, mstype.float16)
        if self.compact:
            discard = self.gather(self.concat((self.reshape(discard, (-1,)), self.beside)), self.places, 0)
        else:
            discard = self.pack(discard)
        return discard * DISCARD + (1.0 - discard) * self.kept


class PackSlopes(nn.Cell):
    """(N,) or (B, N) -> fp32 (B, N, 2, 8): eight times the slope, eight times its negative."""

    def __init__(self, spec):
        super().__init__(auto_prefix=False)
        self.shape, self.repeat = (-1, spec.heads, 1, 1), (spec.batch if len(spec.alibi_shape) == 1 else 1, 1, 1, 1)
        self.signs = Tensor(np.repeat([[1.0], [-1.0]], 8, axis=1).astype(np.float32))
        self.cast, self.reshape, self.tile = P.Cast(), P.Reshape(), P.Tile()

    def construct(self, slopes):
        x = self.tile(self.reshape(self.cast(slopes, mstype.float32), self.shape), self.repeat)
        return x * self.signs


class PackKeep(nn.Cell):
    """(query, seed) -> dropout's keep mask, uint8 tiles: a byte an element, and about 14 while it is being made."""

    def __init__(self, geometry):
        super().__init__(auto_prefix=False)
        spec = geometry.spec
        shape = (spec.batch, spec.heads, spec.q_len, spec.kv_len)
        self.factors = KeepFactors(spec)
        self.pack = PackTiles(shape, tile_axes(geometry, shape))
        self.cast, self.greater = P.Cast(), P.Greater()

    def construct(self, query, seed):
        kept = self.pack(self.cast(self.greater(self.factors(query, seed), 0.0), mstype.float16))
        return self.cast(kept, mstype.uint8)


class TileOperands(nn.Cell):
    """The arguments mask, bias, slopes and keep, those that the spec has, in the order of the signatures.

    Args:
        geometry: :class:`~flash_attention.ascend.geometry.Geometry` of the kernel.
        kept: what its mask tiles hold where a key is kept.
    """

    def __init__(self, geometry, kept):
        super().__init__(auto_prefix=False)
        spec = geometry.spec
        self.has_mask, self.has_bias = spec.mask_shape is not None, spec.bias_shape is not None
        self.has_slopes, self.has_dropout = spec.alibi_shape is not None, spec.dropout_rate > 0
        if self.has_mask:
            self.mask = PackMask(geometry, kept)
        if self.has_bias:
            self.bias, self.cast = PackTiles(spec.bias_shape, tile_axes(geometry, spec.bias_shape)), P.Cast()
        if self.has_slopes:
            self.slopes = PackSlopes(spec)
        if self.has_dropout:
            self.keep = PackKeep(geometry)

    def construct(self, query, bias, mask, slopes, seed):
        packed = ()
        if self.has_mask:
            packed = packed + (self.mask(mask),)
        if self.has_bias:
            packed = packed + (self.bias(self.cast(bias, mstype.float32)),)
        if self.has_slopes:
            packed = packed + (self.slopes(slopes),)
        if self.has_dropout:
            packed = packed + (self.keep(query, seed),)
        return packed


def constant_tensors(arrays):
    """A tuple of Tensors from a dict of arrays."""
    return tuple(Tensor(array) for array in arrays.values())
