"""A cache of one number a token beside its model in plain lists: random schedules may not make them differ."""

import numpy as np
import pytest

from flash_attention_infer.core import OutOfBlocksError, SequenceTable, StaleSequenceError

WRONG = -1  # what a slot holds that nobody has written


class Shadow:
    """A :class:`SequenceTable`, a pool of tokens that follows its steps, and what each sequence should hold."""

    def __init__(self, num_blocks, block_size, **options):
        self.table = SequenceTable(num_blocks, block_size, **options)
        self.pool = np.full(num_blocks * block_size, WRONG, np.int64)
        self.want = {}  # id -> int64 array
        self.freed = []
        self.written = 0

    def add(self):
        sequence = self.table.add()
        self.want[sequence] = np.zeros(0, np.int64)
        return sequence

    def fork(self, sequence):
        child = self.table.fork(sequence)
        self.want[child] = self.want[sequence]
        return child

    def extend(self, sequences, counts):
        """Write new tokens, or see nothing change where there is no room. Returns whether there was."""
        before = self.state()
        try:
            step = self.table.reserve(sequences, counts)
        except OutOfBlocksError:
            assert self.state() == before
            return False
        self.write(step)
        return True

    def write(self, step):
        """What a framework does with a step: copies, then writes."""
        self.copy(step)
        for b, sequence in enumerate(step.sequences):
            new = self.written + np.arange(step.counts[b])
            self.written += int(step.counts[b])
            slots = step.slots[b, : step.counts[b]]
            self.pool[slots[slots >= 0]] = new[slots >= 0]
            assert step.starts[b] == len(self.want[sequence]) and (step.slots[b, step.counts[b] :] == -1).all()
            self.want[sequence] = np.concatenate([self.want[sequence], new])

    def copy(self, step):
        blocks = self.pool.reshape(-1, self.table.block_size)
        for source, target in step.copies:
            blocks[target] = blocks[source]

    def truncate(self, sequence, length):
        self.table.truncate(sequence, length)
        self.want[sequence] = self.want[sequence][:length]

    def free(self, sequences):
        self.table.free(sequences)
        for sequence in sequences:
            del self.want[sequence]
        self.freed += sequences

    def misuse(self, sequence):
        """Every use of a freed sequence is refused and changes nothing."""
        before, live = self.state(), list(self.want)[:1]
        for use in (
            lambda: self.table.free(live + [sequence]),
            lambda: self.table.fork(sequence),
            lambda: self.table.reserve(live + [sequence], [3] * (len(live) + 1)),
            lambda: self.table.truncate(sequence, 0),
        ):
            with pytest.raises(StaleSequenceError, match="freed"):
                use()
        assert self.state() == before

    def state(self):
        """Everything that a failed call must leave alone."""
        table = self.table
        return {one: (table.length(one), table.blocks(one)) for one in table.live}, table.free_blocks

    def read(self, sequence):
        """The tokens of a sequence, by its blocks."""
        places = self.pool.reshape(-1, self.table.block_size)[self.table.blocks(sequence)]
        return places.reshape(-1)[: self.table.length(sequence)]

    def check(self, sequences=None):
        """Contents of these sequences (None = all), and that no block is lost or held too often."""
        for sequence in self.want if sequences is None else sequences:
            np.testing.assert_array_equal(self.read(sequence), self.want[sequence])
        assert set(self.table.live) == set(self.want)
        holders = np.zeros(self.table.allocator.num_blocks, int)
        for sequence in self.want:
            np.add.at(holders, self.table.blocks(sequence), 1)
        assert [self.table.allocator.holders(block) for block in np.flatnonzero(holders)] == list(holders[holders > 0])
        assert self.table.free_blocks == (holders == 0).sum()


def run_schedule(shadow, rng, steps, most_live, most_tokens, check_every):
    """A seeded schedule of ``steps`` operations; returns what it reached, by name."""
    reached = {"live": 0, "refused": 0, "copies": 0, "shared prefix": 0}
    for number in range(steps):
        live = list(shadow.want)
        kinds = ["extend"] * 4 + ["fork", "truncate", "misuse"] + (["add"] * 2 if len(live) < most_live else ["free"])
        kind = kinds[rng.integers(len(kinds))] if live else "add"
        one = live[rng.integers(len(live))] if live else None
        if kind == "add":
            shadow.add()
        elif kind == "fork" and len(live) < most_live:
            shadow.fork(one)
            reached["shared prefix"] = max(reached["shared prefix"], len(shadow.want[one]))
        elif kind == "truncate":
            length = len(shadow.want[one])
            shadow.truncate(one, int(rng.integers(max(0, length - 20), length + 1)))
        elif kind == "free" or (kind == "fork" and len(live) >= most_live):
            shadow.free([live[n] for n in rng.permutation(len(live))[: rng.integers(1, 3)]])
        elif kind == "misuse" and shadow.freed:
            shadow.misuse(shadow.freed[rng.integers(len(shadow.freed))])
        elif kind == "extend":
            group = [live[n] for n in rng.permutation(len(live))[: rng.integers(1, 9)]]
            held = shadow.table.free_blocks
            if not shadow.extend(group, rng.integers(1, most_tokens, len(group))):
                reached["refused"] += 1
                shadow.free(live[: len(live) // 2 + 1])
            reached["copies"] += held - shadow.table.free_blocks
        reached["live"] = max(reached["live"], len(shadow.want))
        if number % check_every == 0:
            shadow.check()
    shadow.check()
    return reached
