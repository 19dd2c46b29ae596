"""dp and mp: batch and heads split over a device matrix. Strategies of inputs and outputs, and a device's share.

A strategy is a tuple with the number of parts of each axis, as MindSpore's ``shard`` takes it. Only the first two axes
of a call's tensors are ever split, batch by dp and heads by mp, and only where they are not broadcast.
"""

import itertools

from flash_attention.core.context import part_of
from flash_attention.core.errors import invalid_value

LAYER = "FlashAttention"
INPUTS = ("query", "key", "value", "attention_mask", "alibi_mask")


def parts(shape, dp, mp):
    """Strategy of a tensor (B|1, N|1, ...) of the whole call."""
    return tuple(count if size != 1 else 1 for size, count in zip(shape, (dp, mp))) + (1,) * (len(shape) - 2)


def strategies(query, key, dp, mp, attention_mask=None, alibi_mask=None, mask_batch=True, alibi=False, dropout=False):
    """Strategies of one ``FlashAttention`` call.

    Args:
        query, key: shapes (B, N, Sq, D), (B, Nkv, Sk, D).
        dp, mp: devices that share the batch and the heads.
        attention_mask, alibi_mask: shapes of these, or None.
        mask_batch: have_attention_mask_batch: the mask's batch axis is split by dp where it is not 1.
        alibi: slopes (N,) made for the call, where no alibi_mask is given. dropout: whether there is a seed.

    Returns:
        ``({input: strategy}, {output: strategy})``; inputs that are absent have no entry.

    Raises:
        ValueError: dp does not divide the batch, or mp the key/value heads.
    """
    check_shares(query[0], key[1], dp, mp)
    found = {"query": (dp, mp, 1, 1), "key": (dp, mp, 1, 1), "value": (dp, mp, 1, 1)}
    if attention_mask is not None:
        rank, rows = len(attention_mask), dp if mask_batch else 1
        found["attention_mask"] = {
            2: lambda: (1, 1),  # (Sq, Sk), or compact
            3: lambda: parts((attention_mask[0], 1), rows, mp)[:1] + (1, 1),
            4: lambda: parts(attention_mask, rows, mp),
        }[rank]()
    if alibi_mask is not None:
        found["alibi_mask"] = parts(alibi_mask, dp, mp)
    elif alibi:
        found["alibi_slopes"] = (mp,)
    if dropout:
        found["dropout_seed"] = ()
    return found, {"output": (dp, mp, 1, 1), "lse": (dp, mp, 1)}


def check_shares(batch, kv_heads, dp, mp):
    """Raise unless dp divides the batch and mp the key/value heads."""
    for name, count, what, size in (("dp", dp, "batch", batch), ("mp", mp, "key/value heads", kv_heads)):
        if size % count:
            raise invalid_value(LAYER, name, "a divisor of the {} {}".format(size, what), count)


def check_strategy(strategy):
    """Raise unless ``strategy`` is one that :func:`strategies` can give; returns (dp, mp).

    Args:
        strategy: one tuple of ints for each of :data:`INPUTS`, the masks optional.
    """
    need = "a tuple of tuples of ints for (query, key, value[, attention_mask[, alibi_mask]]), query (dp, mp, 1, 1)"
    known = isinstance(strategy, (tuple, list)) and 3 <= len(strategy) <= len(INPUTS)
    if not known or any(not isinstance(entry, (tuple, list)) for entry in strategy):
        raise invalid_value(LAYER, "in_strategy", need, repr(strategy))
    query, key, value = (tuple(entry) for entry in strategy[:3])
    good = len(query) == 4 and query[2:] == (1, 1) and all(type(size) is int and size > 0 for size in query)
    if not (good and key == query and value == query):
        raise invalid_value(LAYER, "in_strategy", need, repr(strategy))
    dp, mp = query[:2]
    for name, entry in zip(INPUTS[3:], strategy[3:]):
        possible = _possible(name, query, dp, mp)
        if tuple(entry) not in possible:
            need = "one of {} for {} with query {}".format(", ".join(map(str, possible)), name, query)
            raise invalid_value(LAYER, "in_strategy", need, tuple(entry))
    return dp, mp


def _possible(name, query, dp, mp):
    """Every strategy that an input can have, whatever its shape."""
    shapes = [(rows, heads, 2, 2) for rows, heads in itertools.product((1, dp), (1, mp))]
    if name == "attention_mask":
        shapes += [(2, 2)] + [shape[:1] + shape[2:] for shape in shapes]
    else:
        shapes = [shape for shape in shapes if shape[1] == mp]
    return sorted({strategies(query, query, dp, mp, **{name: shape})[0][name] for shape in shapes})


def share(spec, dp, mp, device=(0, 0)):
    """The spec of one device's part of the call ``spec``.

    Args:
        device: its numbers along dp and mp.

    Raises:
        ValueError: dp does not divide the batch, or mp the key/value heads.
    """
    check_shares(spec.batch, spec.kv_heads, dp, mp)
    batch, heads, kv_heads = spec.batch // dp, spec.heads // mp, spec.kv_heads // mp
    start = (device[0] * batch, device[1] * heads, 0, 0)
    return part_of(spec, start, (spec.q_len, spec.kv_len), batch, heads, kv_heads)


def own(shape, dp, mp, device):
    """Slices of a tensor (B|1, N|1, ...) that ``device`` holds."""
    slices = []
    for size, count, number in zip(shape, parts(shape, dp, mp), tuple(device) + (0,) * len(shape)):
        first = number * (size // count) if count > 1 else 0
        slices.append(slice(first, first + size // count))
    return tuple(slices)
