"""Dynamic sparse attention in MindSpore: reorder per head, core calls over intervals of keys, order back.

sparse_reorder.py orders, sparse_windows.py attends; sparse_steps.py has the published steps one by one. Shared with
JAX, and the idea: `core.mechanisms.sparse`.
"""

from mindspore import nn
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import sparse as shared
from flash_attention.core.validation import check_scale, scale_or_default
from flash_attention.nn.layer.sparse_reorder import by_head, check_fits, compaction, pad, sorting, take
from flash_attention.nn.layer.sparse_windows import over_buckets, over_kept
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import info
from flash_attention.ops.host import is_eager


def dynamic_sparse_attention(
    q,
    k,
    v,
    q_idx,
    k_idx,
    sm_scale=None,
    sparsity_mode="hash",
    *,
    buffer_size=None,
    max_keys=None,
    engine=None
):  # fmt: skip
    """Causal attention over keys chosen by data, for each head (Pagliardini et al., 2023).

    With positions counted in the given tensors, query i sees the keys ``j <= i`` of its own bucket ('hash'), or all
    kept keys ``j <= i`` if it is kept itself ('qk').

    Args:
        q (Tensor): (B, Nq, H, D); k, v: (B, Nk, H, D); float16, bfloat16 or float32.
        q_idx, k_idx (Tensor): (B, Nq, H), (B, Nk, H). 'hash': bucket ids, any integers. 'qk': keep where True or > 0,
            of float or bool dtype.
        sm_scale (float): factor on the scores; default ``1 / sqrt(D)``.
        sparsity_mode (str): 'hash' or 'qk'.
        buffer_size (int, tuple): 'qk' only, see :func:`qk_sparse_attention`.
        max_keys (int): 'hash' only, see :func:`hash_sparse_attention`.
        engine (str): as in ``flash_attention.ops.flash_attention``.

    Returns:
        Tensor (B, Nq, H, D) in v's dtype; a query that sees nothing gives 0. Differentiable in q, k and v.

    Raises:
        KeyError: unknown mode. TypeError, ValueError: an index of a wrong dtype, shapes that do not fit.
    """
    _check_mode(sparsity_mode, buffer_size, max_keys)
    if sparsity_mode == "qk":
        return qk_sparse_attention(q, k, v, q_idx, k_idx, sm_scale, buffer_size=buffer_size, engine=engine)
    return hash_sparse_attention(q, k, v, q_idx, k_idx, sm_scale, max_keys=max_keys, engine=engine)


def hash_sparse_attention(q, k, v, q_bucket_idx, k_bucket_idx, sm_scale=None, *, max_keys=None, engine=None):
    """Causal attention among the tokens of a bucket; arguments as in :func:`dynamic_sparse_attention`.

    Cost: N^2 / (2 * buckets) pairs a head when buckets are balanced, beside a sort.

    Args:
        max_keys (int): keys in a window: those between the first key of the first and the last key of the last of 128
            queries sorted by bucket. Default: PyNative finds the need of each window; a graph computes all N keys.
            A bound skips work in graphs too; it must suffice: later keys are lost (an error in PyNative).
    """
    names = ("q_bucket_idx", "k_bucket_idx")
    _, scale = _prepare("hash_sparse_attention", "hash", names, q, k, v, q_bucket_idx, k_bucket_idx, sm_scale, None,
                        engine)  # fmt: skip
    q_ids, q_index, q_inverse = sorting(q_bucket_idx)
    k_ids, k_index, k_inverse = sorting(k_bucket_idx)
    out_dtype = v.dtype
    q, k, v = by_head(q), by_head(k), by_head(v)
    q, k, v = take(q, q_index, q_inverse), take(k, k_index, k_inverse), take(v, k_index, k_inverse)
    out = over_buckets(q, k, v, q_index, k_index, q_ids, k_ids, scale, max_keys, engine)
    return take(out, q_inverse, q_index).swapaxes(1, 2).astype(out_dtype)


