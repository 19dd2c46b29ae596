"""Task tables, core split, budgets, tile choice and limits of the Ascend 910 kernels: numbers only, nothing is run."""

import itertools

import numpy as np
import pytest

from flash_attention.ascend import host, tasks
from flash_attention.ascend.budget import Budget, forward_buffers
from flash_attention.ascend.chips import ASCEND_310P, ASCEND_910A
from flash_attention.ascend.geometry import Geometry, KernelTiles
from flash_attention.ascend.limits import supports
from flash_attention.ascend.signature import forward_signature, mask_axes
from flash_attention.ascend.tiles import candidate_tiles, choose_tiles, fit_forward
from flash_attention.core import reference
from flash_attention.core.ranges import visible
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.core.tiling import Tile, strategy_names

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
FIELD = {name: number for number, name in enumerate(tasks.TILE_FIELDS)}

BANDS = {
    "dense": {},
    "causal": {"causal": True},
    "tokens": {"local_window_size": (33, 5)},
    "blocks": {"prev_block_num": 1, "next_block_num": 2, "block_size": 24},
    "blocks, causal": {"prev_block_num": 2, "next_block_num": 0, "block_size": 48, "causal": True},
}
LENGTHS = {"square": (200, 200), "wide": (70, 300), "tall": (300, 70), "shifted": (130, 130)}


def make_spec(q_len=256, kv_len=256, head_dim=64, heads=(1, 2, 1), **options):
    return AttentionSpec(heads[0], heads[1], heads[2], q_len, kv_len, head_dim, "float16", **options)


def cases():
    for (band, options), (shape, lengths), tiles in itertools.product(
        BANDS.items(), LENGTHS.items(), ((64, 48, 2), (32, 64, 1))
    ):
        offset = -13 if shape == "shifted" else None
        yield pytest.param(options, lengths, tiles, offset, id="{} {} {}".format(band, shape, tiles))


@pytest.mark.parametrize("options, lengths, tiles, offset", list(cases()))
def test_tables_against_every_score(options, lengths, tiles, offset):
    """Visited tiles are those with a visible key; a side without its flag needs no predicate, in both tables."""
    spec = make_spec(*lengths, q_offset=offset, **options)
    geometry = Geometry(spec, KernelTiles(tiles[0], tiles[1], tiles[2], 1))
    plan = geometry.plan()
    p, j = np.arange(spec.q_len)[:, None] + spec.offset, np.arange(spec.kv_len)[None, :]
    seen = visible(spec.band, p, j)
    below = j < spec.band.first_key(p)
    above = np.arange(geometry.kv_tiles * tiles[1])[None, :] > spec.band.last_key(p)  # also of keys that do not exist
    by_query, by_key = tasks.query_tiles(plan), tasks.key_tasks(plan)
    for i, t in itertools.product(range(plan.q_tiles), range(plan.kv_tiles)):
        rows, columns = slice(*plan.queries(i)), slice(*plan.keys(t))
        row, key_row = by_query[i], by_key[t]
        visits = row[FIELD["first"]] <= t < row[FIELD["stop"]]
        by_key_visits = key_row[0] <= i < key_row[1]  # may count queries that a ragged tile does not have
        assert seen[rows, columns].any() <= visits <= by_key_visits
        if not by_key_visits:
            continue
        needs_low, needs_high = below[rows, columns].any(), above[rows, t * tiles[1] : (t + 1) * tiles[1]].any()
        assert (t < row[FIELD["low_stop"]], t >= row[FIELD["high_first"]]) == (needs_low, needs_high)
        assert (i >= key_row[2], i < key_row[3]) == (needs_low, needs_high)
        distance = j[:, columns] - p[rows]
        assert (t < row[FIELD["before_stop"]]) <= (distance <= 0).all()
        assert (t >= row[FIELD["after_first"]]) == (distance >= 0).all()


