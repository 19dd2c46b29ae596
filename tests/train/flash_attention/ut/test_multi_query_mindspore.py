"""Multi-query attention and TriangleAttention in MindSpore, both modes; the layer against its JAX twin."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore
from support.judge import check
from support.multi_query import BAD_LAYERS, Grouped, H, rng

from flash_attention.core import reference
from flash_attention.core.mechanisms.weights import unflatten_params
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.nn import (
    MultiQueryAttention,
    TriangleAttention,
    grouped_query_attention,
    load_weights,
    weights_of,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
MODES = ("pynative", "graph")
X, D_OUT = rng.standard_normal((2, 2, 9, 16))


class _Function(nn.Cell):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def construct(self, query, key, value, mask=None):
        return grouped_query_attention(query, key, value, mask, engine="portable", **self.options)


class InMindSpore(Grouped):
    mode, functions = None, in_mindspore.FUNCTIONS

    def run(self, *args, **options):
        with in_mindspore.mode(self.mode):
            return in_mindspore.run(*args, **options)

    @staticmethod
    def function(**options):
        return _Function(options)


class TestPynative(InMindSpore):
    mode = "pynative"


@pytest.mark.slow
class TestGraph(InMindSpore):
    mode = "graph"


def test_graph():
    TestGraph().check("tile", 2, 7, 12, True, None, "float32")


# --- the layer ------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_layer_equals_its_twin(mode):
    pytest.importorskip("jax")
    from support import in_jax

    from flash_attention.jax import MultiQueryAttention as Twin

    options = dict(kv_heads=2, causal=True, kv_head_mapping="tile", bias=True)
    cell, twin = MultiQueryAttention(16, H, engine="portable", **options), Twin(16, H, **options)
    twin.params = unflatten_params(weights_of(cell))
    with in_mindspore.mode(mode):
        got = in_mindspore.run_layer(cell, [X], D_OUT)
    want = in_jax.run_layer(twin, [X], D_OUT)
    assert set(got[2]) == set(want[2])
    for mine, other in [(got[0], want[0]), (got[1][0], want[1][0])] + [(got[2][n], want[2][n]) for n in want[2]]:
        np.testing.assert_allclose(mine, other, atol=2e-5 * max(1.0, np.abs(other).max()))


def test_weights_there_and_back():
    one, two = MultiQueryAttention(16, H, bias=True), MultiQueryAttention(16, H, bias=True)
    load_weights(two, unflatten_params(weights_of(one)))
    np.testing.assert_array_equal(one(_tensor(X)).asnumpy(), two(_tensor(X)).asnumpy())
    with pytest.raises(ValueError, match="'weights' must be named"):
        load_weights(MultiQueryAttention(16, H), weights_of(one))
    with pytest.raises(ValueError, match="'weights' must be of shape \\(4, 16\\) at 'to_k.weight'"):
        load_weights(one, weights_of(MultiQueryAttention(16, H, kv_heads=2, bias=True)))


@pytest.mark.parametrize("mode", MODES)
def test_cached_decoding_equals_the_full_call(mode):
    cell = MultiQueryAttention(16, H, kv_heads=2, causal=True, engine="portable")
    x = _tensor(X)
    with in_mindspore.mode(mode):
        want = cell(x).asnumpy()
        first, cache = cell(x[:, :6], None, None, None, True)
        second, cache = cell(x[:, 6:], None, None, cache, True)
    np.testing.assert_allclose(np.concatenate([first.asnumpy(), second.asnumpy()], 1), want, atol=1e-5)
    assert cache[0].shape == (2, 9, 2, 4)


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
def test_trains_saves_and_loads(mode, tmp_path):
    cell, other = (MultiQueryAttention(16, H, kv_heads=2, causal=True, engine="portable") for _ in range(2))
    x = _tensor(X)
    with in_mindspore.mode(mode):
        in_mindspore.check_training(cell, x, _tensor(D_OUT))
        in_mindspore.check_checkpoint(cell, other, x, tmp_path)


def test_context_mask_and_half_precision():
    cell = MultiQueryAttention(16, H, dim_head=8, dtype=ms.float16)
    context = np.array(D_OUT)
    mask = Tensor((np.arange(9) < 6)[None, None, None])
    want = cell(_tensor(X[:, :5]), _tensor(context)[:, :6])
    context[:, 6:] = 7.0
    got = cell(_tensor(X[:, :5]), _tensor(context), mask)
    assert got.dtype == ms.float16
    np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), atol=5e-3)


@pytest.mark.parametrize("options, match", BAD_LAYERS)
def test_layer_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        MultiQueryAttention(**dict({"dim": 16, "heads": H}, **options))


def _tensor(x):
    return Tensor(np.ascontiguousarray(x, np.float32))


# --- TriangleAttention ----------------------------------------------------------------------------
def triangle(xp, tensors, mask):
    """Results by name: unscaled causal attention where mask is 0."""
    q, k, v, d_out = (np.asarray(x, xp.float64) for x in tensors)
    keep = None if mask is None else mask[:, None] == 0
    spec = AttentionSpec(*q.shape[:2], q.shape[1], q.shape[2], q.shape[2], q.shape[3], scale=1.0, causal=True,
                         mask_shape=None if mask is None else keep.shape)  # fmt: skip
    out = reference.attention(xp, spec, q, k, v, Operands(mask=keep))[0]
    return dict(reference.attention_grad(spec, q, k, v, Operands(mask=keep), d_out), out=out)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [None, "shared", "batch"])
def test_triangle(mode, mask):
    length = 70
    q, k, v, d_out = rng.standard_normal((4, 2, 3, length, 8))
    q = q / 8**0.5
    if mask is not None:
        mask = (rng.random((1 if mask == "shared" else 2, length, length)) < 0.4).astype(np.float32) * 3
        mask[:, 5] = 1.0  # a query that sees nothing
    with in_mindspore.mode(mode):
        cell = TriangleAttention(block_size=32, engine="portable")
        out, grads = in_mindspore.run(cell, [q, k, v] + ([] if mask is None else [mask]), d_out)
    got = dict(zip(("out", "query", "key", "value"), [out] + grads))
    check(got, lambda xp: triangle(xp, (q, k, v, d_out), mask), "float32", in_mindspore.FUNCTIONS)
    if mask is not None:
        assert not out[:, :, 5].any()


def test_triangle_block_size_changes_nothing():
    q, k, v = (_tensor(x) for x in rng.standard_normal((3, 1, 2, 70, 8)))
    want = TriangleAttention(engine="portable")(q, k, v).asnumpy()
    np.testing.assert_allclose(TriangleAttention(block_size=16, engine="portable")(q, k, v).asnumpy(), want, atol=1e-6)


def test_triangle_reads_only_the_lower_blocks():
    """NaN in the keys and values of later blocks changes nothing in the rows before."""
    q, k, v, d_out = rng.standard_normal((4, 1, 1, 600, 8))
    want, _ = in_mindspore.run(TriangleAttention(engine="portable"), [q, k, v], d_out)
    k[:, :, 512:], v[:, :, 512:] = np.nan, np.nan
    out, _ = in_mindspore.run(TriangleAttention(engine="portable"), [q, k, v], d_out)
    np.testing.assert_array_equal(out[:, :, :256], want[:, :, :256])


def test_triangle_in_half_precision():
    q, k, v = rng.standard_normal((3, 1, 2, 40, 8)).astype(np.float16)
    out, grads = in_mindspore.run(TriangleAttention(engine="portable"), [100 * q, k, v], np.ones(q.shape), "float16")
    assert np.isfinite(out).all() and all(np.isfinite(grad).all() for grad in grads)
    assert TriangleAttention(engine="portable")(*map(Tensor, (q, k, v))).dtype == ms.float16


@pytest.mark.parametrize("mode", MODES)
def test_triangle_drops_in_training_only(mode):
    q, k, v = (_tensor(x) for x in rng.standard_normal((3, 1, 2, 40, 8)))
    with in_mindspore.mode(mode):
        cell = TriangleAttention(dropout_rate=0.5, engine="portable")
        plain = cell.set_train(False)(q, k, v).asnumpy()
        np.testing.assert_array_equal(plain, TriangleAttention(engine="portable")(q, k, v).asnumpy())
        cell.set_train(True)
        one, two = cell(q, k, v).asnumpy(), cell(q, k, v).asnumpy()
    assert (one != two).any() and (one != plain).any()


@pytest.mark.parametrize("options, match", [
    ({"block_size": 0}, "'block_size' must be an int >= 1"),
    ({"dropout_rate": 1.0}, "'dropout_rate' must be"),
    ({"dp": 0}, "'dp' must be an int >= 1"),
    ({"mp": 1.5}, "'mp' must be an int >= 1"),
])  # fmt: skip
def test_triangle_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        TriangleAttention(**options)


@pytest.mark.parametrize("mode", MODES)
def test_triangle_refuses_shapes(mode):
    x = _tensor(np.ones((2, 1, 6, 4)))
    with in_mindspore.mode(mode):
        with pytest.raises(ValueError, match="'attention_mask' must be of shape \\(1\\|2, 6, 6\\)"):
            TriangleAttention()(x, x, x, _tensor(np.ones((6, 6))))
        with pytest.raises(ValueError, match="'key' must be of shape"):
            TriangleAttention()(x, x[:, :, :5], x[:, :, :5])
