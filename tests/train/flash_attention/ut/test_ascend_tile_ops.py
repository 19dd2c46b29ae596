"""The tile operations of the Ascend 910 kernels, one by one on the strict simulator, against numpy."""

import itertools

import numpy as np
import pytest
from support.ascend import Stage

from flash_attention.ascend.host import from_nz, to_nz
from flash_attention.ascend.simulator import SimulatorError
from flash_attention.ascend.tile_ops import finish, layout, masks, softmax
from flash_attention.ascend.tile_ops.layout import Place, Rows
from flash_attention.ascend.tile_ops.matmul import Cube, Operand
from flash_attention.ascend.tile_ops.vector import Lanes
from flash_attention.core.ranges import Band, visible

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
KEYS = (16, 32, 48, 80, 112, 128, 256)


def draw(*shape, dtype=np.float32, scale=1.0):
    return (scale * np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape)).astype(dtype)


def tile_of(x):
    """(keys, queries) -> score tile [q1][keys][16]."""
    return np.ascontiguousarray(x.reshape(x.shape[0], -1, 16).transpose(1, 0, 2))


def matrix_of(tile):
    """Score tile [q1][keys][16] -> (keys, queries)."""
    return tile.transpose(1, 0, 2).reshape(tile.shape[1], -1)


def statistic_of(x):
    """One value a query -> [q1][64 lanes]."""
    return np.ascontiguousarray(np.tile(x.reshape(-1, 1, 16), (1, 4, 1)).reshape(-1, 64), np.float32)


