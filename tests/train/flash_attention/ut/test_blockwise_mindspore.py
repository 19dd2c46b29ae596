"""Blockwise parallel transformer in MindSpore: properties of support/blockwise.py, the block against its JAX twin."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support import in_mindspore
from support.blockwise import (
    BAD_BLOCKS,
    BAD_CALLS,
    BIASED,
    HIDDEN,
    KEEP,
    LOGITS,
    OTHERS,
    PLAIN,
    SIZES,
    TOKENS,
    VALID,
    WEIGHT,
    X_OUT,
    Attention,
    Loss,
    X,
    draws,
)
from support.graphs import output_shapes

from flash_attention.core.mechanisms.weights import unflatten_params
from flash_attention.nn import (
    Blockwise_LM_Head,
    BlockwiseAttention,
    BlockwiseFFN,
    BlockwiseParallel,
    blockwise_cross_entropy,
    blockwise_fused_cross_entropy,
    load_weights,
    weights_of,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
MODES = ["pynative", pytest.param("graph", marks=pytest.mark.slow)]


def _tensor(x):
    return Tensor(np.asarray(x, np.float32))


class _InMode:
    functions, mode = in_mindspore.FUNCTIONS, "pynative"

    def run(self, *args, **options):
        with in_mindspore.mode(self.mode):
            return in_mindspore.run(*args, **options)

    @staticmethod
    def function(**options):
        return BlockwiseAttention(engine="portable", **options)


class TestAttention(_InMode, Attention):
    pass


class InGraph(_InMode, Attention):
    mode = "graph"


@pytest.mark.slow
@pytest.mark.parametrize("case", [BIASED, OTHERS[2]], ids=lambda case: case.name)
def test_attention_in_a_graph(case):
    InGraph().check_case(case)


@pytest.mark.slow
def test_graph_refuses_and_recomputes():
    InGraph().check_refused_shapes()
    InGraph().check_case(BIASED, policy="everything_saveable", prevent_cse=True)


@pytest.mark.slow
def test_attention_dropout():
    q, k, v = (_tensor(x) for x in draws(PLAIN)[0][:3])
    cells = [BlockwiseAttention(attn_pdrop=0.5, query_chunk_size=q, key_chunk_size=k, engine="portable")
             for q, k in ((8, 16), (None, None))]  # fmt: skip
    want = BlockwiseAttention(engine="portable")(q, k, v).asnumpy()
    for cell in cells:
        np.testing.assert_allclose(cell.set_train(False)(q, k, v).asnumpy(), want, atol=2e-6)
    one, two = (cell.set_train()(q, k, v, dropout_seed=7).asnumpy() for cell in cells)
    np.testing.assert_allclose(one, two, atol=2e-6)
    assert not np.allclose(one, want)
    assert not np.allclose(cells[0](q, k, v).asnumpy(), cells[0](q, k, v).asnumpy())
    still = BlockwiseAttention(deterministic=True, attn_pdrop=0.5, engine="portable").set_train()
    np.testing.assert_allclose(still(q, k, v).asnumpy(), want, atol=2e-6)


# --- network and loss -----------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_ffn_equals_one_call(mode):
    dense = nn.Dense(16, 16)
    with in_mindspore.mode(mode):
        want = in_mindspore.run(dense, [X], X_OUT)
        for size, policy in ((8, "nothing_saveable"), (5, None), (64, "dots_saveable")):
            out, grads = in_mindspore.run(BlockwiseFFN(dense, size, policy), [X], X_OUT)
            np.testing.assert_allclose(out, want[0], atol=1e-5)
            np.testing.assert_allclose(grads[0], want[1][0], atol=1e-5)
        block = BlockwiseParallel(engine="portable", **SIZES)
        got = BlockwiseFFN(block, 8)(_tensor(X)).asnumpy()
        np.testing.assert_allclose(got, block.forward_ffn(_tensor(X)).asnumpy(), atol=1e-5)


def test_ffn_refuses():
    with pytest.raises(ValueError, match="'inputs' must be of shape"):
        BlockwiseFFN(nn.Dense(4, 4), 2)(Tensor(np.ones((3, 4), np.float32)))
    with pytest.raises(KeyError, match="'policy' must be None or one of"):
        BlockwiseFFN(nn.Dense(4, 4), 2, "all")
    with pytest.raises(TypeError, match="'chunk_size' must be an int"):
        BlockwiseFFN(nn.Dense(4, 4), "2")


class _Plain(nn.Cell):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def construct(self, logits, tokens, valid):
        return blockwise_cross_entropy(logits, tokens, valid, **self.options)


class _Fused(nn.Cell):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def construct(self, hidden, weight, bias, tokens, valid):
        return blockwise_fused_cross_entropy(hidden, weight, tokens, valid, bias=bias, **self.options)


class _First(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, *tensors):
        return self.cell(*tensors)[0]


class LossOf(Loss):
    """The loss and its gradients in one mode."""

    mode = "pynative"

    def call(self, cell, floats, others):
        floats = [_tensor(x) for x in floats]
        others = [None if x is None else Tensor(x) for x in others]
        with in_mindspore.mode(self.mode):
            loss, accuracy = cell(*floats, *others)
            grads = ops.grad(_First(cell), tuple(range(len(floats))))(*floats, *others)
            grads = (grads,) if isinstance(grads, Tensor) else grads
        return float(loss.asnumpy()), float(accuracy.asnumpy()), [grad.asnumpy() for grad in grads]

    def loss(self, logits, tokens, valid, **options):
        return self.call(_Plain(options), [logits], [tokens, valid])

    def fused(self, hidden, weight, tokens, valid, bias, **options):
        return self.call(_Fused(options), [hidden, weight, bias], [tokens, valid])


class TestLoss(LossOf):
    pass


class LossInGraph(LossOf):
    mode = "graph"


def test_fused_loss_in_a_graph():
    LossInGraph().check_fused()


class _FusedStep(nn.Cell):
    """The fused loss and its gradients in one graph."""

    def __init__(self):
        super().__init__()
        self.fused = _Fused({"chunk_size": 64})
        self.gradient = ops.grad(_First(self.fused), (0, 1, 2))

    def construct(self, *tensors):
        return self.fused(*tensors), self.gradient(*tensors)


@pytest.mark.slow
def test_the_fused_loss_never_forms_the_logits(tmp_path):
    """No operator's output in the compiled graph, forward and backward, is larger than a chunk's logits."""
    hidden, weight, bias = (_tensor(np.ones(shape)) for shape in ((1, 512, 8), (600, 8), 600))
    tokens, valid = (Tensor(np.ones((1, 512), np.int32)) for _ in range(2))
    shapes = output_shapes(str(tmp_path), lambda: _FusedStep()(hidden, weight, bias, tokens, valid))
    sizes = [np.prod(shape) for shape in shapes]
    assert len(sizes) > 20  # the graph was read
    assert 64 * 600 in sizes and max(sizes) == 64 * 600


@pytest.mark.slow
def test_loss_in_a_graph():
    LossInGraph().check_mean(4, "chunk_mean")
    LossInGraph().check_nothing_valid()
    with pytest.raises(ValueError, match="'tokens' must be of shape"):
        LossInGraph().loss(LOGITS, TOKENS[:, :5], VALID)


@pytest.mark.parametrize("mode", MODES)
def test_head(mode):
    head = Blockwise_LM_Head(11, 4, hidden_size=6)
    load_weights(head, {"weight": WEIGHT, "bias": np.arange(11.0)})
    hidden, tokens, valid = _tensor(HIDDEN), Tensor(TOKENS), Tensor(VALID)
    with in_mindspore.mode(mode):
        logits = head(hidden)
        np.testing.assert_allclose(logits.asnumpy(), HIDDEN @ WEIGHT.T + np.arange(11.0), atol=1e-5)
        want = [x.asnumpy() for x in blockwise_cross_entropy(logits, tokens, valid)]
        np.testing.assert_allclose([x.asnumpy() for x in head.loss(hidden, tokens, valid)], want, rtol=1e-5)
        probs = Blockwise_LM_Head(11, 4, return_probs=True, hidden_size=6)
        load_weights(probs, weights_of(head))
        np.testing.assert_allclose(probs(hidden).asnumpy().sum(-1), 1.0, atol=1e-5)
        half = Blockwise_LM_Head(11, 4, dtype=ms.float16, hidden_size=6)
        assert half(hidden).dtype == ms.float16 and np.isfinite(float(half.loss(hidden, tokens, valid)[0].asnumpy()))


@pytest.mark.parametrize("options, error, match", [
    ({"vocab_size": 0}, ValueError, "'vocab_size' must be an int >= 1"),
    ({"hidden_size": None}, TypeError, "'hidden_size' must be an int >= 1"),
    ({"chunk_size": 0}, ValueError, "'chunk_size' must be an int >= 1"),
    ({"policy": "all"}, KeyError, "'policy' must be None or one of"),
    ({"return_probs": 1}, TypeError, "'return_probs' must be a bool"),
])  # fmt: skip
def test_head_refuses(options, error, match):
    with pytest.raises(error, match=match):
        Blockwise_LM_Head(**dict({"vocab_size": 11, "chunk_size": 4, "hidden_size": 6}, **options))
    with pytest.raises(ValueError, match="'hidden_states' must be of shape \\(B, S, 6\\)"):
        Blockwise_LM_Head(11, 4, hidden_size=6)(_tensor(LOGITS))


# --- the block ------------------------------------------------------------------------------------
class _Masked(nn.Cell):
    """The block as a layer of x alone."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.mask = Tensor(KEEP)

    def construct(self, x):
        return self.block(x, self.mask)


