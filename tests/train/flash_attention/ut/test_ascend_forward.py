"""The Ascend 910 forward kernel, whole, on the strict simulator, against the float64 reference."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from support.ascend import (
    FEATURES,
    LOGITS,
    SOME_LOGITS,
    SOME_WINDOWS,
    WINDOWS,
    assert_kernel_matches,
    at_logit,
    fp16_case,
    run_kernel,
)
from support.selection import mostly_slow, unpacked
from support.unvisited import CALLS, poisoned

import tolerances
from conformance import Case, make_inputs, random_cases, run_naive, run_reference, tagged
from flash_attention.ascend import host, simulated
from flash_attention.ascend.chips import ASCEND_310P, ASCEND_910A
from flash_attention.ascend.forward import build_forward
from flash_attention.ascend.geometry import Geometry, KernelTiles
from flash_attention.ascend.limits import supports
from flash_attention.ascend.simulator import Toolkit
from flash_attention.ascend.tiles import choose_tiles
from flash_attention.core import reference
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.core.tiling import strategy_names
from flash_attention.core.validation import Options, TensorInfo, make_spec

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def taken(*tags):
    """Cases of the shared list as fp16 forward calls, where the kernel takes them."""
    cases = {}
    for case in map(fp16_case, tagged(*tags)):
        if supports(case.spec) is None:
            cases.setdefault(replace(case, name="", tags=()), case)
    return list(cases.values())


def check(case, tiles=None, **options):
    assert_kernel_matches(case, run_kernel(case, tiles, **options))


@pytest.mark.slow
@pytest.mark.parametrize("case", taken("ci"), ids=str)
def test_one_feature_at_a_time(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", taken("primary", "pairwise", "long"), ids=str)
def test_shared_grid(case):
    check(case)


@pytest.mark.slow
def test_random_calls():
    """100 calls of any sizes and options, drawn by hypothesis; what the kernel does not take is left out."""
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.seed(910)
    @hypothesis.settings(max_examples=100, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(random_cases().map(fp16_case).filter(lambda case: supports(case.spec) is None))
    def run(case):
        check(case)

    run()


# Small tiles make every way through the kernel short: several tiles and ragged ones on both sides, tasks with one tile
# too few, pieces, trees of maxima that end in an odd number.
TILES = {
    "resident": KernelTiles(32, 48, 2, 2),
    "pieces": KernelTiles(64, 32, 1, 2),
    "odd": KernelTiles(48, 80, 2, 3),
}


# Every feature and every kind of tiles in the fast suite, all pairs in the slow one.
PAIRS = {"{}, {}".format(*names): (FEATURES[names[0]], TILES[names[1]]) for names in itertools.product(FEATURES, TILES)}
IN_TURN = ["{}, {}".format(*names) for names in zip(FEATURES, itertools.cycle(TILES))]


@pytest.mark.parametrize("feature, tiles", unpacked(mostly_slow(PAIRS, IN_TURN)))
def test_features_at_small_tiles(feature, tiles):
    check(fp16_case(feature), tiles)


@pytest.mark.parametrize("head_dim", mostly_slow((1, 16, 40, 64, 80, 128, 160, 256), fast=(1, 40, 256)))
@pytest.mark.parametrize("lengths", mostly_slow(((130, 77), (33, 300)), fast=[(130, 77)]))
def test_head_sizes_and_tails(head_dim, lengths):
    case = Case(dtype="float16", lengths=lengths, head_dim=head_dim, heads=(1, 2, 1), gradients=False, band="causal")
    check(case)


@pytest.mark.parametrize("head_dim", mostly_slow((64, 128, 256), fast=[128]))
def test_two_resident_tiles_of_the_size_a_device_gets(head_dim):
    """Lengths of a few tiles with the tiles of a large call: the ones whose cycles are reported."""
    tiles = choose_tiles(AttentionSpec(4, 8, 8, 4096, 4096, head_dim, "float16", causal=True))
    assert tiles.resident == 2
    case = Case(dtype="float16", lengths=(300, 420), head_dim=head_dim, heads=(1, 1, 1), gradients=False, band="causal")
    check(case, tiles)


@pytest.mark.parametrize("strategy", strategy_names())
def test_strategies(strategy):
    """Strategies choose other tiles for the same call; the result is right with each."""
    case = Case(dtype="float16", lengths=(200, 77), head_dim=40, heads=(1, 2, 2), gradients=False)
    spec = replace(make_inputs(case).spec, tiling=strategy)
    check(case, choose_tiles(spec))


@pytest.mark.parametrize("window", mostly_slow(WINDOWS, fast=SOME_WINDOWS))
def test_block_windows_around_the_block_count(window):
    """Five blocks of 32 tokens in tiles that do not line up with them; the first visited tile is rarely tile 0."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, 1, 150, 16)).astype(np.float16)
    spec = AttentionSpec(1, 1, 1, 150, 150, 16, "float16", prev_block_num=window[0], next_block_num=window[1],
                         block_size=32)  # fmt: skip
    out, lse = simulated.forward(spec, query, key, value, tiles=KernelTiles(32, 48, 2, 2))
    block = np.arange(150) // 32
    hidden = (block[None, :] < block[:, None] - window[0]) | (block[None, :] > block[:, None] + window[1])
    scores = np.where(hidden, -np.inf, query[0, 0].astype(np.float64) @ key[0, 0].astype(np.float64).T / 4.0)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    total = weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[0, 0], weights / total @ value[0, 0].astype(np.float64), atol=2e-3)
    np.testing.assert_allclose(lse[0, 0], (scores.max(axis=1, keepdims=True) + np.log(total))[:, 0], atol=1e-3)


