"""The kernel in front of the backward kernel, on the strict simulator: delta and the extra columns, against float64."""

import numpy as np
import pytest
from support.selection import mostly_slow

from flash_attention.ascend import backward_arguments as arguments
from flash_attention.ascend import cost, host
from flash_attention.ascend.backward_operands import ONE
from flash_attention.ascend.budget import Budget
from flash_attention.ascend.geometry import SCALE_RANGE, Geometry, KernelTiles
from flash_attention.ascend.preprocess import build_preprocess
from flash_attention.ascend.preprocess_arguments import pack_preprocess, preprocess_buffers, row_statistics
from flash_attention.ascend.simulator import SimulatorParams, Toolkit
from flash_attention.ascend.tiles import choose_tiles
from flash_attention.core.spec import AttentionSpec

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
UNITS = [arguments.COARSE, 1.0, 1.0]


def geometry(q_len=70, tile=64, head_dim=32, heads=2, **options):
    spec = AttentionSpec(1, heads, 1, q_len, 90, head_dim, "float16", **options)
    return Geometry(spec, KernelTiles(tile, 48, 1, tile // 16))


def draw(shape):
    """out, lse, d_out, d_lse of a call."""
    rng, spec = np.random.default_rng(shape.spec.q_len), shape.spec
    size = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
    out, d_out = rng.standard_normal((2,) + size).astype(np.float16)
    lse, d_lse = (100 * rng.standard_normal((2,) + size[:3])).astype(np.float32)
    return out, lse, d_out, d_lse


def prepared(shape, out, lse, d_out, d_lse, cores=2):
    """(query_columns, minus_delta) of the kernel."""
    kernel = build_preprocess(Toolkit(SimulatorParams(core_order_seed=cores)).tik, shape, cores)
    return host.run(kernel, pack_preprocess(shape, cores, out, lse, d_out, d_lse))


CALLS = {
    "ragged": dict(),
    "no whole piece": dict(q_len=5, tile=16),
    "queries beyond the last piece": dict(q_len=20, tile=128, head_dim=16),
    "pieces of one group": dict(q_len=100, tile=112, head_dim=40),
    "whole tiles": dict(q_len=128, tile=128, head_dim=16, heads=3),
    "head size 256": dict(q_len=64, head_dim=256, heads=1),
    "dropout": dict(dropout_rate=0.3),
    "negative scale": dict(scale=-0.2),
}
FAST = ["ragged", "queries beyond the last piece", "pieces of one group", "dropout"]


@pytest.mark.parametrize("name", mostly_slow(list(CALLS), fast=FAST))
def test_columns_add_up_to_the_statistics(name):
    shape = geometry(**CALLS[name])
    spec, queries = shape.spec, shape.q_tiles * shape.tiles.q
    out, lse, d_out, d_lse = draw(shape)
    columns, minus_delta = prepared(shape, out, lse, d_out, d_lse)
    assert columns.shape == (1, spec.heads, 2, queries, 16)

    shifted = lse - arguments.probability_exponent(shape) * np.log(2.0)
    delta = (d_out.astype(np.float64) * out).sum(-1) - d_lse
    totals = columns[..., :3].astype(np.float64) @ UNITS
    kept = 1.0 - spec.dropout_rate
    np.testing.assert_allclose(totals[:, :, 0, : spec.q_len], -shifted / spec.scale, rtol=2e-6)
    np.testing.assert_allclose(totals[:, :, 1, : spec.q_len], -kept * delta, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(minus_delta[..., : spec.q_len], -kept * delta, rtol=1e-3, atol=1e-4)
    assert (totals[:, :, 0, spec.q_len :] * spec.scale < -(2.0**21)).all()  # far beyond what fp16 exponents resolve
    assert not totals[:, :, 1, spec.q_len :].any() and not minus_delta[..., spec.q_len :].any()

    constant = np.zeros((2, 16))
    constant[0, arguments.HIDING], constant[0, ONE] = arguments.COARSE, 1.0
    np.testing.assert_array_equal(columns[..., 3:], np.broadcast_to(constant[:, None, 3:], columns[..., 3:].shape))


def test_products_of_the_columns_subtract_the_statistics():
    """(q')(k')^T is minus the statistic where query and key exist, and hides all else."""
    shape = geometry()
    tensors = draw(shape)
    queries = prepared(shape, *tensors)[0].astype(np.float64)
    products = queries @ arguments.pack_key_columns(shape).astype(np.float64).T
    assert products.shape == (1, 2, 2, 128, 96)
    want = row_statistics(shape, tensors[1], tensors[3])[:, :, 0, :70, None]
    np.testing.assert_allclose(products[:, :, 0, :70, :90], np.broadcast_to(want, (1, 2, 70, 90)), rtol=1e-6)
    hidden = np.ones((128, 96), bool)
    hidden[:70, :90] = False
    assert (products[:, :, 0][..., hidden] < -1e7).all()
    assert not products[:, :, 1][..., hidden].any()


@pytest.mark.parametrize("size", (1e-3, 1.0, 100.0, 6e4, 1e6, 1.6e7))
def test_parts_resolve_fp32(size):
    shape = geometry(scale=1.0)
    out, lse, d_out, d_lse = draw(shape)
    lse *= size / 100
    totals = prepared(shape, out, lse, d_out, d_lse)[0][..., :3].astype(np.float64) @ UNITS
    want = row_statistics(shape, lse, d_lse)[:, :, 0, :70]
    np.testing.assert_allclose(totals[:, :, 0, :70], want, rtol=2.0**-24, atol=2.0**-24)


def test_parts_saturate():
    """Beyond a logit of 65504 at the smallest scale."""
    shape = geometry(scale=SCALE_RANGE[0])
    out, lse, d_out, d_lse = draw(shape)
    totals = prepared(shape, out, np.full_like(lse, -1e9), d_out, d_lse)[0][..., :3].astype(np.float64) @ UNITS
    assert (65504.0 / SCALE_RANGE[0] < totals[:, :, 0, :70]).all() and np.isfinite(totals).all()


def test_queries_that_see_no_key_have_no_statistics():
    shape = geometry()
    out, lse, d_out, d_lse = draw(shape)
    out[:, :, 3], lse[:, :, 3], d_lse[:, :, 3] = 0.0, -np.inf, np.nan
    columns, minus_delta = prepared(shape, out, lse, d_out, d_lse)
    assert not columns[:, :, :, 3, :3].any() and not minus_delta[:, :, 3].any()


def test_same_bits_on_any_number_of_cores():
    shape = geometry(q_len=200)
    tensors = draw(shape)
    first = prepared(shape, *tensors, cores=1)
    for cores in (3, 32):
        for got, want in zip(prepared(shape, *tensors, cores=cores), first):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("head_dim", (16, 128, 256))
def test_buffers_fit(head_dim):
    for tile in range(16, 272, 16):
        assert Budget(preprocess_buffers(geometry(512, tile, head_dim))).fits


def test_predicted_time(figure):
    """Bound by memory: O and dO are read, their columns written, once."""
    call = AttentionSpec(4, 8, 8, 4096, 4096, 128, "float16")
    got, backward = cost.predict(call, "preprocess"), cost.predict(call, "backward")
    figure("predicted, preprocess (4,8,4096,128), of the backward kernel's time", 100 * got.seconds / backward.seconds,
           2, "%")  # fmt: skip
    assert got.bound == "MTE2"
    assert 2 * 4096 * 128 * 32 * 2 <= got.gm_bytes <= 1.2 * 2 * 4096 * 128 * 32 * 2


def test_128k_tokens_are_built():
    """Gaps between column groups beyond what one move takes; the program does not grow with the length."""
    spec = AttentionSpec(1, 2, 2, 131072, 131072, 128, "float16")
    kernel = build_preprocess(Toolkit().tik, Geometry(spec, choose_tiles(spec, "backward")), 32)
    assert kernel.report["ir"] < 500
