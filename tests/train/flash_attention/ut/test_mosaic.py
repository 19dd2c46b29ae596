"""The `mosaic` engine: its kernels interpreted, lowered for CUDA without a GPU, and refused where they cannot run."""

import functools
import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jax_engines import JaxEngine, forward_and_backward, heads_of, interpreted_fast
from support.padded import KV_LENGTHS, Q_LENGTHS, padded

from conformance import Case, judge, make_inputs
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.spec import AttentionSpec
from flash_attention.jax import ENGINES
from flash_attention.jax.engines import choice, mosaic
from flash_attention.jax.engines import mosaic_sizes as sizes

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
DTYPES = ("float16", "bfloat16")
PLAIN = AttentionSpec(2, 4, 2, 1000, 1000, 64, "bfloat16", causal=True)
REFUSAL = mosaic.supports(PLAIN)
needs_mosaic = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
needs_the_interpreter = pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a CPU it is interpreted")


# --- the choice ------------------------------------------------------------------------------------------------------
@needs_mosaic
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_only_by_name(backend, monkeypatch):
    """It was never run on a device: no platform's row of the choice names it."""
    monkeypatch.setattr(mosaic, "backend", lambda: backend)
    assert ENGINES["mosaic"].order is None and not any("mosaic" in row.engines for row in choice.TABLE)
    assert ENGINES.choose(PLAIN).name != "mosaic" and ENGINES.choose(PLAIN, "mosaic").name == "mosaic"


REFUSED = {
    "'dtype' must be float16 or bfloat16, but got float32. Use implementation='pallas' or 'xla'.": {"dtype": "float32"},
    "'dtype' must be that of the whole call, but got a float32 part of a larger call.": {"wide": True},
    "'head_dim' must be 64 or 128, but got 256. Use implementation='pallas' or 'xla'.": {"head_dim": 256},
    "'batch' must be at most 65535, as the heads, but got 65536. Use implementation='xla'.": {"batch": 65536},
    "'mask' must be left out, but got a tensor. Use implementation='pallas' or 'xla'.": {"mask_shape": (2, 1, 9, 9)},
    "'bias' must be left out, but got a tensor. Use implementation='pallas' or 'xla'.": {"bias_shape": (1, 4, 9, 9)},
    "'dropout_rate' must be left out, but got 0.1. Use implementation='pallas' or 'xla'.": {"dropout_rate": 0.1},
    "'tile' must be a tile that fits {} bytes of shared memory and {} registers of a thread, but got".format(
        sizes.SHARED_LIMIT, sizes.COMPUTING_REGISTERS
    ): {"tile": (256, 256)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(UnsupportedError) as caught:
        ENGINES.choose(replace(PLAIN, **REFUSED[message]), "mosaic")
    assert message in str(caught.value)


@pytest.mark.parametrize("backend, capability", [("rocm", ""), ("tpu", ""), ("cuda", "8.0"), ("cuda", "10.0")])
def test_other_devices_are_refused(backend, capability, monkeypatch):
    monkeypatch.setattr(mosaic, "backend", lambda: backend)
    monkeypatch.setattr(mosaic.pallas_sizes, "capability", lambda: capability)
    reason = mosaic.supports(PLAIN)
    assert reason.argument == "backend" and reason.need.startswith("a Hopper GPU") and "'xla'" in reason.remedy
    assert reason.value == (backend if backend != "cuda" else "compute capability " + capability)


def test_an_old_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 6, 2))
    monkeypatch.setattr(jax, "__version__", "0.6.2")
    want = "'implementation' must be used with jax 0.10 or newer (Mosaic GPU), but got 'mosaic' with jax 0.6.2."
    assert want in str(mosaic.supports(PLAIN))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", mosaic.LEAST_JAX)
    monkeypatch.setattr(mosaic.importlib.util, "find_spec", lambda name: None)
    want = "'implementation' must be used where absl-py is installed (Mosaic GPU imports it), but got 'mosaic' without"
    assert want in str(mosaic.supports(PLAIN))


