"""The order of tokens in MindSpore, a head at a time: by bucket, or kept ones first; there and back by gathers."""

from mindspore import dtype as mstype
from mindspore import nn, ops
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import sparse as shared
from flash_attention.ops.functional import computable, counted

# Primitives: a graph cannot expand every function of these names inside a bprop.
_reshape, _slice, _join = P.Reshape(), P.Slice(), P.Concat(0)
_gather, _select, _zeros_like = P.Gather(), P.Select(), P.ZerosLike()


def by_head(x):
    """(B, N, H, D) -> (B, H, N, D), in a dtype that MindSpore computes with."""
    return computable(x).swapaxes(1, 2)


def repeat(count, step, state):
    """``state = step(*state)``, ``count`` times."""
    for _ in range(count):
        state = step(*state)
    return state


def along_last(x, index):
    """Gather along the last axis."""
    return ops.gather_elements(x, x.ndim - 1, index)


def comparable(ids):
    """Bucket ids in a type that MindSpore computes with: int32 where they fit."""
    return ids.astype(mstype.int64 if _is_wide(ids.dtype) else mstype.int32)


def sorting(ids):
    """``(sorted ids, index, inverse)``, (B, H, N) each, of a stable sort of ids (B, N, H) along N."""
    ids = comparable(ids).swapaxes(1, 2)
    length, rank = ids.shape[2], ids
    if ids.dtype == mstype.int64:  # equal ids get the same number below N, so that the product cannot overflow
        ascending, _ = ops.sort(ids)
        zero = ids.astype(mstype.int32) * 0
        rank = shared.bisect(repeat, ops.where, length, zero, lambda index: along_last(ascending, index) < ids)
    _, index = ops.sort(rank.astype(mstype.int64) * length + counted(length))
    index = index.astype(mstype.int32)
    _, inverse = ops.sort(index)
    return along_last(ids, index), index, inverse.astype(mstype.int32)


def compaction(keep, size):
    """``(index (B, H, size), slot (B, H, N), count (B, H, 1))`` of flags (B, N, H).

    ``slot`` is the inverse of ``index``, past the end where a token is dropped.
    """
    keep = (keep if keep.dtype == mstype.bool_ else keep > 0).astype(mstype.int32).swapaxes(1, 2)
    rank, count = shared.ranks(keep, _cumulate)
    _, index = ops.sort(rank)
    last = ops.minimum(count, size)
    slot = ops.where(rank < last, rank, rank * 0 + size)
    return index[:, :, :size].astype(mstype.int32), slot, count


def _cumulate(x):
    return ops.cumsum(x, -1)


def pad(index, count, pad_idx):
    """int32 copy of ``index`` (B, H, M) with ``pad_idx`` in the slots from ``count`` (B, H, 1) on."""
    index = index.astype(mstype.int32)
    return ops.where(counted(index.shape[2]) < count, index, index * 0 + int(pad_idx))


def rows(x, index):
    """Rows of (B, H, N, D) by ``index`` (B, H, M); 0 where that is N."""
    batch, heads, length, dim = x.shape
    flat = _reshape(x, (-1, dim))
    flat = _join((flat, _zeros_like(_slice(flat, (0, 0), (1, dim)))))
    base = _reshape(counted(batch * heads) * length, (batch, heads, 1))
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


take = _Take(auto_prefix=False)


@constexpr
def _is_wide(dtype):
    return str(dtype).lower() in ("int64", "uint64", "uint32")


@constexpr(check=False)
def check_fits(layer, keep, size):
    """PyNative only: raise unless ``size`` places hold what every head keeps of ``keep`` (B, N, H)."""
    shared.check_fits(layer, keep.asnumpy(), size)
