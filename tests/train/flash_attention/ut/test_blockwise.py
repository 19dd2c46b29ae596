"""Blockwise parallel transformer in JAX: attention, loss and block against float64; cache, dropout, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.blockwise import (
    BAD_BLOCKS,
    BAD_CALLS,
    HIDDEN,
    KEEP,
    PLAIN,
    SIZES,
    TOKENS,
    VALID,
    X_OUT,
    Attention,
    Loss,
    X,
    draws,
)
from support.jax_engines import in_float64
from support.layers import attention, check_layer, dense, split
from support.positions import rotated

from flash_attention.jax import (
    Blockwise_LM_Head,
    BlockwiseParallelJax,
    blockwise_compute_attn,
    blockwise_compute_ffn,
    blockwise_cross_entropy,
    blockwise_fused_cross_entropy,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


class TestAttention(Attention):
    run, functions = staticmethod(in_jax.run), in_jax.FUNCTIONS

    @staticmethod
    def function(**options):
        options = dict({"deterministic": True}, **options)
        return functools.partial(blockwise_compute_attn, **options)


@pytest.mark.slow
def test_dtype_and_precision():
    """The output has `dtype`; the products of both directions carry `precision`."""
    (q, k, v, _), _ = draws(PLAIN)
    q, k, v = (jnp.asarray(x, jnp.float16) for x in (q, k, v))
    assert blockwise_compute_attn(q, k, v).dtype == jnp.float32
    assert blockwise_compute_attn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16

    def loss(q, precision):
        return blockwise_compute_attn(q, k, v, precision=precision).sum()

    # None: the package's own choice, which rounds no float32 operand
    for precision, named in ((jax.lax.Precision.HIGHEST, True), ("highest", True), (None, True), ("default", False)):
        text = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(q, precision))
        products, highest = text.count("dot_general["), text.count("(Precision.HIGHEST, Precision.HIGHEST)")
        assert products > 6 and highest == (products if named else 0)


@pytest.mark.slow
def test_attention_dropout_does_not_depend_on_chunks():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in draws(PLAIN)[0])
    static = ("query_chunk_size", "key_chunk_size", "deterministic", "attn_pdrop")
    call = functools.partial(jax.jit(blockwise_compute_attn, static_argnames=static), q, k, v, attn_pdrop=0.5)
    rng = jax.random.PRNGKey(0)
    want = call(dropout_rng=rng)
    np.testing.assert_allclose(call(dropout_rng=rng, query_chunk_size=8, key_chunk_size=16), want, atol=2e-6)
    assert not np.allclose(call(dropout_rng=jax.random.PRNGKey(1)), want)
    np.testing.assert_allclose(call(deterministic=True), blockwise_compute_attn(q, k, v), atol=1e-6)
    mean = np.mean([call(dropout_rng=jax.random.PRNGKey(n)) for n in range(64)], 0)
    assert np.abs(mean - call(deterministic=True)).mean() < 0.15  # inverted: right on average
    with pytest.raises(ValueError, match="'dropout_rng' must be a PRNG key"):
        call()


@pytest.mark.slow
def test_float64():
    with in_float64():
        q, k, v, _ = (jnp.asarray(x, jnp.float64) for x in draws(PLAIN)[0])
        out = blockwise_compute_attn(q, k, v, dtype=jnp.float64, query_chunk_size=8)
        scores = np.where(np.tri(37, dtype=bool), np.einsum("bihd,bjhd->bhij", q, k), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(out, want, atol=1e-12)


# --- network and loss -----------------------------------------------------------------------------
@pytest.mark.parametrize("size, policy", [
    pytest.param(5, "nothing_saveable", marks=pytest.mark.slow),
    pytest.param(None, "nothing_saveable", marks=pytest.mark.slow),
    pytest.param(1, None, marks=pytest.mark.slow),
    pytest.param(64, "dots_with_no_batch_dims_saveable", marks=pytest.mark.slow),
])  # fmt: skip
def test_ffn_equals_one_call(size, policy):
    block = BlockwiseParallelJax(**SIZES)
    x = jnp.asarray(X, jnp.float32)

    def loss(params, x, call):
        block.params = params
        return (call(x) ** 2).sum()

    @jax.jit
    def both(params, x):
        want = jax.grad(loss, (0, 1))(params, x, block.forward_ffn)
        return want, jax.grad(loss, (0, 1))(params, x, lambda x: blockwise_compute_ffn(block, x, size, policy=policy))

    want, got = both(block.init(jax.random.PRNGKey(0)), x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(blockwise_compute_ffn(jnp.sin, x, size), jnp.sin(x), atol=1e-6)


def test_ffn_refuses():
    with pytest.raises(ValueError, match="'inputs' must be of shape"):
        blockwise_compute_ffn(jnp.sin, jnp.ones((3, 4)), 2)
    with pytest.raises(KeyError, match="'policy' must be None or one of"):
        blockwise_compute_ffn(jnp.sin, jnp.ones((1, 3, 4)), 2, policy="all")
    with pytest.raises(TypeError, match="'chunk_size' must be an int"):
        blockwise_compute_ffn(jnp.sin, jnp.ones((1, 3, 4)), "2")


class TestLoss(Loss):
    @staticmethod
    def loss(logits, tokens, valid, **options):
        logits = jnp.asarray(logits, jnp.float32)

        def call(logits):
            return blockwise_cross_entropy(logits, tokens, valid, **options)

        (loss, accuracy), grads = jax.jit(jax.value_and_grad(call, (0,), has_aux=True))(logits)
        return float(loss), float(accuracy), [np.asarray(grad) for grad in grads]

    @staticmethod
    def fused(hidden, weight, tokens, valid, bias, **options):
        def call(hidden, weight, bias):
            return blockwise_fused_cross_entropy(hidden, weight, tokens, valid, bias=bias, **options)

        floats = [jnp.asarray(x, jnp.float32) for x in (hidden, weight, bias)]
        (loss, accuracy), grads = jax.jit(jax.value_and_grad(call, (0, 1, 2), has_aux=True))(*floats)
        return float(loss), float(accuracy), [np.asarray(grad) for grad in grads]


@pytest.mark.slow
def test_head():
    head = Blockwise_LM_Head(11, 4)
    x = jnp.asarray(HIDDEN, jnp.float32)
    logits = head(x)
    assert head.params["weight"].shape == (11, 6) and not head.params["bias"].any()
    np.testing.assert_allclose(logits, dense(head.params, x), atol=1e-5)
    np.testing.assert_allclose(head.loss(x, TOKENS, VALID), blockwise_cross_entropy(logits, TOKENS, VALID), rtol=1e-5)
    probs = Blockwise_LM_Head(11, 4, return_probs=True, hidden_size=6)(x, params=head.params)
    np.testing.assert_allclose(probs, jax.nn.softmax(logits), atol=1e-6)
    half = Blockwise_LM_Head(11, None, dtype=jnp.float16, hidden_size=6)
    assert half(x).dtype == jnp.float16 and np.isfinite(half.loss(x, TOKENS, VALID)[0])
    wide = Blockwise_LM_Head(4, 8, hidden_size=4096).init(jax.random.PRNGKey(0))
    assert abs(float(wide["weight"].std()) * 64 - 1) < 0.05  # normal, standard deviation 1 / sqrt(E)


@pytest.mark.parametrize("options, error, match", [
    ({"vocab_size": 0}, ValueError, "'vocab_size' must be an int >= 1"),
    ({"chunk_size": 0}, ValueError, "'chunk_size' must be an int >= 1"),
    ({"policy": "all"}, KeyError, "'policy' must be None or one of"),
    ({"return_probs": 1}, TypeError, "'return_probs' must be a bool"),
])  # fmt: skip
def test_head_refuses(options, error, match):
    with pytest.raises(error, match=match):
        Blockwise_LM_Head(**dict({"vocab_size": 11, "chunk_size": 4}, **options))
    with pytest.raises(ValueError, match="'hidden_size' must be given"):
        Blockwise_LM_Head(11, 4).init(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="'hidden_states' must be of shape \\(B, S, 8\\)"):
        Blockwise_LM_Head(11, 4, hidden_size=8)(jnp.ones((1, 2, 6)))


# --- the block ------------------------------------------------------------------------------------
def norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["weight"] + params["bias"]


def plain_block(params, x, causal=True, keep=KEEP):
    """The block, dense; rotary as a rotation matrix; a query that sees nothing gets no attention."""
    normed = norm(params["norm"], x)
    q, k, v = (split(dense(params[name], normed), 2) for name in ("to_q", "to_k", "to_v"))
    eye = np.zeros((8, 21, 8)) + np.eye(8)[:, None]
    angles = np.arange(21)[:, None] * 10000.0 ** (-np.arange(2) / 2.0)
    turn = np.concatenate([rotated(eye[..., :4], angles), eye[..., 4:]], -1)  # (in, n, out)
    q, k = (jnp.einsum("bnhi,ino->bnho", y, jnp.asarray(turn, x.dtype)) for y in (q, k))
    seen = (keep > 0) & (np.tri(21, dtype=bool) if causal else True)
    dead = ~seen.any(-1)[:, 0, :, None, None]
    attended = jnp.where(dead, 0.0, attention(q, k, v, seen=seen | dead.reshape(2, 1, 21, 1)))
    x = x + dense(params["to_out"], attended.reshape(x.shape))
    params = params["ffn"]
    hidden = dense(params["fc_in"], norm(params["norm"], x))
    gelu = 0.5 * hidden * (1.0 + jax.scipy.special.erf(hidden / np.sqrt(2.0)))
    return x + dense(params["fc_out"], gelu)


_both_ways = functools.partial(plain_block, causal=False)


class _Masked:
    """The block as a layer of x alone."""

    def __init__(self, **options):
        self.block = BlockwiseParallelJax(**dict(SIZES, **options))
        self.params = self.block.params

    def __call__(self, x, params):
        return self.block.forward(x, KEEP, params=params)


@pytest.mark.parametrize("causal, policy", [
    (True, "nothing_saveable"),
    pytest.param(False, None, marks=pytest.mark.slow),
    pytest.param(True, "dots_saveable", marks=pytest.mark.slow),
])  # fmt: skip
def test_block(causal, policy):
    layer = _Masked(causal=causal, policy=policy)
    got = in_jax.run_layer(layer, [X], X_OUT)
    check_layer(got, plain_block if causal else _both_ways, layer.params, [X], X_OUT)


@pytest.mark.slow
def test_masks_and_positions():
    block = BlockwiseParallelJax(**SIZES)
    x = jnp.asarray(X, jnp.float32)
    keys = np.arange(21) != 7
    want = block.forward(x, np.broadcast_to(keys, (2, 1, 21, 21)))
    for mask in (np.stack([keys, keys]), keys[None, None, None], np.broadcast_to(keys, (1, 2, 21, 21)).astype(int)):
        np.testing.assert_allclose(block.forward(x, mask), want, atol=1e-6)
    assert not np.allclose(block.forward(x), want, atol=1e-3)
    np.testing.assert_allclose(block.forward(x, position_ids=np.arange(21)[None] + 5000), block.forward(x), atol=1e-2)
    shifted = block.forward(x, position_ids=np.stack([np.arange(21), 2 * np.arange(21)]))
    np.testing.assert_allclose(shifted[0], block.forward(x)[0], atol=1e-6)
    assert not np.allclose(shifted[1], block.forward(x)[1], atol=1e-3)
    with pytest.raises(ValueError, match="bias="):
        block.forward(x, -1.0 * np.ones((2, 21)))


@pytest.mark.slow
def test_the_past_ignores_the_future():
    block = BlockwiseParallelJax(**SIZES)
    x = jnp.asarray(X, jnp.float32)
    later = block.forward(x.at[:, 12:].set(5.0))
    np.testing.assert_array_equal(later[:, :12], block.forward(x)[:, :12])
    assert bool((later[:, 12:] != block.forward(x)[:, 12:]).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu", "swish", "quick_gelu"])
def test_activations(name):
    block = BlockwiseParallelJax(**dict(SIZES, activation_function=name))
    x = np.asarray(X, np.float64)
    weights = jax.tree.map(lambda y: np.asarray(y, np.float64), block.params["ffn"])
    hidden = np.asarray(dense(weights["fc_in"], norm(weights["norm"], x)), np.float64)
    sigmoid = 1.0 / (1.0 + np.exp(-hidden))
    active = {
        "gelu": hidden * np.asarray(jax.scipy.stats.norm.cdf(hidden)),
        "gelu_new": 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))),
        "relu": np.maximum(hidden, 0),
        "silu": hidden * sigmoid,
        "swish": hidden * sigmoid,
        "quick_gelu": hidden / (1.0 + np.exp(-1.702 * hidden)),
    }[name]
    want = np.asarray(dense(weights["fc_out"], active))
    np.testing.assert_allclose(block.forward_ffn(jnp.asarray(X, jnp.float32)), want, atol=1e-5)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_cache(causal):
    """Token by token equals the full forward; without causality, the last token sees all that were written."""
    block = BlockwiseParallelJax(**dict(SIZES, causal=causal))
    x = jnp.asarray(X, jnp.float32)
    want = block.forward(x)
    np.testing.assert_array_equal(block.forward(x, init_cache=True), want)
    assert block.cache["key"].shape == (2, 2, 21, 8) and int(block.cache["index"]) == 0
    steps = ((0, 7), (7, 14), (14, 20), (20, 21))
    outs = [block.forward(x[:, start:stop]) for start, stop in steps]
    if causal:
        np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=1e-5)
    np.testing.assert_allclose(outs[-1], want[:, 20:], atol=1e-5)
    with pytest.raises(ValueError, match="'hidden_states' must be at most 0 more tokens"):
        block.forward(x[:, :1])
    block.cache = None
    np.testing.assert_array_equal(block.forward(x), want)


@pytest.mark.slow
def test_cache_under_jit_with_a_mask():
    """The pure call: one compilation for all tokens; the mask has the cache's length."""
    block = BlockwiseParallelJax(**SIZES)
    x, keep = jnp.asarray(X, jnp.float32), np.tile(np.arange(24) != 4, (2, 1))
    want = block.forward(x, keep[:, :21])
    step = jax.jit(lambda x, cache: block.apply(block.params, x, keep, cache=cache))
    outs, cache = [], block.new_cache(2, 24)
    for t in range(21):
        out, cache = step(x[:, t : t + 1], cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=1e-5)


