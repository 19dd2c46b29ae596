"""Attention of reordered tokens in MindSpore: a core call for each tile of queries and the window of keys it sees.

PyNative reads the windows' widths and computes no more; a graph needs them in advance (``max_keys``).
"""

from mindspore import dtype as mstype
from mindspore import ops
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms import sparse as shared
from flash_attention.core.validation import check_int
from flash_attention.nn.layer.sparse_reorder import along_last, repeat, rows
from flash_attention.ops.functional import counted, flash_attention
from flash_attention.ops.host import is_eager

TILE = 256  # queries that share a window of keys
STEP = 128  # widths are multiples of it, so that few shapes occur


def over_buckets(q, k, v, q_pos, k_pos, q_ids, k_ids, scale, max_keys, engine):
    """Attention in which a query sees the keys of its bucket up to its own position.

    Args:
        q, k, v: (B, H, N, D) in a dtype that MindSpore computes with; positions int32 and bucket ids (B, H, N), both
            sides in ascending order of (bucket, position).
        max_keys: most keys of a window; None = what it needs in PyNative, all in a graph.
    """
    first, stop = shared.hash_intervals(repeat, along_last, ops.where, q_pos, k_pos, q_ids, k_ids)
    return _attend(q, k, v, first, stop, scale, max_keys, engine)


def over_kept(q, k, v, q_pos, k_pos, scale, engine):
    """Attention in which a query sees the keys up to its own position; padding, which comes last, takes no part."""
    first, stop = shared.qk_intervals(repeat, along_last, ops.where, q_pos, k_pos)
    return _attend(q, k, v, first, stop, scale, None, engine)


def _attend(q, k, v, first, stop, scale, max_keys, engine):
    """Core calls over tiles of queries. What nobody sees is zeroed: NaN there must not meet a weight 0."""
    place = counted(k.shape[2])
    key = place + ops.zeros_like(k[..., 0]).astype(mstype.int32)
    seen = ops.expand_dims(shared.covered(repeat, along_last, ops.where, first, stop, key), -1)
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
