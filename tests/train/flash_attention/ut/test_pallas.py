"""The `pallas` engine: plans of its kernels, shared memory, lowering for CUDA. Results: test_conformance_jax.py."""

import functools
import importlib.util
import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jax_engines import JaxEngine, compiled_fast, forward_and_backward, heads_of, in_float64
from support.padded import KV_LENGTHS, Q_LENGTHS, assert_padding_is_ignored

from conformance import BANDS, Case, judge, make_inputs, tagged
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.plan import make_plan
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.jax import ENGINES, flash_attention
from flash_attention.jax.engines import pallas_sizes as sizes

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
HEAD_DIMS = (16, 32, 40, 64, 80, 128, 160, 256)
TILES = ((16, 16), (32, 64), (64, 32), (64, 64))
DTYPES = ("float16", "bfloat16", "float32")
PLAIN = AttentionSpec(2, 4, 2, 1000, 1000, 64, "bfloat16", causal=True)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a GPU it may be")
def test_never_chosen_on_a_cpu():
    assert ENGINES.choose(PLAIN).name == "xla" and ENGINES.choose(PLAIN, "pallas").name == "pallas"


# --- plans -----------------------------------------------------------------------------------------------------------
def tiles(rows, keys):
    return sizes.Tiles(rows, keys, 64, 4, 1)


