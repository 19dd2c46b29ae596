"""Dynamic sparse attention in MindSpore: reorder per head, core calls over intervals of keys, order back.

Tiles of queries meet the window of keys that they see. PyNative reads the windows' widths and computes no more; a graph
needs them in advance, see ``buffer_size`` and ``max_keys``. Shared with JAX, and the idea: `core.mechanisms.sparse`.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms import sparse as shared
from flash_attention.core.validation import check_int, check_scale
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import computable, flash_attention, info
from flash_attention.ops.host import is_eager

# Primitives: a graph cannot expand every function of these names inside a bprop.
_reshape, _slice, _join = P.Reshape(), P.Slice(), P.Concat(0)
_gather, _select, _zeros_like = P.Gather(), P.Select(), P.ZerosLike()

TILE = 256  # queries that share a window of keys
STEP = 128  # widths are multiples of it, so that few shapes occur


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
        max_keys (int): keys in a window: those between the first key of the first and the last key of the last of 256
            queries sorted by bucket. Default: PyNative finds the need of each window; a graph computes all N keys.
            A bound skips work in graphs too; it must suffice: later keys are lost (an error in PyNative).
    """
    names = ("q_bucket_idx", "k_bucket_idx")
    places, _, scale = _prepare("hash_sparse_attention", "hash", names, q, k, v, q_bucket_idx, k_bucket_idx,
                                sm_scale, None, engine)  # fmt: skip
    q_ids, q_index, q_inverse = _sorting(q_bucket_idx, places[0])
    k_ids, k_index, k_inverse = _sorting(k_bucket_idx, places[1])
    out_dtype = v.dtype
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    q, k, v = _take(q, q_index, q_inverse), _take(k, k_index, k_inverse), _take(v, k_index, k_inverse)
    first, stop = shared.hash_intervals(_repeat, _along_last, ops.where, q_index, k_index, q_ids, k_ids)
    out = _attend(q, k, v, first, stop, scale, max_keys, engine)
    return _take(out, q_inverse, q_index).swapaxes(1, 2).astype(out_dtype)


def qk_sparse_attention(q, k, v, q_keep, k_keep, sm_scale=None, *, buffer_size=None, engine=None):
    """Causal attention of the kept queries over the kept keys; arguments as in :func:`dynamic_sparse_attention`.

    Cost: half of (kept queries) * (kept keys) pairs a head in PyNative, (buffer of queries) * (of keys) in a graph.

    Args:
        buffer_size (int, tuple): places for kept tokens of a head, an int or (queries, keys); default all. It must hold
            the tokens that are kept: later ones are lost (an error in PyNative).
    """
    places, sizes, scale = _prepare("qk_sparse_attention", "qk", ("q_keep", "k_keep"), q, k, v, q_keep, k_keep,
                                    sm_scale, buffer_size, engine)  # fmt: skip
    q_index, q_slot, q_count = _compaction(q_keep, sizes[0], places[0])
    k_index, k_slot, k_count = _compaction(k_keep, sizes[1], places[1])
    out_dtype = v.dtype
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    q, k, v = _take(q, q_index, q_slot), _take(k, k_index, k_slot), _take(v, k_index, k_slot)
    q_pos = _pad(q_index, q_count, shared.QUERY_PAD)
    k_pos = _pad(k_index, k_count, shared.KEY_PAD)
    first, stop = shared.qk_intervals(_repeat, _along_last, ops.where, q_pos, k_pos)
    out = _attend(q, k, v, first, stop, scale, None, engine)
    return _take(out, q_slot, q_index).swapaxes(1, 2).astype(out_dtype)


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
    size, place = _check_compact(x.shape, x.dtype, _info(keep_tensor), _info(index), buffer_size)
    if index is not None:
        return rows(_by_head(x), index.swapaxes(1, 2)).swapaxes(1, 2).astype(x.dtype), index, None
    if is_eager():
        size = _needed(keep_tensor, size, buffer_size)
    index, _, count = _compaction(keep_tensor, size, place)
    out = rows(_by_head(x), index).swapaxes(1, 2).astype(x.dtype)
    return out, index.swapaxes(1, 2), count[..., 0]


