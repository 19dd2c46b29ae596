"""The cost model: its scheduling rule, three programs whose time is computed by hand, and what it predicts for calls.

The rates in the hand computations are literals from the published figures of the chip, not the simulator's constants.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
from support.ascend import Stage
from support.selection import mostly_slow

from flash_attention.ascend import cost, host, tasks
from flash_attention.ascend.backward import build_backward
from flash_attention.ascend.backward_arguments import pack_cores
from flash_attention.ascend.chips import ASCEND_310P, ASCEND_910A
from flash_attention.ascend.forward import build_forward
from flash_attention.ascend.geometry import KernelTiles
from flash_attention.ascend.limits import supports
from flash_attention.ascend.schedule import PIPES, schedule
from flash_attention.ascend.simulator import SimulatorParams, Toolkit
from flash_attention.ascend.simulator.trace import Span, TraceRecord
from flash_attention.ascend.tile_ops import layout
from flash_attention.ascend.tile_ops.matmul import Cube, Operand
from flash_attention.ascend.tile_ops.vector import LANES, Lanes, Place, binary, unary
from flash_attention.ascend.tiles import candidate_tiles, choose_tiles
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.spec import AttentionSpec

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
KB = 1024


# --- the rule ---------------------------------------------------------------------------------------------------------
def record(pipe, cycles, reads=(), writes=(), part=0, scope="UB"):
    """One instruction; ``reads`` and ``writes`` are pairs (start, stop) of bytes of one memory."""
    spans = [tuple(Span(scope, start, stop, "x") for start, stop in side) for side in (reads, writes)]
    return TraceRecord("op", pipe, cycles, 1, "file:1", part, *spans)


@pytest.mark.parametrize(
    "first, second, end",
    [
        (dict(writes=[(0, 64)]), dict(reads=[(64, 96)]), 10),  # other bytes: both at once
        (dict(reads=[(0, 64)]), dict(reads=[(0, 64)]), 10),  # two readers
        (dict(writes=[(0, 64)]), dict(reads=[(32, 96)]), 17),  # read after write
        (dict(reads=[(0, 64)]), dict(writes=[(32, 96)]), 17),  # write after read
        (dict(writes=[(0, 64)]), dict(writes=[(32, 96)]), 17),  # write after write
        (dict(writes=[(0, 4)]), dict(reads=[(28, 32)]), 17),  # the same block of 32 bytes
        (dict(writes=[(0, 64)]), dict(part=1), 17),  # the next step of a composite call
    ],
)
def test_an_instruction_waits_for_conflicts_only(first, second, end):
    records = [record("V", 10, **first), record("MTE3", 7, **second)]
    plan = schedule(records)
    assert plan.cycles == end
    assert plan.busy == dict(dict.fromkeys(PIPES, 0.0), V=10, MTE3=7)
    assert schedule(records, issue=3).busy["V"] == 13


def test_a_pipe_is_in_order_and_scalars_hold_up_all():
    blocked = [record("V", 10, writes=[(0, 32)]), record("M", 5, reads=[(0, 32)]), record("M", 5)]
    assert schedule(blocked).intervals[2][1] == 15
    assert schedule([record("S", 30), record("V", 10)]).cycles == 40
    assert schedule([record("V", 10), record("S", 30)]).cycles == 30


def test_scopes_are_apart_and_global_memory_is_by_tensor():
    one = TraceRecord("op", "MTE2", 10, 64, "f:1", 0, (Span("GM", 0, 64, "a"),), (Span("L1", 0, 64, "k"),))
    other = TraceRecord("op", "MTE3", 7, 32, "f:1", 0, (Span("UB", 0, 64, "u"),), (Span("GM", 0, 64, "b"),))
    assert schedule([one, other]).cycles == 10
    assert schedule([one, other]).gm_bytes == 96
    same = other._replace(writes=one.reads)
    assert schedule([one, same]).cycles == 17


# --- three programs by hand -------------------------------------------------------------------------------------------
def timed(stage):
    """The schedule of a stage that was just run."""
    return schedule(stage.api.trace.cores[0])


def near(got, want, share):
    """Within ``share`` of ``want``."""
    return abs(got - want) <= share * want


def test_a_chain_of_products_is_bound_by_the_cube(figure):
    """C = 64 A B: 128^3 / 4096 cycles each; loads at 40 B a cycle, L1 -> L0 at 512 and 256, L0C -> UB at 256."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-2, 3, (128, 128)).astype(np.float16) for _ in range(2))
    stage, products = Stage(a=host.to_nz(a), b=host.to_nz(b)), 64
    with stage.program((8, 128, 16), "float32") as out:
        left, right = stage.load("a", "L1"), stage.load("b", "L1")
        sums, result = stage.local("sums", "L0C", "float32", 128 * 128), stage.local("c", "UB", "float32", 128 * 128)
        cube = Cube(stage.tik_program)
        for number in range(products):
            cube.multiply(sums, Operand(left, 128, 128), Operand(right, 128, 128), accumulate=number > 0)
        layout.drain(stage.api, Place(result), Place(sums), 1, 64)
        stage.store(out, result)
    got = stage.run()
    want = products * (a.astype(np.float64) @ b)
    assert np.array_equal(got.transpose(1, 0, 2).reshape(128, 128), want)
    plan = timed(stage)
    by_hand = 2 * 32 * KB / 40 + 32 * KB / 512 + 32 * KB / 256 + products * 512 + 64 * KB / 256 + 64 * KB / 40
    figure("cost model, chain of products, off the hand computation", 100 * abs(plan.cycles / by_hand - 1), 2, "%")
    assert max(plan.busy, key=plan.busy.get) == "M"
    assert plan.busy["M"] >= 0.88 * plan.cycles


