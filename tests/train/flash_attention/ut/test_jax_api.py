"""The JAX function against `jax.nn.dot_product_attention`, keyword by keyword, and under JAX's transformations."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance import Case, make_inputs, run_reference
from flash_attention.core.alibi import alibi_slopes
from flash_attention.jax import FlashAttention, flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
T, S, N, K, H = 40, 40, 4, 2, 16
KEYWORDS = inspect.signature(jax.nn.dot_product_attention).parameters


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


Q, KEY, V = draw(2, T, N, H), draw(2, S, K, H, seed=1), draw(2, S, K, H, seed=2)
LENGTHS = jnp.array([23, 40], jnp.int32)
BOTH = [
    {},
    {"bias": draw(2, N, T, S, seed=3)},
    {"bias": draw(1, N, 1, S, seed=3)},
    {"mask": draw(2, 1, T, S, seed=4) > -1},
    {"mask": draw(1, N, T, S, seed=4) > -1, "bias": draw(1, 1, T, S, seed=3)},
    {"scale": 0.3},
    {"is_causal": True},
    {"query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS},
    {"key_value_seq_lengths": LENGTHS, "is_causal": True},
    {"local_window_size": 5, "is_causal": True},
    {"local_window_size": (3, 9), "mask": jnp.ones((1, 1, T, S), bool)},
    {"implementation": "xla"},
]


def names(call):
    return ",".join(call) or "plain"


@pytest.mark.parametrize("call", BOTH, ids=names)
def test_against_jax_nn(call):
    want = jax.nn.dot_product_attention(Q, KEY, V, **call)
    np.testing.assert_allclose(flash_attention(Q, KEY, V, **call), want, atol=2e-6)
    if "query_seq_lengths" in call:
        return

    def loss(function):
        return jax.grad(lambda q, k, v: (function(q, k, v, **call) ** 2).sum(), (0, 1, 2))(Q, KEY, V)

    for found, wanted in zip(loss(flash_attention), loss(jax.nn.dot_product_attention)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "call", [{}, {"is_causal": True}, {"bias": draw(1, N, T, S)}, {"mask": draw(1, 1, T, S) > -1}], ids=names
)
def test_rank_3_against_jax_nn(call):
    want = jax.nn.dot_product_attention(Q[0], KEY[0], V[0], **call)
    found = flash_attention(Q[0], KEY[0], V[0], **call)
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, atol=2e-6)


def test_window_alone():
    """Against a mask written out: some releases of jax.nn ignore a window that is the only restriction."""
    i, j = np.ogrid[:T, :S]
    mask = jnp.asarray((i - j <= 3) & (j - i <= 9))[None, None]
    want = jax.nn.dot_product_attention(Q, KEY, V, mask=mask)
    np.testing.assert_allclose(flash_attention(Q, KEY, V, local_window_size=(3, 9)), want, atol=2e-6)


def test_every_keyword_of_jax_nn_is_taken():
    ours = inspect.signature(flash_attention).parameters
    assert set(KEYWORDS) <= set(ours)
    for name, parameter in KEYWORDS.items():
        assert ours[name].kind == parameter.kind, name
        if parameter.default is not inspect.Parameter.empty:
            assert ours[name].default == parameter.default, name


@pytest.mark.skipif("return_residual" not in KEYWORDS, reason="this jax has no return_residual")
def test_return_residual_against_jax_nn():
    want = jax.nn.dot_product_attention(Q, KEY, V, is_causal=True, return_residual=True)
    found = flash_attention(Q, KEY, V, is_causal=True, return_residual=True)
    for a, b in zip(found, want):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_residual_is_the_lse_with_heads_last():
    out, lse = flash_attention(Q, KEY, V, return_lse=True)
    assert lse.shape == (2, N, T) and lse.dtype == jnp.float32
    again, residual = flash_attention(Q, KEY, V, return_residual=True)
    np.testing.assert_array_equal(again, out)
    np.testing.assert_array_equal(residual, lse.swapaxes(1, 2))
    scores = jnp.einsum("btnh,bsnh->bnts", Q, jnp.repeat(KEY, N // K, 2)) / np.sqrt(H)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(scores, -1), atol=2e-6)
    one = flash_attention(Q[0], KEY[0], V[0], return_lse=True)[1]
    np.testing.assert_allclose(one, lse[0], atol=1e-6)


def test_the_two_documented_differences():
    """Alignment when T != S, and rows that see no key."""
    q = Q[:, :12]
    top_left = jax.nn.dot_product_attention(q, KEY, V, is_causal=True)
    np.testing.assert_allclose(flash_attention(q, KEY, V, is_causal=True, q_offset=0), top_left, atol=2e-6)
    bottom_right = jax.nn.dot_product_attention(Q, KEY, V, is_causal=True)[:, :12]
    shifted = flash_attention(Q[:, -12:], KEY, V, is_causal=True)
    np.testing.assert_allclose(shifted, jax.nn.dot_product_attention(Q, KEY, V, is_causal=True)[:, -12:], atol=2e-6)
    assert not np.allclose(flash_attention(q, KEY, V, is_causal=True), bottom_right)
    dead = jnp.ones((1, 1, T, S), bool).at[:, :, 3].set(False)
    assert not np.asarray(flash_attention(Q, KEY, V, mask=dead)[:, 3]).any()


CASE = Case(lengths=(60, 90), head_dim=16, band="causal", slopes="alibi", bias="heads", sinks=True, cotangent=True)


def call_of(case, implementation="xla"):
    """(function of (q, k, v, differentiable operands), its arguments) of a conformance case."""
    inputs = make_inputs(case)
    arrays = [jnp.asarray(x) for x in inputs[1:4]]
    wanted = {name: jnp.asarray(inputs.tensors[name]) for name in ("bias", "alibi_slopes", "sinks")}

    def attend(q, k, v, wanted):
        return flash_attention(q, k, v, **wanted, **case.options, implementation=implementation, return_lse=True)

    return attend, (*arrays, wanted)


def assert_near(found, want, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), found, want)


def scalar(function):
    """A loss through both results: the LSE has a cotangent too."""

    def loss(*arguments):
        out, lse = function(*arguments)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    return loss


def test_jit_grad_and_checkpoint():
    attend, arguments = call_of(CASE)
    want = jax.grad(scalar(call_of(CASE, "reference")[0]), (0, 1, 2, 3))(*arguments)
    for function in (attend, jax.jit(attend), jax.checkpoint(attend)):
        assert_near(jax.grad(scalar(function), (0, 1, 2, 3))(*arguments), want, 1e-4)
    assert_near(jax.jit(jax.grad(scalar(jax.checkpoint(attend)), (0, 1, 2, 3)))(*arguments), want, 1e-4)


def test_vmap():
    attend, (q, k, v, wanted) = call_of(CASE)
    many = [jnp.stack([x, x * 0.5, -x]) for x in (q, k, v)]
    want = [attend(a, b, c, wanted) for a, b, c in zip(*many)]
    found = jax.vmap(attend, in_axes=(0, 0, 0, None))(*many, wanted)
    assert_near(found, jax.tree.map(lambda *parts: jnp.stack(parts), *want), 1e-6)
    gradient = jax.grad(scalar(attend))
    found = jax.vmap(gradient, in_axes=(0, 0, None, None))(many[0], many[1], v, wanted)
    assert_near(found, jnp.stack([gradient(a, b, v, wanted) for a, b in zip(*many[:2])]), 1e-5)


def test_scan_over_a_traced_offset():
    """A decoder's loop: one query at a time, its position traced."""
    q, k, v = draw(1, 20, 2, 8), draw(1, 20, 2, 8, seed=1), draw(1, 20, 2, 8, seed=2)
    want = flash_attention(q, k, v, is_causal=True)

    def step(_, i):
        one = jax.lax.dynamic_slice_in_dim(q, i, 1, axis=1)
        return None, flash_attention(one, k, v, is_causal=True, q_offset=i)[:, 0]

    _, found = jax.lax.scan(step, None, jnp.arange(20))
    assert_near(found.swapaxes(0, 1), want, 2e-6)