@pytest.mark.slow
def test_block_dropout_does_not_depend_on_chunks():
    x, rng = jnp.asarray(X, jnp.float32), jax.random.PRNGKey(3)
    blocks = [
        BlockwiseParallelJax(**dict(SIZES, q_chunk_size=q, k_chunk_size=k, attn_pdrop=0.2, resid_pdrop=0.3))
        for q, k in ((8, 4), (21, 21))
    ]
    one, two = (block.forward(x, deterministic=False, dropout_rng=rng) for block in blocks)
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_array_equal(blocks[0].forward(x), BlockwiseParallelJax(**SIZES).forward(x))
    assert not np.allclose(one, blocks[0].forward(x), atol=1e-2)
    with pytest.raises(ValueError, match="'dropout_rng' must be a PRNG key"):
        blocks[0].forward(x, deterministic=False)
    with pytest.raises(ValueError, match="'deterministic' must be True in forward_ffn"):
        blocks[0].forward_ffn(x, deterministic=False)


@pytest.mark.slow
def test_half_precision_and_attributes():
    block = BlockwiseParallelJax(**dict(SIZES, dtype=jnp.float16, float32_logits=True))
    x = jnp.asarray(X, jnp.float32)
    out = block.forward(x, KEEP)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, BlockwiseParallelJax(**SIZES).forward(x, KEEP), atol=2e-2)
    plain = BlockwiseParallelJax(**dict(SIZES, dtype=jnp.bfloat16))
    assert bool(jnp.isfinite(plain.forward(x, KEEP)).all())
    for name, value in dict(SIZES, float32_logits=True, activation_function="gelu", causal=True).items():
        assert getattr(block, name) == value