def test_a_copy_is_bound_by_global_memory(figure):
    """16 pieces of 32 KB in and out at 40 B a cycle each, at the same time: 17 pieces' time."""
    data = np.arange(16 * 8 * KB, dtype=np.float32).reshape(16, 8 * KB)
    stage = Stage(x=data)
    with stage.program(data.shape, "float32") as out:
        with stage.api.for_range(0, 16, thread_num=2) as piece:
            tile = stage.local("tile", "UB", "float32", 8 * KB)
            stage.api.data_move(tile, stage.gm["x"][piece * 8 * KB], 0, 1, KB, 0, 0)
            stage.api.data_move(out[piece * 8 * KB], tile, 0, 1, KB, 0, 0)
    assert np.array_equal(stage.run(), data)
    plan = timed(stage)
    by_hand = 17 * 32 * KB / 40
    figure("cost model, copy, off the hand computation", 100 * abs(plan.cycles / by_hand - 1), 1, "%")
    assert plan.busy["V"] == plan.busy["M"] == 0
    assert near(plan.gm_bytes / plan.cycles, 2 * 40, 0.07)


def test_a_softmax_is_bound_by_the_vector_unit(figure):
    """Softmax over 128 rows of 64 lanes, fp32, 16 times: 256 B a cycle, exp and reciprocal at a quarter of it."""
    rounds, rows = 16, 128
    data = np.random.default_rng(1).standard_normal((rounds, rows, LANES)).astype(np.float32)
    stage = Stage(x=data)
    api = stage.api

    def tree(op, scratch, source):
        half = rows // 2
        while half:
            binary(op, Lanes(scratch), Lanes(source), Lanes(source, half * LANES), half)
            source, half = scratch, half // 2

    with stage.program(data.shape, "float32") as out:
        scratch = stage.local("scratch", "UB", "float32", rows // 2 * LANES)
        with api.for_range(0, rounds, thread_num=2) as number:
            x, y = (stage.local(name, "UB", "float32", rows * LANES) for name in "xy")
            api.data_move(x, stage.gm["x"][number * rows * LANES], 0, 1, KB, 0, 0)
            tree(api.vec_max, scratch, x)
            binary(api.vec_sub, Lanes(x), Lanes(x), Lanes(scratch, 0, 0), rows)
            unary(api.vec_exp, Lanes(y), Lanes(x), rows)
            tree(api.vec_add, scratch, y)
            unary(api.vec_rec, Lanes(scratch), Lanes(scratch), 1)
            binary(api.vec_mul, Lanes(y), Lanes(y), Lanes(scratch, 0, 0), rows)
            api.data_move(out[number * rows * LANES], y, 0, 1, KB, 0, 0)
    powers = np.exp(data - data.max(axis=1, keepdims=True))
    assert np.allclose(stage.run(), powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
    plan = timed(stage)
    one_pass = rows * LANES * 4 / 256  # the trees take a pass less one repeat, two passes are plain
    by_hand = rounds * (2 * (one_pass - 1) + 2 * one_pass + 4 * one_pass + 4) + 2 * 32 * KB / 40
    figure("cost model, softmax, off the hand computation", 100 * abs(plan.cycles / by_hand - 1), 2, "%")
    assert max(plan.busy, key=plan.busy.get) == "V"
    assert plan.busy["V"] >= 0.9 * plan.cycles


# --- calls ------------------------------------------------------------------------------------------------------------
CALL = AttentionSpec(4, 8, 8, 4096, 4096, 128, "float16")
predict = functools.lru_cache(maxsize=None)(cost.predict)  # several tests look at the same calls


def test_predicted_utilisation_dense(figure):
    """(4, 8, 4096, 128), forward: the vector unit bounds it; the cube waits more than half of the time."""
    got = predict(CALL)
    figure("predicted, forward (4,8,4096,128) dense, cube busy", 100 * got.cube_utilisation, 40, "%", at_least=True)
    figure("predicted, forward (4,8,4096,128) dense", got.tflops, None, "TFLOPS")
    figure("predicted, forward (4,8,4096,128) dense, residual of the fit", 100 * got.residual, 5, "%")
    assert got.bound == "V"
    assert got.flops == 4 * 128 * 4096 * 4096 * 32
    assert near(got.efficiency, got.tflops / 262.144, 1e-6)


def test_predicted_utilisation_causal_and_windowed(figure):
    causal = predict(replace(CALL, causal=True))
    windowed = predict(replace(CALL, prev_block_num=4, next_block_num=0))
    figure("predicted, forward (4,8,4096,128) causal, cube busy", 100 * causal.cube_utilisation, 35, "%", at_least=True)
    figure("predicted, forward (4,8,4096,128) causal", causal.tflops, None, "TFLOPS")
    figure("predicted, forward (4,8,4096,128) causal, residual of the fit", 100 * causal.residual, 5, "%")
    figure("predicted, forward (4,8,4096,128) window of 4 blocks, cube busy", 100 * windowed.cube_utilisation, 25, "%",
           at_least=True)  # fmt: skip
    figure("predicted, forward (4,8,4096,128) window of 4 blocks", windowed.tflops, None, "TFLOPS")
    figure("predicted, forward (4,8,4096,128) window of 4 blocks, residual of the fit", 100 * windowed.residual, 5, "%")
    assert windowed.seconds < causal.seconds < predict(CALL).seconds


def test_predicted_backward(figure):
    got = predict(CALL, "backward")
    figure("predicted, backward (4,8,4096,128) dense, cube busy", 100 * got.cube_utilisation, 60, "%", at_least=True)
    figure("predicted, backward (4,8,4096,128) dense, residual of the fits", 100 * got.residual, 5, "%")
    assert [fit.name for fit in got.fits] == ["keys", "queries"]
    assert got.flops == 10 * 128 * 4096 * 4096 * 32


def whole_cores(spec, direction, tiles, chip):
    """Cycles of each core when every one of its tasks is walked."""
    geometry = cost.Geometry(spec, tiles)
    plan, tik = geometry.plan(), Toolkit(SimulatorParams(execute=False)).tik
    if direction == "forward":
        kernel = build_forward(tik, geometry, chip.cores)
        shares = tasks.split(host.task_loads(plan, tiles.resident), geometry.heads, chip.cores)
        feed = {"tasks": tasks.query_tasks(plan, tiles.resident), "cores": shares}
    else:
        kernel = build_backward(tik, geometry, chip.cores)
        feed = {"key_tasks": tasks.key_tasks(plan), "tiles": tasks.query_tiles(plan)}
        feed["cores"] = pack_cores(geometry, chip.cores)
    return [schedule(records).cycles for records in kernel.count(feed).cores.values()]


WHOLE = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"local_window_size": (200, 40)},
    "ragged": {"kv_len": 611, "causal": True},
    "grouped": {"kv_heads": 1, "prev_block_num": 2},
}


