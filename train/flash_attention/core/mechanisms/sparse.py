"""Dynamic sparse attention: which keys a query sees, as intervals of reordered keys; checks; the dense picture.

Pagliardini et al., "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention", 2023. Tokens are
reordered, separately for every head, so that the keys of each query become one interval of consecutive ones:

* hash: sorted by bucket, in time order inside a bucket: a query sees the head of its bucket, up to its own time;
* qk: kept tokens first, in time order: a query sees the kept keys up to its own time.

tokens (B, N, H, D) -> sort | compact -> (B, H, N, D) -> **intervals** -> blockwise attention -> back to time order.

Everything here works on numpy, JAX and MindSpore arrays alike: ``take(x, index)`` gathers along the last axis,
``where`` is the framework's, and ``repeat(count, step, state)`` does ``state = step(*state)`` ``count`` times.
"""

import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import FLOATS, check_int

QUERY_PAD, KEY_PAD = -1, 1000000000
"""Positions of padding among compacted queries and keys: ``q_pos >= k_pos`` is false wherever one is padding."""

KINDS = {"hash": "integer", "qk": "float or bool"}
"""Mode -> dtype of ``q_idx`` and ``k_idx``."""


def bisect(repeat, where, length, zero, before):
    """First index in 0 .. length for which ``before`` fails, elementwise.

    Args:
        length: number of sorted entries.
        zero: int array of zeros, in the result's shape.
        before: ``before(index)``, a boolean array: does the entry come before? True up to some index, then False.
    """

    end = zero + (length - 1)

    def descend(index, step):
        last = index + (step - 1)  # the entries up to `index` come before: do the next `step`?
        last = where(last < end, last, end)
        return where(before(last), last + 1, index), step // 2

    return repeat(length.bit_length(), descend, (zero, 1 << (length.bit_length() - 1)))[0]


def hash_intervals(repeat, take, where, q_pos, k_pos, q_bucket, k_bucket):
    """``(first, stop)``, int (B, H, Nq): sorted keys ``first .. stop - 1`` are what a sorted query sees.

    Args: positions and bucket ids (B, H, N), ascending by (bucket, position).
    """
    zero, length = q_pos * 0, k_pos.shape[-1]

    def up_to_now(index):
        bucket = take(k_bucket, index)
        return (bucket < q_bucket) | ((bucket == q_bucket) & (take(k_pos, index) <= q_pos))

    first = bisect(repeat, where, length, zero, lambda index: take(k_bucket, index) < q_bucket)
    return first, bisect(repeat, where, length, zero, up_to_now)


def qk_intervals(repeat, take, where, q_pos, k_pos):
    """``(first, stop)``, int (B, H, Mq): kept keys ``first .. stop - 1`` are what a kept query sees; padding sees none.

    Args: positions (B, H, M), ascending, padding last: QUERY_PAD among queries, KEY_PAD among keys.
    """
    zero, length = q_pos * 0, k_pos.shape[-1]
    stop = bisect(repeat, where, length, zero, lambda index: take(k_pos, index) <= q_pos)
    # Padding comes after all others, and bounds may not decrease.
    beyond = zero + bisect(repeat, where, length, zero[..., :1], lambda index: take(k_pos, index) < KEY_PAD)
    return where(q_pos < 0, beyond, zero), where(q_pos < 0, beyond, stop)


def covered(repeat, take, where, first, stop, key):
    """Boolean like ``key``: whether any query sees it. ``key`` (B, H, Nk) counts the reordered keys, 0 .. Nk - 1."""
    # Of the queries that begin at or before a key, the last one reaches furthest.
    last = bisect(repeat, where, first.shape[-1], key * 0, lambda index: take(first, index) <= key) - 1
    return (last >= 0) & (take(stop, where(last < 0, key * 0, last)) > key)


def ranks(keep, cumulate):
    """``(rank, count (.., 1))``: the place of each token when kept ones go first, in time order, then dropped ones.

    Args: keep: int32 0 or 1 (.., N); cumulate: cumulative sum along the last axis.
    """
    kept = cumulate(keep)
    count = kept[..., -1:]
    dropped = cumulate(1 - keep)
    return keep * (kept - 1) + (1 - keep) * (count + dropped - 1), count


def visible(mode, q_idx, k_idx):
    """Boolean (B, H, Nq, Nk): what each query sees. O(Nq * Nk): for pictures and judges."""
    q, k = (np.asarray(x).transpose(0, 2, 1) for x in (q_idx, k_idx))
    past = np.arange(q.shape[-1])[:, None] >= np.arange(k.shape[-1])[None, :]
    if mode == "hash":
        return past & (q[..., :, None] == k[..., None, :])
    return past & (q > 0)[..., :, None] & (k > 0)[..., None, :]


