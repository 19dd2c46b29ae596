"""Engine 'simulator': gradients by the Ascend 910 backward kernel inside MindSpore on the CPU, in both modes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from support.ascend_backward import assert_gradients_match, fp16_gradients
from support.mindspore_engines import MindSporeEngine
from support.selection import mostly_slow

from conformance import tagged
from flash_attention.ascend import simulated
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.nn.layer.flash_attention import FlashAttention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
NAMES = ("mask with dead rows", "ALiBi", "bias a key", "LSE cotangent", "one kv head")
CASES = {case.name: fp16_gradients(case) for case in tagged("ci") if case.name in NAMES}


@pytest.mark.parametrize("case", mostly_slow(CASES, fast=["ALiBi"]))
def test_functional_call(case, mode):
    got = MindSporeEngine("simulator", ms.get_context("mode")).run(case)
    got.pop("out")
    assert_gradients_match(case, got)


def test_gradients_of_the_cell_are_the_very_kernel_s(mode):
    """Bit for bit what the numpy entry gives; the Cell's own strategy decides the tiles."""
    rng = np.random.default_rng(0)
    query, key, value, d_out = rng.standard_normal((4, 1, 2, 130, 40)).astype(np.float16)
    cell = FlashAttention(40, 0.0, 1, 0, "wukong", causal=True, engine="simulator")

    def weighted(query, key, value):
        return (cell(query, key, value) * Tensor(d_out)).sum()

    got = ops.grad(weighted, (0, 1, 2))(*map(Tensor, (query, key, value)))
    options = dict(causal=True, prev_block_num=1, next_block_num=0, block_size=64, tiling="wukong")
    spec = AttentionSpec(1, 2, 2, 130, 130, 40, "float16", **options)
    saved = (query, key, value, Operands()) + simulated.forward(spec, query, key, value)
    want = simulated.backward(spec, saved, (d_out, np.zeros((1, 2, 130), np.float32)))
    for one, other in zip(got, want):
        np.testing.assert_array_equal(one.asnumpy(), other)
