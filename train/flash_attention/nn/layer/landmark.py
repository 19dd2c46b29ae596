"""Landmark attention in MindSpore: the calls, and which Cell computes one.

Idea, formulas and checks: `core.mechanisms.landmark`; all pairs: landmark_tiles.py; the best sections only:
landmark_retrieval.py. A graph asks a ``constexpr`` for the Cell of its shapes and options; so does PyNative, which also
looks at the pattern.
"""

import functools

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import landmark as shared
from flash_attention.core.validation import check_int
from flash_attention.nn.layer.landmark_retrieval import Retrieval
from flash_attention.nn.layer.landmark_tiles import AllPairs
from flash_attention.ops.functional import computable, flash_attention, info
from flash_attention.ops.host import is_eager
from flash_attention.ops.precision import OwnPrecision

LAYER = "fused_landmark_attention"


def fused_landmark_attention(q, k, v, is_mem, sm_scale=None, block_size=64, top_k_blocks=None):
    """Landmark attention (Mohtashami and Jaggi, 2023), causal; queries are the last Nq of the Nk positions.

    A landmark closes its section. A query sees the ordinary tokens of its own section up to itself, one by one, and
    each past section with the weight of its landmark, shared out by a softmax inside the section. Landmarks give no
    value. Without landmarks this is causal attention.

    Cost: the pairs of causal attention. With ``top_k_blocks`` (Nk / block_size + (k + 1) * block_size) pairs a query in
    PyNative, and what is not chosen is not read.

    Args:
        q (Tensor): (B, H, Nq, D); k, v: (B, H, Nk, D), Nq <= Nk; float16, bfloat16 or float32.
        is_mem (Tensor): which keys are landmarks, bool or int (Nk,) or (B, Nk). PyNative looks whether it is the
            pattern "last of every block_size keys"; a graph, which cannot, computes all Nq * Nk pairs and reads all
            keys: use the Cell ``FusedLandmarkAttention`` there.
        sm_scale (float): factor on the scores; default ``1 / sqrt(D)``.
        block_size (int): of the regular pattern, at least 2. It matters to speed only.
        top_k_blocks (int): a query sees only the k past sections whose landmarks score highest (the earlier one on
            ties); None = all. The choice has no gradient.

    Returns:
        Tensor (B, H, Nq, D) in v's dtype. A query that sees nothing (a landmark first of all) gives 0.

    Raises:
        ValueError, TypeError: shapes that do not fit, a block size below 2.
    """
    shapes, dtypes = (q.shape, k.shape, v.shape, is_mem.shape), (q.dtype, k.dtype, v.dtype, is_mem.dtype)
    scale = _check(LAYER, shapes, dtypes, sm_scale, block_size, top_k_blocks)
    if is_eager():
        cell = _cell_of_pattern(is_mem, shapes, scale, block_size, top_k_blocks)
    else:
        cell = _general(shapes[0], shapes[1], scale, top_k_blocks)
    mem = is_mem.astype(mstype.int32)
    return cell(q, k, v, mem).astype(v.dtype)


class FusedLandmarkAttention(nn.Cell):
    r"""Landmark attention of the regular pattern: the last of every ``block_size`` keys is a landmark.

    Args:
        n_prefix_q (int): blocks of keys before the first query, (Nk - Nq) / block_size, checked at every call.
            Default: None, any number of keys may precede.
        sm_scale (float): factor on the scores. Default: None, ``1 / sqrt(D)``.
        block_size (int): keys of a block with its landmark, at least 2. Default: 64.
        top_k_blocks (int): keyword only; as in ``fused_landmark_attention``, in both modes. Default: None.

    Inputs:
        - **q** (Tensor) - (B, H, Nq, D); **k**, **v** - (B, H, Nk, D), Nq <= Nk.

    Outputs:
        Tensor (B, H, Nq, D) in v's dtype.

    Raises:
        ValueError, TypeError: bad argument.
    """

    def __init__(self, n_prefix_q=None, sm_scale=None, block_size=64, *, top_k_blocks=None):
        super().__init__()
        check_int("FusedLandmarkAttention", "block_size", block_size, 2)
        if n_prefix_q is not None:
            check_int("FusedLandmarkAttention", "n_prefix_q", n_prefix_q, 0)
        self.n_prefix_q, self.sm_scale = n_prefix_q, sm_scale
        self.block_size, self.top_k_blocks = block_size, top_k_blocks

    def construct(self, q, k, v):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
        scale = _check("FusedLandmarkAttention", shapes, dtypes, self.sm_scale, self.block_size, self.top_k_blocks)
        cell = _regular(shapes[0], shapes[1], scale, self.block_size, self.top_k_blocks, self.n_prefix_q)
        return cell(q, k, v, None).astype(v.dtype)


# --- which Cell computes a call -------------------------------------------------------------------------------------
@constexpr
def _check(layer, shapes, dtypes, sm_scale, block_size, top_k_blocks):
    infos = list(map(info, shapes, dtypes))
    is_mem = infos[3] if len(infos) > 3 else None
    return shared.check_call(layer, *infos[:3], is_mem, sm_scale, block_size, top_k_blocks)


@constexpr
def _regular(query, key, scale, block, top_k, n_prefix_q):
    if n_prefix_q is not None:
        shared.check_prefix("FusedLandmarkAttention", query, key, n_prefix_q, block)
    return _regular_cell(query, key, scale, block, top_k)


@functools.lru_cache(maxsize=64)
def _regular_cell(query, key, scale, block, top_k):
    pattern = shared.regular(key[2], block)
    if not pattern.any():
        return _Causal(scale)
    if top_k is not None and top_k < pattern.sum():
        return _InFloat32(Retrieval(query, np.broadcast_to(pattern, (query[0], key[2])), scale, top_k))
    return _InFloat32(AllPairs(query[2], key[2], scale, block, None))


@constexpr
def _general(query, key, scale, top_k):
    return _general_cell(query[2], key[2], scale, top_k)


@functools.lru_cache(maxsize=64)
def _general_cell(q_len, kv_len, scale, top_k):
    return _InFloat32(AllPairs(q_len, kv_len, scale, 0, top_k))


@constexpr(check=False)
def _cell_of_pattern(is_mem, shapes, scale, block, top_k):
    """PyNative only: the Cell for a pattern whose values can be seen."""
    pattern = is_mem.asnumpy() != 0
    query, key = shapes[:2]
    if not pattern.any():
        return _Causal(scale)
    if shared.is_regular(pattern, block):
        return _regular_cell(query, key, scale, block, top_k)
    if top_k is not None and top_k < np.atleast_2d(pattern).sum(1).max():
        return _InFloat32(Retrieval(query, np.broadcast_to(pattern, (query[0], key[2])), scale, top_k))
    return _general_cell(query[2], key[2], scale, None)


class _Causal(nn.Cell):
    """No landmark anywhere: the core call."""

    def __init__(self, scale):
        super().__init__(auto_prefix=False)
        self.scale = scale

    def construct(self, q, k, v, mem):
        q, k, v = computable(q), computable(k), computable(v)
        return flash_attention(q, k, v, is_causal=True, scale=self.scale, layout="BNSD")


class _InFloat32(OwnPrecision):
    """``cell`` on float32 copies of the tensors: softmax and sums are not for 16 bits."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, q, k, v, mem):
        return self.cell(q.astype(mstype.float32), k.astype(mstype.float32), v.astype(mstype.float32), mem)
