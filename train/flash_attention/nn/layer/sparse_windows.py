"""Attention of reordered tokens in MindSpore: core calls for tiles of queries, each over the window of keys it sees.

Tiles with windows of like width share a call, as heads of their own. PyNative reads the windows' widths and computes no
more; a graph needs them in advance (``max_keys``).
"""

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms import sparse as shared
from flash_attention.core.validation import check_int
from flash_attention.nn.layer.sparse_reorder import along_last, repeat
from flash_attention.ops.functional import counted, flash_attention
from flash_attention.ops.host import is_eager

TILE = 128  # most queries that share a window of keys
STEP = 128  # widths are multiples of it, so that few shapes occur
PAIRS = 2**22  # most pairs of query and key in a call, so that masks and scores stay small


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
    """Core calls over groups of tiles. What nobody sees is zeroed: NaN there must not meet a weight 0."""
    batch, heads, length, dim = q.shape
    tile, count = _tiling(length)
    key = counted(k.shape[2]) + ops.zeros_like(k[..., 0]).astype(mstype.int32)
    seen = ops.expand_dims(shared.covered(repeat, along_last, ops.where, first, stop, key), -1)
    alive = ops.expand_dims(stop > first, -1)
    rows = _keep(alive, q), first, stop
    if tile * count > length:
        rows = [ops.concat((x, x[:, :, 2 * length - tile * count :]), 2) for x in rows]
    queries, first, stop = [x.reshape((batch * heads * count, tile, -1)) for x in rows]
    k, v = [_keep(seen, x).reshape((-1, dim)) for x in (k, v)]
    if is_eager():
        groups, order = _groups(first, stop, batch * heads, key.shape[2], max_keys)
    else:
        groups, order = _static_groups(first.shape, batch * heads, key.shape[2], max_keys)
    outs = ()
    for numbers, starts, width in groups:
        part = [ops.gather(x, numbers, 0) for x in (queries, first, stop)]
        outs = outs + (_group(part, k, v, starts, key.shape[2], width, scale, engine),)
    out = outs[0] if len(outs) == 1 else ops.concat(outs, 0)
    if order is not None:
        out = ops.gather(out, order, 0)
    return _keep(alive, out.reshape((batch, heads, tile * count, dim))[:, :, :length])


def _group(part, k, v, starts, length, width, scale, engine):
    """Attention of tiles of queries (G, T, D), each over ``width`` keys from the first that its first query sees."""
    queries, first, stop = part  # (G, T, 1)
    if width == 0:
        return ops.zeros_like(queries)
    begin = ops.minimum(first[:, :1], length - width)
    places = (begin[:, :, 0] + starts + counted(width)).reshape((-1,))
    shape = (1, first.shape[0], width, -1)
    k, v = ops.gather(k, places, 0).reshape(shape), ops.gather(v, places, 0).reshape(shape)
    mask = ops.expand_dims(_between(first - begin, stop - begin, width), 0)
    return flash_attention(ops.expand_dims(queries, 0), k, v, mask=mask, scale=scale, engine=engine, layout="BNSD")[0]


def _between(first, stop, width):
    """Boolean (G, T, width): ``first <= key < stop``. Copies, as comparisons that broadcast are slow on the CPU."""
    key = ops.tile(counted(width), first.shape[:2] + (1,))
    return (key >= ops.tile(first, (1, 1, width))) & (key < ops.tile(stop, (1, 1, width)))


def _keep(mask, x):
    return ops.where(mask, x, ops.zeros_like(x))


@constexpr
def _tiling(length):
    """``(queries a tile, tiles)``, of one size: the last tokens are repeated where the length is no multiple."""
    count = -(-length // TILE)
    return -(-length // count), count


@constexpr
def _static_groups(shape, heads, length, max_keys):
    return _grouped(np.full(shape[0], _bound(length, max_keys)), shape[1], heads, length)


@constexpr(check=False)
def _groups(first, stop, heads, length, max_keys):
    """Groups by what each tile needs, rounded up; bounds (heads * tiles, T, 1)."""
    needs = stop.asnumpy()[:, -1, 0] - first.asnumpy()[:, 0, 0]
    if needs.max() > _bound(length, max_keys):
        need = "at least {}, the keys that {} queries span".format(needs.max(), first.shape[1])
        raise invalid_value("hash_sparse_attention", "max_keys", need, max_keys)
    return _grouped(np.minimum(length, -(-needs // STEP) * STEP), first.shape[1], heads, length)


def _bound(length, max_keys):
    return length if max_keys is None else min(length, check_int("hash_sparse_attention", "max_keys", max_keys, 1))


def _grouped(widths, tile, heads, length):
    """Tiles of like width share a call while it has at most PAIRS pairs, half as many again as it needs.

    Args: widths: keys in the window of each of heads * tiles; length: keys of a head.

    Returns:
        ``(((numbers of tiles, first key of their heads (G, 1), width), ...), order)``: the order puts the results back,
        None where they are in order.
    """
    numbers = np.argsort(widths, kind="stable")  # so a group's last tile is its widest
    groups = []  # [tiles, keys that they need together, width]
    for number, width in zip(numbers.tolist(), widths[numbers].tolist()):
        if groups:
            members, need, _ = groups[-1]
            area = (len(members) + 1) * width
            if tile * area <= PAIRS and 2 * area <= 3 * (need + width):
                members.append(number)
                groups[-1][1:] = need + width, width
                continue
        groups.append([[number], width, width])
    parts = []
    for members, _, width in groups:
        members = np.array(members, np.int32)
        starts = members // (len(widths) // heads) * length
        parts.append((Tensor(members), Tensor(starts[:, None].astype(np.int32)), width))
    in_order = (numbers == np.arange(len(widths))).all()
    return tuple(parts), None if in_order else Tensor(np.argsort(numbers).astype(np.int32))
