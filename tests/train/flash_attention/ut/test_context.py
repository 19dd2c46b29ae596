"""Context parallelism: the plan of a ring, in numpy and integers; splitting by batch and heads."""

import itertools

import numpy as np
import pytest

from flash_attention.core import reference
from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.context import make_ring_plan, part_of, ring_refusal, ulysses_refusal
from flash_attention.core.lse import merge
from flash_attention.core.ranges import visible
from flash_attention.core.spec import AttentionSpec, Operands

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
B, N, K, D = 2, 4, 2, 8


def spec_of(length=48, kv_length=None, **fields):
    return AttentionSpec(B, N, K, length, kv_length or length, D, **fields)


SPECS = {
    "dense": spec_of(),
    "causal, everything": spec_of(causal=True, alibi_shape=(N,), dropout_rate=0.3, mask_shape=(B, 1, 48, 48)),
    "causal, odd shares": spec_of(36, causal=True),
    "window": spec_of(local_window_size=(9, 2)),
    "narrow window": spec_of(local_window_size=(3, 0)),
    "only later keys": spec_of(local_window_size=(0, 15)),
    "blocks": spec_of(prev_block_num=1, next_block_num=0, block_size=4),
    "more keys": spec_of(24, 48, causal=True),
    "more queries": spec_of(48, 24, causal=True, kv_lengths=False),
}
RINGS = (1, 2, 4)


def draws(spec):
    rng = np.random.default_rng(0)
    tensors = [
        rng.standard_normal((B, heads, n, D)) for heads, n in ((N, spec.q_len), (K, spec.kv_len), (K, spec.kv_len))
    ]
    operands = Operands(
        mask=None if spec.mask_shape is None else rng.random(spec.mask_shape) < 0.7,
        slopes=None if spec.alibi_shape is None else alibi_slopes(N),
        dropout_seed=np.uint32(5) if spec.dropout_rate else None,
    )
    return tensors, operands


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", SPECS)
def test_the_rounds_of_all_ranks_are_the_whole_call(name, ring):
    """Each rank's parts, merged by their LSE, are its rows of the call."""
    spec = SPECS[name]
    (query, key, value), operands = draws(spec)
    plan = make_ring_plan(spec, ring)
    want = reference.attention(np, spec, query, key, value, operands)
    for rank in range(ring):
        parts = {q: [] for q in range(plan.chunks)}
        for pair in (pair for one in plan.rounds(rank) for pair in one.pairs):
            rows = slice(pair.q_start, pair.q_start + plan.q_chunk)
            columns = slice(pair.kv_start, pair.kv_start + plan.kv_chunk)
            mask = None if operands.mask is None else operands.mask[:, :, rows, columns]
            given = query[:, :, rows], key[:, :, columns], value[:, :, columns], operands._replace(mask=mask)
            parts[pair.q].append(reference.attention(np, pair.spec, *given))
        for q, start in enumerate(plan.starts(rank, plan.q_chunk)):
            rows = slice(start, start + plan.q_chunk)
            empty = np.zeros((B, N, plan.q_chunk, D)), np.full((B, N, plan.q_chunk), -np.inf)
            out, lse = merge(np, *zip(empty, *parts[q]))
            np.testing.assert_allclose(out, want[0][:, :, rows], atol=1e-12)
            np.testing.assert_allclose(lse, want[1][:, :, rows], atol=1e-12)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", SPECS)
def test_keys_are_where_the_rounds_say_and_gradients_come_home(name, ring):
    plan = make_ring_plan(SPECS[name], ring)
    rounds = [plan.rounds(rank) for rank in range(ring)]
    here, ended = list(range(ring)), []
    for number in range(len(rounds[0])):
        now = [one[number] for one in rounds]
        assert len({(each.way, each.restart, each.home) for each in now}) == 1, "all ranks send alike"
        moved = range(ring) if now[0].restart else here
        here = [moved[(rank - now[0].way) % ring] for rank in range(ring)]
        for rank, each in enumerate(now):
            starts = plan.starts(here[rank], plan.kv_chunk)
            assert all(pair.kv_start == starts[pair.kv] for pair in each.pairs)
            if each.home is not None:
                assert (rank + each.home) % ring == here[rank]
                ended.append(number)
    assert number in ended


def test_messages_that_no_window_needs_are_absent():
    hops = {name: make_ring_plan(spec, 4).hops for name, spec in SPECS.items()}
    assert hops["dense"] == hops["causal, everything"] == ((1, 3),)
    assert hops["narrow window"] == ((1, 1),) and hops["only later keys"] == ((-1, 2),)
    assert make_ring_plan(spec_of(local_window_size=(0, 0)), 4).hops == ((1, 0),)
    assert make_ring_plan(SPECS["causal, everything"], 4).zigzag and not make_ring_plan(SPECS["window"], 4).zigzag
    assert not make_ring_plan(SPECS["causal, odd shares"], 4).zigzag


def test_zigzag_balances_the_pairs():
    spec = spec_of(1024, causal=True)
    plan = make_ring_plan(spec, 4)
    seen = visible(spec.band, np.arange(1024)[:, None], np.arange(1024)[None, :])
    loads = []
    for rank in range(4):
        pairs = [pair for one in plan.rounds(rank) for pair in one.pairs]
        size = plan.q_chunk
        loads.append(sum(seen[p.q_start : p.q_start + size, p.kv_start : p.kv_start + size].sum() for p in pairs))
    assert sum(loads) == seen.sum() and max(loads) <= 1.05 * min(loads)


@pytest.mark.parametrize("name", ["causal, everything", "blocks", "more keys"])
def test_batch_and_heads_are_parts_of_the_call(name):
    """dp x mp: each device's rows and heads, with its slopes and its places in the dropout mask, are the whole call."""
    spec = SPECS[name]
    (query, key, value), operands = draws(spec)
    want = reference.attention(np, spec, query, key, value, operands)[0]
    for row, half in itertools.product(range(B), range(2)):
        rows, heads, kv_heads = slice(row, row + 1), slice(2 * half, 2 * half + 2), slice(half, half + 1)
        part = part_of(spec, (row, 2 * half, 0, 0), (spec.q_len, spec.kv_len), batch=1, heads=2, kv_heads=1)
        given = operands._replace(
            mask=None if operands.mask is None else operands.mask[rows],
            slopes=None if operands.slopes is None else operands.slopes[heads],
        )
        out = reference.attention(np, part, query[rows, heads], key[rows, kv_heads], value[rows, kv_heads], given)[0]
        np.testing.assert_allclose(out, want[rows, heads], atol=1e-12)


def test_refusals():
    blocks = spec_of(prev_block_num=1, block_size=16)
    assert ring_refusal(blocks, 1) is None and ring_refusal(blocks, 3) is None
    message = str(ring_refusal(blocks, 4).error("RingAttention"))
    assert message == (
        "For 'RingAttention', 'key' must be a multiple of block_size = 16 on each rank with a block window, but got 12 "
        "tokens. Use local_window_size, or another block_size."
    )
    assert ulysses_refusal(blocks, 4) is None
    message = str(ulysses_refusal(blocks, 3).error("UlyssesAttention"))
    assert message == (
        "For 'UlyssesAttention', 'query' must be a multiple of 3 heads (ranks trade them for tokens), but got 4 heads. "
        "Use a ring."
    )