# --- what must not matter -------------------------------------------------------------------------
def plain(q_len=200, kv_len=200, head_dim=32, heads=(1, 4, 2), tiling="sparse", **options):
    spec = AttentionSpec(heads[0], heads[1], heads[2], q_len, kv_len, head_dim, "float16", tiling=tiling, **options)
    rng = np.random.default_rng(q_len)
    query = rng.standard_normal((heads[0], heads[1], q_len, head_dim)).astype(np.float16)
    key, value = rng.standard_normal((2, heads[0], heads[2], kv_len, head_dim)).astype(np.float16)
    return spec, query, key, value


def test_number_of_cores_changes_no_bit():
    spec, *tensors = plain(causal=True)
    tiles = KernelTiles(32, 48, 2, 1)
    results = [simulated.forward(spec, *tensors, tiles=tiles, chip=replace(ASCEND_910A, cores=n)) for n in (1, 3, 32)]
    for other in results[1:]:
        np.testing.assert_array_equal(other[0], results[0][0])
        np.testing.assert_array_equal(other[1], results[0][1])


def test_same_bits_on_310p():
    spec, *tensors = plain(causal=True, alibi_shape=(4,))
    operands = Operands(slopes=np.float32([0.5, 0.1, 0.2, 0.01]))
    tiles = KernelTiles(64, 64, 1, 4)
    ours, other = (simulated.forward(spec, *tensors, operands, tiles, chip) for chip in (ASCEND_910A, ASCEND_310P))
    np.testing.assert_array_equal(ours[0], other[0])
    np.testing.assert_array_equal(ours[1], other[1])


def test_grouped_heads_are_repeated_heads():
    spec, query, key, value = plain()
    grouped = simulated.forward(spec, query, key, value)
    key, value = np.repeat(key, 2, axis=1), np.repeat(value, 2, axis=1)
    repeated = simulated.forward(replace(spec, kv_heads=4), query, key, value)
    np.testing.assert_array_equal(grouped[0], repeated[0])


def test_inference_build_writes_the_same_output_and_nothing_else():
    spec, *tensors = plain(causal=True)
    geometry = Geometry(spec, choose_tiles(spec))
    kernel = build_forward(Toolkit().tik, geometry, 2, with_lse=False)
    feed = host.pack_forward(geometry, 2, *tensors, Operands())
    out, lse = host.unpack_forward(geometry, host.run(kernel, feed))
    assert lse is None
    np.testing.assert_array_equal(out, simulated.forward(spec, *tensors)[0])


@pytest.mark.parametrize("call", mostly_slow(CALLS, fast=["block window, ALiBi"]))
def test_unvisited_keys_are_not_read(call):
    (query, key, value, _), (bad_key, bad_value), hidden = poisoned(call)
    options = dict(call.options, layout="BNSD")
    seed, slopes = options.pop("dropout_seed", None), call.tensors.get("alibi_slopes")
    operands = Operands(slopes=slopes, dropout_seed=None if seed is None else np.uint32(seed))
    infos = Operands(*[None if x is None else TensorInfo(np.shape(x), str(x.dtype)) for x in operands])
    q_info, kv_info = (TensorInfo(x.shape, "float16") for x in (query, key))
    spec = make_spec("flash_attention", q_info, kv_info, kv_info, infos, Options(**options))
    half = [x.astype(np.float16) for x in (query, key, value, bad_key, bad_value)]
    clean = simulated.forward(spec, half[0], half[1], half[2], operands)
    dirty = simulated.forward(spec, half[0], half[3], half[4], operands)
    assert np.isnan(half[3][:, :, hidden]).all() and np.isfinite(clean[0]).all()
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])


# --- precision ------------------------------------------------------------------------------------
PRECISION = {
    "normal": {},
    "D 128": {"head_dim": 128},
    "long rows": {"lengths": (64, 1500), "heads": (1, 1, 1)},
    "large scores": {"logits": "scale", "head_dim": 128},
    "large inputs": {"values": "large", "head_dim": 64},
    "products near 6e4": {"values": "extreme", "head_dim": 64},
}


