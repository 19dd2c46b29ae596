"""Retrieval of landmark attention in MindSpore: only the best past sections of each query are gathered, and its own."""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from flash_attention.core.mechanisms import landmark as shared
from flash_attention.nn.layer.sparse_reorder import rows as rows_of
from flash_attention.nn.layer.top_k import top_k
from flash_attention.ops.portable.scores import join_rows, matmul, matmul_nt

_reshape = P.Reshape()


def keep_best(logits, past, count):
    """Logits (.., S) with -inf for the past sections beyond the ``count`` best."""
    chosen = best_of(ops.where(past, logits, shared.NONE), count)
    return ops.where(ops.logical_and(past, ops.logical_not(chosen)), shared.NONE, logits)


def best_of(logits, count):
    """Boolean like logits (.., S): the ``count`` best, the earlier one on ties; -inf never."""
    return ops.logical_and(top_k(logits, count), logits > shared.FINITE)


class Retrieval(nn.Cell):
    """``(q, k, v, mem) -> out``: only the ``top_k`` best past sections of each query are gathered, and its own."""

    def __init__(self, query, pattern, scale, top_k):
        super().__init__(auto_prefix=False)
        members, landmarks = shared.tables(pattern)
        batch, heads, q_len, dim = query
        length = pattern.shape[1]
        self.scale, self.top_k, self.length = scale, top_k, length
        self.count, self.width = landmarks.shape[1], members.shape[2]
        landmarks = np.where(landmarks < 0, length, landmarks)[:, None].repeat(heads, 1)
        self.landmarks = Tensor(landmarks.astype(np.int32))  # (B, H, S), N where there is none
        self.exists = Tensor(landmarks[:, :, None] < length)
        self.members = Tensor(np.where(members < 0, length, members).reshape(-1, members.shape[2]))
        self.row_of_batch = Tensor((np.arange(batch, dtype=np.int32) * members.shape[1])[:, None, None, None])
        self.order = Tensor(np.arange(self.count, dtype=np.int32))
        section, step = shared.sections(pattern)[:, None, :, None], shared.RETRIEVED // ((top_k + 1) * self.width * dim)
        step, self.tiles = max(1, min(q_len, step // (batch * heads))), ()
        for begin in range(0, q_len, step):
            row = np.arange(begin, min(begin + step, q_len), dtype=np.int32)
            place = row + length - q_len
            own = Tensor(np.ascontiguousarray(section[:, :, place].repeat(heads, 1)))
            self.tiles += ((begin, len(row), own, Tensor(place[:, None, None])),)

    def construct(self, q, k, v, mem):
        """The output, a tile of queries after the other."""
        keys = rows_of(k, self.landmarks)
        outs = ()
        for begin, count, own, place in self.tiles:
            outs = outs + (self.tile(q[:, :, begin : begin + count], k, v, keys, own, place),)
        return outs[0] if len(outs) == 1 else join_rows(outs)

    def tile(self, q, k, v, landmark_keys, own, place):
        """Queries (B, H, R, D) of sections ``own`` (B, H, R, 1) at ``place`` (R, 1, 1)."""
        batch, heads, count, dim = q.shape
        logits = matmul_nt(q, landmark_keys) * self.scale
        past = ops.logical_and(self.order < own, self.exists)
        chosen = best_of(ops.stop_gradient(ops.where(past, logits, shared.NONE)), self.top_k)
        index, _ = ops.sort(ops.where(chosen, self.order, self.count))  # the chosen ones first
        index = index[..., : self.top_k]
        valid = index < self.count
        logit = ops.gather_elements(logits, 3, ops.minimum(index, self.count - 1))
        group = ops.concat((own, index), -1) + self.row_of_batch  # (B, H, R, k + 1)
        token = _reshape(ops.gather(self.members, _reshape(group, (-1,)), 0), group.shape + (self.width,))
        valid = ops.concat((own >= 0, valid), -1)
        seen = ops.logical_and(
            ops.logical_and(token < self.length, token <= place), _reshape(valid, valid.shape + (1,))
        )
        token = _reshape(ops.where(seen, token, self.length), (batch, heads, -1))
        shape = (batch * heads * count, 1, (self.top_k + 1) * self.width, dim)
        k, v = _reshape(rows_of(k, token), shape), _reshape(rows_of(v, token), shape)
        scores = matmul_nt(_reshape(q, (-1, 1, 1, dim)), k) * self.scale
        p, lse = _safe_softmax(_reshape(scores, seen.shape), seen)
        a, alive = ops.concat((lse[..., :1], logit), -1), ops.concat((seen[..., :1, :].any(-1), valid[..., 1:]), -1)
        g, _ = _safe_softmax(a, alive)
        w = _reshape(_reshape(g, g.shape + (1,)) * p, (batch * heads * count, 1, 1, -1))
        return _reshape(matmul(w, v), q.shape)


def _safe_softmax(x, seen):
    """``(softmax, LSE)`` along the last axis over what is seen; 0 where nothing is. Gradients are finite."""
    x = ops.where(seen, x, -1e30)
    peak = ops.stop_gradient(x.max(-1, keepdims=True))
    e = ops.where(seen, ops.exp(x - peak), 0.0)
    mass = e.sum(-1, keepdims=True)
    mass = ops.where(mass > 0.0, mass, 1.0)
    lse = peak + ops.log(mass)
    return e / mass, lse.squeeze(-1)