# --- shared memory and registers -------------------------------------------------------------------------------------
def test_bounds_of_a_plain_tile():
    """Head size 64, 128 x 128 tiles, two stages: Q, and K and V twice; a warpgroup owns 64 rows."""
    spec, tiles = PLAIN, sizes.tiles_of(PLAIN, "forward")
    assert tiles == sizes.Tiles(128, 128, 2)
    assert sizes.shared_bytes(spec, tiles, "forward") == 2 * 64 * (128 + 4 * 128) + 4 * 128 + sizes.RESERVED
    sums, scores, left = 64 * 64 // 128, 64 * 128 // 128, 64 * 128 // 2 // 128
    assert sizes.registers(spec, tiles, "forward") == sums + scores + left + sizes.OTHER_REGISTERS
    # dK and dV: K and V, and Q, dO, LSE and delta twice.
    tiles = sizes.tiles_of(spec, "key")
    assert tiles == sizes.Tiles(64, 128, 2)
    want = 2 * 64 * (2 * 128 + 4 * 64) + 4 * (128 + 4 * 64) + sizes.RESERVED
    assert sizes.shared_bytes(spec, tiles, "key") == want


@pytest.mark.parametrize("direction", sizes.DIRECTIONS)
@pytest.mark.parametrize("dim", sizes.HEAD_DIMS)
def test_our_own_tiles_fit(dim, direction):
    spec = replace(PLAIN, head_dim=dim)
    tiles = sizes.tiles_of(spec, direction)
    assert sizes.shared_bytes(spec, tiles, direction) <= sizes.SHARED_LIMIT
    assert sizes.registers(spec, tiles, direction) <= sizes.COMPUTING_REGISTERS
    assert 2 * sizes.COMPUTING_REGISTERS + sizes.COPYING_REGISTERS <= 3 * (65536 // (3 * 128) // 8 * 8)


def test_tiles_are_rounded_to_what_a_warpgroup_owns():
    for asked, forward, key in (
        ((16, 16), (128, 64), (64, 128)),
        ((300, 130), (256, 128), (256, 128)),
    ):
        spec = replace(PLAIN, tile=asked)
        assert sizes.tiles_of(spec, "forward")[:2] == sizes.tiles_of(spec, "query")[:2] == forward
        assert sizes.tiles_of(spec, "key")[:2] == key


# --- lowering --------------------------------------------------------------------------------------------------------
KERNELS = ["forward", "key_gradients", "query_gradient"]


def kernels(case, monkeypatch, tile=None):
    """Names of the kernels in the program lowered for CUDA: layouts, shapes of wgmma and shared memory are checked.

    Without a GPU, Mosaic lowers for compute capability 9.0.
    """
    monkeypatch.setattr(mosaic, "backend", lambda: "cuda")
    inputs = make_inputs(case)
    spec, operands = replace(inputs.spec, layout=case.layout, tile=tile), jax.tree.map(jnp.asarray, inputs.operands)
    assert mosaic.supports(spec) is None
    *qkv, d_out = heads_of(case, inputs)

    def run(q, k, v, operands, cotangents):
        results, pullback = jax.vjp(lambda *x: mosaic.run(spec, *x, operands), q, k, v)
        return results + pullback(cotangents)

    jax.clear_caches()
    traced = jax.jit(run).trace(*qkv, operands, (d_out, jnp.asarray(inputs.d_lse)))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    jax.clear_caches()
    assert "stablehlo.while" not in program, "nothing but the kernels does the work"
    assert program.count("custom_call @mosaic_gpu") == len(KERNELS)
    return sorted(set(re.findall(r"flash_attention_(\w+)_mosaic_gpu", program)))


GRID = [
    Case(dtype=dtype, lengths=(300, 333), head_dim=dim, band="causal", layout=layout)
    for dtype, dim, layout in itertools.product(DTYPES, sizes.HEAD_DIMS, ("BNSD", "BSND"))
]
EVERYTHING = Case(
    dtype="bfloat16", lengths=(129, 200), head_dim=64, band="blocks16-causal", slopes="alibi-batch", logits="cap",
    sinks=True, ids="segments", offset="traced-batch", cotangent=True,
)  # fmt: skip
FEATURES = [
    EVERYTHING,
    replace(EVERYTHING, ids="lengths", band="window", head_dim=128, dtype="float16"),
    Case(dtype="float16", lengths=(1, 1), head_dim=64),
    Case(dtype="bfloat16", lengths=(1000, 8), head_dim=128, heads=(1, 6, 1)),
]


@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[] if x in (GRID[0], EVERYTHING) else pytest.mark.slow) for x in GRID + FEATURES],
    ids=str,
)
def test_lowers_for_hopper(case, monkeypatch):
    assert kernels(case, monkeypatch) == KERNELS


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("dim, tile", [(64, (64, 64)), (64, (64, 128)), (128, (64, 64))], ids=str)
def test_tiles_that_are_accepted_lower(dim, tile, monkeypatch):
    """Mosaic raises where a block's shared memory is beyond the device's."""
    assert (
        kernels(Case(dtype="bfloat16", lengths=(300, 300), head_dim=dim, band="window"), monkeypatch, tile) == KERNELS
    )


