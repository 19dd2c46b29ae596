"""The published steps of dynamic sparse attention in MindSpore, one by one: order, pad, the two kernels."""

from mindspore import dtype as mstype
from mindspore import ops
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import sparse as shared
from flash_attention.core.validation import scale_or_default
from flash_attention.nn.layer.sparse_reorder import by_head, compaction, comparable, pad, rows, sorting, take
from flash_attention.nn.layer.sparse_windows import over_buckets, over_kept
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import computable, info
from flash_attention.ops.host import is_eager


def compact(keep_tensor=None, x=None, index=None, *, buffer_size=None):
    """Bring the kept rows of each head to the front, in time order.

    Args:
        keep_tensor (Tensor): (B, N, H), keep where True or > 0; x: (B, N, H, D). Either may come first.
        index (Tensor): (B, M, H) of an earlier call: only gather by it.
        buffer_size (int): M. Default: the largest count in PyNative, N in a graph.

    Returns:
        ``(compact_x (B, M, H, D), index (B, M, H), indices_per_head (B, H) or None)``. ``index`` holds the kept
        positions in time order, then dropped ones; the last result counts the kept ones, None when index was given.
    """
    if keep_tensor is not None and keep_tensor.ndim == 4:
        keep_tensor, x = x, keep_tensor
    size = _check_compact(x.shape, x.dtype, _info(keep_tensor), _info(index), buffer_size)
    if index is not None:
        return rows(by_head(x), index.swapaxes(1, 2)).swapaxes(1, 2).astype(x.dtype), index, None
    if is_eager():
        size = _needed(keep_tensor, size, buffer_size)
    index, _, count = compaction(keep_tensor, size)
    out = rows(by_head(x), index).swapaxes(1, 2).astype(x.dtype)
    return out, index.swapaxes(1, 2), count[..., 0]


def pad_index(index, indices_per_head, pad_idx=-1):
    """int32 copy of ``index`` (B, M, H) with ``pad_idx`` in the slots from ``indices_per_head`` (B, H) on."""
    return pad(index.swapaxes(1, 2), ops.expand_dims(indices_per_head, -1), pad_idx).swapaxes(1, 2)


def sort_bucketed_attention(qkv, qkv_bucket_idx):
    """Stable ascending sort of (B, N, H, D) along N by its bucket ids (B, N, H), separately for each head.

    Returns:
        ``(sorted_qkv, sorted_bucket_idx, sort_index)``; ``sort_index`` int32 (B, N, H) is each row's original position.
    """
    _check_sort(qkv.shape, qkv.dtype, _info(qkv_bucket_idx))
    ids, index, inverse = sorting(qkv_bucket_idx)
    out = take(by_head(qkv), index, inverse).swapaxes(1, 2)
    return out.astype(qkv.dtype), ids.swapaxes(1, 2).astype(qkv_bucket_idx.dtype), index.swapaxes(1, 2)


def hash_sparse_attention_kernel(
    q,
    k,
    v,
    q_idx,
    k_idx,
    q_hash,
    k_hash,
    sm_scale=None,
    *,
    max_keys=None,
    engine=None
):  # fmt: skip
    """Attention of reordered tokens: a query sees the keys of its bucket with ``q_idx >= k_idx``.

    Args:
        q, k, v (Tensor): (B, H, N, D), as :func:`sort_bucketed_attention` orders them (then transposed).
        q_idx, k_idx (Tensor): int (B, H, N): original positions. q_hash, k_hash: bucket ids, any integers. Both sides
            must be in ascending order of (bucket, position): an error in PyNative.
        sm_scale (float): default ``1 / sqrt(D)``. max_keys, engine: as in :func:`hash_sparse_attention`.

    Returns:
        Tensor (B, H, Nq, D) in v's dtype.
    """
    layer, names = "hash_sparse_attention_kernel", ("q_idx", "k_idx", "q_hash", "k_hash")
    scale = _prepare(layer, names, q, k, v, (q_idx, k_idx, q_hash, k_hash), sm_scale, engine)
    if is_eager():
        _check_order(layer, "q_hash", q_hash, q_idx)
        _check_order(layer, "k_hash", k_hash, k_idx)
    q_pos, k_pos = q_idx.astype(mstype.int32), k_idx.astype(mstype.int32)
    q_ids, k_ids = comparable(q_hash), comparable(k_hash)
    out = over_buckets(
        computable(q), computable(k), computable(v), q_pos, k_pos, q_ids, k_ids, scale, max_keys, engine
    )  # fmt: skip
    return out.astype(v.dtype)


