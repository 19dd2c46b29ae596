"""Engine 'simulator': the Ascend 910 kernel inside MindSpore on the CPU, in both modes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.ascend import assert_kernel_matches, fp16_case
from support.mindspore_engines import MindSporeEngine
from support.selection import mostly_slow

from conformance import tagged
from flash_attention.ascend import limits, simulated
from flash_attention.core.spec import AttentionSpec
from flash_attention.nn.layer.flash_attention import FlashAttention
from flash_attention.ops import ENGINES, tik

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
NAMES = ("mask with dead rows", "ALiBi", "dropout", "one kv head", "compact mask")
CASES = {case.name: fp16_case(case) for case in tagged("ci") if case.name in NAMES}


@pytest.mark.parametrize("case", mostly_slow(CASES, fast=["mask with dead rows", "dropout"]))
def test_functional_call(case, mode):
    assert_kernel_matches(case, MindSporeEngine("simulator", ms.get_context("mode")).run(case))


def test_cell_runs_the_very_kernel(mode):
    """Bit for bit what the numpy entry gives; the Cell's own strategy decides the tiles."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, 2, 130, 40)).astype(np.float16)
    cell = FlashAttention(40, 0.0, 1, 0, "wukong", causal=True, engine="simulator", return_lse=True)
    out, lse = cell(*map(Tensor, (query, key, value)))
    options = dict(causal=True, prev_block_num=1, next_block_num=0, block_size=64, tiling="wukong")
    spec = AttentionSpec(1, 2, 2, 130, 130, 40, "float16", **options)
    want = simulated.forward(spec, query, key, value)
    np.testing.assert_array_equal(out.asnumpy(), want[0])
    np.testing.assert_array_equal(lse.asnumpy(), want[1])


def test_only_by_name_and_with_the_limits_of_the_kernels(monkeypatch):
    assert ENGINES["simulator"].order is None
    monkeypatch.setattr(tik.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tik, "_kernels", [lambda *args: None])
    for options in ({}, {"dtype": "float32"}, {"head_dim": 300}, {"sinks": True}, {"segments": True}):
        spec = AttentionSpec(**dict(dict(batch=1, heads=1, kv_heads=1, q_len=64, kv_len=64, head_dim=64,
                                         dtype="float16"), **options))  # fmt: skip
        assert ENGINES["simulator"].supports(spec) == limits.supports(spec) == ENGINES["tik"].supports(spec)
        assert (limits.supports(spec) is None) == (not options)
