"""The operator's tensor arguments in MindSpore operators: mask, real_shift, drop_mask and padded heads.

mapping (decisions) -> **tensors** -> passes (the operator and what surrounds it). Every method makes the rows
``first .. first + rows`` of its tensor, so that nothing larger than asked for is formed. Sizes are static.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from flash_attention.core import dropout
from flash_attention.ops.aclnn import mapping, model

_INT_MIN = -(2**31)
_LARGEST = {"float16": 65504.0, "bfloat16": 3.0e38}  # real_shift is clipped here: -inf would poison the gradient


def signed(value):
    """A uint32 as the int32 of the same bits: Ascend multiplies int32, not uint32."""
    return int(np.array(value, np.uint32).view(np.int32))


class Arguments(nn.Cell):
    """Common base of both passes of one spec."""

    def __init__(self, spec):
        super().__init__(auto_prefix=False)
        self.map = mapped = mapping.map_spec(spec)
        band = spec.band
        self.sizes = (spec.batch, spec.heads, spec.q_len, spec.kv_len)
        self.head_dim, self.kv_heads, self.group = spec.head_dim, spec.kv_heads, spec.group
        self.scale, self.dtype = spec.scale, getattr(mstype, spec.dtype)
        self.left, self.right, self.prev, self.next = band.left, band.right, band.prev, band.next
        self.block, self.offset = spec.block_size, spec.offset
        self.compact, self.segments, self.kv_lengths = spec.compact_mask, spec.segments, spec.kv_lengths
        self.has_mask = spec.mask_shape is not None and not spec.compact_mask
        self.mask_rows = self.has_mask and spec.mask_shape[2] != 1
        self.bias_shape, self.alibi, self.sinks = spec.bias_shape, spec.alibi_shape is not None, spec.sinks
        self.q_lengths, self.rate = spec.q_lengths, spec.dropout_rate
        self.explicit = mapped.mask == "explicit"
        self.mask_shape = mapped.mask_shape
        self.shift_shape = (spec.batch if mapping.shift_varies(spec) else 1, spec.heads)
        self.shift_factor = 1.0
        if (self.bias_shape is not None or self.alibi) and mapping.SCALE_MULTIPLIES_REAL_SHIFT:
            self.shift_factor = 1.0 / spec.scale
        self.largest = _LARGEST.get(spec.dtype, 3.0e38)
        self.i = Tensor(np.arange(spec.q_len, dtype=np.int32).reshape(1, 1, -1, 1))
        self.j = Tensor(np.arange(spec.kv_len, dtype=np.int32).reshape(1, 1, 1, -1))
        self.triangle = Tensor(model.triangle()) if mapped.mask == "compact" else None
        live = mapping.live_rows(spec)
        self.dead_rows = None if live is None or self.explicit else Tensor(~live.reshape(1, 1, -1))
        if self.compact:
            position = np.arange(spec.q_len) + spec.offset
            self.own_rows = Tensor((position % self.block).astype(np.int32))
            self.own_columns = Tensor((np.arange(spec.kv_len) % self.block).astype(np.int32))
        self._init_dropout(spec)

    def _init_dropout(self, spec):
        if not spec.dropout_rate:
            return
        self.m1, self.m2 = signed(dropout._M1), signed(dropout._M2)
        self.golden = signed(dropout._GOLDEN)
        self.n15, self.n16, self.low15, self.low16, self.top = [
            Tensor(np.full((1, 1, 1, 1), value, np.int32)) for value in (15, 16, 2**17 - 1, 2**16 - 1, _INT_MIN)
        ]
        self.threshold = signed(dropout.threshold(spec.dropout_rate) ^ 0x80000000)
        first_row, first_head, self.first_query, first_key = spec.origin
        column = dropout.col_key(np, np.arange(first_key, first_key + spec.kv_len)).view(np.int32)
        self.column = Tensor(column.reshape(1, 1, 1, -1))
        self.b = Tensor(np.arange(first_row, first_row + spec.batch, dtype=np.int32).reshape(-1, 1, 1, 1))
        self.h = Tensor(np.arange(first_head, first_head + spec.heads, dtype=np.int32).reshape(1, -1, 1, 1))
        order = np.arange(8) if model.DROP_MASK_BITORDER == "little" else np.arange(7, -1, -1)
        self.bits = Tensor((1 << order).astype(np.int32))

    def positions(self, first, rows, q_offset):
        """Positions of the rows, int32 (1|B, 1, rows, 1)."""
        index = self.i[:, :, first : first + rows]
        if self.offset is None:
            return index + ops.cast(ops.reshape(q_offset, (-1, 1, 1, 1)), mstype.int32)
        return index + self.offset

    def keep(self, first, rows, mask, q_ids, kv_ids, kv_lengths, q_offset):
        """What the rows see, query lengths aside: bool (1|B, 1|N, rows, Sk)."""
        p, j = self.positions(first, rows, q_offset), self.j
        seen = j >= 0
        if self.left is not None:
            seen = ops.logical_and(seen, j - p >= -self.left)
        if self.right is not None:
            seen = ops.logical_and(seen, j - p <= self.right)
        if self.prev is not None or self.next is not None or self.compact:
            blocks = P.FloorDiv()(j, self.block) - P.FloorDiv()(p, self.block)
            if self.prev is not None:
                seen = ops.logical_and(seen, blocks >= -self.prev)
            if self.next is not None:
                seen = ops.logical_and(seen, blocks <= self.next)
            if self.compact:
                own = P.Gather()(ops.cast(mask, mstype.int32), self.own_rows[first : first + rows], 0)
                own = P.Gather()(own, self.own_columns, 1)
                seen = ops.logical_and(seen, ops.logical_or(blocks != 0, own > 0))
        if self.has_mask:
            seen = ops.logical_and(seen, mask[:, :, first : first + rows] if self.mask_rows else mask)
        if self.segments:
            q_ids = ops.reshape(q_ids[:, first : first + rows], (-1, 1, rows, 1))
            seen = ops.logical_and(seen, q_ids == ops.reshape(kv_ids, (-1, 1, 1, self.sizes[3])))
        if self.kv_lengths:
            seen = ops.logical_and(seen, j < ops.reshape(kv_lengths, (-1, 1, 1, 1)))
        return ops.broadcast_to(seen, (-1, -1, rows, self.sizes[3]))

    def attn_mask(self, keep):
        """The operator's mask: None, the constant triangle, or the explicit one; uint8, 1 = discard."""
        if not self.explicit:
            return self.triangle
        discard = ops.cast(ops.logical_not(keep), mstype.uint8)
        if len(self.mask_shape) == 2:
            return ops.reshape(discard, self.mask_shape)
        return ops.broadcast_to(discard, self.mask_shape)

    def dead(self, keep, q_lengths):
        """bool (1|B, 1|N, Sq), True where a query sees no key; None where every query sees one."""
        dead = self.dead_rows
        if self.explicit:
            dead = ops.logical_not(P.ReduceAny()(keep, -1))
        if self.q_lengths:
            after = ops.reshape(self.i, (1, 1, -1)) >= ops.reshape(q_lengths, (-1, 1, 1))
            dead = after if dead is None else ops.logical_or(dead, after)
        return dead

    def distance(self, first, rows, q_offset):
        """ALiBi's |p - j|, float32 (1|B, 1, rows, Sk)."""
        return ops.abs(ops.cast(self.positions(first, rows, q_offset) - self.j, mstype.float32))

    def added(self, first, rows, bias, slopes, q_offset):
        """What is added to the scaled scores: bias and ALiBi, float32; the spec has at least one of them."""
        total = None
        if self.bias_shape is not None:
            total = ops.cast(bias[:, :, first : first + rows] if self.bias_shape[2] != 1 else bias, mstype.float32)
        if self.alibi:
            slopes = ops.cast(ops.reshape(slopes, (-1, self.sizes[1], 1, 1)), mstype.float32)
            alibi = -slopes * self.distance(first, rows, q_offset)
            total = alibi if total is None else total + alibi
        return total

    def real_shift(self, bias, slopes, q_offset):
        """bias and ALiBi in the operator's terms: the query's dtype, (1|B, N, Sq | 1024, Sk); None without them."""
        if self.map.shift_rows is None:
            return None
        first, rows = self.map.shift_rows
        total = self.added(first, rows, bias, slopes, q_offset) * self.shift_factor
        total = ops.clip_by_value(total, Tensor(-self.largest, mstype.float32), Tensor(self.largest, mstype.float32))
        return ops.cast(ops.broadcast_to(total, self.shift_shape + (rows, self.sizes[3])), self.dtype)

    def _mix(self, x):
        x = ops.bitwise_xor(x, self._shift_right(x, self.n16, self.low16)) * self.m1
        x = ops.bitwise_xor(x, self._shift_right(x, self.n15, self.low15)) * self.m2
        return ops.bitwise_xor(x, self._shift_right(x, self.n16, self.low16))

    def _shift_right(self, x, count, low):
        # int32 shifts carry the sign; the mask makes the shift logical.
        return ops.bitwise_and(P.RightShift()(x, count), low)

    def kept(self, first, rows, seed):
        """``core.dropout.keep`` on int32 bits: bool (B, N, rows, Sk)."""
        state = self._mix(ops.reshape(ops.cast(seed, mstype.int32), (1, 1, 1, 1)))
        for index in (self.b, self.h, self.i[:, :, first : first + rows] + self.first_query):
            state = self._mix(ops.bitwise_xor(state, (index + 1) * self.golden))
        x = ops.bitwise_xor(state, self.column) * self.m1
        x = ops.bitwise_xor(x, self._shift_right(x, self.n15, self.low15)) * self.m2
        return ops.bitwise_xor(x, self.top) >= self.threshold

    def drop_mask(self, seed):
        """The operator's drop_mask: uint8 (B, N, Sq, Sk // 8), a bit 1 = keep; None without dropout."""
        if not self.rate:
            return None
        batch, heads, q_len, kv_len = self.sizes
        kept = ops.cast(self.kept(0, q_len, seed), mstype.int32)
        packed = ops.reshape(kept, (batch, heads, q_len, kv_len // 8, 8)) * self.bits
        return ops.cast(P.ReduceSum()(packed, -1), mstype.uint8)

    def widen(self, x, width, column=None):
        """``x`` (B, N, S, head_dim) with zeros up to ``width`` columns; ``column`` (B, N, S, 1) comes first of them."""
        more = width - self.head_dim
        if column is not None:
            x = P.Concat(3)((x, column))
            more -= 1
        if more == 0:
            return x
        return P.Concat(3)((x, ops.zeros(x.shape[:3] + (more,), x.dtype)))