def pad_index(index, indices_per_head, pad_idx=-1):
    """int32 copy of ``index`` (B, M, H) with ``pad_idx`` in the slots from ``indices_per_head`` (B, H) on."""
    return _pad(index.swapaxes(1, 2), ops.expand_dims(indices_per_head, -1), pad_idx).swapaxes(1, 2)


def sort_bucketed_attention(qkv, qkv_bucket_idx):
    """Stable ascending sort of (B, N, H, D) along N by its bucket ids (B, N, H), separately for each head.

    Returns:
        ``(sorted_qkv, sorted_bucket_idx, sort_index)``; ``sort_index`` int32 (B, N, H) is each row's original position.
    """
    place = _check_sort(qkv.shape, qkv.dtype, _info(qkv_bucket_idx))
    ids, index, inverse = _sorting(qkv_bucket_idx, place)
    out = _take(_by_head(qkv), index, inverse).swapaxes(1, 2)
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
    layer, indices = "hash_sparse_attention_kernel", (q_idx, k_idx, q_hash, k_hash)
    names = ("q_idx", "k_idx", "q_hash", "k_hash")
    scale = _prepare_kernel(layer, names, q, k, v, indices, sm_scale, engine)
    if is_eager():
        _check_order(layer, "q_hash", q_hash, q_idx)
        _check_order(layer, "k_hash", k_hash, k_idx)
    q_pos, k_pos = q_idx.astype(mstype.int32), k_idx.astype(mstype.int32)
    first, stop = shared.hash_intervals(_repeat, _along_last, ops.where, q_pos, k_pos, _ids(q_hash), _ids(k_hash))
    out = _attend(computable(q), computable(k), computable(v), first, stop, scale, max_keys, engine)
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
    scale = _prepare_kernel(layer, ("q_idx", "k_idx"), q, k, v, (q_idx, k_idx), sm_scale, engine)
    q_pos, k_pos = q_idx.astype(mstype.int32), k_idx.astype(mstype.int32)
    if is_eager():
        _check_order(layer, "q_idx", ops.where(q_pos < 0, q_pos * 0 + shared.KEY_PAD, q_pos))
        _check_order(layer, "k_idx", k_pos)
    first, stop = shared.qk_intervals(_repeat, _along_last, ops.where, q_pos, k_pos)
    out = _attend(computable(q), computable(k), computable(v), first, stop, scale, None, engine)
    return out.astype(v.dtype)


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


# --- steps: tensors by head, (B, H, N, D) and (B, H, N) -------------------------------------------------------------
def _attend(q, k, v, first, stop, scale, max_keys, engine):
    """Core calls over tiles of queries. What nobody sees is zeroed: NaN there must not meet a weight 0."""
    place = _places(k.shape[2])
    key = place + ops.zeros_like(k[..., 0]).astype(mstype.int32)
    seen = ops.expand_dims(shared.covered(_repeat, _along_last, ops.where, first, stop, key), -1)
    alive = ops.expand_dims(stop > first, -1)
    q, k, v = _keep(alive, q), _keep(seen, k), _keep(seen, v)
    tiles = _tiles(q.shape[2])
    if is_eager():
        widths = _widths(first, stop, tiles, k.shape[2], max_keys)
    else:
        widths = _static_widths(tiles, k.shape[2], max_keys)
    outs = ()
    for n in range(len(tiles)):
        begin, end = tiles[n]
        part = q[:, :, begin:end], first[:, :, begin:end], stop[:, :, begin:end]
        outs = outs + (_tile(part, k, v, place, widths[n], scale, engine),)
    out = outs[0] if len(outs) == 1 else ops.concat(outs, 2)
    return _keep(alive, out)


def _tile(part, k, v, place, width, scale, engine):
    """Attention of one tile of queries over a window of ``width`` keys, which begins where its first query's do."""
    q, first, stop = part
    if width == 0:
        return ops.zeros_like(q)
    index = place
    if width < k.shape[2]:
        begin = ops.minimum(first[..., :1], k.shape[2] - width)
        index = begin + place[:width]
        k, v = rows(k, index), rows(v, index)
    index = ops.expand_dims(index, -2)
    mask = (index >= ops.expand_dims(first, -1)) & (index < ops.expand_dims(stop, -1))
    return flash_attention(q, k, v, mask=mask, scale=scale, engine=engine, layout="BNSD")