def test_only_the_lse():
    """A loss on the LSE alone."""
    attend, arguments = call_of(CASE)
    want = jax.grad(lambda *a: (call_of(CASE, "reference")[0](*a)[1] ** 2).sum(), (0, 1))(*arguments)
    assert_near(jax.grad(lambda *a: (attend(*a)[1] ** 2).sum(), (0, 1))(*arguments), want, 1e-4)


def test_integers_are_taken_as_lengths_and_offset():
    want = flash_attention(Q, KEY, V, query_seq_lengths=LENGTHS * 0 + 17, key_value_seq_lengths=LENGTHS * 0 + 9)
    np.testing.assert_array_equal(flash_attention(Q, KEY, V, query_seq_lengths=17, key_value_seq_lengths=9), want)
    want = flash_attention(Q, KEY, V, is_causal=True, q_offset=jnp.int32(-3))
    np.testing.assert_allclose(flash_attention(Q, KEY, V, is_causal=True, q_offset=-3), want, atol=1e-6)


def test_class_is_the_function_in_the_cells_conventions():
    q, k, v = (x.swapaxes(1, 2) for x in (Q, KEY, V))
    discard = np.random.default_rng(0).random((2, 1, T, S)) < 0.3
    layer = FlashAttention(
        H,
        0.2,
        1,
        0,
        "wukong",
        alibi=True,
        causal=True,
        local_window_size=(30, 0),
        scale=0.2,
        block_size=16,
        return_lse=True,
    )
    out, lse = layer(q, k, v, jnp.asarray(discard), deterministic=False, dropout_seed=9)
    want = flash_attention(
        Q, KEY, V, mask=~discard, alibi_slopes=alibi_slopes(N), dropout_rate=0.2, dropout_seed=9, is_causal=True,
        local_window_size=(30, 0), scale=0.2, prev_block_num=1, next_block_num=0, block_size=16, return_lse=True,
    )  # fmt: skip
    np.testing.assert_array_equal(out.swapaxes(1, 2), want[0])
    np.testing.assert_array_equal(lse, want[1])


