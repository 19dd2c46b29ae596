"""The backward kernel's own steps, one by one on the strict simulator; packed columns, tables, predicted cycles."""

import numpy as np
import pytest
from support.ascend import Stage

from flash_attention.ascend import backward_arguments as arguments
from flash_attention.ascend import simulated
from flash_attention.ascend.backward import build_backward
from flash_attention.ascend.backward_budget import backward_buffers
from flash_attention.ascend.budget import Budget
from flash_attention.ascend.geometry import Geometry, KernelTiles
from flash_attention.ascend.preprocess import build_preprocess
from flash_attention.ascend.simulator import SimulatorError, SimulatorParams, Toolkit
from flash_attention.ascend.tile_ops import gradient, masks
from flash_attention.ascend.tile_ops.vector import Lanes
from flash_attention.core.spec import AttentionSpec, Operands

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
GROUPS, KEYS = 2, 48
ELEMENTS = GROUPS * KEYS * 16


def draw(*shape, dtype=np.float16):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def run(operation, out="x", **inputs):
    """``operation(api, local)`` on inputs that lie in the Unified Buffer; the tensor ``out`` after it."""
    stage = Stage(**inputs)
    with stage.program(inputs[out].shape, str(inputs[out].dtype)) as result:
        local = {name: stage.load(name) for name in inputs}
        operation(stage.api, local)
        stage.store(result, local[out])
    return stage.run()


# --- tile operations ------------------------------------------------------------------------------
def test_scale():
    x = draw(GROUPS, KEYS, 16)
    got = run(lambda api, t: gradient.scale(api, t["x"], t["x"], 0.3, ELEMENTS), x=x)
    np.testing.assert_array_equal(got, x * np.float16(0.3))


@pytest.mark.parametrize("mask_groups", (1, GROUPS))
def test_discard(mask_groups):
    x = draw(GROUPS, KEYS, 16)
    mask = np.where(draw(mask_groups, KEYS, 16) > 0, arguments.KEPT, masks.DISCARD).astype(np.float16)
    got = run(lambda api, t: gradient.discard(api, t["x"], t["mask"], GROUPS, KEYS, mask_groups), x=x, mask=mask)
    np.testing.assert_array_equal(got, np.where(np.broadcast_to(mask, x.shape) > 0, x, np.float16(masks.DISCARD)))


def test_exponential_of_hidden_scores_is_zero():
    x = draw(GROUPS, KEYS, 16)
    x[:, ::3] = masks.DISCARD
    got = run(lambda api, t: gradient.exponential(api, t["x"], ELEMENTS), x=x)
    assert not got[:, ::3].any()
    np.testing.assert_allclose(got, np.exp(x.astype(np.float64)), rtol=1e-3, atol=1e-7)


def test_score_gradients():
    x, probs = draw(GROUPS, KEYS, 16), draw(GROUPS, KEYS, 16) ** 2
    got = run(lambda api, t: gradient.score_gradients(api, t["x"], t["probs"], ELEMENTS), x=x, probs=probs)
    np.testing.assert_array_equal(got, x * probs)


@pytest.mark.parametrize("out", ("kept", "dropped"))
def test_drop(out):
    probs, keep = draw(GROUPS, KEYS, 16) ** 2, (draw(KEYS, GROUPS, 16) > 0).astype(np.uint8).reshape(GROUPS, KEYS, 16)
    empty = np.zeros_like(probs)

    def operation(api, t):
        gradient.drop(api, t["kept"], t["dropped"], t["probs"], t["keep"], ELEMENTS)

    got = run(operation, out, probs=probs, keep=keep, kept=empty, dropped=empty)
    np.testing.assert_array_equal(got, probs * (keep == (1 if out == "kept" else 0)))


def test_add_dropped_takes_each_query_its_delta():
    x, dropped, delta = draw(GROUPS, KEYS, 16), draw(KEYS, GROUPS, 16).reshape(GROUPS, KEYS, 16), draw(GROUPS, 1, 16)
    lanes = np.ascontiguousarray(np.tile(delta, (1, 8, 1)))

    def operation(api, t):
        gradient.add_dropped(api, t["x"], t["dropped"], t["lanes"], GROUPS, KEYS)

    got = run(operation, x=x, dropped=dropped, lanes=lanes)
    want = x.astype(np.float64) + dropped.astype(np.float64) * delta.astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-3)


def test_signs_of_a_tile_that_the_diagonal_crosses():
    relative = np.arange(GROUPS * 16).astype(np.float32) + 5
    statistic = np.ascontiguousarray(np.tile(relative.reshape(GROUPS, 1, 16), (1, 4, 1)))
    index = np.repeat(np.arange(KEYS, dtype=np.float32), 16).reshape(KEYS, 16)
    units = np.repeat(np.float16([1, -1]), 128)
    work = np.zeros((GROUPS, KEYS, 16), np.float32)

    def operation(api, t):
        args = t["x"], Lanes(t["statistic"]), t["index"], t["work"], t["units"], GROUPS, KEYS
        gradient.signs(api, *args)

    x = np.zeros((GROUPS, KEYS, 16), np.float16)
    got = run(operation, x=x, statistic=statistic, index=index, units=units, work=work)
    np.testing.assert_array_equal(got, np.sign(relative.reshape(GROUPS, 1, 16) - np.arange(KEYS).reshape(1, KEYS, 1)))