def _keep(mask, x):
    return ops.where(mask, x, ops.zeros_like(x))


def _by_head(x):
    return computable(x).swapaxes(1, 2)


def _repeat(count, step, state):
    for _ in range(count):
        state = step(*state)
    return state


def _along_last(x, index):
    return ops.gather_elements(x, x.ndim - 1, index)


def _ids(x):
    """Bucket ids in a type that MindSpore computes with: int32 where they fit."""
    return x.astype(mstype.int64 if _is_wide(x.dtype) else mstype.int32)


def _sorting(ids, place):
    """``(sorted ids, index, inverse)``, (B, H, N) each, of a stable sort; ids (B, N, H), place (N,)."""
    ids = _ids(ids).swapaxes(1, 2)
    length, rank = ids.shape[2], ids
    if ids.dtype == mstype.int64:  # equal ids get the same number below N, so that the product cannot overflow
        ascending, _ = ops.sort(ids)
        zero = ids.astype(mstype.int32) * 0
        rank = shared.bisect(_repeat, ops.where, length, zero, lambda index: _along_last(ascending, index) < ids)
    _, index = ops.sort(rank.astype(mstype.int64) * length + place)
    index = index.astype(mstype.int32)
    _, inverse = ops.sort(index)
    return _along_last(ids, index), index, inverse.astype(mstype.int32)


def _compaction(keep, size, place):
    """``(index (B, H, size), slot (B, H, N), count (B, H, 1))``: `slot` is the inverse, past the end if dropped."""
    keep = (keep if keep.dtype == mstype.bool_ else keep > 0).astype(mstype.int32).swapaxes(1, 2)
    rank, count = shared.ranks(keep, _cumulate)
    _, index = ops.sort(rank)
    last = ops.minimum(count, size)
    slot = ops.where(rank < last, rank, rank * 0 + size)
    return index[:, :, :size].astype(mstype.int32), slot, count


def _cumulate(x):
    return ops.cumsum(x, -1)


def _pad(index, count, pad_idx):
    """(B, H, M) and (B, H, 1): see :func:`pad_index`."""
    index = index.astype(mstype.int32)
    return ops.where(_places(index.shape[2]) < count, index, index * 0 + int(pad_idx))


def rows(x, index):
    """Rows of (B, H, N, D) by ``index`` (B, H, M); 0 where that is N."""
    batch, heads, length, dim = x.shape
    flat = _reshape(x, (-1, dim))
    flat = _join((flat, _zeros_like(_slice(flat, (0, 0), (1, dim)))))
    base = _reshape(_places(batch * heads) * length, (batch, heads, 1))
    index = _select(index < length, index + base, _zeros_like(index) + batch * heads * length)
    return _reshape(_gather(flat, _reshape(index, (-1,)), 0), (batch, heads, -1, dim))


class _Take(nn.Cell):
    """:func:`rows` whose transpose is a gather by the inverse index, not a scatter.

    That drops the cotangents of rows that the inverse does not point to: those of compacted padding, which none sees.
    """

    def construct(self, x, index, inverse):
        return rows(x, index)

    def bprop(self, x, index, inverse, out, d_out):
        return rows(d_out, inverse), _zeros_like(index), _zeros_like(inverse)


_take = _Take(auto_prefix=False)


# --- decided from shapes and options, or, in PyNative, from values --------------------------------------------------
@constexpr
def _check_mode(mode, buffer_size, max_keys):
    shared.check_mode(mode, buffer_size, max_keys)


@constexpr
def _is_wide(dtype):
    return str(dtype).lower() in ("int64", "uint64", "uint32")


@constexpr
def _places(length):
    return Tensor(np.arange(length, dtype=np.int32))


@constexpr
def _tiles(length):
    """((begin, end), ...) of the tiles of queries."""
    return tuple((begin, min(begin + TILE, length)) for begin in range(0, length, TILE))


@constexpr
def _static_widths(tiles, length, max_keys):
    return (_bound(length, max_keys),) * len(tiles)


