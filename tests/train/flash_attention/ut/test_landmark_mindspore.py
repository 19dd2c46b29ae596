"""Landmark attention in MindSpore: the properties of support/landmark.py, the Cell in both modes, training."""

import functools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore
from support.judge import check
from support.landmark import BEST, IRREGULAR, REGULAR, Landmark, MoreLandmark, dense, draws

from flash_attention.nn import FusedLandmarkAttention, fused_landmark_attention
from flash_attention.nn.layer.projection import Projection

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


class _Function(nn.Cell):
    def __init__(self, landmarks, options):
        super().__init__()
        self.landmarks, self.options = Tensor(landmarks), options

    def construct(self, q, k, v):
        return fused_landmark_attention(q, k, v, self.landmarks, **self.options)


class _WithPattern(nn.Cell):
    """The pattern is an input, which a graph cannot see."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def construct(self, q, k, v, landmarks):
        return fused_landmark_attention(q, k, v, landmarks, **self.options)


class _InMode:
    functions, mode = in_mindspore.FUNCTIONS, "pynative"
    exps = 2  # the softmax within a group, then that of the groups

    def judged(self, *args, **options):
        with in_mindspore.mode(self.mode):
            return in_mindspore.run(*args, **options)

    run = judged

    @staticmethod
    def call(landmarks, **options):
        return _Function(landmarks, options)


class TestPynative(_InMode, Landmark):
    pass


@pytest.mark.slow
class TestMoreInPynative(_InMode, MoreLandmark):
    pass


class _InGraph(_InMode):
    mode = "graph"


@pytest.mark.parametrize("case", [REGULAR, pytest.param(BEST, marks=pytest.mark.slow)], ids=lambda case: case.name)
def test_cell_in_a_graph(case):
    *tensors, d_out = draws(case)
    cell = FusedLandmarkAttention(block_size=case.block, top_k_blocks=case.top_k)
    out, grads = _InGraph().run(cell, tensors, d_out)
    got = dict(zip(("out", "query", "key", "value"), [out] + grads))
    check(got, functools.partial(dense, case=case), "float32", in_mindspore.FUNCTIONS, exps=2)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 2])
def test_unknown_pattern_in_a_graph(top_k):
    """The general path: any pattern, also with the best sections only."""
    case = IRREGULAR._replace(top_k=top_k)
    *tensors, d_out = draws(case)
    out, grads = _InGraph().run(_WithPattern(case.options()), tensors + [case.landmarks()], d_out)
    got = dict(zip(("out", "query", "key", "value"), [out] + grads))
    check(got, functools.partial(dense, case=case), "float32", in_mindspore.FUNCTIONS, exps=2)


@pytest.mark.parametrize("options, error, match", [
    ({"block_size": 1}, ValueError, "'block_size' must be an int >= 2"),
    ({"n_prefix_q": -1}, ValueError, "'n_prefix_q' must be an int >= 0"),
    ({"n_prefix_q": 16, "block_size": 8}, ValueError, "'n_prefix_q' must be 16 keys before the queries / block_size 8"),
    ({"top_k_blocks": 0.5}, TypeError, "'top_k_blocks' must be an int >= 1"),
])  # fmt: skip
def test_cell_refuses(options, error, match):
    q, k, v, _ = (Tensor(x.astype(np.float32)) for x in draws(REGULAR._replace(q_len=29)))
    with pytest.raises(error, match=match):
        FusedLandmarkAttention(**options)(q, k, v)
    assert FusedLandmarkAttention(2, 0.3, 8)(q, k, v).shape == q.shape


class _Layer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = Projection(16, 48), Projection(16, 16)
        self.attention = FusedLandmarkAttention(block_size=8)

    def construct(self, x):
        q, k, v = self.to_qkv(x).reshape((2, 33, 3, 2, 8)).transpose((2, 0, 3, 1, 4)).split(1, 0)
        out = self.attention(q.squeeze(0), k.squeeze(0), v.squeeze(0))
        return self.to_out(out.swapaxes(1, 2).reshape((2, 33, 16)))


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
def test_trains_saves_and_loads(mode, tmp_path):
    x, target = (Tensor(x.astype(np.float32)) for x in np.random.default_rng(3).standard_normal((2, 2, 33, 16)))
    cell = _Layer()
    with in_mindspore.mode(mode):
        in_mindspore.check_training(cell, x, target)
        in_mindspore.check_checkpoint(cell, _Layer(), x, tmp_path)


def test_half_precision():
    q, k, v, _ = (Tensor(x.astype(np.float16)) for x in draws(REGULAR))
    out = FusedLandmarkAttention(block_size=8)(q * 100, k, v)
    assert out.dtype == ms.float16 and np.isfinite(out.asnumpy()).all()