@pytest.mark.parametrize("resident", (1, 2))
def test_task_rows_cover_their_tiles(resident):
    spec = make_spec(330, 330, causal=True, local_window_size=(40, None))
    plan = Geometry(spec, KernelTiles(32, 48, resident, 1)).plan()
    table, tiles = tasks.query_tasks(plan, resident), tasks.query_tiles(plan)
    rows = table[:, tasks.TASK_HEAD :].reshape(-1, len(tasks.TILE_FIELDS))
    np.testing.assert_array_equal(rows[: len(tiles)], tiles)
    assert not rows[len(tiles) :].any() and len(rows) - len(tiles) < resident
    for task, (first, stop) in enumerate(table[:, :2]):
        own = rows[task * resident : (task + 1) * resident]
        own = own[own[:, 1] > own[:, 0]]
        assert (first, stop) == (own[:, 0].min(), own[:, 1].max())


def test_a_task_that_sees_nothing_visits_nothing():
    plan = Geometry(make_spec(256, 64, causal=True), KernelTiles(64, 64, 2, 1)).plan()
    assert tasks.query_tasks(plan, 2)[:, :2].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("cores", (1, 3, 8, 32))
@pytest.mark.parametrize("heads", (1, 5))
def test_split_is_complete_and_even(cores, heads):
    loads = np.arange(1.0, 17.0)
    table = tasks.split(loads, heads, cores)
    assert table[0, 0] == 0 and table[-1, 1] == 16 * heads
    np.testing.assert_array_equal(table[1:, 0], table[:-1, 1])
    sequence = np.tile(loads, heads)
    shares = np.array([sequence[start:stop].sum() for start, stop in table[:, :2]])
    assert shares.max() <= sequence.sum() / cores + loads.max()


@pytest.mark.parametrize("block", (16, 48, 100, 300))
@pytest.mark.parametrize("offset", (None, -9, 40))
def test_compact_mask_strip_is_the_mask_around_the_own_blocks(block, offset):
    """Strip tiles put where the table says, and nothing elsewhere, hide what the reference hides within the band."""
    mask = np.random.default_rng(block).random((block, block)) < 0.6
    spec = make_spec(200, 200, mask_shape=mask.shape, compact_mask=True, block_size=block, q_offset=offset)
    geometry = Geometry(spec, KernelTiles(32, 48, 1, 1))
    plan = geometry.plan()
    strip, rows = host.pack_mask(geometry, mask), tasks.query_tiles(plan)
    assert strip.shape == mask_axes(geometry)
    hidden = np.zeros((plan.q_tiles * 32, plan.kv_tiles * 48), bool)
    for i, t in itertools.product(range(plan.q_tiles), range(plan.kv_tiles)):
        place = t - rows[i, FIELD["strip_first"]]
        if 0 <= place < strip.shape[3]:
            tile = strip[0, 0, rows[i, FIELD["strip_row"]], place].transpose(0, 2, 1).reshape(32, 48)
            hidden[i * 32 : (i + 1) * 32, t * 48 : (t + 1) * 48] = tile != 0
    p, j = np.arange(200)[:, None] + spec.offset, np.arange(200)[None, :]
    want = reference.visibility(np, spec, Operands(mask=mask))[0, 0]
    np.testing.assert_array_equal(visible(spec.band, p, j) & ~hidden[:200, :200], want)


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 3), (1, 70), (1, 90))), ids=str)
def test_operands_of_every_broadcast_shape_are_packed(shape):
    """Tiles of an operand hold what its broadcast to (B, N, Sq, Sk) holds."""
    geometry = Geometry(make_spec(70, 90, heads=(2, 3, 3), bias_shape=shape), KernelTiles(32, 48, 1, 1))
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed = host.pack_bias(geometry, bias)
    batches, heads, q_tiles, kv_tiles, groups = packed.shape[:5]
    assert (batches, heads) == shape[:2] and (q_tiles, groups) == ((1, 1) if shape[2] == 1 else (3, 2))
    rows = packed.transpose(0, 1, 2, 4, 6, 3, 5).reshape(batches, heads, q_tiles * groups * 16, kv_tiles * 48)
    rows = np.broadcast_to(rows[:, :, :1], rows.shape[:2] + (70, rows.shape[3])) if shape[2] == 1 else rows[:, :, :70]
    np.testing.assert_array_equal(rows[..., :90], np.broadcast_to(bias, shape[:2] + (70, 90)))