# --- results, interpreted --------------------------------------------------------------------------------------------
def case(name, **fields):
    """Few heads: the interpreter compiles its program anew for each block."""
    fields = dict({"dtype": "bfloat16", "head_dim": 64, "heads": (1, 1, 1), "cotangent": True}, **fields)
    return Case(name=name, **fields)


CASES = [
    case("causal, groups", band="causal", lengths=(150, 150), heads=(1, 2, 1)),
    case("causal, D 128, fp16", band="causal", lengths=(70, 200), head_dim=128, dtype="float16"),
    case("dense, BSND", lengths=(129, 260), heads=(2, 2, 2), layout="BSND", dtype="float16"),
    case("one token", lengths=(1, 1)),
    case("dead rows", band="causal", lengths=(200, 130)),
    case("two-sided window", band="window", lengths=(300, 300)),
    case("block window", band="blocks128", lengths=(390, 390), dtype="float16"),
    case("small blocks", band="blocks16-causal", lengths=(140, 200)),
    case("many stages", lengths=(64, 900)),
    case("offset", band="causal", offset="offset23", lengths=(100, 140)),
    case("run-time offset a batch", band="window", offset="traced-batch", lengths=(100, 140), heads=(2, 1, 1)),
    case("ALiBi", slopes="alibi", band="causal", heads=(1, 2, 2)),
    case("ALiBi a batch, cap", slopes="alibi-batch", logits="cap", heads=(2, 1, 1)),
    case("cap, scale", logits="cap-scale", dtype="float16"),
    case("sinks", sinks=True, band="left-causal", heads=(1, 2, 1)),
    case("sinks, dead rows, cap", sinks=True, logits="cap", band="causal", lengths=(140, 70)),
    case("lengths", ids="lengths", lengths=(260, 260), heads=(2, 1, 1)),
    case("segments", ids="segments", band="causal", lengths=(200, 200)),
    case("large inputs", values="large"),
    case("products near 6e4", values="extreme", dtype="float16"),
]


@pytest.fixture
def quickly():
    with interpreted_fast():
        yield


@needs_mosaic
@pytest.mark.parametrize("case", CASES[:1] + [pytest.param(x, marks=pytest.mark.slow) for x in CASES[1:]], ids=str)
def test_forward_and_gradients(case, quickly):
    engine = JaxEngine("mosaic")
    assert engine.supports(case.spec) is None
    judge(engine.run, case, engine.functions)


@needs_mosaic
@needs_the_interpreter
@pytest.mark.slow
def test_no_races(quickly, monkeypatch):
    """Threads, barriers and copies of every kernel, with more tiles than the ring has stages."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    from flash_attention.jax.engines.mosaic_operations import Interpreted

    monkeypatch.setattr(Interpreted, "detect_races", True)
    jax.clear_caches()
    for lengths in ((64, 520), (300, 64)):
        JaxEngine("mosaic").run(case("races", band="causal", lengths=lengths, offset="offset0"))
        assert gpu_callbacks.get_races().races_found is False
    jax.clear_caches()


@needs_mosaic
@pytest.mark.slow
def test_same_bits(quickly):
    first, second = (JaxEngine("mosaic").run(CASES[0]) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@needs_mosaic
@pytest.mark.slow
def test_nan_in_padding(quickly):
    """What lies beyond the lengths changes no bit."""
    options = {"query_seq_lengths": Q_LENGTHS, "key_value_seq_lengths": KV_LENGTHS}
    run = forward_and_backward("BNSD", implementation="mosaic", **options)
    clean, dirty = (
        run(*(jnp.asarray(x, jnp.bfloat16) for x in tensors)) for tensors in padded(heads=1, kv_heads=1, head_dim=64)
    )
    for name, a, b in zip(("out", "lse", "query", "key", "value"), clean, dirty):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@needs_mosaic
@pytest.mark.slow
def test_vmap_and_tiles_change_nothing(quickly):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 1, 200, 64)), jnp.bfloat16) for _ in range(3))
    spec = AttentionSpec(2, 1, 1, 200, 200, 64, "bfloat16", causal=True)
    whole, lse = mosaic.run(spec, q, k, v)
    mapped, _ = jax.vmap(functools.partial(mosaic.run, replace(spec, batch=1)))(q[:, None], k[:, None], v[:, None])
    np.testing.assert_array_equal(np.asarray(mapped[:, 0]), np.asarray(whole))
    _, other = mosaic.run(replace(spec, tile=(64, 64)), q, k, v)
    np.testing.assert_allclose(other, lse, atol=2e-6)