@pytest.mark.parametrize("direction", mostly_slow(["forward", "backward"], fast=["forward"]))
def test_the_prediction_is_the_time_of_the_whole_call(direction, figure):
    """Few short tasks say what all tasks of all cores take, walked one by one; single tasks may be off the line."""
    chip, worst, off_line = replace(ASCEND_910A, cores=2), 0.0, 0.0
    for options in WHOLE.values():
        spec = replace(AttentionSpec(1, 2, 2, 800, 800, 64, "float16"), **options)
        tiles = KernelTiles(128, 128, 2, 4) if direction == "forward" else KernelTiles(128, 128, 1, 4)
        got = predict(spec, direction, chip, tiles=tiles)
        worst = max(worst, abs(got.cycles / max(whole_cores(spec, direction, tiles, chip)) - 1))
        off_line = max(off_line, got.residual)
    if direction == "forward":
        figure("cost model, forward, 800 tokens, call off the walk over all tasks", 100 * worst, 3, "%")
        figure("cost model, forward, 800 tokens, residual of single tasks", 100 * off_line, 9, "%")
    else:
        figure("cost model, backward, 800 tokens, call off the walk over all tasks", 100 * worst, 4, "%")
        figure("cost model, backward, 800 tokens, residual of single tasks", 100 * off_line, 11, "%")


LOPSIDED = AttentionSpec(1, 2, 2, 2048, 4096, 64, "float16", causal=True)