@pytest.mark.parametrize("band", BANDS)
def test_kernels_visit_the_plan(band):
    from flash_attention.jax.engines.pallas_tiles import plan_by_key, plan_by_query

    for (q_len, kv_len), offset, (rows, keys) in itertools.product(
        ((1000, 1000), (129, 1000), (1000, 127)), ("aligned", "offset23"), ((64, 32), (32, 128))
    ):
        case = Case(lengths=(q_len, kv_len), band=band, offset=offset, gradients=False)
        spec = case.spec
        plan = make_plan(spec.band, spec.offset, rows, keys)
        by_query = np.asarray(plan_by_query(spec, Operands(), tiles(rows, keys)))
        by_key = np.asarray(plan_by_key(spec, Operands(), tiles(rows, keys)))
        assert by_query.shape == (1, plan.q_tiles, 4) and by_key.shape == (1, plan.kv_tiles, 4)
        np.testing.assert_array_equal(by_query[0, :, :2], plan.kv_range)
        visited = plan.q_range[:, 0] < plan.q_range[:, 1]
        np.testing.assert_array_equal(by_key[0, visited, :2], plan.q_range[visited])
        assert (by_key[0, ~visited, 0] == by_key[0, ~visited, 1]).all()
        # Without a predicate: the plan's full tiles, but for the ragged one.
        full = np.minimum(plan.full_range, kv_len // keys)
        filled = full[:, 0] < full[:, 1]
        np.testing.assert_array_equal(by_query[0, filled, 2:], full[filled])
        assert (by_query[0, ~filled, 2] == by_query[0, ~filled, 3]).all()


def test_lengths_shorten_the_plan():
    from flash_attention.jax.engines.pallas_tiles import plan_by_key, plan_by_query

    spec = replace(PLAIN, causal=False, q_lengths=True, kv_lengths=True)
    operands = Operands(q_lengths=jnp.array([100, 1000]), kv_lengths=jnp.array([0, 130]))
    by_query, by_key = (np.asarray(make(spec, operands, tiles(64, 64))) for make in (plan_by_query, plan_by_key))
    assert not by_query[0, :, 1].any() and (by_query[1] == [0, 3, 0, 2]).all()
    assert not by_key[0, :, 1].any()
    np.testing.assert_array_equal(by_key[1, :, 1], [16] * 3 + [0] * 13)
    np.testing.assert_array_equal(by_key[1, :4, 3], [16, 16, 0, 0])


def test_other_segments_are_not_visited():
    from flash_attention.jax.engines.pallas_tiles import plan_by_query

    spec = replace(PLAIN, batch=1, causal=False, segments=True)
    ids = jnp.asarray(np.repeat([0, 1, 2, 3], 250))[None]
    plan = np.asarray(plan_by_query(spec, Operands(q_segment_ids=ids, kv_segment_ids=ids), tiles(64, 64)))[0]
    for tile, (first, stop) in enumerate(plan[:, :2]):
        rows = np.asarray(ids[0, tile * 64 : tile * 64 + 64])
        keys = np.flatnonzero(np.isin(np.asarray(ids[0]), rows))
        assert (first, stop) == (keys[0] // 64, keys[-1] // 64 + 1)


# --- shared memory ---------------------------------------------------------------------------------------------------
def test_bound_of_a_plain_tile():
    """bfloat16, 128 x 64, head size 64, two stages: Q once, K and V twice, P once, statistics."""
    spec, tile = replace(PLAIN, head_dim=64), sizes.Tiles(128, 64, 64, 4, 2)
    statistics = 4 * (6 * 128 + 2 * 64)
    want = 2 * 128 * 64 + 2 * (2 * 2 * 64 * 64 + statistics) + 2 * 128 * 64
    assert sizes.shared_bytes(spec, tile, "forward") == want
    biased = sizes.shared_bytes(replace(spec, bias_shape=(1, 4, 1000, 1000)), tile, "forward")
    assert biased == want + 2 * 4 * 128 * 64


@pytest.mark.parametrize("direction", sizes.DIRECTIONS)
def test_every_call_fits_every_gpu(direction):
    extras = ({}, {"bias_shape": (1, 4, 1000, 1000), "mask_shape": (2, 1, 1000, 1000)})
    for dtype, dim, extra in itertools.product(DTYPES, range(1, 257), extras):
        spec = replace(PLAIN, dtype=dtype, head_dim=dim, **extra)
        chosen = sizes.tiles_of(spec, direction)
        assert sizes.shared_bytes(spec, chosen, direction) <= sizes.shared_limit()
        assert chosen.dim >= dim and chosen.dim & (chosen.dim - 1) == 0
    # Short calls do not compute a whole tile of padding.
    short = sizes.tiles_of(replace(PLAIN, q_len=5, kv_len=20), direction)
    assert (short.rows, short.keys) == (16, 32)


REFUSED = {
    "'dtype' must be float16, bfloat16 or float32, but got float64": {"dtype": "float64"},
    "'head_dim' must be at most 256, but got 257": {"head_dim": 257},
    "'tile' must be a tile that fits {} bytes of shared memory, but got".format(sizes.shared_limit()): {
        "tile": (128, 128), "head_dim": 256, "dtype": "float32"
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    with pytest.raises(UnsupportedError) as caught:
        ENGINES.choose(replace(PLAIN, **REFUSED[reason]), "pallas")
    assert reason in str(caught.value)


# --- lowering --------------------------------------------------------------------------------------------------------
def kernels(case, backward=True):
    """Names of the Triton kernels in the program that is lowered for CUDA."""
    if importlib.util.find_spec("jaxlib.triton") is None:
        pytest.skip("this jaxlib was built without Triton's dialect, so that nothing can be lowered for a GPU")
    inputs = make_inputs(case)
    tensors = {name: jnp.asarray(x) for name, x in inputs.tensors.items()}
    *qkv, d_out = heads_of(case, inputs)

    def run(q, k, v, d_out, d_lse, **tensors):
        options = dict(case.options, implementation="pallas", return_lse=True)
        results, pullback = jax.vjp(functools.partial(flash_attention, **tensors, **options), q, k, v)
        return results + (pullback((d_out, d_lse)) if backward else ())

    cotangents = d_out, jnp.asarray(inputs.d_lse)
    program = jax.jit(run).trace(*qkv, *cotangents, **tensors).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in program, "nothing but the kernels does the work"
    return {name for name in re.findall(r'name = "(\w+)"', program) if name.startswith("flash_attention_")}


def expected(case, backward=True, forward="forward"):
    """Their names, as the case needs them."""
    found = [forward] + ["query_gradient", "key_gradients"] * backward + ["bias_gradient"] * (case.bias != "none")
    return {"flash_attention_" + name for name in found}


EVERYTHING = Case(
    dtype="bfloat16", lengths=(129, 200), head_dim=40, band="blocks16-causal", mask="dense", slopes="alibi-batch",
    logits="cap", sinks=True, ids="segments", offset="traced-batch", dropout=0.1, cotangent=True, bias="heads",
)  # fmt: skip


def test_everything_lowers_for_cuda():
    assert kernels(EVERYTHING) == expected(EVERYTHING)


GRID = [
    Case(dtype=dtype, lengths=(256, 256), head_dim=dim, band="causal")
    for dtype, dim in itertools.product(DTYPES, HEAD_DIMS)
]


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_head_size_lowers(case):
    assert kernels(case) == expected(case)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_lowers(dtype, tile, monkeypatch):
    monkeypatch.setattr(sizes, "tiles_of", lambda spec, direction: sizes.Tiles(*tile, 64, 4, 2))
    case = Case(dtype=dtype, head_dim=64, band="window", lengths=(200, 200), bias="heads")
    assert kernels(case) == expected(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in tagged("ci") if case.ids != "int-lengths"], ids=str)
def test_every_feature_lowers(case):
    assert kernels(case, case.gradients) == expected(case, case.gradients)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_export(dtype):
    """The program of another machine, exported here."""
    from jax import export

    q = jax.ShapeDtypeStruct((1, 256, 4, 64), dtype)
    call = jax.jit(functools.partial(flash_attention, is_causal=True, implementation="pallas"))
    checks = [
        export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
    ]
    exported = export.export(call, platforms=("cuda",), disabled_checks=checks)(q, q, q)
    assert exported.platforms == ("cuda",) and "flash_attention_forward" in exported.mlir_module()


# --- keys that programs share out -----------------------------------------------------------------------------------
DECODING = {
    "one query": Case(lengths=(1, 1100), band="causal", heads=(1, 2, 1), gradients=False),
    "sinks, ALiBi, dropout": Case(
        lengths=(3, 700), band="causal", heads=(1, 4, 2), sinks=True, slopes="alibi", dropout=0.2, cotangent=True
    ),
    "lengths": Case(lengths=(2, 900), ids="lengths", mask="dense", layout="BSND", gradients=False),
    "rows that see nothing": Case(lengths=(9, 800), mask="rows", sinks=True, gradients=False),
    "segments, bf16": Case(
        lengths=(5, 800), ids="segments", dtype="bfloat16", layout="BSND", logits="cap", bias="keys", gradients=False
    ),
    "run-time offset": Case(lengths=(4, 1000), band="causal", offset="traced-batch", gradients=False),
    # The heads of a group as rows of one tile.
    "groups": Case(lengths=(2, 900), band="causal", heads=(2, 8, 2), sinks=True, dtype="bfloat16", layout="BSND"),
    "groups, run-time offset": Case(lengths=(3, 900), heads=(2, 6, 3), offset="traced-batch", band="causal"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "one query" else pytest.mark.slow) for name in DECODING]
)
def test_parts_of_the_keys_are_merged(name, monkeypatch):
    case = DECODING[name]
    # Small tiles, so that short calls have many parts.
    monkeypatch.setattr(sizes, "tiles_of", lambda spec, direction: sizes.Tiles(16, 32, 32, 4, 1))
    assert sizes.parts_of(case.spec, sizes.tiles_of(case.spec, "forward")) >= 5
    judge(JaxEngine("pallas").run, case, JaxEngine.functions)


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("parts", [1, 8])
def test_a_step_of_decoding(layout, parts, monkeypatch):
    """The heads of a group are rows of one tile, which sees a filled part of each cache."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((3, length, heads, 16)).astype(np.float32) for length, heads in ((2, 8), (300, 2), (300, 2))
    )
    q, k, v = (jnp.asarray(x if layout == "BSND" else x.swapaxes(1, 2)) for x in (q, k, v))
    filled = jnp.array([300, 2, 157])
    options = {"key_value_seq_lengths": filled, "q_offset": filled - 2, "is_causal": True, "layout": layout}
    spec = AttentionSpec(3, 8, 2, 2, 300, 16, causal=True, dynamic_offset=True, kv_lengths=True)
    assert sizes.stacks(spec) and sizes.stacked(spec).q_len == 8
    monkeypatch.setattr(sizes, "tiles_of", lambda spec, direction: sizes.Tiles(16, 32, 16, 4, 1))
    monkeypatch.setattr(sizes, "parts_of", lambda spec, tiles: parts)
    found = flash_attention(q, k, v, implementation="pallas", return_lse=True, **options)
    want = flash_attention(q, k, v, implementation="reference", return_lse=True, **options)
    for x, y in zip(found, want):
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_what_tells_the_heads_of_a_group_apart():
    """Such calls, long ones and single heads have a program a head."""
    spec = AttentionSpec(3, 8, 2, 2, 300, 16, causal=True)
    assert sizes.stacks(spec)
    apart = ({"mask_shape": (3, 1, 2, 300)}, {"bias_shape": (1, 8, 2, 300)}, {"alibi_shape": (8,)}, {"segments": True})
    for changes in apart + ({"q_lengths": True}, {"dropout_rate": 0.1}, {"q_len": 17}, {"kv_heads": 8}):
        assert not sizes.stacks(replace(spec, **changes)), changes


def test_parts_lower_for_cuda():
    case = Case(dtype="bfloat16", lengths=(1, 4096), head_dim=128, band="causal", heads=(1, 8, 2))
    assert kernels(case, backward=False) == expected(case, False, "forward_of_parts")


def test_how_many_parts():
    """Two programs for each of 132 processors, at least 4 key tiles each, 32 at most; none for long queries."""

    def parts(batch, heads, q_len, kv_len, **fields):
        spec = AttentionSpec(batch, heads, heads, q_len, kv_len, 128, "bfloat16", causal=True, **fields)
        return sizes.parts_of(spec, sizes.Tiles(64, 64, 128, 4, 2))

    assert parts(1, 32, 1, 32768) == 9 and parts(1, 8, 1, 32768) == 32 and parts(16, 32, 1, 32768) == 1
    assert parts(1, 8, 1, 1024) == 4 and parts(1, 8, 1, 200) == 1 and parts(1, 8, 65, 32768) == 1
    assert parts(1, 8, 1, 32768, local_window_size=(1023, 0)) == 4
    assert parts(1, 32, 64, 32768) == 9


# --- the gradient of a bias -----------------------------------------------------------------------------------------
SHAPES = [
    pytest.param(shape, marks=[] if shape == (1, 1, 1, 90) else pytest.mark.slow)
    for shape in itertools.product((1, 2), (1, 4), (1, 70), (1, 90))
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_gradient_of_every_shape(shape):
    rng = np.random.default_rng(0)
    query, d_out = rng.standard_normal((2, 2, 70, 4, 16))
    key, value = rng.standard_normal((2, 2, 90, 2, 16))
    bias = rng.standard_normal(shape)

    def gradient(dtype, bias, **options):
        def loss(bias):
            out = flash_attention(*tensors, bias, local_window_size=(30, 9), logits_soft_cap=2.0, **options)
            return (out * cotangent).sum()

        *tensors, cotangent, given = (jnp.asarray(x, dtype) for x in (query, key, value, d_out, bias))
        return np.asarray(jax.jit(jax.grad(loss))(given))

    with compiled_fast():
        with in_float64():
            terms = gradient(jnp.float64, np.broadcast_to(bias, (2, 4, 70, 90)), implementation="reference")
        found = gradient(jnp.float32, bias, implementation="pallas")
    summed = tuple(axis for axis, size in enumerate(shape) if size == 1)
    want, size = (x.sum(axis=summed, keepdims=True) for x in (terms, np.abs(terms)))
    # A bias that a whole row shares has gradient 0: what is summed up to it sets the rounding, not the sum.
    bound = max(1e-5 * max(1.0, np.abs(want).max()), 2.0**-23 * size.max())
    assert found.shape == shape and np.abs(found - want).max() < bound


# --- results beyond the suite ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_same_bits():
    case = Case(lengths=(200, 200), band="causal", slopes="alibi", dropout=0.2)
    first = JaxEngine("pallas").run(case)
    jax.clear_caches()
    for name, x in JaxEngine("pallas").run(case).items():
        np.testing.assert_array_equal(first[name], x, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
def test_nan_in_padding(layout):
    options = {"query_seq_lengths": Q_LENGTHS, "key_value_seq_lengths": KV_LENGTHS, "is_causal": True}
    assert_padding_is_ignored(forward_and_backward(layout, implementation="pallas", **options))


@pytest.mark.slow
def test_vmap_and_tiles_change_nothing():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 100, 2, 16)), jnp.float32) for _ in range(3))
    attend = functools.partial(flash_attention, is_causal=True, implementation="pallas")
    whole = attend(q, k, v)
    mapped = jax.vmap(attend)(q, k, v)
    np.testing.assert_allclose(mapped, whole, atol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.vmap(attend))(q[None], k[None], v[None])[0], whole, atol=2e-6)
