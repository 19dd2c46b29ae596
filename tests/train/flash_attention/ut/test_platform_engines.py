"""Engines of one platform's libraries, `cudnn` and `splash`, and the table by which `auto` chooses."""

import functools
import itertools
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jax_engines import JaxEngine
from support.mechanisms import one_device

from conformance import Case, check, judge
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.ranges import visible
from flash_attention.core.spec import AttentionSpec
from flash_attention.jax import ENGINES, AttentionRegistry, flash_attention
from flash_attention.jax.engines import choice, cudnn, pallas, platforms, splash

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
PLAIN = AttentionSpec(2, 4, 2, 256, 256, 64, "bfloat16", causal=True)


# --- the choice ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm", "tpu", "tt"])
def test_auto_takes_what_was_measured(backend, monkeypatch):
    for module in (choice, cudnn, pallas, splash):
        monkeypatch.setattr(module, "backend", lambda: backend)
    chosen = ("cudnn", "pallas", "xla", "xla") if backend == "cuda" else ("xla",) * 4
    specs = PLAIN, replace(PLAIN, soft_cap=30.0), replace(PLAIN, head_dim=320), replace(PLAIN, dtype="float32")
    assert tuple(ENGINES.choose(spec).name for spec in specs) == chosen
    for name in ("splash", "reference"):
        assert ENGINES[name].order is None, "nothing was measured with it"
    assert choice.here().backend == (backend if backend != "tt" else "elsewhere")


def test_the_order_is_that_of_every_row():
    """One order serves all platforms: no row may contradict another."""
    for row in choice.TABLE:
        orders = [ENGINES[name].order for name in row.engines]
        assert orders == sorted(orders), row


def test_a_measured_engine_would_be_chosen(monkeypatch):
    """A row that names two engines: the first that supports the call."""
    row = choice.Choice("cuda", ("pallas", "xla"), "a test")
    monkeypatch.setattr(choice, "TABLE", (row,) + choice.TABLE[:1])
    monkeypatch.setattr(choice, "backend", lambda: "cuda")
    ranked = choice.ranked(pallas.ENGINE)
    assert ranked.order == 0 and ranked.pays(PLAIN)
    monkeypatch.setattr(choice, "backend", lambda: "cpu")
    assert not ranked.pays(PLAIN)