# --- checks: of shapes and dtypes, before anything is computed ------------------------------------------------------
def check_mode(mode, buffer_size=None, max_keys=None):
    """Raise KeyError unless the mode is known, ValueError for an option of the other mode."""
    layer = "dynamic_sparse_attention"
    if mode not in KINDS:
        need = "one of {}".format(", ".join(map(repr, KINDS)))
        raise KeyError(str(invalid_value(layer, "sparsity_mode", need, repr(mode))))
    for name, value, owner in (("buffer_size", buffer_size, "qk"), ("max_keys", max_keys, "hash")):
        if value is not None and mode != owner:
            raise invalid_value(layer, name, "None unless sparsity_mode is '{}'".format(owner), value)


def check_tensors(layer, query, key, value, axis=1):
    """Raise unless (B, N, H, D) tensors fit, given as TensorInfo; ``axis``: 1, or 2 for (B, H, N, D)."""
    layout = "(B, N, H, D)" if axis == 1 else "(B, H, N, D)"
    for name, info in (("q", query), ("k", key), ("v", value)):
        if len(info.shape) != 4:
            raise invalid_value(layer, name, "of shape {}".format(layout), "shape {}".format(info.shape))
        if info.dtype not in FLOATS:
            raise invalid_type(layer, name, "of dtype {}".format(", ".join(FLOATS)), info.dtype)
        if 0 in info.shape:
            raise invalid_value(layer, name, "without an empty axis", "shape {}".format(info.shape))
    want = list(query.shape)
    want[axis] = key.shape[axis]
    for name, info in (("k", key), ("v", value)):
        if list(info.shape) != want:
            need = "of shape {}, that of the queries but for their number".format(tuple(want))
            raise invalid_value(layer, name, need, "shape {}".format(info.shape))


def check_indices(layer, name, info, shape, kind):
    """Raise unless ``info`` (TensorInfo) has this shape and a dtype of this kind, a value of :data:`KINDS`."""
    integer = "int" in info.dtype
    fits = integer if kind == "integer" else info.dtype == "bool" or info.dtype in FLOATS
    if not fits:
        raise invalid_type(layer, name, "of {} dtype".format(kind), info.dtype)
    if tuple(info.shape) != tuple(shape):
        raise invalid_value(layer, name, "of shape {}".format(tuple(shape)), "shape {}".format(tuple(info.shape)))


def check_call(layer, mode, names, query, key, value, q_idx, k_idx):
    """All of a call of BNHD tensors, each a TensorInfo; ``names`` are those of the two index tensors."""
    check_tensors(layer, query, key, value)
    check_indices(layer, names[0], q_idx, query.shape[:3], KINDS[mode])
    check_indices(layer, names[1], k_idx, key.shape[:3], KINDS[mode])


def check_kernel(layer, names, tensors, indices):
    """All of a kernel's call: BHND tensors and integer (B, H, N) indices (queries' and keys' in turn)."""
    check_tensors(layer, *tensors, axis=2)
    for n, (name, info) in enumerate(zip(names, indices)):
        check_indices(layer, name, info, tensors[n % 2].shape[:3], "integer")


def check_buffer_size(layer, value, lengths):
    """Raise unless ``value`` is None, an int or a pair of these >= 1; returns places for kept queries and keys."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise invalid_value(layer, "buffer_size", "None, an int or a pair (queries, keys)", repr(value))
    return tuple(
        length if size is None else min(length, check_int(layer, "buffer_size", size, 1))
        for size, length in zip(pair, lengths)
    )


def check_compact(layer, keep, x, index):
    """Raise unless keep (B, N, H), x (B, N, H, D) and index (B, M, H) or None fit; all are TensorInfo."""
    if len(x.shape) != 4:
        raise invalid_value(layer, "x", "of shape (B, N, H, D)", "shape {}".format(tuple(x.shape)))
    if index is None:
        if tuple(keep.shape) != tuple(x.shape[:3]):
            need = "of shape {}".format(tuple(x.shape[:3]))
            raise invalid_value(layer, "keep_tensor", need, "shape {}".format(tuple(keep.shape)))
        return
    check_indices(layer, "index", index, (x.shape[0],) + tuple(index.shape[1:2]) + (x.shape[2],), "integer")


# --- checks of values, as numpy arrays, where a framework can see them ----------------------------------------------
def most_kept(keep):
    """The largest number of tokens that a head keeps, of (B, N, H) flags."""
    return int((keep > 0).sum(1).max())


def check_fits(layer, keep, size):
    """Raise unless ``size`` places hold what every head keeps."""
    if size < keep.shape[1] and most_kept(keep) > size:
        need = "at least {}, the number of kept tokens".format(most_kept(keep))
        raise invalid_value(layer, "buffer_size", need, size)


def check_order(layer, name, *columns):
    """Raise unless ``columns`` (B, H, N), the most significant first, ascend along N."""
    fine = True
    for x in reversed(columns):
        before, after = x[..., :-1], x[..., 1:]
        fine = (before < after) | ((before == after) & fine)
    if not np.all(fine):
        need = "in ascending order along the last axis (by bucket, then position)"
        raise invalid_value(layer, name, need, "another order", "Use hash_sparse_attention or qk_sparse_attention.")
