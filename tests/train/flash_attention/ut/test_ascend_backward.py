"""The Ascend 910 backward kernel, whole, on the strict simulator, against the float64 reference."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from support.ascend import FEATURES, LOGITS, SOME_LOGITS, SOME_WINDOWS, WINDOWS, at_logit
from support.ascend_backward import (
    NAMES,
    assert_gradients_match,
    fp16_gradients,
    judge_backward_kernel,
    run_backward_kernel,
)
from support.selection import mostly_slow, unpacked
from support.unvisited import CALLS, poisoned

import tolerances
from conformance import Case, make_inputs, tagged
from flash_attention.ascend import simulated
from flash_attention.ascend.backward import build_backward
from flash_attention.ascend.backward_arguments import cotangent_exponent, pack_backward
from flash_attention.ascend.backward_budget import backward_buffers
from flash_attention.ascend.budget import Budget
from flash_attention.ascend.chips import ASCEND_310P, ASCEND_910A
from flash_attention.ascend.geometry import Geometry, KernelTiles
from flash_attention.ascend.limits import supports
from flash_attention.ascend.preprocess import build_preprocess
from flash_attention.ascend.preprocess_arguments import pack_preprocess, preprocess_signature
from flash_attention.ascend.simulator import SimulatorParams, Toolkit
from flash_attention.ascend.tiles import candidate_tiles, choose_tiles
from flash_attention.core import reference
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.core.tiling import strategy_names
from flash_attention.core.validation import Options, TensorInfo, make_spec

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def taken(*tags):
    """Cases of the shared list as fp16 calls with gradients, where the kernel takes them.

    'large' values are left out: their gradients of 3e8 do not fit fp16.
    """
    cases = {}
    for case in map(fp16_gradients, tagged(*tags)):
        if supports(case.spec) is None and case.values != "large":
            cases.setdefault(replace(case, name="", tags=()), case)
    return list(cases.values())


def check(case, tiles=None, **options):
    judge_backward_kernel(case, tiles, **options)


@pytest.mark.slow
@pytest.mark.parametrize("case", taken("ci"), ids=str)
def test_one_feature_at_a_time(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", taken("primary", "pairwise", "long"), ids=str)
def test_shared_grid(case):
    check(case)


# Small tiles make every way through the kernel short: several tiles and ragged ones on both sides, one and more pieces.
TILES = {"pieces": KernelTiles(64, 48, 1, 2), "one piece": KernelTiles(32, 80, 1, 2)}


@pytest.mark.parametrize("tiles", mostly_slow(TILES, fast=["pieces"]))
@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
def test_features_at_small_tiles(feature, tiles):
    check(fp16_gradients(feature), tiles)


HEADS = (16, 40, 64, 80, 128, 160, 256)


@pytest.mark.parametrize("head_dim", mostly_slow((1,) + HEADS, fast=(1, 40, 256)))
def test_head_sizes_and_tails(head_dim):
    check(Case(dtype="float16", lengths=(130, 77), head_dim=head_dim, heads=(1, 2, 1), band="causal"))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", (1,) + HEADS)
@pytest.mark.parametrize("lengths", ((33, 300), (300, 33), (257, 129)), ids=str)
def test_more_head_sizes_and_tails(head_dim, lengths):
    check(Case(dtype="float16", lengths=lengths, head_dim=head_dim, heads=(1, 2, 1), band="window"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", strategy_names())
def test_strategies(strategy):
    """Strategies choose other tiles for the same call; the result is right with each."""
    case = Case(dtype="float16", lengths=(200, 77), head_dim=40, heads=(1, 2, 2))
    check(case, choose_tiles(replace(make_inputs(case).spec, tiling=strategy), "backward"))


# --- judged by the reference alone ----------------------------------------------------------------
def plain(q_len=200, kv_len=200, head_dim=32, heads=(1, 4, 2), tiling="sparse", **options):
    """(spec, (query, key, value), (d_out, d_lse)) of a call outside the shared list."""
    spec = AttentionSpec(heads[0], heads[1], heads[2], q_len, kv_len, head_dim, "float16", tiling=tiling, **options)
    rng = np.random.default_rng(q_len)
    query, d_out = rng.standard_normal((2, heads[0], heads[1], q_len, head_dim)).astype(np.float16)
    key, value = rng.standard_normal((2, heads[0], heads[2], kv_len, head_dim)).astype(np.float16)
    d_lse = rng.standard_normal((heads[0], heads[1], q_len)).astype(np.float32)
    return spec, (query, key, value), (d_out, d_lse)


def gradients(spec, tensors, cotangents, operands=Operands(), **options):
    """Gradients by name, from the forward kernel's output and LSE."""
    out, lse = simulated.forward(spec, *tensors, operands)
    grads = simulated.backward(spec, tensors + (operands, out, lse), cotangents, **options)
    return {name: grad for name, grad in zip(NAMES, grads) if grad is not None}