def qk_sparse_attention_kernel(q, k, v, q_idx, k_idx, sm_scale=None, *, engine=None):
    """Attention of compacted tokens: a query sees the keys with ``q_idx >= k_idx``.

    Args:
        q, k, v (Tensor): (B, H, M, D), as :func:`compact` orders them (then transposed).
        q_idx, k_idx (Tensor): int (B, H, M): original positions from :func:`pad_index`, padded with -1 (queries) and
            1e9 (keys); ascending but for the queries' padding at the end: an error in PyNative.
        sm_scale (float): default ``1 / sqrt(D)``. engine: as in :func:`qk_sparse_attention`.

    Returns:
        Tensor (B, H, Mq, D) in v's dtype; 0 in padded slots.
    """
    layer = "qk_sparse_attention_kernel"
    scale = _prepare(layer, ("q_idx", "k_idx"), q, k, v, (q_idx, k_idx), sm_scale, engine)
    q_pos, k_pos = q_idx.astype(mstype.int32), k_idx.astype(mstype.int32)
    if is_eager():
        _check_order(layer, "q_idx", ops.where(q_pos < 0, q_pos * 0 + shared.KEY_PAD, q_pos))
        _check_order(layer, "k_idx", k_pos)
    out = over_kept(computable(q), computable(k), computable(v), q_pos, k_pos, scale, engine)
    return out.astype(v.dtype)


# --- checks ---------------------------------------------------------------------------------------------------------
def _prepare(layer, names, q, k, v, indices, sm_scale, engine):
    """Check a kernel's call; returns the scale."""
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    for index in indices:
        shapes, dtypes = shapes + (index.shape,), dtypes + (index.dtype,)
    return _check(layer, names, shapes, dtypes, sm_scale, engine)


@constexpr
def _check(layer, names, shapes, dtypes, sm_scale, engine):
    infos = list(map(info, shapes, dtypes))
    shared.check_kernel(layer, names, infos[:3], infos[3:])
    ENGINES.check_name(engine, layer)
    return scale_or_default(layer, "sm_scale", sm_scale, shapes[0][-1])


def _info(x):
    """``(shape, dtype)`` of a tensor for a ``constexpr``, None for None."""
    return None if x is None else (x.shape, x.dtype)


@constexpr
def _check_compact(shape, dtype, keep, index, buffer_size):
    keep, index = (None if x is None else info(*x) for x in (keep, index))
    shared.check_compact("compact", keep, info(shape, dtype), index)
    return shared.check_buffer_size("compact", buffer_size, (shape[1], shape[1]))[0]


@constexpr
def _check_sort(shape, dtype, ids):
    layer = "sort_bucketed_attention"
    shared.check_compact(layer, info(*ids), info(shape, dtype), None)
    shared.check_indices(layer, "qkv_bucket_idx", info(*ids), shape[:3], "integer")


@constexpr(check=False)
def _needed(keep, size, buffer_size):
    shared.check_fits("compact", keep.asnumpy(), size)
    return size if buffer_size is not None else shared.most_kept(keep.asnumpy())


@constexpr(check=False)
def _check_order(layer, name, *columns):
    shared.check_order(layer, name, *(column.asnumpy() for column in columns))
