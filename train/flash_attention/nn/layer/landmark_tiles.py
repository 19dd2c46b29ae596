"""Landmark attention of all pairs in MindSpore: tiles of queries against the keys up to them, forward and backward.

landmark.py -> **AllPairs** -> core.mechanisms.landmark (one tile's softmax over groups and its gradient). The groups of
a tile are blocks of the regular pattern, or sections by their numbers with any other one.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import landmark as shared
from flash_attention.nn.layer.landmark_retrieval import keep_best
from flash_attention.ops.portable.scores import join_rows, matmul, matmul_nt, swap, take_rows, zeros_like

ROWS = 256  # queries of a tile
_largest, _total = P.ReduceMax(), P.ReduceSum()
_transpose, _reshape = P.Transpose(), P.Reshape()


class AllPairs(nn.Cell):
    """``(q, k, v, mem) -> out`` of fixed lengths, float32; scores are formed again for the gradient, tile by tile.

    Args:
        block: of the regular pattern, where ``mem`` is None; 0 = ``mem`` int32 (Nk,) or (B, Nk) is given.
        top_k: None, or how many past sections count (``block`` = 0 only).
    """

    def __init__(self, q_len, kv_len, scale, block, top_k):
        super().__init__(auto_prefix=False)
        self.scale, self.kv_len, self.block = scale, kv_len, block
        first, self.tiles = kv_len - q_len, ()
        for begin in range(0, q_len, ROWS):
            count = min(ROWS, q_len - begin)
            stop = first + begin + count  # keys up to the tile's last query, in whole blocks
            keys = -(-stop // block) * block if block else kv_len
            position = Tensor(np.arange(first + begin, stop, dtype=np.int32)[:, None])
            self.tiles += ((begin, count, keys, position),)
        self.padded = self.tiles[-1][2]
        self.pad = None
        if self.padded > kv_len:
            self.pad = Tensor(np.zeros((1, 1, self.padded - kv_len, 1), np.float32))
        self.key = Tensor(np.arange(self.padded, dtype=np.int32)[None])
        self.pattern = Tensor(shared.regular(self.padded, block)) if block else None
        self.zeros = Tensor(np.zeros((block,), np.float32)) if block else None
        self.top_k = top_k if top_k is not None and top_k < kv_len else None

    def construct(self, q, k, v, mem):
        """The output."""
        k, v, pattern, section = self.prepare(k, v, mem)
        outs = ()
        for begin, count, keys, position in self.tiles:
            k_part, v_part = take_rows(k, 0, keys), take_rows(v, 0, keys)
            p, g, grouping, _ = self.weights(take_rows(q, begin, count), k_part, position, keys, pattern, section)
            outs = outs + (matmul(grouping[2](g) * p, v_part),)
        return outs[0] if len(outs) == 1 else join_rows(outs)

    def bprop(self, q, k, v, mem, out, d_out):
        """Gradients, the last tile first: its keys include those of all others."""
        k, v, pattern, section = self.prepare(k, v, mem)
        delta = _total(d_out * out, -1)
        d_qs, d_k, d_v, after = (), None, None, 0
        for begin, count, keys, position in self.tiles[::-1]:
            k_part, v_part, q_part = take_rows(k, 0, keys), take_rows(v, 0, keys), take_rows(q, begin, count)
            d_o = take_rows(d_out, begin, count)
            p, g, grouping, past = self.weights(q_part, k_part, position, keys, pattern, section)
            d_w = matmul_nt(d_o, v_part)
            row = take_rows(_reshape(delta, delta.shape + (1,)), begin, count)
            w, d_s = shared.group_gradient(ops.where, grouping, p, g, d_w, row, self.columns(pattern, keys), past)
            d_s = d_s * self.scale
            d_qs = (matmul(d_s, k_part),) + d_qs
            d_k = self.collect(d_k, matmul(swap(d_s), q_part), keys, after)
            d_v = self.collect(d_v, matmul(swap(w), d_o), keys, after)
            after = keys
        d_q = d_qs[0] if len(d_qs) == 1 else join_rows(d_qs)
        d_mem = None if mem is None else zeros_like(mem)
        return d_q, take_rows(d_k, 0, self.kv_len), take_rows(d_v, 0, self.kv_len), d_mem

    def collect(self, total, part, keys, length):
        """``total`` (of ``length`` keys or more) plus ``part``, which covers its first ``keys``."""
        if total is None:
            return part
        if self.padded == keys:
            return total + part
        return join_rows((take_rows(total, 0, keys) + part, take_rows(total, keys, self.padded - keys)))

    def prepare(self, k, v, mem):
        """Keys and values of whole blocks, landmarks' values 0; the pattern (1|B, 1, 1, K) and sections (B, K)."""
        if self.block:
            pattern, section = self.pattern, None
        else:
            mem = mem + zeros_like(mem) if mem.ndim == 2 else mem + ops.zeros((k.shape[0], 1), mstype.int32)
            pattern = _reshape(mem, (k.shape[0], 1, 1, self.kv_len)) > 0
            section = ops.cumsum(mem, -1) - mem
        if self.pad is not None:
            pad = zeros_like(take_rows(k, 0, 1)) + self.pad
            k, v = join_rows((k, pad)), join_rows((v, pad))
        values = _reshape(pattern, (-1, 1, self.padded, 1))
        return k, ops.where(values, zeros_like(v), v), pattern, section

    def columns(self, pattern, keys):
        """The pattern of the first ``keys`` keys."""
        return pattern[:keys] if self.block else pattern

    def weights(self, q, k, position, keys, pattern, section):
        """``(p, g, grouping, past)`` of a tile, see the core."""
        scores = matmul_nt(q, k) * self.scale
        is_landmark, key = self.columns(pattern, keys), self.key[:, :keys]
        if self.block:
            group, own_section = self.key[:, : keys // self.block], position // self.block
            grouping = self.by_block()
        else:
            group = key
            own_section = ops.gather(section, _reshape(position, (-1,)), 1)
            own_section = _reshape(own_section, (section.shape[0], 1, -1, 1))
            grouping = _by_section(section)
        seen = ops.logical_and(ops.logical_not(is_landmark), key <= position)
        past, own = group < own_section, group == own_section
        p, a = shared.group_softmax(ops.where, ops.exp, ops.log, grouping, scores, seen, is_landmark, past, own)
        if self.top_k is not None:
            a = keep_best(a, past, self.top_k)
        peak = _largest(a, -1)
        peak = _reshape(ops.where(peak > shared.FINITE, peak, 0.0), peak.shape + (1,))
        e = ops.exp(a - peak)
        mass = _reshape(_total(e, -1), peak.shape)
        return p, e / ops.where(mass > 0.0, mass, 1.0), grouping, past

    def by_block(self):
        """Grouping by blocks of consecutive keys."""
        size, zeros = self.block, self.zeros

        def split(x):
            return _reshape(x, x.shape[:3] + (-1, size))

        def largest(x):
            return _largest(split(x), -1)

        def total(x):
            return _total(split(x), -1)

        def spread(x):
            return _reshape(_reshape(x, x.shape + (1,)) + zeros, x.shape[:3] + (-1,))

        return largest, total, spread


@constexpr
def _row_starts(batch, length):
    """(B, 1): where each batch row begins among all of them."""
    return Tensor((np.arange(batch, dtype=np.int32) * length)[:, None])


def _by_section(section):
    """Grouping by the section number (B, K) of each key, along the first axis of a transposed tile."""
    batch, length = section.shape
    index = _reshape(section + _row_starts(batch, length), (-1,))

    def turned(x):
        x = _transpose(x, (0, 3, 1, 2))
        return _reshape(x, (batch * length,) + x.shape[2:])

    def back(x):
        return _transpose(_reshape(x, (batch, length) + x.shape[1:]), (0, 2, 3, 1))

    def largest(x):
        return back(ops.unsorted_segment_max(turned(x), index, batch * length))

    def total(x):
        return back(ops.unsorted_segment_sum(turned(x), index, batch * length))

    def spread(x):
        return back(ops.gather(turned(x), index, 0))

    return largest, total, spread
