"""LongNet's dilated attention: which tokens meet in which pattern, as index tables; checks; the picture.

Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023. A pattern (w, r) cuts the sequence into
segments of w tokens; in each, head h keeps every r-th token, the first of them at its own offset. Kept tokens attend to
one another by the core call, a batch row for each segment. Patterns are mixed by their softmax denominators.

tokens (B, N, H, D) -> pad -> **sparsify** -> (B * segments, slots, H, D) -> core call -> **densify** -> mix by LSE.
"""

from dataclasses import dataclass
from typing import NamedTuple, Tuple

import numpy as np

from flash_attention.core.errors import Reason, invalid_type, invalid_value
from flash_attention.core.mechanisms.positions import t5_buckets, xpos_reach, xpos_tables
from flash_attention.core.validation import check_bool, check_int, check_rate, is_int

HEAD_OFFSETS = ("mod", "block")
NUM_BUCKETS, MAX_DISTANCE = 32, 128  # of the T5 bias
SCALE_BASE = 512.0  # of xPos


@dataclass(frozen=True)
class Pattern:
    """One pattern on a sequence of ``length`` tokens.

    Attributes:
        length: N; segment: tokens of a segment before sparsifying, at most N; rate: r.
        offsets: first kept token of a segment, one a head.
    """

    length: int
    segment: int
    rate: int
    offsets: Tuple[int, ...]

    @property
    def segments(self):
        """Number of segments; the last may be short."""
        return -(-self.length // self.segment)

    @property
    def slots(self):
        """Places for kept tokens in a segment; the last may be empty for some heads."""
        return -(-self.segment // self.rate)

    @property
    def heads(self):
        """Number of heads."""
        return len(self.offsets)

    @property
    def select(self):
        """(H,): of the ``rate * H`` (token, head) pairs of a slot, those that are kept."""
        return tuple(offset * self.heads + head for head, offset in enumerate(self.offsets))

    @property
    def spread(self):
        """(rate * H,): the inverse; H, one past the end, where nothing is kept."""
        kept = {pair: head for head, pair in enumerate(self.select)}
        return tuple(kept.get(pair, self.heads) for pair in range(self.rate * self.heads))

    def occupied(self):
        """Boolean (segments, H, slots): whether a token stands there, not padding."""
        inside = np.asarray(self.offsets)[:, None] + self.rate * np.arange(self.slots)
        position = np.arange(self.segments)[:, None, None] * self.segment + inside
        return (inside < self.segment) & (position < self.length)

    def kept(self):
        """Boolean (H, N): the tokens that each head keeps."""
        inside = np.arange(self.length) % self.segment % self.rate
        return inside[None, :] == np.asarray(self.offsets)[:, None]


def make_patterns(length, heads, segment_size, dilation_rate, head_offset="mod"):
    """The :class:`Pattern` of each (segment size, rate). Arguments as :func:`check_call` returns them."""
    patterns = []
    for segment, rate in zip(segment_size, dilation_rate):
        share = -(-heads // rate)
        offsets = [h % rate if head_offset == "mod" else h // share for h in range(heads)]
        patterns.append(Pattern(length, min(segment, length), rate, tuple(offsets)))
    return tuple(patterns)


class Share(NamedTuple):
    """One pattern on one of several devices, each with ``local.length`` consecutive tokens of the sequence.

    Attributes:
        local: the pattern as this device sparsifies its own tokens.
        segment: the whole segment that its queries attend to; ``local`` where no segment reaches beyond the device.
        members: devices that share a segment, consecutive ones; their sparsified keys and values are gathered.
    """

    local: Pattern
    segment: Pattern
    members: int


def make_shares(layer, length, heads, segment_size, dilation_rate, head_offset, devices):
    """The :class:`Share` of each (segment size, rate); ``length`` tokens on each of ``devices``.

    Raises:
        UnsupportedError: segments that begin or end inside of a device without lying in it, or kept tokens that differ
            from device to device.
    """
    whole = make_patterns(length * devices, heads, segment_size, dilation_rate, head_offset)
    shares = []
    for local, pattern in zip(make_patterns(length, heads, segment_size, dilation_rate, head_offset), whole):
        if length % pattern.segment == 0 or devices == 1:
            shares.append(Share(local, local, 1))
            continue
        members = pattern.segment // length
        if pattern.segment % length or devices % members:
            need = "a divisor of the {} tokens of a device, or a multiple that divides all {}".format(
                length, length * devices
            )
            raise Reason("segment_size", pattern.segment, need, "Pad the sequence.").error(layer)
        if length % pattern.rate:
            need = "a divisor of the {} tokens of a device where a segment is shared".format(length)
            raise Reason("dilation_rate", pattern.rate, need, "Pad the sequence.").error(layer)
        segment = Pattern(pattern.segment, pattern.segment, pattern.rate, pattern.offsets)
        shares.append(Share(local, segment, members))
    return tuple(shares)


def sparsify(x, pattern, pad, select):
    """(B, N, H, D) -> (B * segments, slots, H, D).

    Args:
        pad: ``pad(x, count)`` appends ``count`` zero rows to axis 1.
        select: ``select(x)`` takes ``pattern.select`` along axis 2.
    """
    heads, dim = x.shape[2], x.shape[3]
    x = pad(x, pattern.segments * pattern.segment - pattern.length)
    x = pad(x.reshape((-1, pattern.segment, heads, dim)), pattern.slots * pattern.rate - pattern.segment)
    return x if pattern.rate == 1 else select(x.reshape((-1, pattern.slots, pattern.rate * heads, dim)))


def densify(x, pattern, cut, spread):
    """The transpose of :func:`sparsify`: (B * segments, slots, H, D) -> (B, N, H, D).

    Args:
        cut: ``cut(x, count)`` keeps the first ``count`` rows of axis 1.
        spread: ``spread(x)`` takes ``pattern.spread`` along axis 2, a fill value where that is H.
    """
    heads, dim = x.shape[2], x.shape[3]
    if pattern.rate > 1:
        x = spread(x).reshape((-1, pattern.slots * pattern.rate, heads, dim))
    x = cut(x, pattern.segment).reshape((-1, pattern.segments * pattern.segment, heads, dim))
    return cut(x, pattern.length)


def needs_mask(pattern, causal):
    """True when padding could be seen. Causal queries never look at what follows them, and padding comes last."""
    return not causal and not pattern.occupied().all()


def bucket_ring(pattern, causal):
    """int32 (2 * slots,): T5 bucket of the original distance at each distance in slots, see :func:`toeplitz`."""
    slots = np.arange(pattern.slots)
    distance = np.concatenate([slots, slots - pattern.slots])
    return t5_buckets(distance * pattern.rate, not causal, NUM_BUCKETS, MAX_DISTANCE)


def toeplitz(tile, ring, slots):
    """(H, 2 * S) values by distance ``j - i`` modulo 2 * S -> (1, H, slots, S): queries 0 .. slots, keys 0 .. S.

    Rows of length 2 * S - 1 cut from the repeated ring start one distance earlier each; no gather, and a gradient that
    is a sum. Rolling the ring by t gives the queries from t on. ``tile`` is the framework's.
    """
    heads, keys = ring.shape[0], ring.shape[1] // 2
    rows = tile(ring, (1, slots))[:, : slots * (2 * keys - 1)]
    return rows.reshape((1, heads, slots, 2 * keys - 1))[:, :, :, :keys]


def xpos_tiles(layer, pattern, causal):
    """``[(first, stop), ...]``: query slots that can share one xPos centre with the keys before them.

    Raises:
        ValueError: a segment without causality that no single centre can hold.
    """
    reach = xpos_reach("float32", SCALE_BASE)
    if pattern.slots * pattern.rate <= reach:
        return [(0, pattern.slots)]
    if not causal:
        need = "at most {} tokens with use_xpos=True and causal=False (xPos grows toward later keys)".format(reach)
        raise invalid_value(layer, "segment_size", need, pattern.segment, "Use causal=True.")
    step = max(1, reach // 2 // pattern.rate)
    return [(first, min(first + step, pattern.slots)) for first in range(0, pattern.slots, step)]


def check_shared_xpos(layer, segment):
    """Raise where one xPos centre cannot hold a segment that several devices share."""
    reach = xpos_reach("float32", SCALE_BASE)
    if segment.slots * segment.rate > reach:
        need = "at most {} tokens with use_xpos=True where several devices share a segment".format(reach)
        raise Reason("segment_size", segment.segment, need).error(layer)


def slot_tables(pattern, first, stop, centre, dim, downscale):
    """xPos tables ``(cos, sin)``, float64 (stop - first, 1, dim / 2), of the slots ``first .. stop``.

    Tokens of a head lie ``rate`` apart, and only distances matter: slot t stands at ``rate * t``.
    """
    positions = np.arange(first, stop, dtype=np.float64) * pattern.rate
    tables = xpos_tables(np, positions, centre * float(pattern.rate), dim, downscale, SCALE_BASE)
    with np.errstate(under="ignore"):
        return tuple(table[:, None, :] for table in tables)


def pair_counts(patterns, causal):
    """int (H, N, N): in how many patterns query i sees key j. O(N * N): for pictures and judges."""
    length, heads = patterns[0].length, patterns[0].heads
    position = np.arange(length)
    counts = np.zeros((heads, length, length), np.int64)
    for pattern in patterns:
        kept = pattern.kept()
        together = (position // pattern.segment)[:, None] == (position // pattern.segment)[None, :]
        counts += kept[:, :, None] & kept[:, None, :] & together
    return np.where(np.tri(length, dtype=bool), counts, 0) if causal else counts


def pairs_per_head(patterns, causal):
    """Query-key pairs that are computed, mean over the heads: the cost of a call, padding included."""
    return sum(p.segments * (p.slots * (p.slots + 1) / 2.0 if causal else float(p.slots) ** 2) for p in patterns)


def check_call(layer, segment_size, dilation_rate, head_offset="mod"):
    """Raise unless the patterns are possible; returns ``(segment sizes, rates)`` as tuples."""
    sizes = []
    for name, value in (("segment_size", segment_size), ("dilation_rate", dilation_rate)):
        values = (value,) if is_int(value) else value
        if not isinstance(values, (tuple, list)) or not values:
            raise invalid_type(layer, name, "an int or a sequence of ints", repr(value))
        sizes.append(tuple(check_int(layer, name, item, 1) for item in values))
    if len(sizes[0]) != len(sizes[1]):
        need = "as many numbers as segment_size, {}".format(len(sizes[0]))
        raise invalid_value(layer, "dilation_rate", need, len(sizes[1]))
    if head_offset not in HEAD_OFFSETS:
        need = "one of {}".format(", ".join(map(repr, HEAD_OFFSETS)))
        raise invalid_value(layer, "head_offset", need, repr(head_offset))
    return tuple(sizes)


def check_tensors(layer, query, key, value, table):
    """Raise unless the shapes are those of one self-attention: (B, N, H, D) three times; table (32, H) or None."""
    if len(query) != 4:
        raise invalid_value(layer, "query", "of shape (B, N, H, D)", "shape {}".format(tuple(query)))
    for name, shape in (("key", key), ("value", value)):
        if tuple(shape) != tuple(query):
            raise invalid_value(layer, name, "of the query's shape {}".format(tuple(query)), tuple(shape))
    if table is not None and tuple(table) != (NUM_BUCKETS, query[2]):
        raise invalid_value(layer, "rel_pos_table", "of shape ({}, {})".format(NUM_BUCKETS, query[2]), tuple(table))


def check_layer(layer, names, flags, dropout, distributed):
    """Raise unless the layer's arguments are possible; returns ``(dim, heads, causal)`` with aliases resolved.

    Args:
        names: ``{name: (value, alias, value of the alias, default)}`` of dim, heads and causal.
        flags: ``{name: value}`` that must be bools.
    """
    resolved = {}
    for name, (value, alias, other, default) in names.items():
        if value is not None and other is not None and value != other:
            raise invalid_value(layer, alias, "absent or equal to {} = {}".format(name, value), other)
        resolved[name] = default if value is None and other is None else other if value is None else value
    dim = check_int(layer, "dim", resolved["dim"], 1)
    heads = check_int(layer, "heads", resolved["heads"], 1)
    for name, flag in dict(flags, causal=resolved["causal"], Distributed=distributed).items():
        check_bool(layer, name, flag)
    check_rate(layer, "dropout", dropout)
    if dim % heads:
        raise invalid_value(layer, "dim", "a multiple of heads = {}".format(heads), dim)
    if flags.get("use_xpos") and dim // heads % 2:
        raise invalid_value(layer, "dim", "an even number of features a head with use_xpos=True", dim // heads)
    return dim, heads, resolved["causal"]