def test_operands_that_overlap_in_part_are_refused():
    with pytest.raises(SimulatorError) as caught:
        run(lambda api, t: gradient.score_gradients(api, t["x"], t["x"][16:], ELEMENTS), x=draw(GROUPS, KEYS, 16))
    assert caught.value.rule in ("bounds", "overlap")


# --- tables and buffers ---------------------------------------------------------------------------
def geometry(q_len=70, kv_len=90, **options):
    return Geometry(AttentionSpec(1, 2, 1, q_len, kv_len, 32, "float16", **options), KernelTiles(64, 48, 1, 2))


def test_exponent_is_half_the_logarithm_of_the_number_of_visible_keys():
    assert arguments.probability_exponent(geometry(1, 1)) == 0
    assert arguments.probability_exponent(geometry(512, 1024)) == 5
    assert arguments.probability_exponent(geometry(1024, 1024, causal=True)) == 4
    assert arguments.probability_exponent(geometry(1024, 1024, local_window_size=(15, 16))) == 2
    assert arguments.probability_exponent(geometry(64, 2**21)) == 10  # 2**10 P fits fp16, and so does ln 2**10 < KEPT


def test_cores_share_both_passes():
    table = arguments.pack_cores(geometry(500, 700), 5)
    for first, stop, items in ((0, 1, 1 * 15), (2, 3, 2 * 8)):
        assert table[0, first] == 0 and table[-1, stop] == items
        np.testing.assert_array_equal(table[1:, first], table[:-1, stop])


def test_budget_names_every_buffer():
    shape = geometry(
        alibi_shape=(2,), bias_shape=(1, 2, 1, 90), mask_shape=(1, 1, 70, 90), dropout_rate=0.1, causal=True
    )
    buffers = backward_buffers(shape)
    names = [buffer.name for buffer in buffers]
    assert len(names) == len(set(names))
    text = str(Budget(buffers))
    assert all(name in text for name in names)


# --- predicted cycles -----------------------------------------------------------------------------
PIPES = ("V", "M", "MTE1", "MTE2", "MTE3")


def busy(q_len, kv_len, keys=128, **options):
    """Busy cycles a pipe of one core that runs one head."""
    spec = AttentionSpec(1, 1, 1, q_len, kv_len, 128, "float16", **options)
    rng = np.random.default_rng(0)
    query, d_out = rng.standard_normal((2, 1, 1, q_len, 128)).astype(np.float16)
    key = rng.standard_normal((1, 1, kv_len, 128)).astype(np.float16)
    shapes = {"mask": spec.mask_shape, "bias": spec.bias_shape, "slopes": spec.alibi_shape}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    operands = Operands(dropout_seed=np.uint32(1) if spec.dropout_rate else None, **tensors)
    shape = Geometry(spec, KernelTiles(128, keys, 1, 4))
    tik = Toolkit(SimulatorParams(trace=True)).tik
    kernels = [build(tik, shape, 1) for build in (build_preprocess, build_backward)]
    lse = np.full((1, 1, q_len), 20.0, np.float32)
    simulated.run_backward(kernels, shape, 1, (query, key, key, operands, query, lse), (d_out, lse))
    return kernels[1].trace.cycles()


def per_tile(options=lambda q_len, kv_len: {}, keys=128):
    """Cycles a pipe for 128 x 128 more scores, both passes: start and end of tasks cancel.

    Args:
        options: fields of the AttentionSpec from the lengths. keys: of a tile.
    """
    corners = {(q, kv): busy(q, kv, keys, **options(q, kv)) for q in (128, 256) for kv in (128, 256)}
    return {
        pipe: corners[256, 256][pipe] - corners[256, 128][pipe] - corners[128, 256][pipe] + corners[128, 128][pipe]
        for pipe in PIPES
    }


def test_interior_tile(figure):
    """128 x 128 scores, head_dim 128, nothing masked, both passes: the vector pipe stays clearly below the cube.

    The exponential is taken at a quarter of the plain rate, as the reference facts assume; at the plain rate the
    vector pipe needs 768 cycles less.
    """
    cycles = per_tile()
    figure("backward, interior tile, both passes, vector pipe", cycles["V"], 2816, "cycles")
    figure("backward, interior tile, both passes, cube", cycles["M"], 3840, "cycles")
    assert cycles["M"] == 7 * 512 + 4 * 64  # the extra columns cost 64 of each product's 512
    assert max(cycles["V"], cycles["MTE1"], cycles["MTE3"]) < 0.75 * cycles["M"]


OPTIONS = {
    "mask": (lambda q, kv: {"mask_shape": (1, 1, q, kv)}, 256, 128),
    "bias a query": (lambda q, kv: {"bias_shape": (1, 1, q, kv)}, 768, 128),
    "bias a key": (lambda q, kv: {"bias_shape": (1, 1, 1, kv)}, 768, 64),
    "ALiBi, causal": (lambda q, kv: {"alibi_shape": (1,), "causal": True, "q_offset": 4096}, 1340, 128),
    "dropout": (lambda q, kv: {"dropout_rate": 0.1}, 1400, 128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPTIONS))
def test_what_options_add(name):
    """At most so many vector cycles for both passes: one over fp16 scores takes 256, one over fp32 scores 512."""
    options, most, keys = OPTIONS[name]
    assert 0 < per_tile(options, keys)["V"] - per_tile(keys=keys)["V"] <= most