def _bound(length, max_keys):
    return length if max_keys is None else min(length, check_int("hash_sparse_attention", "max_keys", max_keys, 1))


@constexpr(check=False)
def _widths(first, stop, tiles, length, max_keys):
    """Keys in the window of each tile: what its queries need, rounded up."""
    first, stop = first.asnumpy(), stop.asnumpy()
    needs = [int((stop[..., end - 1] - first[..., begin]).max()) for begin, end in tiles]
    if max(needs) > _bound(length, max_keys):
        need = "at least {}, the keys that {} queries span".format(max(needs), TILE)
        raise invalid_value("hash_sparse_attention", "max_keys", need, max_keys)
    return tuple(min(length, -(-need // STEP) * STEP) for need in needs)


def _prepare(layer, mode, names, q, k, v, q_idx, k_idx, sm_scale, buffer_size, engine):
    """Check a call; ``((places of queries, of keys), buffer sizes, scale)``."""
    shapes = (q.shape, k.shape, v.shape, q_idx.shape, k_idx.shape)
    dtypes = (q.dtype, k.dtype, v.dtype, q_idx.dtype, k_idx.dtype)
    places, sizes, scale = _check(layer, mode, names, shapes, dtypes, sm_scale, buffer_size, engine)
    if mode == "qk" and is_eager():
        _check_fits(layer, q_idx, sizes[0])
        _check_fits(layer, k_idx, sizes[1])
    return places, sizes, scale


@constexpr
def _check(layer, mode, names, shapes, dtypes, sm_scale, buffer_size, engine):
    shared.check_call(layer, mode, names, *map(info, shapes, dtypes))
    ENGINES.check_name(engine, layer)
    lengths = shapes[0][1], shapes[1][1]
    sizes = shared.check_buffer_size(layer, buffer_size, lengths)
    places = tuple(Tensor(np.arange(length, dtype=np.int32)) for length in lengths)
    return places, sizes, _scale(layer, sm_scale, shapes[0])


def _prepare_kernel(layer, names, q, k, v, indices, sm_scale, engine):
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    for index in indices:
        shapes, dtypes = shapes + (index.shape,), dtypes + (index.dtype,)
    return _check_kernel(layer, names, shapes, dtypes, sm_scale, engine)


@constexpr
def _check_kernel(layer, names, shapes, dtypes, sm_scale, engine):
    infos = list(map(info, shapes, dtypes))
    shared.check_kernel(layer, names, infos[:3], infos[3:])
    ENGINES.check_name(engine, layer)
    return _scale(layer, sm_scale, shapes[0])


def _scale(layer, sm_scale, shape):
    return float(shape[-1]) ** -0.5 if sm_scale is None else check_scale(layer, sm_scale, "sm_scale")


def _info(x):
    """``(shape, dtype)`` of a tensor for a ``constexpr``, None for None."""
    return None if x is None else (x.shape, x.dtype)


@constexpr
def _check_compact(shape, dtype, keep, index, buffer_size):
    keep, index = (None if x is None else info(*x) for x in (keep, index))
    shared.check_compact("compact", keep, info(shape, dtype), index)
    size, _ = shared.check_buffer_size("compact", buffer_size, (shape[1], shape[1]))
    return size, Tensor(np.arange(shape[1], dtype=np.int32))


@constexpr
def _check_sort(shape, dtype, ids):
    layer = "sort_bucketed_attention"
    shared.check_compact(layer, info(*ids), info(shape, dtype), None)
    shared.check_indices(layer, "qkv_bucket_idx", info(*ids), shape[:3], "integer")
    return Tensor(np.arange(shape[1], dtype=np.int32))


@constexpr(check=False)
def _needed(keep, size, buffer_size):
    shared.check_fits("compact", keep.asnumpy(), size)
    return size if buffer_size is not None else shared.most_kept(keep.asnumpy())


@constexpr(check=False)
def _check_fits(layer, keep, size):
    shared.check_fits(layer, keep.asnumpy(), size)


@constexpr(check=False)
def _check_order(layer, name, *columns):
    shared.check_order(layer, name, *(column.asnumpy() for column in columns))