def qk_sparse_attention(q, k, v, q_keep, k_keep, sm_scale=None, *, buffer_size=None, engine=None):
    """Causal attention of the kept queries over the kept keys; arguments as in :func:`dynamic_sparse_attention`.

    Cost: half of (kept queries) * (kept keys) pairs a head in PyNative, (buffer of queries) * (of keys) in a graph.

    Args:
        buffer_size (int, tuple): places for kept tokens of a head, an int or (queries, keys); default all. It must hold
            the tokens that are kept: later ones are lost (an error in PyNative).
    """
    sizes, scale = _prepare("qk_sparse_attention", "qk", ("q_keep", "k_keep"), q, k, v, q_keep, k_keep, sm_scale,
                            buffer_size, engine)  # fmt: skip
    q_index, q_slot, q_count = compaction(q_keep, sizes[0])
    k_index, k_slot, k_count = compaction(k_keep, sizes[1])
    out_dtype = v.dtype
    q, k, v = by_head(q), by_head(k), by_head(v)
    q, k, v = take(q, q_index, q_slot), take(k, k_index, k_slot), take(v, k_index, k_slot)
    q_pos, k_pos = pad(q_index, q_count, shared.QUERY_PAD), pad(k_index, k_count, shared.KEY_PAD)
    out = over_kept(q, k, v, q_pos, k_pos, scale, engine)
    return take(out, q_slot, q_index).swapaxes(1, 2).astype(out_dtype)


class DynamicSparseAttention(nn.Cell):
    r"""``dynamic_sparse_attention`` as a Cell: no parameters, options at construction.

    Args:
        sm_scale (float): factor on the scores. Default: None, ``1 / sqrt(D)``.
        sparsity_mode (str): 'hash' or 'qk'. Default: 'hash'.
        buffer_size (int, tuple), max_keys (int), engine (str): keyword only; as in ``dynamic_sparse_attention``.

    Inputs:
        - **q** (Tensor) - (B, Nq, H, D); **k**, **v** - (B, Nk, H, D).
        - **q_idx** (Tensor) - (B, Nq, H); **k_idx** - (B, Nk, H): bucket ids, or flags: **keep where True or > 0**.

    Outputs:
        Tensor (B, Nq, H, D).

    Raises:
        KeyError: unknown mode. ValueError, TypeError: bad argument.
    """

    def __init__(self, sm_scale=None, sparsity_mode="hash", *, buffer_size=None, max_keys=None, engine=None):
        super().__init__()
        shared.check_mode(sparsity_mode, buffer_size, max_keys)
        check_scale("DynamicSparseAttention", sm_scale, "sm_scale")
        ENGINES.check_name(engine, "DynamicSparseAttention")
        self.sm_scale, self.sparsity_mode = sm_scale, sparsity_mode
        self.buffer_size, self.max_keys, self.engine = buffer_size, max_keys, engine

    def construct(self, q, k, v, q_idx, k_idx):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        return dynamic_sparse_attention(
            q, k, v, q_idx, k_idx, self.sm_scale, self.sparsity_mode, buffer_size=self.buffer_size,
            max_keys=self.max_keys, engine=self.engine,
        )  # fmt: skip


# --- checks ---------------------------------------------------------------------------------------------------------
@constexpr
def _check_mode(mode, buffer_size, max_keys):
    shared.check_mode(mode, buffer_size, max_keys)


def _prepare(layer, mode, names, q, k, v, q_idx, k_idx, sm_scale, buffer_size, engine):
    """Check a call; ``(places for kept queries and keys, scale)``."""
    shapes = (q.shape, k.shape, v.shape, q_idx.shape, k_idx.shape)
    dtypes = (q.dtype, k.dtype, v.dtype, q_idx.dtype, k_idx.dtype)
    sizes, scale = _check(layer, mode, names, shapes, dtypes, sm_scale, buffer_size, engine)
    if mode == "qk" and is_eager():
        check_fits(layer, q_idx, sizes[0])
        check_fits(layer, k_idx, sizes[1])
    return sizes, scale


@constexpr
def _check(layer, mode, names, shapes, dtypes, sm_scale, buffer_size, engine):
    shared.check_call(layer, mode, names, *map(info, shapes, dtypes))
    ENGINES.check_name(engine, layer)
    sizes = shared.check_buffer_size(layer, buffer_size, (shapes[0][1], shapes[1][1]))
    return sizes, scale_or_default(layer, "sm_scale", sm_scale, shapes[0][-1])
