"""Sampling in MindSpore: the draws of support/sampling.py, in both modes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore
from support.sampling import LOGITS, Sampled

from flash_attention.core import sampling
from flash_attention.ops.sampling import sample

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


class _Cell(nn.Cell):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def construct(self, logits, seed, position):
        return sample(logits, seed, position, **self.options)


class _InMode(Sampled):
    mode = "pynative"

    def sample(self, logits, seed, position, **options):
        seed, position = (Tensor(np.asarray(x, np.uint32)) for x in (seed, position))
        with in_mindspore.mode(self.mode):
            return _Cell(options)(Tensor(logits), seed, position).asnumpy()


class TestPynative(_InMode):
    pass


class InGraph(_InMode):
    mode = "graph"


def test_graph():
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
    want = sampling.sample(np, LOGITS, np.uint32(7), np.uint32(3), sampling.Sampling(**options))
    np.testing.assert_array_equal(InGraph().sample(LOGITS, 7, 3, **options), want)
    with pytest.raises(ValueError, match="'top_k' must be an int >= 1, but got 0"):
        InGraph().sample(LOGITS, 7, 3, top_k=0)


def test_ints_as_seeds():
    logits = Tensor(np.random.default_rng(1).standard_normal((4, 9)).astype(np.float32))
    np.testing.assert_array_equal(
        sample(logits, 3, 1).asnumpy(), sample(logits, Tensor(3, ms.uint32), Tensor(1, ms.uint32)).asnumpy()
    )
