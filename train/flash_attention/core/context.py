"""Context parallelism in integers: who holds which tokens, which pairs of chunks see each other, and which hops follow.

The sequence is split over a ring of groups (devices, where nothing else is combined with it). A group's shard is one
run of tokens or, for a causal call, two: chunk ``g`` and its mirror image ``2 * ring - 1 - g``, so that every group
sees equally many keys ("zig-zag"). Keys travel from group to group; a hop that no window needs is not made.

AttentionSpec -> **Placement, RingPlan** -> the frameworks' rings (``jax/distributed``, ``ops/context``).
"""

from dataclasses import dataclass, replace
from typing import Optional, Tuple

from flash_attention.core.errors import Reason
from flash_attention.core.spec import AttentionSpec


class Placement:
    """What follows from a plan's ``ring`` (groups), ``zigzag`` and ``hops`` ((direction, groups), ...)."""

    @property
    def chunks(self):
        """Chunks of a shard."""
        return 2 if self.zigzag else 1

    @property
    def full_turn(self):
        """True when keys go round the whole ring, so that every group sees those of every other."""
        return self.hops == ((1, self.ring - 1),)

    def starts(self, shard, chunk):
        """First tokens of the chunks (of ``chunk`` tokens) of ring shard ``shard``; traced integers work."""
        return (shard * chunk, (2 * self.ring - 1 - shard) * chunk) if self.zigzag else (shard * chunk,)

    def homes(self, odd):
        """(from, to) of the even (or odd) chunks: chunk c of the contiguous order belongs to group c or its mirror."""
        chunks = [2 * g + odd for g in range(self.ring)]
        return [(g, min(c, 2 * self.ring - 1 - c)) for g, c in enumerate(chunks)]


def takes_zigzag(spec, ring):
    """Whether two mirrored chunks a group balance the work: in causal calls without a lower limit."""
    causal = spec.band.bounded_above and not spec.band.bounded_below
    return ring > 1 and causal and not spec.dynamic_offset


def key_unit(spec):
    """A chunk of keys is a multiple of this: block windows count blocks from the chunk's first key."""
    in_blocks = spec.compact_mask or spec.band.prev is not None or spec.band.next is not None
    return spec.block_size if in_blocks else 1


def reaches(band, offset):
    """Whether a query of ``band`` sees a key of it, its first query being at position ``offset`` (traced ones too)."""
    return (band.first_key(offset) < band.kv_len) & (band.last_key(offset + band.q_len - 1) >= 0)


