"""CoLT5 in MindSpore: the router's properties, the layers against their JAX twins in both modes, training."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore
from support.colt5 import (
    ATTENTION,
    BAD_ATTENTION,
    BAD_FEED_FORWARD,
    BAD_ROUTERS,
    BLOCK,
    CONTEXT,
    CROSS,
    FEED_FORWARD,
    MASK,
    X_OUT,
    Router,
    X,
)

from flash_attention.core.mechanisms.weights import unflatten_params
from flash_attention.nn import (
    ConditionalRoutedAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedTransformerBlock,
    CoordinateDescentRouter,
    coor_descent,
    load_weights,
    weights_of,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
DIM = X.shape[-1]
NARROW = 0.1 * X  # scores so close that the soft choice is undecided, and its gradient not 0


def _tensor(x):
    return Tensor(np.asarray(x, np.float32))


class TestRouter(Router):
    @staticmethod
    def descent(s, mask=None, **options):
        return coor_descent(_tensor(s), mask=None if mask is None else Tensor(mask), **options).asnumpy()

    @staticmethod
    def route(weight, x, num_tokens, mask, **options):
        router = CoordinateDescentRouter(DIM, num_routing_tokens=len(weight), **options)
        load_weights(router, {"weight": weight})
        found = router(_tensor(x), num_tokens, None if mask is None else Tensor(mask))
        return [None if y is None else y.asnumpy() for y in found]


@pytest.mark.parametrize("options, match", BAD_ROUTERS)
def test_router_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        CoordinateDescentRouter(**dict({"dim": DIM}, **options))
    with pytest.raises(ValueError, match="'num_tokens' must be an int >= 1"):
        CoordinateDescentRouter(DIM)(_tensor(np.ones((1, 3, DIM))), 0)
    with pytest.raises(ValueError, match="'mask' must be of shape"):
        CoordinateDescentRouter(DIM)(_tensor(np.ones((1, 3, DIM))), 2, _tensor(np.ones((1, 4))))


class _Masked(nn.Cell):
    """A layer of x alone."""

    def __init__(self, layer, mask):
        super().__init__()
        self.layer, self.mask = layer, Tensor(mask)

    def construct(self, x):
        return self.layer(x, self.mask)


LAYERS = {
    "feed_forward": ("ConditionalRoutedFeedForward", FEED_FORWARD),
    "attention": ("ConditionalRoutedAttention", ATTENTION),
    "attention, two sets, by score": (
        "ConditionalRoutedAttention",
        dict(ATTENTION, num_routed_kv=2, multiply_keys_by_score=True, multiply_queries_by_score=True),
    ),
    "attention, all routed, no null": (
        "ConditionalRoutedAttention",
        dict(ATTENTION, num_heavy_tokens_q=40, num_heavy_tokens_kv=17, use_null_q_tokens=False),
    ),
    "block": ("ConditionalRoutedTransformerBlock", BLOCK),
    "cross": ("ConditionalRoutedCrossAttention", CROSS),
}


def check_against_its_twin(mode, name, masked=False):
    """Output and all gradients of a layer and of its JAX twin with the same weights."""
    twins = pytest.importorskip("flash_attention.jax")
    from support import in_jax

    import flash_attention.nn as cells

    made, options = LAYERS[name]
    routed = {} if made == "ConditionalRoutedFeedForward" else {"engine": "portable"}
    cell, twin = getattr(cells, made)(DIM, **options, **routed), getattr(twins, made)(DIM, **options)
    twin.params = unflatten_params(weights_of(cell))
    arrays = [NARROW, 0.1 * CONTEXT] if name == "cross" else [NARROW]
    with in_mindspore.mode(mode):
        got = in_mindspore.run_layer(_Masked(cell, MASK) if masked else cell, arrays, X_OUT)
    want = in_jax.run_layer(_MaskedTwin(twin) if masked else twin, arrays, X_OUT)
    named = {name.replace("layer.", "", 1) if masked else name: grad for name, grad in got[2].items()}
    assert set(named) == set(want[2])
    pairs = [(got[0], want[0])] + list(zip(got[1], want[1])) + [(named[n], want[2][n]) for n in want[2]]
    for mine, other in pairs:
        np.testing.assert_allclose(mine, other, atol=2e-4 * max(1.0, np.abs(other).max()))


class _MaskedTwin:
    def __init__(self, layer):
        self.layer, self.params = layer, layer.params

    def __call__(self, x, params):
        return self.layer(x, MASK, params=params)


@pytest.mark.parametrize("name", [
    "block",
    pytest.param("feed_forward", marks=pytest.mark.slow),
    pytest.param("attention, two sets, by score", marks=pytest.mark.slow),
    pytest.param("attention, all routed, no null", marks=pytest.mark.slow),
    pytest.param("cross", marks=pytest.mark.slow),
])  # fmt: skip
def test_equals_its_twin(name):
    check_against_its_twin("pynative", name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_equals_its_twin_with_a_mask(mode):
    check_against_its_twin(mode, "block", masked=True)
    check_against_its_twin(mode, "attention, two sets, by score", masked=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "cross", "attention, all routed, no null"])
def test_equals_its_twin_in_a_graph(name):
    check_against_its_twin("graph", name)


def test_masked_tokens_influence_no_valid_row():
    layer = ConditionalRoutedTransformerBlock(DIM, engine="portable", **dict(BLOCK, num_heavy_attn_tokens_kv=14))
    want = layer(_tensor(X), Tensor(MASK)).asnumpy()
    out = layer(_tensor(np.where(MASK[..., None], X, 7.0 * X[:, ::-1])), Tensor(MASK)).asnumpy()
    np.testing.assert_allclose(out[MASK], want[MASK], atol=1e-5)
    assert np.isfinite(layer(_tensor(X), Tensor(np.zeros_like(MASK))).asnumpy()).all()  # nothing is valid


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_trains_saves_and_loads(mode, tmp_path):
    layer = ConditionalRoutedTransformerBlock(DIM, engine="portable", **BLOCK)
    x, target = _tensor(NARROW), _tensor(X_OUT)
    with in_mindspore.mode(mode):
        in_mindspore.check_training(layer, x, target)
        in_mindspore.check_checkpoint(
            layer, ConditionalRoutedTransformerBlock(DIM, engine="portable", **BLOCK), x, tmp_path
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16], ids=str)
def test_half_precision(dtype):
    layer = ConditionalRoutedTransformerBlock(DIM, dtype=dtype, engine="portable", **BLOCK)
    out, grads, weights = in_mindspore.run_layer(layer, [X], X_OUT)
    assert layer(_tensor(X), Tensor(MASK)).dtype == dtype
    assert np.isfinite(out).all() and np.isfinite(grads[0]).all()
    assert all(np.isfinite(grad).all() for grad in weights.values())


@pytest.mark.parametrize("options, match", BAD_ATTENTION)
def test_attention_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        ConditionalRoutedAttention(DIM, **dict(ATTENTION, **options))


@pytest.mark.parametrize("options, match", BAD_FEED_FORWARD)
def test_feed_forward_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        ConditionalRoutedFeedForward(DIM, **dict(FEED_FORWARD, **options))


def test_inputs_are_checked():
    x = _tensor(X)
    for layer in (ConditionalRoutedAttention(DIM, **ATTENTION), ConditionalRoutedFeedForward(DIM, **FEED_FORWARD)):
        with pytest.raises(ValueError, match="'x' must be of shape \\(B, N, 12\\)"):
            layer(x[..., :5])
        with pytest.raises(ValueError, match="'mask' must be of shape \\(2, 17\\)"):
            layer(x, Tensor(MASK[:, :9]))
        with pytest.raises(ValueError, match="bias="):
            layer(x, _tensor(-np.ones(MASK.shape)))
    cross = ConditionalRoutedCrossAttention(DIM, **CROSS)
    with pytest.raises(ValueError, match="'context' must be of shape"):
        cross(x, x[..., :5])
    with pytest.raises(ValueError, match="'context_mask' must be of shape \\(2, 17\\)"):
        cross(x, x, None, Tensor(MASK[:, :9]))
    with pytest.raises(ValueError, match="'num_sets_kv' must be a divisor"):
        ConditionalRoutedCrossAttention(DIM, **dict(CROSS, num_sets_kv=3))
    with pytest.raises(TypeError):
        ConditionalRoutedTransformerBlock(DIM, **dict(BLOCK, window=3))