# --- matrix products ------------------------------------------------------------------------------
def product(left, right, m, n, accumulate=False, tail=None):
    """``left @ right`` by Cube from operands (matrix as stored, transposed)."""
    stage = Stage(left=to_nz(left[0]), right=to_nz(right[0]))
    with stage.program((n // 16, m + (16 if tail else 0), 16), "float32") as out:
        cube = Cube(stage.tik_program)
        a = Operand(stage.load("left", "L1"), *left[0].shape, transposed=left[1])
        b = Operand(stage.load("right", "L1"), *right[0].shape, transposed=right[1])
        rows = m + (16 if tail else 0)
        dst = stage.local("dst", "L0C", "float32", rows * n)
        if tail:
            ones = stage.local("ones", "L1", "float16", 256)
            ub = stage.local("ones_ub", "UB", "float16", 256)
            stage.api.vec_dup(128, ub, 1.0, 2, 8)
            layout.copy(stage.api, Place(ones), Place(ub), 256)
            a = [a, Operand(ones, b.shape[0], 16, transposed=True, uniform=True)]
        for again in range(2 if accumulate else 1):
            cube.multiply(dst, a, b, accumulate=again > 0)
        moved = stage.local("moved", "UB", "float32", rows * n)
        layout.drain(stage.api, Place(moved), Place(dst), 1, rows * n // 256)
        stage.store(out, moved)
    result = stage.run()
    return result.transpose(1, 0, 2).reshape(rows, n)


SHAPES = ((16, 16, 16), (32, 48, 64), (128, 128, 128), (144, 256, 64), (48, 16, 256))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", list(itertools.product((False, True), repeat=2)), ids=str)
def test_products_of_tiles_and_transposes(shape, transposed):
    m, k, n = shape
    left, right = draw(m, k, dtype=np.float16), draw(k, n, dtype=np.float16)
    want = left.astype(np.float64) @ right.astype(np.float64)
    stored = [np.ascontiguousarray(x.T) if flip else x for x, flip in zip((left, right), transposed)]
    got = product((stored[0], transposed[0]), (stored[1], transposed[1]), m, n)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_product_accumulates():
    left, right = draw(64, 48, dtype=np.float16), draw(48, 32, dtype=np.float16)
    got = product((left, False), (right, False), 64, 32, accumulate=True)
    np.testing.assert_allclose(got, 2.0 * left.astype(np.float64) @ right.astype(np.float64), rtol=1e-4, atol=1e-4)


def test_row_of_ones_gives_column_sums():
    """[V 1]^T P^T: the rows below V^T P^T are the sums of P^T's columns."""
    values, probs = draw(128, 64, dtype=np.float16), np.abs(draw(128, 96, dtype=np.float16))
    got = product((values, True), (probs, False), 64, 96, tail=True)
    np.testing.assert_allclose(got[:64], values.T.astype(np.float64) @ probs.astype(np.float64), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got[64:], np.tile(probs.sum(0, dtype=np.float64), (16, 1)), rtol=1e-5)


# --- layout ---------------------------------------------------------------------------------------
def test_nz_round_trip():
    x = draw(2, 3, 70, 40, dtype=np.float16)
    packed = to_nz(x)
    assert packed.shape == (2, 3, 3, 5, 16, 16)
    assert packed[1, 2, 2, 4, 5, 7] == x[1, 2, 4 * 16 + 5, 2 * 16 + 7] and not packed[:, :, 2, :, :, 8:].any()
    np.testing.assert_array_equal(from_nz(packed, 70, 40), x)


@pytest.mark.parametrize("rows", (16, 48, 64))
def test_rows_of_a_head_to_a_tile_and_back(rows):
    """The second tile of a head whose last tile is ragged; rows that do not exist become zeros."""
    x = draw(2, 64 + rows, 32, dtype=np.float16)
    stage = Stage(x=to_nz(x))
    size = Rows(32, 64 + rows, 64, rows)
    with stage.program((2, 64, 16), "float16") as out:
        tile, zeros = (
            stage.local("tile", "L1", "float16", 64 * 32),
            stage.local("zeros", "UB", "float16", 64 * 16),
        )
        stage.api.vec_dup(128, zeros, 0.0, 8, 8)
        layout.load_rows(stage.api, Place(tile), Place(stage.gm["x"], (64 + rows) * 32 + 64 * 16), size)
        if rows < 64:
            layout.clear_rows(stage.api, Place(tile), zeros, size)
        ub = stage.local("ub", "UB", "float16", 64 * 32)
        layout.copy(stage.api, Place(ub), Place(tile), 64 * 32)
        stage.store(out, ub)
    got = stage.run().transpose(1, 0, 2).reshape(64, 32)
    np.testing.assert_array_equal(got[:rows], x[1, 64:])
    assert not got[rows:].any()


def test_rows_beyond_the_gap_limit():
    """Column groups farther apart than a gap can say are stored burst by burst."""
    rows = layout.GAP_LIMIT + 33
    stage = Stage(x=draw(32, 16, dtype=np.float16).reshape(2, 16, 16))
    with stage.program((2, rows // 16 * 16 + 16, 16), "float16") as out:
        tile = stage.load("x")
        total = int(out.shape[1])
        zeros = stage.local("zeros", "UB", "float16", 4096 * 16)
        stage.api.vec_dup(128, zeros, 0.0, 255, 8)
        stage.api.vec_dup(128, zeros[255 * 128], 0.0, 255, 8)
        stage.api.vec_dup(128, zeros[510 * 128], 0.0, 2, 8)
        for start in range(0, 2 * total, 4096):
            count = min(4096, 2 * total - start)
            layout.copy(stage.api, Place(out, start * 16), Place(zeros), count * 16)
        layout.store_rows(stage.api, Place(out, 32 * 16), Place(tile), Rows(32, total, 16, 16))
    got = stage.run()
    np.testing.assert_array_equal(got[:, 32:48], stage.inputs["x"])
    got[:, 32:48] = 0
    assert not got.any()


def test_transposed_rows():
    x = draw(48, 64, dtype=np.float16)  # (columns, queries)
    stage = Stage(x=tile_of(x))
    with stage.program((3, 64, 16), "float16") as out:
        rows = stage.local("rows", "UB", "float16", 48 * 64)
        layout.transposed_rows(stage.api, Place(rows), Place(stage.load("x")), 4, 48)
        stage.store(out, rows)
    np.testing.assert_array_equal(stage.run().transpose(1, 0, 2).reshape(64, 48), x.T)


def test_statistics_spread_and_gather():
    x = draw(4, 16)
    stage = Stage(x=x)
    with stage.program((4, 64), "float32") as out:
        wide = stage.local("wide", "UB", "float32", 256)
        layout.spread_lanes(stage.api, Place(wide), Place(stage.gm["x"]), 4)
        stage.store(out, wide)
    wide = stage.run()
    np.testing.assert_array_equal(wide, statistic_of(x))
    stage = Stage(x=wide)
    with stage.program((4, 16), "float32") as out:
        finish.store_statistic(
            stage.api, Place(out), Place(stage.load("x")), Place(stage.local("compact", "UB", "float32", 64)), 4
        )
    np.testing.assert_array_equal(stage.run(), x)


def test_columns_beyond_the_tile_are_refused():
    stage = Stage(x=draw(16, 16, dtype=np.float16))
    with pytest.raises(SimulatorError) as caught:
        with stage.program((1, 16, 16), "float16") as out:
            tile = stage.local("tile", "UB", "float16", 256)
            layout.load_rows(stage.api, Place(tile), Place(stage.gm["x"]), Rows(32, 16, 16, 16))
            stage.store(out, tile)
        stage.run()
    assert caught.value.rule == "bounds"


# --- softmax --------------------------------------------------------------------------------------
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("groups", (1, 3, 8))
def test_max_over_keys(groups, keys):
    scores = draw(keys, groups * 16, scale=100.0)
    stage = Stage(scores=tile_of(scores))
    with stage.program((groups, 64), "float32") as out:
        dst = stage.local("dst", "UB", "float32", groups * 64)
        scratch = stage.local("scratch", "UB", "float32", groups * max(8 * keys, 128))
        softmax.max_over_keys(stage.api, dst, stage.load("scores"), scratch, groups, keys)
        stage.store(out, dst)
    np.testing.assert_array_equal(stage.run(), statistic_of(scores.max(axis=0)))
    if keys in (16, 32, 128, 256):
        assert stage.cycles("V") <= groups * (keys // 4 + 3)


@pytest.mark.parametrize("scale", (1.0, 0.125))
def test_update_maximum(scale):
    before, tile = draw(64), draw(64) + 0.5
    before[:16] = softmax.LOWEST  # nothing was seen yet
    stage = Stage(running=statistic_of(before), tile_max=statistic_of(tile))
    with stage.program((3, 4, 64), "float32") as out:
        running, tile_max = stage.load("running"), stage.load("tile_max")
        rescale, addend = (stage.local(name, "UB", "float32", 256) for name in ("rescale", "addend"))
        softmax.update_maximum(stage.api, Lanes(running), Lanes(tile_max), Lanes(rescale), Lanes(addend), 4, scale)
        for number, tensor in enumerate((running, rescale, addend)):
            layout.copy(stage.api, Place(out, number * 256), Place(tensor), 256)
    running, rescale, addend = stage.run()
    after = np.maximum(before, tile)
    np.testing.assert_array_equal(running, statistic_of(after))
    np.testing.assert_allclose(rescale, statistic_of(np.exp(scale * (before - after))), rtol=1e-6)
    np.testing.assert_allclose(addend, statistic_of(-scale * after), rtol=1e-6)
    assert not rescale[0].any()


@pytest.mark.parametrize("scale", (None, 0.25))
def test_probabilities(scale):
    scores, shift = 3.0 * draw(48, 32), draw(32)
    stage = Stage(scores=tile_of(scores), shift=statistic_of(-shift), factor=np.full(64, scale or 0, np.float32))
    with stage.program((2, 48, 16), "float16") as out:
        probs = stage.local("probs", "UB", "float16", 48 * 32)
        factor = None if scale is None else Lanes(stage.load("factor"), 0, 0)
        softmax.probabilities(stage.api, probs, stage.load("scores"), Lanes(stage.load("shift")), 2, 48, factor)
        stage.store(out, probs)
    want = np.exp(np.float16((scale or 1.0) * scores - shift).astype(np.float64))
    np.testing.assert_allclose(matrix_of(stage.run()), want, rtol=2e-3)


def test_accumulate():
    output, products, rescale = draw(48, 32), draw(48, 32) + 1.0, np.abs(draw(32))
    stage = Stage(output=tile_of(output), products=tile_of(products), rescale=statistic_of(rescale))
    with stage.program((2, 48, 16), "float32") as out:
        tensor = stage.load("output")
        softmax.accumulate(stage.api, Lanes(tensor), stage.load("products"), Lanes(stage.load("rescale")), 2, 48)
        stage.store(out, tensor)
    np.testing.assert_allclose(matrix_of(stage.run()), output * rescale + products, rtol=1e-6, atol=1e-6)


# --- what changes the scores ----------------------------------------------------------------------
def changed(scores, change, **inputs):
    """Scores after ``change(stage, tensor, scratch)``."""
    stage = Stage(scores=tile_of(scores), **inputs)
    keys, queries = scores.shape
    with stage.program((queries // 16, keys, 16), "float32") as out:
        tensor, scratch = stage.load("scores"), stage.local("scratch", "UB", "float32", keys * 16)
        change(stage, tensor, scratch)
        stage.store(out, tensor)
    return matrix_of(stage.run())


def index_tile(stage, keys, unit=1.0):
    tensor = stage.local("index", "UB", "float32", keys * 16)
    masks.index_tile(stage.api, tensor, keys, unit)
    return tensor


BANDS = {
    "causal": Band(64, 300, right=0),
    "window": Band(64, 300, left=20, right=3),
    "blocks": Band(64, 300, prev=1, next=0, block_size=24),
}


@pytest.mark.parametrize("keys", (48, 128))
@pytest.mark.parametrize("band", BANDS.values(), ids=list(BANDS))
def test_bounds(band, keys):
    """Both sides, for a tile whose first key is known at run time only."""
    scores, start = draw(keys, 64, scale=30.0), 96
    p = np.arange(64) + 120
    first, last = ((band.first_key(p) - 0.5) * masks.UNIT, (band.last_key(p) + 0.5) * masks.UNIT)

    def change(stage, tensor, scratch):
        api, index = stage.api, index_tile(stage, keys, masks.UNIT)
        lanes, integers = stage.local("lanes", "UB", "float32", 64), stage.local("integers", "UB", "int32", 64)
        masks.first_key_of_tile(api, lanes, integers, api.Scalar("int32", init_value=start), masks.UNIT)
        for name, hide in (("first", masks.hide_before), ("last", masks.hide_after)):
            bound = stage.load(name)
            api.vec_sub(64, bound, bound, lanes, 4, 8, 8, 0)
            hide(api, tensor, Lanes(bound), index, scratch, 4, keys)

    got = changed(scores, change, first=statistic_of(first), last=statistic_of(last))
    seen = visible(band, p[None, :], np.arange(keys)[:, None] + start)
    assert seen.any() and not seen.all()
    np.testing.assert_array_equal(got[seen], scores[seen])
    assert got[~seen].max() <= masks.HIDDEN


@pytest.mark.parametrize("shared", (False, True))
def test_discard(shared):
    scores = draw(48, 64, scale=6e4)
    gone = np.random.default_rng(0).random((48, 16 if shared else 64)) < 0.5
    mask = np.where(gone, masks.DISCARD, 0.0).astype(np.float16)

    def change(stage, tensor, scratch):
        masks.discard(stage.api, tensor, Place(stage.load("mask")), 4, 48, 1 if shared else 4)

    got = changed(scores, change, mask=tile_of(mask))
    gone = np.tile(gone, (1, 4)) if shared else gone
    np.testing.assert_array_equal(got[~gone], scores[~gone])
    assert got[gone].max() < softmax.LOWEST - 2.0**30


@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("scale", (None, 0.125))
def test_bias(shared, scale):
    scores, bias = draw(48, 64), draw(48, 16 if shared else 64)

    def change(stage, tensor, scratch):
        factor = None if scale is None else Lanes(stage.load("factor"), 0, 0)
        masks.add_bias(stage.api, tensor, Place(stage.load("bias")), 4, 48, 1 if shared else 4, factor)

    got = changed(scores, change, bias=tile_of(bias), factor=np.full(64, scale or 0, np.float32))
    np.testing.assert_allclose(got, scores * (scale or 1.0) + np.tile(bias, (1, 4 if shared else 1)), rtol=1e-6)


@pytest.mark.parametrize("slope", (0.3, -0.2))
def test_alibi_across_the_diagonal(slope):
    scores, relative = draw(48, 64), np.arange(64.0) - 10

    def change(stage, tensor, scratch):
        minus = Lanes(stage.load("slope"), 8, 0)
        args = Lanes(stage.load("relative")), index_tile(stage, 48), minus, scratch, 4, 48
        masks.add_alibi(stage.api, tensor, *args)

    slopes = np.repeat(np.float32([slope, -slope]), 8)
    got = changed(scores, change, relative=statistic_of(relative), slope=slopes)
    distance = np.abs(relative[None, :] - np.arange(48)[:, None])
    np.testing.assert_allclose(got, scores - np.float32(slope) * distance, rtol=1e-5, atol=1e-5)


def test_slope_tile_is_the_part_of_alibi_that_varies_with_the_key():
    scores, slope = draw(48, 32), 0.25

    def change(stage, tensor, scratch):
        block = Lanes(stage.load("slope"), 0, 0)
        masks.slope_tile(stage.api, Place(scratch), index_tile(stage, 48), block, 48)
        masks.add_bias(stage.api, tensor, Place(scratch), 2, 48, 1)

    got = changed(scores, change, slope=np.full(8, slope, np.float32))
    np.testing.assert_allclose(got, scores + slope * np.arange(48)[:, None], rtol=1e-6)


def test_drop():
    probs, keep = np.abs(draw(48, 64, dtype=np.float16)), (draw(48, 64) > 0).astype(np.uint8)
    stage = Stage(probs=tile_of(probs), keep=tile_of(keep))
    with stage.program((4, 48, 16), "float16") as out:
        kept, wide = (stage.local(name, "UB", "float16", 48 * 64) for name in ("kept", "wide"))
        masks.drop(stage.api, kept, stage.load("probs"), stage.load("keep"), wide, 48 * 64)
        stage.store(out, kept)
    np.testing.assert_array_equal(matrix_of(stage.run()), probs * keep)


# --- the end of a query tile ----------------------------------------------------------------------
def test_end_of_a_tile_with_dead_rows():
    """Rows: O^T and its sums; queries 5 and 20 saw nothing, query 7 only something tiny."""
    rows, groups = 48, 2
    output, sums, maximum = draw(32, 32), np.abs(draw(32)) + 1.0, draw(32, scale=9.0)
    sums[[5, 20]], sums[7] = 0.0, 2.0**-24
    output[:, [5, 20]] = 0.0
    maximum[[5, 20]] = softmax.LOWEST
    whole = np.concatenate([output, np.tile(sums, (16, 1))]).astype(np.float32)
    stage = Stage(output=tile_of(whole), running=statistic_of(maximum))
    with stage.program((1056,), "float32") as out:
        api, tensor, running = stage.api, stage.load("output"), stage.load("running")
        stats = [Lanes(stage.local("s{}".format(n), "UB", "float32", 128)) for n in range(5)]
        finish.row_sums(api, stats[0].place, Place(tensor), groups, rows)
        finish.alive_and_divisor(api, stats[1], stats[2], stats[0], stats[4], groups)
        finish.log_sum_exp(api, stats[3], Lanes(running), stats[1], stats[2], groups, 0.5)
        half, result = (stage.local(name, "UB", "float16", 1024) for name in ("half", "result"))
        finish.normalized_rows(api, Place(result), Lanes(tensor), stats[2], Place(half), groups, rows)
        wide = stage.local("widened", "UB", "float32", 1024)
        api.vec_conv(64, "none", wide, result, 16, 8, 4)
        layout.copy(api, Place(out), Place(wide), 1024)
        finish.store_statistic(api, Place(out, 1024), stats[3].place, stats[4].place, groups)
    got = stage.run()
    dead = sums == 0
    with np.errstate(divide="ignore"):
        lse = np.where(dead, -np.inf, 0.5 * maximum + np.log(sums))
    np.testing.assert_allclose(got[1024:1056], lse[:32], rtol=1e-6)
    rows_out = got[:1024].reshape(2, 32, 16).transpose(1, 0, 2).reshape(32, 32)
    alive = ~dead & (np.arange(32) != 7)
    np.testing.assert_allclose(rows_out[alive], (output / np.where(dead, 1, sums)).T[alive], rtol=2e-3, atol=1e-4)
    assert not rows_out[dead].any()