def needed_hops(spec, ring, q_chunk, kv_chunk):
    """Hops that some group of a contiguous ring needs: e.g. ((1, 2), (-1, 1)), or a full turn."""
    turn = ((1, ring - 1),)
    if spec.dynamic_offset or spec.band.is_dense:
        return turn
    up = down = 0
    for shard in range(ring):
        first = spec.band.first_key(shard * q_chunk + spec.offset)
        last = spec.band.last_key((shard + 1) * q_chunk - 1 + spec.offset)
        if first <= last:
            up, down = max(up, shard - first // kv_chunk), max(down, last // kv_chunk - shard)
    if up + down >= ring - 1:
        return turn
    return tuple((way, count) for way, count in ((1, up), (-1, down)) if count) or ((1, 0),)


def heads_needed(heads, group):
    """Key/value heads that ``heads`` consecutive query heads are given: one where all share it, else one each."""
    return 1 if group % heads == 0 else heads


def part_of(spec, start, lengths, batch=None, heads=None, kv_heads=None):
    """The spec of a part of a call, seen from its own first token; dropout still counts on the whole.

    Args:
        spec: of the whole call, with a static offset.
        start: index of the part's first batch row, head, query and key.
        lengths: (queries, keys) of the part.
        batch, heads, kv_heads: of the part; default all.
    """
    batch, heads = spec.batch if batch is None else batch, spec.heads if heads is None else heads
    sizes = (batch, heads) + tuple(lengths)

    def shape(whole):
        if whole is None or len(whole) == 2:  # absent, or compact
            return whole
        return tuple(size if of_whole > 1 else 1 for of_whole, size in zip(whole, sizes))

    return replace(
        spec,
        batch=batch,
        heads=heads,
        kv_heads=spec.kv_heads if kv_heads is None else kv_heads,
        q_len=lengths[0],
        kv_len=lengths[1],
        q_offset=spec.offset + start[2] - start[3],
        mask_shape=shape(spec.mask_shape),
        bias_shape=shape(spec.bias_shape),
        alibi_shape=None if spec.alibi_shape is None else (batch, heads)[-len(spec.alibi_shape) :],
        origin=tuple(a + b for a, b in zip(spec.origin, start)) if spec.dropout_rate else spec.origin,
    )


# --- a ring whose members know their rank when they compile -----------------------------------------
@dataclass(frozen=True)
class Pair:
    """A chunk of queries and one of keys that see something of each other.

    Attributes:
        q, kv: numbers of the chunks on their ranks. q_start, kv_start: first token of each in the whole sequence.
        spec: of this part.
    """

    q: int
    kv: int
    q_start: int
    kv_start: int
    spec: AttentionSpec


@dataclass(frozen=True)
class Round:
    """What a rank does between two messages.

    Attributes:
        way: ranks that the keys move up before it; 0 in the very first round.
        restart: what moves are the rank's own keys: in the first round of each direction.
        home: ranks that the keys' gradients move up after it, to their owner; None where they go on with the keys.
        pairs: what is computed.
    """

    way: int
    restart: bool
    home: Optional[int]
    pairs: Tuple[Pair, ...]


@dataclass(frozen=True)
class RingPlan(Placement):
    """One call on ``ring`` ranks, each with ``spec.q_len / ring`` queries and ``spec.kv_len / ring`` keys."""

    spec: AttentionSpec
    ring: int
    zigzag: bool
    hops: Tuple[Tuple[int, int], ...]

    @property
    def q_chunk(self):
        """Queries of a chunk."""
        return self.spec.q_len // (self.ring * self.chunks)

    @property
    def kv_chunk(self):
        """Keys of a chunk."""
        return self.spec.kv_len // (self.ring * self.chunks)

    def rounds(self, rank):
        """The rounds of one rank; every rank has as many, because all of them pass keys on."""
        found = []
        for number, (way, count) in enumerate(self.hops):
            first = 0 if number == 0 else 1
            for hop in range(first, count + 1):
                source = rank - way * hop
                there = self.full_turn or 0 <= source < self.ring  # what went round the end is out of reach
                pairs = self._pairs(rank, source % self.ring) if there else ()
                home = -way * count if hop == count else None
                found.append(Round(way if hop else 0, hop == first, home, pairs))
        return tuple(found)

    def _pairs(self, rank, source):
        pairs = []
        for q, q_start in enumerate(self.starts(rank, self.q_chunk)):
            for kv, kv_start in enumerate(self.starts(source, self.kv_chunk)):
                part = part_of(self.spec, (0, 0, q_start, kv_start), (self.q_chunk, self.kv_chunk))
                if reaches(part.band, part.offset):
                    pairs.append(Pair(q, kv, q_start, kv_start, part))
        return tuple(pairs)


def make_ring_plan(spec, ring):
    """:class:`RingPlan` of a call whose lengths ``ring`` divides; contiguous where a shard is not two equal chunks."""
    halves = spec.q_len % (2 * ring) == 0 and spec.kv_len % (2 * ring * key_unit(spec)) == 0
    zigzag = takes_zigzag(spec, ring) and halves
    hops = ((1, ring - 1),)
    if ring > 1 and not zigzag:
        hops = needed_hops(spec, ring, spec.q_len // ring, spec.kv_len // ring)
    return RingPlan(spec, ring, zigzag, hops)


def ring_refusal(spec, ring):
    """Why a ring of so many ranks cannot run the call, or None."""
    chunk, unit = spec.kv_len // ring, key_unit(spec)
    if ring > 1 and chunk % unit:
        need = "a multiple of block_size = {} on each rank with a block window".format(unit)
        return Reason("key", "{} tokens".format(chunk), need, "Use local_window_size, or another block_size.")
    return None


def ulysses_refusal(spec, ranks):
    """Why an all-to-all of heads over so many ranks cannot run the call, or None."""
    if spec.heads % ranks:
        need = "a multiple of {} heads (ranks trade them for tokens)".format(ranks)
        return Reason("query", "{} heads".format(spec.heads), need, "Use a ring.")
    return None
