"""SequenceTable: live sequences, the blocks each one holds, and what happens when they grow, fork, shrink or end.

Every method succeeds whole or raises and changes nothing. Ids are never used again, so that a stale one is noticed.
"""

from array import array
from collections import Counter

import numpy as np

from flash_attention.core.errors import invalid_value
from flash_attention.core.validation import check_int
from flash_attention_infer.core.allocator import BlockAllocator
from flash_attention_infer.core.errors import CacheError, OutOfBlocksError, StaleSequenceError
from flash_attention_infer.core.step import Step

LAYER = "SequenceTable"


class _Sequence:
    """Blocks in order; tokens; the most tokens there have ever been (what lies behind them may be overwritten)."""

    __slots__ = ("blocks", "length", "reached")

    def __init__(self, blocks=(), length=0, reached=0):
        self.blocks, self.length, self.reached = array("i", blocks), length, reached


class SequenceTable:
    """Sequences over a pool of blocks. Costs 12 bytes a block with the allocator, and a small object a sequence.

    Args:
        num_blocks, block_size: the pool; a block holds ``block_size`` tokens.
        max_blocks: most blocks of one sequence; None = the pool.
        ring: a :class:`Ring`, or None. With one, a sequence holds a single block, which is then the ring's row.
        on_shortage: eviction hook ``on_shortage(table, missing, keep)``, called once when a step needs ``missing`` more
            blocks than are free. It may free or truncate sequences, best none of those in ``keep`` (the step's own).
    """

    def __init__(self, num_blocks, block_size, max_blocks=None, ring=None, on_shortage=None):
        self.block_size = check_int(LAYER, "block_size", block_size, 1)
        if ring is not None and (ring.capacity != block_size or max_blocks not in (None, 1)):
            raise invalid_value(LAYER, "block_size", "the ring's capacity {}".format(ring.capacity), block_size)
        self.allocator = BlockAllocator(num_blocks)
        self.ring = ring
        self.max_blocks = 1 if ring else num_blocks if max_blocks is None else max_blocks
        check_int(LAYER, "max_blocks", self.max_blocks, 1)
        self.on_shortage = on_shortage
        self._sequences = {}
        self._next_id = 0

    # --- looking ----------------------------------------------------------------------------------
    @property
    def free_blocks(self):
        """Blocks that nobody holds."""
        return self.allocator.free_blocks

    @property
    def live(self):
        """Ids of the live sequences, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence):
        """Tokens of a sequence."""
        return self._get(sequence).length

    def blocks(self, sequence):
        """Blocks of a sequence, in order."""
        return self._get(sequence).blocks.tolist()

    def blocks_for(self, length):
        """Blocks that a sequence of ``length`` tokens holds."""
        return min(length, 1) if self.ring else -(-length // self.block_size)

    @property
    def max_length(self):
        """Most tokens of a sequence; None = no limit (a ring)."""
        return None if self.ring else self.max_blocks * self.block_size

    def _get(self, sequence):
        found = self._sequences.get(sequence)
        if found is None:
            known = isinstance(sequence, int) and 0 <= sequence < self._next_id
            raise StaleSequenceError(
                "For '{}', 'sequence' must be a live sequence, but got {!r}, which {}.".format(
                    LAYER, sequence, "has been freed" if known else "was never added"
                )
            )
        return found

    def _distinct(self, sequences):
        sequences = tuple(sequences)
        if len(set(sequences)) != len(sequences):
            raise invalid_value(LAYER, "sequences", "distinct", list(sequences))
        return sequences, [self._get(one) for one in sequences]

    # --- changing ---------------------------------------------------------------------------------
    def add(self):
        """A new, empty sequence: its id. Holds no block before its first token."""
        return self._admit(_Sequence())

    def fork(self, sequence):
        """A new sequence with the same tokens, in the same blocks: its id. The first of the two to write copies."""
        parent = self._get(sequence)
        self.allocator.retain(parent.blocks)
        return self._admit(_Sequence(parent.blocks, parent.length, parent.reached))

    def _admit(self, sequence):
        self._sequences[self._next_id] = sequence
        self._next_id += 1
        return self._next_id - 1

    def free(self, sequences):
        """End sequences and give up their blocks.

        Raises:
            StaleSequenceError: one of them is not live (freed before, perhaps). Then none is freed.
        """
        sequences, found = self._distinct(sequences)
        for one in found:
            self.allocator.release(one.blocks)
        for name in sequences:
            del self._sequences[name]

    def truncate(self, sequence, length):
        """Take back the last tokens, so that ``length`` remain (rejected speculation, a failed step).

        Raises:
            CacheError: the ring has overwritten tokens that would become visible again.
        """
        self.check_truncate(sequence, length)
        found = self._get(sequence)
        keep = self.blocks_for(length)
        self.allocator.release(found.blocks[keep:])
        del found.blocks[keep:]
        found.length = length
        if not length:
            found.reached = 0

    def check_truncate(self, sequence, length):
        """Raise unless ``truncate(sequence, length)`` is possible."""
        found = self._get(sequence)
        check_int(LAYER, "length", length, 0, found.length)
        ring = self.ring
        if ring and 0 < length < found.reached - ring.lookahead and found.reached > ring.size + ring.sink_tokens:
            raise CacheError(
                "For '{}', 'length' must be at least {}, but got {}: the ring has gone round, and keeps {} tokens to "
                "take back. Give the ring more lookahead.".format(
                    LAYER, found.reached - ring.lookahead, length, ring.lookahead
                )
            )

    def reserve(self, sequences, counts, rows=None, tokens=None):
        """Room for ``counts[b]`` more tokens of ``sequences[b]``: the :class:`Step` that writes them.

        The tokens count as present from now on; ``truncate`` takes them back.

        Args:
            sequences: distinct ids. counts: ints, not all 0.
            rows, tokens: pad the step to this batch and this T; None = to what it needs. A compiled function serves one
                shape, so few of them should occur.

        Raises:
            OutOfBlocksError: no room, also after the hook.
            StaleSequenceError: a sequence is not live, or the hook has freed it.
        """
        sequences, found, counts = self._checked(sequences, counts)
        rows = len(found) if rows is None else check_int(LAYER, "rows", rows, len(found))
        tokens = max(counts) if tokens is None else check_int(LAYER, "tokens", tokens, max(counts))
        missing = self._needed(found, counts) - self.free_blocks
        if missing > 0 and self.on_shortage is not None:
            self._evict(missing, sequences)
            sequences, found, counts = self._checked(sequences, counts)
        missing = self._needed(found, counts) - self.free_blocks
        if missing > 0:
            raise OutOfBlocksError(
                "For '{}', {} tokens of {} sequences need {} more blocks than the {} that are free of {}. Free or "
                "truncate sequences, or give the cache more blocks.".format(
                    LAYER, sum(counts), len(sequences), missing, self.free_blocks, self.allocator.num_blocks
                )
            )
        starts = [one.length for one in found]
        copies = [pair for one, count in zip(found, counts) for pair in self._grow(one, count)]
        return self._step(sequences, found, starts, counts, copies, rows, tokens)

    def _evict(self, missing, keep):
        hook, self.on_shortage = self.on_shortage, None  # a hook that reserves blocks must not call itself
        try:
            hook(self, missing, keep)
        finally:
            self.on_shortage = hook

    def _checked(self, sequences, counts):
        sequences, found = self._distinct(sequences)
        counts = [check_int(LAYER, "counts", count, 0) for count in np.asarray(counts).reshape(-1).tolist()]
        if len(counts) != len(sequences) or not counts or not max(counts):
            need = "one number of tokens a sequence, not all of them 0"
            raise invalid_value(LAYER, "counts", need, "{} for {} sequences".format(counts, len(sequences)))
        for name, one, count in zip(sequences, found, counts):
            if self.blocks_for(one.length + count) > self.max_blocks:
                most = self.max_blocks * self.block_size
                raise OutOfBlocksError(
                    "For '{}', sequence {} must have at most {} tokens, but got {}.".format(
                        LAYER, name, most, one.length + count
                    )
                )
        return sequences, found, counts

    def _open_block(self, sequence, count):
        """Index of the block with tokens in it that ``count`` more would write into, or None."""
        if not count or not sequence.length:
            return None
        if self.ring:
            return 0
        return None if sequence.length % self.block_size == 0 else sequence.length // self.block_size

    def _needed(self, found, counts):
        """New blocks of a step: growth, and copies of shared blocks (the last holder of one writes in place)."""
        needed, left = 0, Counter()
        for one, count in zip(found, counts):
            needed += self.blocks_for(one.length + count) - len(one.blocks)
            index = self._open_block(one, count)
            if index is not None:
                block = one.blocks[index]
                if self.allocator.holders(block) - left[block] > 1:
                    needed += 1
                    left[block] += 1
        return needed

    def _grow(self, one, count):
        """Give a sequence the blocks for ``count`` more tokens; yields the (from, to) of a copied block."""
        index, pairs = self._open_block(one, count), []
        if index is not None and self.allocator.holders(one.blocks[index]) > 1:
            shared, (own,) = one.blocks[index], self.allocator.allocate(1)
            self.allocator.release([shared])
            one.blocks[index] = own
            pairs.append((shared, own))
        one.blocks.extend(self.allocator.allocate(self.blocks_for(one.length + count) - len(one.blocks)))
        one.length += count
        one.reached = max(one.reached, one.length)
        return pairs

    # --- index arrays -----------------------------------------------------------------------------
    def _step(self, sequences, found, starts, counts, copies, rows, tokens):
        padding = [0] * (rows - len(found))
        starts, counts = (np.asarray(numbers + padding, np.int32) for numbers in (starts, counts))
        tables = self._tables(found, rows)
        t = np.arange(tokens, dtype=np.int32)[None, :]
        position, real = starts[:, None] + t, t < counts[:, None]
        history = sinks = None
        if self.ring is None:
            index = np.minimum(position // self.block_size, tables.shape[1] - 1)
            slots = np.take_along_axis(tables, index, 1) * self.block_size + position % self.block_size
        else:
            row = tables * self.block_size  # (B, 1)
            slots = row + self.ring.place(position)
            real &= self.ring.keeps(position, (starts + counts)[:, None])
            before = starts[:, None] - np.arange(self.ring.window, 0, -1, dtype=np.int32)
            exists = before >= self.ring.sink_tokens
            history = np.where(exists, row + self.ring.place(np.where(exists, before, 0)), row).astype(np.int32)
            sinks = row + np.arange(self.ring.sink_tokens, dtype=np.int32)
        return Step(
            starts,
            counts,
            np.where(real, slots, -1).astype(np.int32),
            tables,
            history,
            sinks,
            np.asarray(copies, np.int32).reshape(-1, 2),
            sequences,
            fresh=not starts.any(),
            whole=tables.shape == (self.allocator.num_blocks, 1) and bool((np.diff(tables[:, 0]) == 1).all()),
        )

    def _tables(self, found, rows):
        """int32 (rows, n). n is a power of two, so that compiled functions see few shapes; padding repeats the last."""
        width = max(len(one.blocks) for one in found)
        width = min(1 << (width - 1).bit_length(), self.max_blocks)
        tables = np.zeros((rows, width), np.int32)
        for row, one in zip(tables, found):
            row[: len(one.blocks)] = one.blocks
            row[len(one.blocks) :] = one.blocks[-1] if len(one.blocks) else 0
        return tables