def test_backend_names_what_jax_computes_on():
    assert platforms.backend() == {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


PLACES = {"pallas": ("cpu", "cuda", "rocm"), "cudnn": ("cuda",), "splash": ("cpu", "tpu")}


@pytest.mark.parametrize("module", [pallas, cudnn, splash], ids=lambda module: module.ENGINE.name)
def test_elsewhere_it_is_refused(module, monkeypatch):
    for backend in ("cpu", "cuda", "rocm", "tpu"):
        monkeypatch.setattr(module, "backend", lambda backend=backend: backend)
        reason = module.supports(PLAIN)
        if backend in PLACES[module.ENGINE.name]:
            assert reason is None
        else:
            assert reason.argument == "backend" and reason.value == backend and "'xla'" in reason.remedy


# --- what each takes -------------------------------------------------------------------------------------------------
ABSENT = {
    "mask": {"mask_shape": (2, 1, 256, 256)},
    "bias": {"bias_shape": (1, 4, 256, 256)},
    "alibi_slopes": {"alibi_shape": (4,)},
    "q_segment_ids": {"segments": True},
    "query_seq_lengths": {"q_lengths": True},
    "key_value_seq_lengths": {"kv_lengths": True},
    "sinks": {"sinks": True},
    "dropout_rate": {"dropout_rate": 0.1},
    "q_offset": {"dynamic_offset": True},
}


@pytest.mark.parametrize("module", [cudnn, splash], ids=lambda module: module.ENGINE.name)
def test_arguments_that_are_refused(module):
    assert module.constraints(PLAIN) is None
    for argument, changes in ABSENT.items():
        assert module.constraints(replace(PLAIN, **changes)).argument == argument
    assert module.constraints(replace(PLAIN, dtype="float32")).argument == "dtype"
    assert module.constraints(replace(PLAIN, wide=True)).argument == "dtype"


CUDNN_REFUSES = {
    "head_dim": [{"head_dim": 60}, {"head_dim": 136}],
    "logits_soft_cap": [{"soft_cap": 30.0}],
    "prev_block_num": [{"prev_block_num": 1}, {"next_block_num": 0}],
    "tile": [{"tile": (64, 64)}],
    "local_window_size": [
        {"causal": False, "local_window_size": (9, 9)},
        {"causal": False, "local_window_size": (9, None)},
        {"causal": False, "local_window_size": (None, 9)},
    ],
    "sequence length": [{"kv_len": 300, "q_offset": 44}, {"q_offset": 1}, {"q_len": 300, "q_offset": 0}],
}


@pytest.mark.parametrize("argument", CUDNN_REFUSES)
def test_cudnn_refuses(argument):
    for changes in CUDNN_REFUSES[argument]:
        assert cudnn.constraints(replace(PLAIN, **changes)).argument == argument
    for taken in ({"local_window_size": (9, None)}, {"causal": False, "local_window_size": (9, 0)}):
        assert cudnn.constraints(replace(PLAIN, **taken)) is None
    assert cudnn.constraints(replace(PLAIN, causal=False, kv_len=300, q_offset=44)) is None


def test_splash_refuses_rows_that_see_nothing():
    for changes in (
        {"q_len": 300, "q_offset": -44},
        {"q_offset": -1},
        {"causal": False, "local_window_size": (0, 0), "q_offset": 9},
    ):
        assert splash.constraints(replace(PLAIN, **changes)).argument == "sequence length"
    for taken in ({"soft_cap": 30.0}, {"kv_len": 300, "q_offset": 44}, {"prev_block_num": 1}, {"head_dim": 60}):
        assert splash.constraints(replace(PLAIN, **taken)) is None


# --- cudnn -----------------------------------------------------------------------------------------------------------
CUDNN_CASES = [
    Case(dtype="bfloat16", cotangent=True, head_dim=64, **fields)
    for fields in (
        {"band": "causal", "layout": "BSND"},
        {"band": "left-causal"},
        {"lengths": (100, 150), "heads": (1, 4, 1)},
    )
]


def without_a_gpu(monkeypatch):
    """jax.nn's own implementation in place of the kernel, which only a computer with a GPU has."""
    if platforms.backend() != "cuda":
        monkeypatch.setattr(cudnn, "backend", lambda: "cuda")
        monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")


@pytest.mark.slow
@pytest.mark.parametrize("case", CUDNN_CASES, ids=str)
def test_cudnn_asks_jax_nn_for_the_same_attention(case, monkeypatch):
    without_a_gpu(monkeypatch)
    engine = JaxEngine("cudnn")
    judge(engine.run, case, engine.functions)


@pytest.mark.slow
def test_the_lse_costs_nothing_unless_used(monkeypatch):
    without_a_gpu(monkeypatch)
    x = jax.ShapeDtypeStruct((1, 2048, 2, 64), "bfloat16")

    def loops(implementation):
        def loss(q, k, v):
            return flash_attention(q, k, v, is_causal=True, implementation=implementation).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text().count(" while(")

    assert loops("xla") > 0 and loops("cudnn") == 0


# --- splash ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [128, 256])
def test_masks_are_the_plan(block):
    """Every block's state from a dense mask, at sizes where that is possible."""
    bands = (
        {"causal": True},
        {"causal": False, "local_window_size": (300, 40)},
        {"prev_block_num": 1, "block_size": 64},
    )
    for changes, (q_len, kv_len) in itertools.product(bands, ((700, 700), (130, 1000))):
        spec = replace(PLAIN, q_len=q_len, kv_len=kv_len, q_offset=None, **changes)
        by_query, by_key = splash.mask_infos(spec, block)
        position = np.arange(q_len)[:, None] + spec.offset
        dense = np.asarray(visible(spec.band, position, np.arange(kv_len)[None, :]))
        states = {}
        for i, j in itertools.product(range(-(-q_len // block)), range(-(-kv_len // block))):
            part = dense[i * block : (i + 1) * block, j * block : (j + 1) * block]
            states[i, j] = 2 if part.all() else int(part.any())
        assert np.array_equal(by_query.q_sequence[:q_len], position[:, 0])
        for info, transposed in ((by_query, False), (by_key, True)):
            found = dict.fromkeys(states, 0)
            for own, place in np.ndindex(*info.block_mask[0].shape):
                here = int(info.block_mask[0, own, place])
                other = int(info.data_next[0, own, place])
                if here:
                    found[(other, place) if transposed else (own, other)] = here
            assert {key: bool(x) for key, x in found.items()} == {key: bool(x) for key, x in states.items()}
            assert all(states[key] == 2 for key, x in found.items() if x == 2)


def test_masks_of_a_million_tokens():
    """No time or memory of S x S: the library's own constructor takes minutes."""
    begin = time.perf_counter()
    spec = replace(PLAIN, q_len=2**20, kv_len=2**20, local_window_size=(1024, None))
    by_query, by_key = splash.mask_infos(spec, 512)
    assert by_query.block_mask.shape == (1, 2048, 3) and by_key.block_mask.shape == (1, 3, 2048)
    assert time.perf_counter() - begin < 2


SPLASH_CASES = [
    Case(dtype="bfloat16", cotangent=True, **fields)
    for fields in (
        {"band": "causal", "lengths": (300, 300), "logits": "cap"},
        {"band": "window", "lengths": (300, 300), "head_dim": 80},
        {"band": "blocks16-causal", "lengths": (129, 400), "layout": "BSND"},
        {"band": "left-causal", "lengths": (1, 700), "heads": (1, 8, 2), "head_dim": 128},
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SPLASH_CASES, ids=str)
def test_splash_interpreted(case):
    assert splash.supports(case.spec) is None
    check(JaxEngine("splash"), case)


@pytest.mark.slow
@pytest.mark.skipif(
    not jax.__version__.startswith("0.6."),
    reason="newer JAX (seen with 0.10.2) asks the TPU at hand for its kind while it lowers this kernel",
)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, (200, 100)])
def test_splash_exports_for_tpu(dim, window):
    from jax import export

    q = jax.ShapeDtypeStruct((1, 1024, 4, dim), "bfloat16")
    kv = jax.ShapeDtypeStruct((1, 1024, 2, dim), "bfloat16")
    attend = functools.partial(
        flash_attention, is_causal=window is None, local_window_size=window, implementation="splash"
    )

    def both(q, k, v, d_out):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    exported = export.export(jax.jit(both), platforms=("tpu",))(q, kv, kv, q)
    assert exported.platforms == ("tpu",) and "tpu_custom_call" in exported.mlir_module()


# --- names of the factory --------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(
    platforms.backend() not in ("cpu", "tpu"), reason="needs a TPU, or a CPU that interprets its kernels"
)
def test_the_factory_runs_the_engine():
    """On its own platform; here interpreted in its place."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 128, 2, 64)), "bfloat16") for _ in range(3))
    impl = AttentionRegistry.create("splash", one_device().replace(backend="tpu", runtime_dtype="bfloat16"))
    out = impl(q, k, v, is_causal=True).attention_outputs
    want = flash_attention(q, k, v, is_causal=True, implementation="splash")
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(want, np.float32))
    with pytest.raises(UnsupportedError, match="'sinks' must be left out, but got a tensor. Use 'flash_attn2'"):
        impl(q, k, v, sinks=jnp.zeros(2))