def assert_near(got, spec, tensors, cotangents, operands=Operands(), rtol=8e-3):
    want = reference.attention_grad(spec, *tensors, operands, *cotangents)
    assert set(got) == set(want)
    for name in want:
        assert tolerances.error(got[name], want[name]) <= rtol * tolerances.largest(want[name]), name


@pytest.mark.parametrize("window", mostly_slow(WINDOWS, fast=SOME_WINDOWS))
def test_block_windows_around_the_block_count(window):
    """Five blocks of 32 tokens in tiles that do not line up with them; the first visited tile is rarely tile 0."""
    call = plain(150, 150, 16, (1, 1, 1), prev_block_num=window[0], next_block_num=window[1], block_size=32)
    assert_near(gradients(*call, tiles=KernelTiles(32, 48, 1, 1)), *call)


def test_negative_slopes_and_positive_bias_at_ragged_ends():
    """Scores of queries and keys that do not exist must not overflow, whatever is added to them."""
    call = plain(70, 90, 16, (1, 2, 2), alibi_shape=(2,), bias_shape=(1, 2, 1, 90))
    bias = np.full((1, 2, 1, 90), 30.0, np.float32)
    operands = Operands(slopes=np.float32([-0.5, -1.5]), bias=bias)
    assert_near(gradients(*call, operands, tiles=KernelTiles(64, 64, 1, 2)), *call, operands, rtol=2e-2)


def test_scale_of_the_other_sign():
    call = plain(70, 90, 16, (1, 1, 1), scale=-0.3)
    assert_near(gradients(*call), *call)


def test_close_scores_near_the_end_of_the_fp16_range():
    """Scores of 6e4 that differ by a few units, where fp16 steps by 32: the gradients are those of the differences."""
    spec, (query, key, value), cotangents = plain(scale=0.25)
    query, key = query.copy(), key.copy()
    query[..., 0], key[..., 0] = 480.0, 500.0
    call = spec, (query, key, value), cotangents
    got, want = gradients(*call), reference.attention_grad(spec, query, key, value, Operands(), *cotangents)
    for name in ("query", "key", "value"):
        assert tolerances.error(got[name], want[name]) <= 2e-2 * tolerances.largest(want[name]), name


@pytest.mark.parametrize("logit, scale", unpacked(mostly_slow(LOGITS, fast=SOME_LOGITS)))
def test_logits_up_to_the_range_of_fp16(logit, scale):
    """At the ends of the scales that are taken, of both signs, with lengths that end inside a tile."""
    spec, *tensors = at_logit(logit, scale)
    call = spec, tuple(tensors), plain(spec.q_len, spec.kv_len, spec.head_dim, (1, 1, 1))[2]
    assert_near(gradients(*call), *call, rtol=3e-2)


@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_products_beyond_the_range_of_fp16(dropout):
    """|dP - delta| beyond twice 65504 where the gradients themselves are in range."""
    spec, tensors, (d_out, d_lse) = plain(dropout_rate=dropout)
    operands = Operands(dropout_seed=np.uint32(5) if dropout else None)
    cotangents = (6e3 * d_out).astype(np.float16), 6e3 * d_lse
    value = np.repeat(tensors[2], 2, axis=1).astype(np.float64)
    d_probs = cotangents[0].astype(np.float64) @ value.swapaxes(-1, -2)
    assert np.abs(d_probs).max() > 2 * 65504
    got = gradients(spec, tensors, cotangents, operands)
    assert_near(got, spec, tensors, cotangents, operands)
    assert 2e3 < max(tolerances.largest(got[name]) for name in ("query", "key", "value")) < 65504