@pytest.mark.parametrize("mode, causal, policy", [
    ("pynative", True, "nothing_saveable"),
    pytest.param("pynative", False, None, marks=pytest.mark.slow),
    pytest.param("graph", True, None, marks=pytest.mark.slow),
    pytest.param("graph", True, "nothing_saveable", marks=pytest.mark.slow),
])  # fmt: skip
def test_block_equals_its_twin(mode, causal, policy):
    pytest.importorskip("jax")
    from support import in_jax

    from flash_attention.jax import BlockwiseParallelJax

    cell = BlockwiseParallel(causal=causal, policy=policy, engine="portable", **SIZES)
    twin = BlockwiseParallelJax(causal=causal, **SIZES)
    twin.params = unflatten_params(weights_of(cell))
    with in_mindspore.mode(mode):
        got = in_mindspore.run_layer(_Masked(cell), [X], X_OUT)

    class Masked:
        params = twin.params

        def __call__(self, x, params):
            return twin.forward(x, KEEP, params=params)

    want = in_jax.run_layer(Masked(), [X], X_OUT)
    named = {name[len("block.") :]: grad for name, grad in got[2].items()}
    assert set(named) == set(want[2])
    for mine, other in [(got[0], want[0]), (got[1][0], want[1][0])] + [(named[n], want[2][n]) for n in want[2]]:
        np.testing.assert_allclose(mine, other, atol=3e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu", "swish", "quick_gelu"])
def test_activations(name):
    pytest.importorskip("jax")
    from flash_attention.jax import BlockwiseParallelJax

    cell = BlockwiseParallel(activation_function=name, engine="portable", **SIZES)
    twin = BlockwiseParallelJax(activation_function=name, **SIZES)
    twin.params = unflatten_params(weights_of(cell))
    want = twin.forward_ffn(X.astype(np.float32))
    np.testing.assert_allclose(cell.forward_ffn(_tensor(X)).asnumpy(), want, atol=1e-5)


@pytest.mark.parametrize("mode, causal", [
    ("pynative", True),
    pytest.param("pynative", False, marks=pytest.mark.slow),
    pytest.param("graph", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_cache(mode, causal):
    block = BlockwiseParallel(causal=causal, engine="portable", **SIZES).set_train(False)
    x = _tensor(X)
    with in_mindspore.mode(mode):
        want = block.forward(x, init_cache=True).asnumpy()
        assert block.cache[0].shape == (2, 2, 21, 8)
        steps = ((0, 6), (6, 7), (7, 20), (20, 21))
        outs = [block.forward(x[:, start:stop]).asnumpy() for start, stop in steps]
    if causal:
        np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=1e-5)
    np.testing.assert_allclose(outs[-1], want[:, 20:], atol=1e-5)
    with pytest.raises(ValueError, match="'hidden_states' must be at most 0 more tokens"):
        block.forward(x[:, :1])
    block.cache = None
    np.testing.assert_allclose(block.forward(x).asnumpy(), want, atol=1e-6)


@pytest.mark.slow
def test_masks_and_positions():
    block = BlockwiseParallel(engine="portable", **SIZES).set_train(False)
    x, keys = _tensor(X), np.arange(21) != 7
    want = block(x, Tensor(np.broadcast_to(keys, (2, 1, 21, 21)).copy())).asnumpy()
    for mask in (np.stack([keys, keys]), keys[None, None, None]):
        np.testing.assert_allclose(block(x, Tensor(mask)).asnumpy(), want, atol=1e-6)
    plain = block(x).asnumpy()
    assert not np.allclose(plain, want, atol=1e-3)
    twice = block(x, None, Tensor(np.stack([np.arange(21), 2 * np.arange(21)]).astype(np.int32))).asnumpy()
    np.testing.assert_allclose(twice[0], plain[0], atol=1e-6)
    assert not np.allclose(twice[1], plain[1], atol=1e-3)
    later = block(_tensor(np.where(np.arange(21)[:, None] < 12, X, 5.0))).asnumpy()
    np.testing.assert_allclose(later[:, :12], plain[:, :12], atol=1e-6)
    with pytest.raises(ValueError, match="bias="):
        block(x, Tensor(-np.ones((2, 21), np.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_trains_saves_and_loads(mode, tmp_path):
    block = BlockwiseParallel(attn_pdrop=0.1, resid_pdrop=0.1, engine="portable", **SIZES)
    x, target = _tensor(X), _tensor(X_OUT)
    with in_mindspore.mode(mode):
        in_mindspore.check_training(block, x, target)
        assert (block(x).asnumpy() != block(x).asnumpy()).any()
        in_mindspore.check_checkpoint(block, BlockwiseParallel(engine="portable", **SIZES), x, tmp_path)


@pytest.mark.slow
def test_half_precision():
    plain = BlockwiseParallel(engine="portable", **SIZES).set_train(False)
    for dtype in (ms.float16, ms.bfloat16):
        block = BlockwiseParallel(dtype=dtype, float32_logits=True, engine="portable", **SIZES).set_train(False)
        load_weights(block, weights_of(plain))
        out = block(_tensor(X), Tensor(KEEP))
        assert out.dtype == dtype
        want = plain(_tensor(X), Tensor(KEEP)).asnumpy()
        np.testing.assert_allclose(out.astype(ms.float32).asnumpy(), want, atol=0.02 if dtype == ms.float16 else 0.15)
        _, grads, weights = in_mindspore.run_layer(block, [X], X_OUT)
        assert np.isfinite(grads[0]).all() and all(np.isfinite(grad).all() for grad in weights.values())


@pytest.mark.parametrize("options, error, match", BAD_BLOCKS)
def test_block_refuses(options, error, match):
    with pytest.raises(error, match=match):
        BlockwiseParallel(**dict(SIZES, **options))


@pytest.mark.parametrize("shapes, match", BAD_CALLS)
def test_block_refuses_inputs(shapes, match):
    tensors = [None if shape is None else Tensor(np.ones(shape, np.float32)) for shape in shapes]
    with pytest.raises(ValueError, match=match):
        BlockwiseParallel(engine="portable", **SIZES)(*tensors)