# --- budgets and limits ---------------------------------------------------------------------------
EXTRAS = {
    "plain": {},
    "all": {"causal": True, "bias_shape": (1, 1, 1, 1), "alibi_shape": (2,), "dropout_rate": 0.1,
            "local_window_size": (9, 9), "mask_shape": (1, 1, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("chip", (ASCEND_910A, ASCEND_310P), ids=lambda chip: chip.soc)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=list(EXTRAS))
@pytest.mark.parametrize("strategy", strategy_names())
def test_chosen_tiles_fit_every_head_size(strategy, extra, chip):
    for head_dim, lengths in itertools.product(
        (1, 40, 64, 128, 160, 256), ((1, 1), (77, 4096), (4096, 77), (4096, 4096))
    ):
        spec = make_spec(*lengths, head_dim=head_dim, heads=(4, 32, 8), tiling=strategy, **extra)
        for tiles in candidate_tiles(spec, "forward", chip):
            assert Budget(forward_buffers(Geometry(spec, tiles)), chip).fits
            assert tiles.q % 16 == tiles.kv % 16 == tiles.q // 16 % tiles.groups == 0


def test_two_query_tiles_are_resident_or_two_halves():
    longer = Tile(128, 256)
    assert fit_forward(make_spec(4096, 4096, 128, heads=(4, 8, 8)), longer) == KernelTiles(128, 256, 2, 2)
    assert fit_forward(make_spec(4096, 4096, 256, heads=(4, 8, 8)), longer) == KernelTiles(64, 256, 2, 2)
    assert choose_tiles(make_spec(4096, 4096, 128, heads=(4, 8, 8), tiling="sparse")) == KernelTiles(128, 128, 2, 4)
    assert choose_tiles(make_spec(1024, 1024, 128, tiling="sparse")) == KernelTiles(64, 128, 2, 4)
    assert choose_tiles(make_spec(1, 1024, 128, tiling="sparse")).resident == 1


def test_budget_prints_every_buffer():
    spec = make_spec(causal=True)
    budget = Budget(forward_buffers(Geometry(spec, choose_tiles(spec))))
    text = str(budget)
    assert all(buffer.name in text and buffer.content in text for buffer in budget.buffers)
    assert "UB" in text and str(budget.used("UB")) in text


REFUSED = {
    "dtype": ({"dtype": "float32"}, "Cast the inputs to float16"),
    "head_dim": ({"head_dim": 257}, "portable"),
    "q_segment_ids": ({"segments": True}, "portable"),
    "query_seq_lengths": ({"q_lengths": True}, "portable"),
    "key_value_seq_lengths": ({"kv_lengths": True}, "portable"),
    "sinks": ({"sinks": True}, "portable"),
    "q_offset": ({"dynamic_offset": True}, "portable"),
    "logits_soft_cap": ({"soft_cap": 3.0}, "portable"),
    "query": ({"batch": -1}, "portable"),
    "q_len and kv_len": ({"q_len": 2**22}, "portable"),
    "keep": ({"q_len": 2**17, "kv_len": 2**17, "dropout_rate": 0.1}, "portable"),
}


@pytest.mark.parametrize("argument", list(REFUSED))
def test_refused_with_a_remedy(argument):
    options, remedy = REFUSED[argument]
    whole = dict(dict(batch=1, heads=1, kv_heads=1, q_len=64, kv_len=64, head_dim=64, dtype="float16"), **options)
    reason = supports(AttentionSpec(**whole))
    assert reason.argument == argument and remedy in reason.remedy


def test_everything_else_is_taken():
    assert supports(make_spec(131072, 131072, 128, causal=True, scale=-0.1, q_offset=7)) is None
    assert supports(make_spec(300, 70, 1, mask_shape=(1, 2, 300, 70), alibi_shape=(2,), dropout_rate=0.5)) is None


def test_signature_names_are_unique_and_ordered():
    spec = make_spec(mask_shape=(1, 1, 1, 256), bias_shape=(1, 2, 1, 256), alibi_shape=(2,), dropout_rate=0.1)
    inputs, outputs = forward_signature(Geometry(spec, choose_tiles(spec)), 4, True)
    names = [argument.name for argument in inputs + outputs]
    assert names == [
        "query",
        "key",
        "value",
        "mask",
        "bias",
        "slopes",
        "keep",
        "bounds",
        "tasks",
        "cores",
        "output",
        "lse",
    ]
