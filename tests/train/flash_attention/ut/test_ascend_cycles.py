"""Predicted cycles of the forward kernel, from the simulator's trace: an interior tile, and what each option adds.

The rate of the exponential is not published; the trace assumes a quarter of the plain rate, as the reference facts do.
"""

import numpy as np
import pytest
from support.ascend import Stage

from flash_attention.ascend import cost, host
from flash_attention.ascend.chips import ASCEND_910A
from flash_attention.ascend.forward import build_forward
from flash_attention.ascend.geometry import Geometry, KernelTiles
from flash_attention.ascend.simulator import SimulatorParams, Toolkit
from flash_attention.ascend.tile_ops.vector import HALF_LANES, LANES, Lanes, binary, convert, unary
from flash_attention.ascend.tiles import fit_groups
from flash_attention.core.spec import AttentionSpec, Operands

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
UNIT = 128  # cycles are given for 128 queries x 128 keys
TILES = KernelTiles(128, 128, 2, 1)
PIPES = ("V", "M", "MTE1", "MTE2", "MTE3")


def busy(spec, tiles):
    """Busy cycles a pipe of one core that runs the whole call."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 1, spec.q_len, spec.head_dim)).astype(np.float16)
    key = rng.standard_normal((1, 1, spec.kv_len, spec.head_dim)).astype(np.float16)
    shapes = {"mask": spec.mask_shape, "bias": spec.bias_shape, "slopes": spec.alibi_shape}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    operands = Operands(dropout_seed=np.uint32(1) if spec.dropout_rate else None, **tensors)
    geometry = Geometry(spec, tiles)
    kernel = build_forward(Toolkit(SimulatorParams(trace=True)).tik, geometry, 1)
    host.run(kernel, host.pack_forward(geometry, 1, query, key, key, operands))
    return kernel.trace.cycles()


def per_tile(tiles=TILES, options=lambda keys: {}):
    """Cycles a pipe for 128 x 128 scores: what 256 queries spend on more keys. Start and end of a task cancel.

    Args:
        tiles: KernelTiles. options: fields of the AttentionSpec from the number of keys.
    """
    lengths = (2 * tiles.kv, 4 * tiles.kv)
    short, long = (busy(AttentionSpec(1, 1, 1, 256, n, 128, "float16", **options(n)), tiles) for n in lengths)
    return {pipe: (long[pipe] - short[pipe]) * UNIT * UNIT / (256.0 * (lengths[1] - lengths[0])) for pipe in PIPES}


def test_interior_tile(figure):
    """128 x 128 scores, head_dim 128, nothing masked: the vector pipe bounds the kernel, within the goal."""
    cycles = per_tile()
    figure("forward, interior tile, vector pipe", cycles["V"], 2300, "cycles")
    figure("forward, interior tile, cube", cycles["M"], None, "cycles")
    figure("forward, interior tile, MTE1 (L1 to L0)", cycles["MTE1"], None, "cycles")
    figure("forward, interior tile, MTE2 (from global memory)", cycles["MTE2"], None, "cycles")
    figure("forward, interior tile, MTE3 (UB to L1 and global memory)", cycles["MTE3"], None, "cycles")
    assert max(cycles, key=cycles.get) == "V"
    assert cycles["M"] == UNIT**3 / 4096 + UNIT * UNIT * (UNIT + 16) / 4096


@pytest.mark.slow
def test_longer_key_tiles_rescale_less_often(figure):
    cycles = per_tile(KernelTiles(128, 256, 2, 1))
    figure("forward, interior, 256 keys a tile, vector pipe", cycles["V"], 1900, "cycles")
    assert per_tile()["V"] - cycles["V"] >= 300


def test_skipping_the_rescaling_would_not_pay(figure):
    """Where no maximum of a tile changes, O could stay in L0C, the next P V be added there: not drained, not scaled.

    That needs room for O beside the scores, which two resident tiles leave none of, and a decision by the scalar unit.
    With one resident tile nothing is left for the vector unit to do while the cube works.
    """
    spec = AttentionSpec(4, 8, 8, 4096, 4096, 128, "float16")
    two, one = (cost.predict(spec, tiles=fit_groups(spec, KernelTiles(128, 256, n, 8))) for n in (2, 1))
    drained_and_added = 2 * UNIT * (UNIT + 16) * 4 / 256  # cycles a pair of tiles at most saved
    best = one.cycles - one.pairs * drained_and_added
    figure("forward dense, as it is", 1e3 * two.seconds, None, "ms")
    figure("forward dense, one resident tile and O never rescaled", 1e3 * best / one.clock, None, "ms")
    products = {buffer.name: buffer.bytes for buffer in two.budget.buffers}["products"]
    assert products + 2 * UNIT * (UNIT + 16) * 4 > dict(ASCEND_910A.capacity)["L0C"]
    assert best > two.cycles


def test_an_lse_of_fp32_probabilities_would_not_be_cheap(figure):
    """exp in fp32, and a sum over the keys before the conversion: vector cycles for 128 x 128 scores beyond today's."""
    groups, keys = 8, UNIT
    scores = np.zeros((groups, keys, 16), np.float32)
    stage = Stage(x=scores)
    api = stage.api
    with stage.program(scores.shape, "float16") as out:
        x, half = stage.load("x"), stage.local("half", "UB", "float16", scores.size)
        sums = stage.local("sums", "UB", "float32", scores.size // 2)
        unary(api.vec_exp, Lanes(x), Lanes(x), scores.size // LANES)
        convert(api, Lanes(half, 0, 4), Lanes(x), scores.size // LANES)
        binary(api.vec_add, Lanes(sums), Lanes(x, 0, 16), Lanes(x, LANES, 16), scores.size // LANES // 2)
        for level in range(2, 6):  # the tree of sums, to one repeat a group
            repeats = scores.size // LANES >> level
            binary(api.vec_add, Lanes(sums), Lanes(sums, 0, 16), Lanes(sums, LANES, 16), repeats)
        stage.store(out, half)
    stage.run()
    today = scores.size / LANES + 4 * scores.size / HALF_LANES  # conversion, exponential in fp16
    added = stage.cycles("V") - today
    figure("forward, LSE from fp32 probabilities would add, vector pipe", added, None, "cycles")
    assert added > 0.3 * per_tile()["V"]


OPTIONS = {
    "mask": (lambda keys: {"mask_shape": (1, 1, 256, keys)}, 256),
    "bias": (lambda keys: {"bias_shape": (1, 1, 256, keys)}, 256),
    "ALiBi": (lambda keys: {"alibi_shape": (1,), "q_offset": 4096}, 320),
    "dropout": (lambda keys: {"dropout_rate": 0.1}, 256),
    "scale of any sign": (lambda keys: {"scale": -0.1}, 256),
}


@pytest.mark.slow
def test_what_options_add(figure):
    """At most so many vector cycles for 128 x 128 scores: one pass over fp32 scores takes 256."""
    plain = per_tile()["V"]
    added = {name: per_tile(options=options)["V"] - plain for name, (options, _) in OPTIONS.items()}
    figure("forward, interior tile, a mask adds, vector pipe", added["mask"], OPTIONS["mask"][1], "cycles")
    figure("forward, interior tile, a bias adds, vector pipe", added["bias"], OPTIONS["bias"][1], "cycles")
    figure("forward, interior tile, ALiBi adds, vector pipe", added["ALiBi"], OPTIONS["ALiBi"][1], "cycles")
    figure("forward, interior tile, dropout adds, vector pipe", added["dropout"], OPTIONS["dropout"][1], "cycles")
    assert all(0 < added[name] <= most for name, (_, most) in OPTIONS.items())


def test_a_bound_costs_two_passes_of_a_partial_tile_only(figure):
    """One key tile with the causal bound beside one without; a second side doubles it."""

    def cycles(**options):
        return busy(AttentionSpec(1, 1, 1, 128, 128, 128, "float16", **options), KernelTiles(128, 128, 1, 1))["V"]

    index = 4 + 32  # the tile of key indices, made once a core
    plain, one, both = cycles(), cycles(causal=True), cycles(local_window_size=(9, 9))
    figure(
        "forward, tile with a causal bound or a ragged end, adds, vector pipe", one - plain, 512 + index + 40, "cycles"
    )
    assert 512 <= one - plain
    assert 512 <= both - one <= 512 + 40
    assert cycles(local_window_size=(500, 500)) - plain <= index  # bounds that hide nothing here