def with_fp16_maxima(spec, query, key, value):
    """The same formula with the scores, their maximum and the difference in fp16, the rest as in the kernel."""
    query, key, value = (np.asarray(x, np.float32) for x in (query, key, value))
    key, value = (np.repeat(x, spec.group, axis=1) for x in (key, value))
    scores = (np.matmul(query, key.swapaxes(-1, -2)) * np.float32(spec.scale)).astype(np.float16)
    difference = scores - scores.max(axis=-1, keepdims=True)
    probs = np.exp(difference.astype(np.float32)).astype(np.float16).astype(np.float32)
    return (np.matmul(probs, value) / probs.sum(axis=-1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("name", mostly_slow(list(PRECISION), fast=["normal", "large scores", "products near 6e4"]))
def test_error_is_at_most_twice_the_naive_one(name):
    case = Case(dtype="float16", gradients=False, **PRECISION[name])
    want, naive = run_reference(case)["out"], run_naive(case)[0]["out"]
    error = tolerances.error(run_kernel(case)["out"], want)
    assert error <= 2.0 * tolerances.error(naive, want)
    if name != "products near 6e4":  # there one key takes all, and what is left is the rounding of the output
        inputs = make_inputs(case)
        assert error < tolerances.error(with_fp16_maxima(inputs.spec, *inputs[1:4]), want)


def test_lse_of_fp16_probabilities(figure):
    """The row sums are those of the rounded probabilities that multiply V; what that costs the LSE."""
    errors = []
    for lengths in ((200, 200), (64, 1500)):
        spec, *tensors = plain(*lengths, causal=True)
        want = reference.attention(np, spec, *(x.astype(np.float64) for x in tensors))[1]
        errors.append(tolerances.error(simulated.forward(spec, *tensors)[1], want))
    figure("forward, LSE off the exact one", max(errors), 3e-4)


def test_close_scores_near_the_end_of_the_fp16_range():
    """Scores of 6e4 that differ by a few units, where fp16 steps by 32: as exact as products in fp32 allow."""
    spec, query, key, value = plain(scale=0.25)
    query[..., 0], key[..., 0] = 480.0, 500.0
    want, want_lse = reference.attention(np, spec, *(x.astype(np.float64) for x in (query, key, value)))
    single, _ = reference.attention(np, spec, *(x.astype(np.float32) for x in (query, key, value)))
    assert np.abs(want_lse).min() > 5.9e4
    out, lse = simulated.forward(spec, query, key, value)
    error = tolerances.error(out, want)
    assert error <= 2.0 * max(tolerances.error(single, want), 2.0**-10 * tolerances.largest(want))
    assert 10.0 * error < tolerances.error(with_fp16_maxima(spec, query, key, value), want)
    np.testing.assert_allclose(lse, want_lse, rtol=5e-7)


@pytest.mark.parametrize("logit, scale", unpacked(mostly_slow(LOGITS, fast=SOME_LOGITS)))
def test_logits_up_to_the_range_of_fp16(logit, scale):
    """At the ends of the scales that are taken, of both signs, with lengths that end inside a tile."""
    call = at_logit(logit, scale)
    want, want_lse = reference.attention(np, call[0], *(x.astype(np.float64) for x in call[1:]))
    out, lse = simulated.forward(*call)
    assert np.abs(want_lse).min() > 5.9e4
    assert tolerances.error(out, want) <= 2e-2 * tolerances.largest(want)  # products of 6e7 step by 4 in fp32
    np.testing.assert_allclose(lse, want_lse, rtol=5e-7)


# --- sizes and refusals ---------------------------------------------------------------------------
OPTIONS = {"dense": {}, "causal, ALiBi": {"causal": True, "alibi_shape": (2,)}}


@pytest.mark.parametrize("options", mostly_slow(OPTIONS, fast=["causal, ALiBi"]))
def test_128k_tokens_are_built(options):
    """Built strictly (budgets, strides, IR size), not run; the kernel does not grow with the length."""
    specs = [AttentionSpec(1, 2, 2, length, length, 128, "float16", **options) for length in (8192, 131072)]
    assert all(supports(spec) is None for spec in specs)
    kernels = [build_forward(Toolkit().tik, Geometry(spec, choose_tiles(spec)), 32) for spec in specs]
    small, large = (kernel.report["ir"] for kernel in kernels)
    assert large < 2000 and large < 1.2 * small
    assert kernels[1].report["peak"]["UB"] <= 240 * 1024


def test_what_the_kernel_does_not_take_is_refused_before_it_is_built():
    spec, *tensors = plain()
    with pytest.raises(UnsupportedError, match="'sinks' must be None"):
        simulated.forward(replace(spec, sinks=True), *tensors)


def test_tensors_of_another_kernel_are_refused():
    spec, *tensors = plain()
    geometry = Geometry(spec, choose_tiles(spec))
    with pytest.raises(RuntimeError, match="are not the kernel's arguments"):
        host.pack_forward(geometry, 2, tensors[0][:, :, :100], *tensors[1:], Operands())


@pytest.mark.slow
def test_every_head_size_up_to_the_limit():
    for head_dim, causal in itertools.product(range(1, 257, 5), (False, True)):
        band = "causal" if causal else "dense"
        check(Case(dtype="float16", lengths=(50, 70), head_dim=head_dim, heads=(1, 1, 1), gradients=False, band=band))