@pytest.mark.parametrize("options, error, match", BAD_BLOCKS)
def test_block_refuses(options, error, match):
    with pytest.raises(error, match=match):
        BlockwiseParallelJax(**dict(SIZES, **options))


@pytest.mark.parametrize("shapes, match", BAD_CALLS)
def test_block_refuses_inputs(shapes, match):
    arrays = [None if shape is None else np.ones(shape, np.float32) for shape in shapes]
    with pytest.raises(ValueError, match=match):
        BlockwiseParallelJax(**SIZES).forward(*arrays)


@pytest.mark.slow
def test_published_examples():
    """Lengths 128 and 100 with chunks of 64."""
    for length, mask in ((128, (1, 1, 1, 128)), (100, (1, 1, 100, 100))):
        block = BlockwiseParallelJax(64, 64, 256, 4, 64, 512)
        x = jax.random.uniform(jax.random.PRNGKey(0), (1, length, 256))
        out = block.forward(x, jnp.ones(mask), jnp.arange(length)[None])
        assert out.shape == x.shape and bool(jnp.isfinite(out).all())


# --- memory ---------------------------------------------------------------------------------------
def temporaries(function, *shapes):
    """Bytes that the compiled program holds beside its inputs and outputs."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "gradients"])
def test_memory_of_the_block_does_not_grow_with_the_square(direction, figure):
    block = BlockwiseParallelJax(**dict(SIZES, q_chunk_size=64, k_chunk_size=64, intermediate_size=512))
    params = block.params

    def call(x):
        return block.apply(params, x)[0].sum()

    used = [
        temporaries(call if direction == "forward" else jax.grad(call), ((1, n, 16), jnp.float32)) for n in (2048, 8192)
    ]
    figure("blockwise block, {}: temporary memory, 8,192 / 2,048 tokens".format(direction), used[1] / used[0], 4.4, "x")
    assert used[1] < 8192 * 512 * 4 < 2 * 8192 * 8192 * 4  # below the network's hidden activation and one head's scores


@pytest.mark.parametrize("direction", [pytest.param("forward", marks=pytest.mark.slow), "gradients"])
def test_the_fused_loss_never_forms_the_logits(direction):
    """Neither in the compiled program's memory nor as a value of the traced one."""
    count, vocabulary = 4096, 2048

    def call(hidden, weight, tokens):
        return blockwise_fused_cross_entropy(hidden, weight, tokens, chunk_size=128)[0]

    if direction == "gradients":
        call = jax.grad(call, (0, 1))
    shapes = ((1, count, 16), jnp.float32), ((vocabulary, 16), jnp.float32), ((1, count), jnp.int32)
    assert temporaries(call, *shapes) < count * vocabulary * 4 / 4
    text = str(jax.make_jaxpr(call)(*(jnp.zeros(*shape) for shape in shapes)))
    assert "128,2048]" in text and "4096,2048]" not in text and "32,1,128,2048]" not in text
