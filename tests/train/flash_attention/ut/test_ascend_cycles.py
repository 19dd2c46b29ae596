"""Predicted cycles of the forward kernel, from the simulator's trace: an interior tile, and what each option adds.

The rate of the exponential is not published; the trace assumes a quarter of the plain rate, as the reference facts do.
"""

import numpy as np
import pytest

from flash_attention.ascend import host
from flash_attention.ascend.budget import preferred_tile
from flash_attention.ascend.forward import build_forward
from flash_attention.ascend.geometry import Geometry, KernelTiles
from flash_attention.ascend.simulator import SimulatorParams, Toolkit
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
    assert max(cycles, key=cycles.get) == "V"
    assert cycles["M"] == UNIT**3 / 4096 + UNIT * UNIT * (UNIT + 16) / 4096


def test_longer_key_tiles_rescale_less_often(figure):
    cycles = per_tile(KernelTiles(128, 256, 2, 1))
    figure("forward, interior, 256 keys a tile, vector pipe", cycles["V"], 1900, "cycles")
    assert per_tile()["V"] - cycles["V"] >= 300
    assert preferred_tile(AttentionSpec(4, 8, 8, 4096, 4096, 128, "float16")).kv == 256


OPTIONS = {
    "mask": (lambda keys: {"mask_shape": (1, 1, 256, keys)}, 256),
    "bias": (lambda keys: {"bias_shape": (1, 1, 256, keys)}, 256),
    "ALiBi": (lambda keys: {"alibi_shape": (1,), "q_offset": 4096}, 320),
    "dropout": (lambda keys: {"dropout_rate": 0.1}, 256),
    "scale of any sign": (lambda keys: {"scale": -0.1}, 256),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_what_options_add(name):
    """At most so many vector cycles for 128 x 128 scores: one pass over fp32 scores takes 256."""
    options, most = OPTIONS[name]
    added = per_tile(options=options)["V"] - per_tile()["V"]
    assert 0 < added <= most


def test_a_bound_costs_two_passes_of_a_partial_tile_only():
    """One key tile with the causal bound beside one without; a second side doubles it."""

    def cycles(**options):
        return busy(AttentionSpec(1, 1, 1, 128, 128, 128, "float16", **options), KernelTiles(128, 128, 1, 1))["V"]

    index = 4 + 32  # the tile of key indices, made once a core
    plain, one, both = cycles(), cycles(causal=True), cycles(local_window_size=(9, 9))
    assert 512 <= one - plain <= 512 + index + 40
    assert 512 <= both - one <= 512 + 40
    assert cycles(local_window_size=(500, 500)) - plain <= index  # bounds that hide nothing here
