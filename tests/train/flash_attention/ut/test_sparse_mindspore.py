"""Dynamic sparse attention in MindSpore: the properties of support/sparse.py in both modes, training, skipped work."""

from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore
from support.sparse import HASH, ONE_HEAD, QK, MoreSparse, Sparse, draws

import flash_attention.nn as public
from flash_attention.nn import DynamicSparseAttention, hash_sparse_attention
from flash_attention.nn.layer import sparse_windows
from flash_attention.nn.layer.projection import Projection

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


class _Function(nn.Cell):
    def __init__(self, name, options):
        super().__init__()
        self.function, self.options = getattr(public, name), options

    def construct(self, *tensors):
        return self.function(*tensors, **self.options)


class _InMode:
    functions, mode, narrow = in_mindspore.FUNCTIONS, "pynative", False

    def judged(self, *args, **options):
        with in_mindspore.mode(self.mode):
            return in_mindspore.run(*args, **options)

    run = judged

    @staticmethod
    def call(name, **options):
        return _Function(name, dict(options, engine="portable"))

    def value(self, name, *arrays, **options):
        arrays = [Tensor(x.astype(np.float32) if x.dtype == np.float64 else x) if isinstance(x, np.ndarray) else x
                  for x in arrays]  # fmt: skip
        with in_mindspore.mode(self.mode):
            results = getattr(public, name)(*arrays, **options)
        if isinstance(results, Tensor):
            return results.asnumpy()
        return tuple(None if x is None else x.asnumpy() for x in results)


class TestPynative(_InMode, Sparse):
    pass


@pytest.mark.slow
class TestMoreInPynative(_InMode, MoreSparse):
    pass


class InGraph(_InMode, Sparse, MoreSparse):
    mode = "graph"


@pytest.mark.parametrize("case", [HASH, pytest.param(QK, marks=pytest.mark.slow)], ids=lambda case: case.mode)
def test_graph(case):
    InGraph().check_case(case)


@pytest.mark.slow
def test_graph_one_head_and_nan():
    InGraph().check_case(ONE_HEAD)
    InGraph().check_never_read(HASH)
    InGraph().check_never_read(QK)


@pytest.mark.slow
def test_graph_with_bounds():
    """Static bounds that suffice change nothing; in a graph they are what skips work."""
    q, k, v, d_out, q_idx, k_idx = draws(HASH._replace(q_len=700, kv_len=700, share=3))
    call = InGraph.call("hash_sparse_attention", max_keys=512)
    want, want_grads = TestPynative().run(InGraph.call("hash_sparse_attention"), [q, k, v, q_idx, k_idx], d_out)
    out, grads = InGraph().run(call, [q, k, v, q_idx, k_idx], d_out)
    for got, expected in zip([out] + grads, [want] + want_grads):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    InGraph().test_float_flags_and_buffers()


def test_graph_refuses():
    q, k, v, _, q_idx, k_idx = draws(HASH)
    with pytest.raises(TypeError, match="'q_keep' must be of float or bool dtype, but got int32"):
        InGraph().attend(QK, [q, k, v, q_idx, k_idx])


@pytest.mark.parametrize("options, error, match", [
    ({"sparsity_mode": "both"}, KeyError, "'sparsity_mode' must be one of"),
    ({"sparsity_mode": "qk", "max_keys": 8}, ValueError, "'max_keys' must be None unless sparsity_mode is 'hash'"),
    ({"sm_scale": "1"}, TypeError, "'sm_scale' must be None or a finite float"),
    ({"engine": "none"}, ValueError, "'engine' must be"),
])  # fmt: skip
def test_cell_refuses(options, error, match):
    with pytest.raises(error, match=match):
        DynamicSparseAttention(**options)


def test_small_window_is_refused():
    q, k, v, _, q_idx, k_idx = draws(HASH)
    with pytest.raises(ValueError, match="'max_keys' must be at least [0-9]+, the keys that [0-9]+ queries span"):
        TestPynative().value("hash_sparse_attention", q, k, v, q_idx, k_idx, max_keys=2)


class _Layer(nn.Cell):
    """Projections around the Cell; the first feature decides the bucket."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = Projection(16, 48), Projection(16, 16)
        self.attention = DynamicSparseAttention(engine="portable")

    def construct(self, x):
        q, k, v = self.to_qkv(x).reshape((2, 33, 3, 2, 8)).split(1, 2)
        q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)
        return self.to_out(self.attention(q, k, v, self.bucket(q), self.bucket(k)).reshape((2, 33, 16)))

    def bucket(self, x):
        return (x[..., 0] > 0).astype(ms.int32)


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
def test_trains_saves_and_loads(mode, tmp_path):
    x, target = (Tensor(x.astype(np.float32)) for x in np.random.default_rng(3).standard_normal((2, 2, 33, 16)))
    cell = _Layer()
    with in_mindspore.mode(mode):
        in_mindspore.check_training(cell, x, target)
        in_mindspore.check_checkpoint(cell, _Layer(), x, tmp_path)


def test_half_precision():
    q, k, v, _, q_idx, k_idx = draws(QK)
    cell = DynamicSparseAttention(sparsity_mode="qk", engine="portable")
    out = cell(*(Tensor(x.astype(np.float16)) for x in (100 * q, k, v)), Tensor(q_idx), Tensor(k_idx))
    assert out.dtype == ms.float16 and np.isfinite(out.asnumpy()).all()


# --- work that is skipped -------------------------------------------------------------------------------------------
def test_windows_shrink_with_the_buckets(figure):
    """Keys that the core call is given, over all tiles of queries; in PyNative nobody has to bound them."""
    length, given, shares = 4096, [], {}

    def counted(q, k, v, **options):
        given.append(q.shape[2] * k.shape[2])
        return q

    q = Tensor(np.ones((1, length, 1, 4), np.float32))
    with mock.patch.object(sparse_windows, "flash_attention", counted):
        for buckets in (1, 16):
            ids = np.random.default_rng(buckets).integers(0, buckets, (2, 1, length, 1)).astype(np.int32)
            given.clear()
            hash_sparse_attention(q, q, q, *map(Tensor, ids))
            shares[buckets] = sum(given) / length**2
    tiles = 2 * (sparse_windows.TILE + sparse_windows.STEP) / length
    figure("MindSpore hash sparse, 1 bucket, 4,096 tokens: pairs computed / all", shares[1], 1 / 2 + tiles)
    figure("MindSpore hash sparse, 16 buckets, 4,096 tokens: pairs computed / all", shares[16], 1 / 32 + tiles)