def test_division_of_cotangents_is_exact():
    """Gradients of cotangents 16 times as large are 16 times those gradients, bit for bit."""
    spec, tensors, (d_out, d_lse) = plain()
    d_out = (256.0 * d_out).astype(np.float16)
    exponents = [cotangent_exponent(spec, tensors[2], power * d_out, power * d_lse) for power in (1.0, 16.0)]
    assert exponents[1] == exponents[0] + 4 > 4
    ours = gradients(spec, tensors, (d_out, 256.0 * d_lse))
    other = gradients(spec, tensors, (16 * d_out, 4096.0 * d_lse))
    for name in ours:
        np.testing.assert_array_equal(16 * ours[name], other[name])


def test_small_cotangents_are_not_divided():
    assert cotangent_exponent(AttentionSpec(1, 1, 1, 8, 8, 64, "float16"), np.ones(8), np.ones(8), np.ones(8)) == 0
    assert cotangent_exponent(AttentionSpec(1, 1, 1, 8, 8, 64, "float16"), np.full(8, np.inf), np.zeros(0), []) == 0


def test_bias_gradient_has_the_dtype_of_the_bias():
    call = plain(32, 48, 16, (1, 2, 2), bias_shape=(1, 2, 32, 48))
    bias = np.ones((1, 2, 32, 48), np.float16)
    assert gradients(*call, Operands(bias=bias))["bias"].dtype == np.float16


# --- what must not matter -------------------------------------------------------------------------
def assert_same_bits(got, want):
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_same_bits_in_every_run_on_any_number_of_cores_in_any_order():
    call = plain(causal=True, dropout_rate=0.1)
    operands, tiles = Operands(dropout_seed=np.uint32(5)), KernelTiles(64, 48, 1, 2)
    first = gradients(*call, operands, tiles=tiles)
    assert_same_bits(gradients(*call, operands, tiles=tiles), first)
    assert_same_bits(gradients(*call, operands, tiles=tiles, chip=replace(ASCEND_910A, cores=1)), first)
    spec, tensors, cotangents = call
    saved = tensors + (operands,) + simulated.forward(spec, *tensors, operands)
    geometry = Geometry(spec, tiles)
    for seed in (None, 1):
        tik = Toolkit(SimulatorParams(core_order_seed=seed)).tik
        kernels = [build(tik, geometry, 7) for build in (build_preprocess, build_backward)]
        grads = simulated.run_backward(kernels, geometry, 7, saved, cotangents)
        assert_same_bits(dict(zip(NAMES, grads)), first)


def test_same_bits_on_310p():
    call = plain(causal=True, alibi_shape=(4,))
    operands, tiles = Operands(slopes=np.float32([0.5, 0.1, 0.2, 0.01])), KernelTiles(64, 64, 1, 4)
    ours, other = (gradients(*call, operands, tiles=tiles, chip=chip) for chip in (ASCEND_910A, ASCEND_310P))
    assert_same_bits(ours, other)