def test_class_uses_an_alibi_mask_as_it_is():
    q, k, v = (x.swapaxes(1, 2) for x in (Q, KEY, V))
    alibi_mask = draw(1, N, 1, S, seed=5)
    found = FlashAttention(H, alibi=True)(q, k, v, alibi_mask=alibi_mask)
    np.testing.assert_array_equal(found.swapaxes(1, 2), flash_attention(Q, KEY, V, bias=alibi_mask))


def test_class_drops_in_training_only():
    q, k, v = (x.swapaxes(1, 2) for x in (Q, KEY, V))
    layer = FlashAttention(H, 0.5)
    np.testing.assert_array_equal(layer(q, k, v), FlashAttention(H)(q, k, v))
    key = jax.random.key(3)
    by_key = layer(q, k, v, deterministic=False, dropout_rng=key)
    seed = jax.random.bits(key, (), "uint32")
    np.testing.assert_array_equal(by_key, layer(q, k, v, deterministic=False, dropout_seed=seed))
    assert not np.allclose(by_key, layer(q, k, v))


def test_float64_is_the_judge():
    case = Case(lengths=(30, 40), head_dim=8, band="window", logits="cap")
    inputs = make_inputs(case)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        q, k, v = (np.asarray(x, np.float64) for x in inputs[1:4])
        out, lse = flash_attention(q, k, v, implementation="reference", return_lse=True, **case.options)
        assert out.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(out, run_reference(case)["out"], rtol=1e-12, atol=1e-13)
