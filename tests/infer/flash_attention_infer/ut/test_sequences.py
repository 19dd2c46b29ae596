"""Block allocator and sequence table: random schedules, errors that change nothing, forks, rings, memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.schedules import Shadow, run_schedule

from flash_attention_infer.core import (
    BlockAllocator,
    CacheError,
    DoubleFreeError,
    OutOfBlocksError,
    Ring,
    SequenceTable,
    StaleSequenceError,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


# --- random schedules -----------------------------------------------------------------------------
class Machine(RuleBasedStateMachine):
    """Add, extend, fork, truncate, free and misuse in any order; what is left is freed, and no block is missing."""

    num_blocks, block_size, prefix, first, most = 24, 4, 9, 2, 30

    @initialize()
    def prepare(self):
        self.shadow = Shadow(self.num_blocks, self.block_size)
        parent = self.shadow.add()
        assert self.shadow.extend([parent], [self.prefix])
        for _ in range(self.first - 1):
            self.shadow.fork(parent)

    def pick(self, data, least=1, most=1):
        return data.draw(
            st.lists(st.sampled_from(sorted(self.shadow.want)), min_size=least, max_size=most, unique=True)
        )

    @rule()
    def add(self):
        self.shadow.add()

    @precondition(lambda self: self.shadow.want)
    @rule(data=st.data())
    def extend(self, data):
        group = self.pick(data, 1, 6)
        counts = [data.draw(st.integers(0, self.most)) for _ in group]
        if max(counts) and not self.shadow.extend(group, counts):
            self.shadow.free(self.pick(data))

    @precondition(lambda self: self.shadow.want)
    @rule(data=st.data())
    def fork(self, data):
        self.shadow.fork(self.pick(data)[0])

    @precondition(lambda self: self.shadow.want)
    @rule(data=st.data())
    def truncate(self, data):
        one = self.pick(data)[0]
        self.shadow.truncate(one, data.draw(st.integers(0, len(self.shadow.want[one]))))

    @precondition(lambda self: self.shadow.want)
    @rule(data=st.data())
    def free(self, data):
        self.shadow.free(self.pick(data, 1, 3))

    @precondition(lambda self: self.shadow.freed)
    @rule(data=st.data())
    def misuse(self, data):
        self.shadow.misuse(data.draw(st.sampled_from(self.shadow.freed)))

    @invariant()
    def nothing_is_corrupted(self):
        self.shadow.check()

    def teardown(self):
        self.shadow.free(list(self.shadow.want))
        assert self.shadow.table.free_blocks == self.num_blocks


class LargeMachine(Machine):
    num_blocks, block_size, prefix, first, most = 4096, 16, 1000, 64, 400


def run_machine(machine, runs, steps):
    run_state_machine_as_test(machine, settings=settings(
        max_examples=runs, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    ))  # fmt: skip


def test_small_machine():
    run_machine(Machine, 12, 25)


@pytest.mark.slow
def test_large_machine():
    """100 runs of 100 steps over 4,096 blocks, at least 64 live sequences with a shared prefix of 1,000 tokens."""
    run_machine(LargeMachine, 100, 100)


def test_short_schedule():
    reached = run_schedule(Shadow(64, 4), np.random.default_rng(5), 400, 12, 12, check_every=10)
    assert reached["refused"] and reached["live"] == 12


@pytest.mark.slow
def test_long_schedule():
    """10,000 steps."""
    shadow = Shadow(4096, 16)
    parent = shadow.add()
    shadow.extend([parent], [1200])
    for _ in range(70):
        shadow.fork(parent)
    reached = run_schedule(shadow, np.random.default_rng(6), 10000, 100, 400, check_every=100)
    assert reached["live"] >= 64 and reached["shared prefix"] >= 1000 and reached["refused"]


# --- the allocator --------------------------------------------------------------------------------
def test_allocator_refuses_and_changes_nothing():
    pool = BlockAllocator(4)
    held = pool.allocate(3)
    assert held == [0, 1, 2] and pool.free_blocks == 1
    pool.retain([0])
    for act, error, text in (
        (lambda: pool.allocate(2), OutOfBlocksError, "2 blocks are needed, but 1 of 4 are free"),
        (lambda: pool.release([1, 2, 2]), DoubleFreeError, "block 2 is to be released 2 times, but it has 1 holders"),
        (lambda: pool.release([1, 3]), DoubleFreeError, "block 3 is to be released 1 times, but it has 0 holders"),
        (lambda: pool.retain([1, 3]), ValueError, "'blocks' must be held by somebody, but got free block 3"),
        (lambda: pool.release([4]), ValueError, r"'blocks' must be in \[0, 4\), but got 4"),
        (lambda: pool.retain([-1]), ValueError, r"'blocks' must be in \[0, 4\), but got -1"),
    ):
        with pytest.raises(error, match=text):
            act()
        assert [pool.holders(block) for block in range(4)] == [2, 1, 1, 0] and pool.free_blocks == 1
    pool.release([0, 0, 2])
    assert pool.free_blocks == 3 and sorted(pool.allocate(3)) == [0, 2, 3]


# --- the table ------------------------------------------------------------------------------------
def test_a_fork_copies_only_the_block_it_writes():
    table = SequenceTable(8, 4)
    one = table.add()
    table.reserve([one], [6])
    two = table.fork(one)
    assert table.blocks(two) == table.blocks(one) == [0, 1] and table.free_blocks == 6
    step = table.reserve([two, one], [1, 1])  # the second to write keeps the shared block for itself
    assert step.copies.tolist() == [[1, 2]] and table.blocks(two) == [0, 2] and table.blocks(one) == [0, 1]
    assert step.slots.tolist() == [[10], [6]] and step.starts.tolist() == [6, 6] and not step.fresh
    table.truncate(one, 4)
    three = table.fork(one)
    assert table.reserve([three], [1]).copies.size == 0, "a full block is never written again"
    table.free([one, two, three])
    assert table.free_blocks == 8


def test_errors_name_the_fault():
    table = SequenceTable(4, 2, max_blocks=3)
    one = table.add()
    table.reserve([one], [3])
    for act, error, text in (
        (lambda: table.length(7), StaleSequenceError, "must be a live sequence, but got 7, which was never added"),
        (lambda: table.reserve([one], [4]), OutOfBlocksError, "sequence 0 must have at most 6 tokens, but got 7"),
        (lambda: table.reserve([one, one], [1, 1]), ValueError, "'sequences' must be distinct"),
        (lambda: table.free([one, one]), ValueError, "'sequences' must be distinct"),
        (lambda: table.reserve([one], [0]), ValueError, "not all of them 0"),
        (lambda: table.reserve([one], [1, 1]), ValueError, "one number of tokens a sequence"),
        (lambda: table.reserve([one], [-1]), ValueError, "'counts' must be an int >= 0"),
        (lambda: table.reserve([one], [1.5]), TypeError, "'counts' must be an int >= 0"),
        (lambda: table.reserve([one], [2], rows=0), ValueError, "'rows' must be an int >= 1"),
        (lambda: table.reserve([one], [2], tokens=1), ValueError, "'tokens' must be an int >= 2"),
        (lambda: table.truncate(one, 4), ValueError, r"'length' must be an int in \[0, 3\]"),
    ):
        with pytest.raises(error, match=text):
            act()
        assert (table.length(one), table.blocks(one), table.free_blocks) == (3, [0, 1], 2)
    table.free([one])
    with pytest.raises(StaleSequenceError, match="got 0, which has been freed"):
        table.free([one])
    assert table.add() == 1, "ids are never used again"


def test_eviction_hook():
    calls = []

    def evict(table, missing, keep):
        calls.append((missing, keep))
        table.free([one for one in table.live if one not in keep][:1])

    table = SequenceTable(4, 2, on_shortage=evict)
    old, new = table.add(), table.add()
    table.reserve([old, new], [4, 4])
    step = table.reserve([new], [3])
    assert calls == [(2, (new,))] and step.starts.tolist() == [4] and table.live == (new,)
    other = table.add()
    text = "5 tokens of 2 sequences need 2 more blocks than the 0 that are free of 4"
    with pytest.raises(OutOfBlocksError, match=text):
        table.reserve([new, other], [1, 4])
    assert table.length(new) == 7 and len(calls) == 2 and calls[1][0] == 2

    table.on_shortage = lambda table, missing, keep: table.free(keep)
    with pytest.raises(StaleSequenceError, match="has been freed"):
        table.reserve([new, other], [1, 3])
    assert table.free_blocks == 4 and table.live == () and table.on_shortage is not None


def test_steps_of_ragged_batches():
    table = SequenceTable(16, 4)
    ids = [table.add() for _ in range(3)]
    table.reserve(ids, [5, 2, 9])
    step = table.reserve(ids, [1, 0, 4])
    assert step.tokens == 4 and step.batch == 3 and step.lengths.tolist() == [6, 2, 13]
    assert step.slots[0].tolist() == [5, -1, -1, -1] and step.slots[1].tolist() == [-1] * 4
    assert step.tables.shape == (3, 4), "as wide as the longest, rounded up to a power of two"
    assert step.tables[0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("ring", [None, Ring(2, 1)], ids=str)
def test_padded_steps(ring):
    """More rows and places than there are sequences and tokens: nothing is written there."""
    plain, padded = (SequenceTable(6, ring.capacity if ring else 4, ring=ring) for _ in range(2))
    ids = [plain.add() for _ in range(2)]
    assert [padded.add() for _ in range(2)] == ids
    for counts in ([3, 2], [1, 0]):
        want, got = plain.reserve(ids, counts), padded.reserve(ids, counts, rows=4, tokens=5)
        assert got.slots.shape == (4, 5) and got.sequences == want.sequences and got.fresh == want.fresh
        assert got.counts.tolist() == counts + [0, 0] and got.starts[2:].tolist() == [0, 0]
        assert (got.slots[:2, : want.tokens] == want.slots).all() and (got.slots >= 0).sum() == (want.slots >= 0).sum()
        assert (got.tables[:2] == want.tables).all() and (got.tables >= 0).all() and not got.whole
        assert got.last.tolist() == [max(counts[0] - 1, 0), 5 + max(counts[1] - 1, 0), 10, 15]
        if ring:
            assert got.history.shape == (4, 2) and got.history.min() >= 0


def test_a_pool_of_one_block_a_sequence_is_its_own_batch():
    table = SequenceTable(2, 8, max_blocks=1)
    ids = [table.add(), table.add()]
    assert table.reserve(ids, [3, 3]).whole and table.reserve(ids, [1, 1]).fresh is False
    assert not table.reserve(ids[::-1], [1, 1]).whole and not table.reserve(ids[:1], [1]).whole


# --- rings ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ring", [Ring(5), Ring(5, 2), Ring(4, 3, 2)], ids=str)
def test_a_ring_holds_what_the_next_query_sees(ring):
    """After any step, and after any truncation it allows, the history is the window's tokens in order."""
    rng = np.random.default_rng(1)
    shadow = Shadow(3, ring.capacity, ring=ring)
    ids, reached = [shadow.add(), shadow.add()], 0
    for _ in range(60):
        step = shadow.table.reserve(ids, rng.integers(1, 9, 2))
        shadow.copy(step)
        for b, one in enumerate(ids):
            have, start = shadow.want[one], len(shadow.want[one])
            position = start - np.arange(ring.window, 0, -1)
            there = position >= ring.sink_tokens
            np.testing.assert_array_equal(shadow.pool[step.history[b]][there], have[position[there]])
            assert (step.history[b][~there] == step.tables[b, 0] * ring.capacity).all()
        shadow.write(step)
        for b, one in enumerate(ids):
            first = shadow.want[one][: ring.sink_tokens]
            np.testing.assert_array_equal(shadow.pool[step.sinks[b]][: len(first)], first)
        length = len(shadow.want[ids[0]])
        reached = max(reached, length)
        if ring.lookahead and rng.random() < 0.5:
            shadow.truncate(ids[0], min(length, max(reached - ring.lookahead, 0)))
        if rng.random() < 0.2:
            shadow.free([ids[1]])
            ids[1] = shadow.fork(ids[0])


def test_a_ring_refuses_to_show_what_it_has_overwritten():
    ring = Ring(4, 1, 2)
    table = SequenceTable(2, ring.capacity, ring=ring)
    one = table.add()
    table.reserve([one], [20])
    table.truncate(one, 18)
    with pytest.raises(
        CacheError, match="'length' must be at least 18, but got 17: the ring has gone round, and keeps 2"
    ):
        table.truncate(one, 17)
    assert table.length(one) == 18
    table.truncate(one, 0)
    table.reserve([one], [7])
    table.truncate(one, 1)  # all of it is still there
    with pytest.raises(ValueError, match="'block_size' must be the ring's capacity 7"):
        SequenceTable(2, 8, ring=ring)


# --- memory ---------------------------------------------------------------------------------------
def test_bookkeeping_is_below_two_bytes_a_token(figure):
    tokens, size = 1 << 20, 16
    tracemalloc.start()
    table = SequenceTable(tokens // size, size)
    ids = [table.add() for _ in range(64)]
    table.reserve(ids, [tokens // 64] * 64)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert table.free_blocks == 0
    figure("KV cache bookkeeping, blocks of 16 tokens", held / tokens, 2.0, "bytes a token")