def test_gradients_of_grouped_heads_are_sums_over_the_group():
    spec, (query, key, value), cotangents = plain()
    grouped = gradients(spec, (query, key, value), cotangents)
    repeated = (query, np.repeat(key, 2, axis=1), np.repeat(value, 2, axis=1))
    single = gradients(replace(spec, kv_heads=4), repeated, cotangents)
    np.testing.assert_array_equal(grouped["query"], single["query"])
    for name in ("key", "value"):
        total = single[name].astype(np.float64).reshape(1, 2, 2, 200, 32).sum(axis=2)
        np.testing.assert_allclose(grouped[name], total, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("call", mostly_slow(CALLS, fast=["block window, ALiBi"]))
def test_unvisited_keys_are_not_read(call):
    (query, key, value, d_out), (bad_key, bad_value), hidden = poisoned(call)
    options = dict(call.options, layout="BNSD")
    seed, slopes = options.pop("dropout_seed", None), call.tensors.get("alibi_slopes")
    operands = Operands(slopes=slopes, dropout_seed=None if seed is None else np.uint32(seed))
    infos = Operands(*[None if x is None else TensorInfo(np.shape(x), str(x.dtype)) for x in operands])
    q_info, kv_info = (TensorInfo(x.shape, "float16") for x in (query, key))
    spec = make_spec("flash_attention", q_info, kv_info, kv_info, infos, Options(**options))
    half = [x.astype(np.float16) for x in (query, key, value, bad_key, bad_value, d_out)]
    cotangents = half[5], np.zeros(query.shape[:3], np.float32)
    clean = gradients(spec, tuple(half[:3]), cotangents, operands)
    dirty = gradients(spec, (half[0], half[3], half[4]), cotangents, operands)
    assert np.isnan(half[3][:, :, hidden]).all()
    assert_same_bits(dirty, clean)
    assert not clean["key"][:, :, hidden].any() and not clean["value"][:, :, hidden].any()
    assert clean["key"][:, :, ~hidden].any()


# --- sizes and refusals ---------------------------------------------------------------------------
@pytest.mark.slow
def test_1024_tokens_within_a_minute(figure):
    """Forward and backward of (1, 1, 1024, 128), built and run, right."""
    case = Case(dtype="float16", lengths=(1024, 1024), head_dim=128, heads=(1, 1, 1))
    start = time.time()
    got = run_backward_kernel(case)
    seconds = time.time() - start
    assert_gradients_match(case, got)
    figure("simulator, (1, 1, 1024, 128) forward and backward", seconds, 60, "s")


OPTIONS = {
    "dense": {},
    "causal, ALiBi": {"causal": True, "alibi_shape": (2,)},
    "window, dropout": {"prev_block_num": 8, "next_block_num": 8},
}


@pytest.mark.parametrize("options", mostly_slow(OPTIONS, fast=["causal, ALiBi"]))
def test_128k_tokens_are_built(options):
    """Built strictly (budgets, strides, IR size), not run; the kernel does not grow with the length."""
    specs = [AttentionSpec(1, 2, 2, length, length, 128, "float16", **options) for length in (8192, 131072)]
    assert all(supports(spec) is None for spec in specs)
    kernels = [build_backward(Toolkit().tik, Geometry(spec, choose_tiles(spec, "backward")), 32) for spec in specs]
    small, large = (kernel.report["ir"] for kernel in kernels)
    assert large < 4000 and large < 1.2 * small
    assert kernels[1].report["peak"]["UB"] <= 240 * 1024


@pytest.mark.parametrize("head_dim", HEADS)
def test_tiles_fit_with_every_option(head_dim):
    """The tiles that are chosen fit, and plain ones are as large as L0C allows."""
    everything = {"bias_shape": (1, 1, 1, 4096), "alibi_shape": (8,), "mask_shape": (1, 1, 4096, 4096),
                  "dropout_rate": 0.1}  # fmt: skip
    for options in ({}, everything):
        spec = AttentionSpec(1, 8, 8, 4096, 4096, head_dim, "float16", **options)
        tiles = candidate_tiles(spec, "backward")
        assert all(Budget(backward_buffers(Geometry(spec, one))).fits for one in tiles)
        if not options:
            assert (tiles[0].q, tiles[0].kv) == (128, 128 if head_dim <= 128 else 64)


def test_what_the_kernel_does_not_take_is_refused_before_it_is_built():
    spec, tensors, cotangents = plain()
    saved = tensors + (Operands(), tensors[0], cotangents[1])
    with pytest.raises(UnsupportedError, match="'sinks' must be None"):
        simulated.backward(replace(spec, sinks=True), saved, cotangents)
    with pytest.raises(UnsupportedError, match="'scale' must be of a magnitude between"):
        simulated.backward(replace(spec, scale=1e-6), saved, cotangents)


def test_tensors_of_another_kernel_are_refused():
    spec, tensors, (d_out, d_lse) = plain()
    geometry = Geometry(spec, choose_tiles(spec, "backward"))
    with pytest.raises(RuntimeError, match="are not the kernel's arguments"):
        pack_preprocess(geometry, 2, d_out[:, :, :100], d_lse, d_out, d_lse)
    query, key, value = tensors
    prepared = [np.zeros(argument.shape, argument.dtype) for argument in preprocess_signature(geometry, 2)[1]]
    pack_backward(geometry, 2, query, key, value, Operands(), d_out, prepared, 1.0)
    with pytest.raises(RuntimeError, match="are not the kernel's arguments"):
        pack_backward(geometry, 2, query, key[:, :, :100], value, Operands(), d_out, prepared, 1.0)


@pytest.mark.slow
def test_every_head_size_up_to_the_limit():
    for head_dim, band in itertools.product(range(1, 257, 5), ("dense", "causal")):
        check(Case(dtype="float16", lengths=(50, 70), head_dim=head_dim, heads=(1, 1, 1), band=band))