def test_bounds_have_a_factor_of_their_own(figure):
    """Of 32 key tiles the first 16 are seen whole by all queries, the others by few, one of which has a bound."""
    got = predict(LOPSIDED, "backward", tiles=KernelTiles(128, 128, 1, 4))
    figure("cost model, backward, 2048 queries and 4096 keys, residual of the fits", 100 * got.residual, 8, "%")
    keys = got.fits[0]
    assert 0.1 * keys.pair < keys.bound < keys.pair
    bounds = {(task, visited): bound for task, visited, bound, _ in keys.samples if task == 1}
    assert bounds == {(1, 1): 1, (1, 2): 0, (1, 4): 0, (1, 8): 0}


def test_bounds_of_every_task_are_part_of_the_task():
    """Each dense task ends in a ragged tile: nothing tells its cost from the task's."""
    got = predict(AttentionSpec(1, 2, 2, 512, 600, 64, "float16"), tiles=KernelTiles(128, 128, 1, 8))
    assert got.fits[0].bound == 0 and all(bounds == tasks for tasks, _, bounds, _ in got.fits[0].samples)


LARGE = {
    "causal, 64": {"causal": True, "head_dim": 64},
    "grouped": {"kv_heads": 2},
    "window of 16 blocks": {"causal": True, "prev_block_num": 16},
}


@pytest.mark.slow
def test_residual_of_large_calls(figure):
    """Time = a + b x visited tiles within 5% where a task visits many tiles and lengths are whole tiles."""
    calls = [(replace(CALL, **options), direction) for options in LARGE.values() for direction in cost.FLOPS]
    worst = max(predict(replace(spec, tiling="sparse"), direction).residual for spec, direction in calls)
    figure("cost model, calls of 4096 tokens, residual of the fits", 100 * worst, 5, "%")


AUTO = {
    "dense": ({}, "forward"),
    "narrow window": ({"causal": True, "prev_block_num": 1, "next_block_num": 0}, "forward"),
    "backward": ({}, "backward"),
}


@pytest.mark.parametrize("options, direction", AUTO.values(), ids=list(AUTO))
def test_auto_takes_the_tiles_that_the_model_finds_fastest(options, direction):
    spec = replace(CALL, **options)
    times = {tiles: predict(spec, direction, tiles=tiles).seconds for tiles in candidate_tiles(spec, direction)}
    assert len(times) > 1
    assert times[choose_tiles(spec, direction)] == min(times.values())
    assert choose_tiles(replace(spec, tiling="sparse"), direction).kv == 128


def test_auto_does_not_take_one_tile_for_all():
    narrow = replace(CALL, causal=True, prev_block_num=1, next_block_num=0)
    assert (choose_tiles(CALL).kv, choose_tiles(narrow).kv) == (256, 128)


def test_the_model_is_not_asked_where_there_is_no_choice(monkeypatch):
    monkeypatch.setattr(cost, "predict", None)
    assert choose_tiles(replace(CALL, tiling="wukong")).q == 64
    assert choose_tiles(replace(CALL, q_len=1000, kv_len=100)).kv == 112
    assert supports(replace(CALL, q_len=5000)) is None


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"prev_block_num": 4, "next_block_num": 0}])
def test_the_prediction_is_the_time_of_a_large_call(options):
    spec = replace(CALL, batch=1, **options)
    got = predict(spec)
    want = max(whole_cores(spec, "forward", got.geometry.tiles, ASCEND_910A))
    assert near(got.cycles, want, 0.05)


def test_one_tile_needs_no_line():
    """A call of a single tile: the fit has one point, which it meets."""
    got = predict(AttentionSpec(1, 1, 1, 16, 16, 16, "float16"))
    assert got.pairs == 1
    assert near(got.cycles, got.fits[0].samples[0][-1], 1e-6)


def test_scenarios_move_what_they_vary():
    base, fast_exp, cached, slow_issue = (predict(CALL, scenario=scenario) for scenario in cost.SCENARIOS)
    assert fast_exp.busy["V"] < base.busy["V"] and near(fast_exp.busy["M"], base.busy["M"], 1e-9)
    assert cached.busy["MTE2"] < 0.6 * base.busy["MTE2"] and near(cached.busy["V"], base.busy["V"], 1e-9)
    assert slow_issue.cycles > base.cycles


def test_310p_has_fewer_cores_and_slower_memory():
    spec = replace(CALL, batch=1, heads=1, kv_heads=1)
    slow, fast = predict(spec, chip=ASCEND_310P), predict(spec)
    assert slow.busy["MTE2"] / slow.pairs > 2 * fast.busy["MTE2"] / fast.pairs
    assert slow.peak == 8 * 2 * 4096e9


def test_what_is_refused():
    with pytest.raises(UnsupportedError, match="'dtype' must be float16, but got float32"):
        predict(replace(CALL, dtype="float32"))
    with pytest.raises(ValueError, match="'direction' must be 'forward', 'preprocess' or 'backward', but got 'side"):
        predict(CALL, "sideways")
