"""Wrappers of tokens and vectors in JAX: embeddings, memory, mems, logits, the loss, cached generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.transformer import DECODING

from flash_attention.jax import (
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 11, (2, 10)).astype(np.int32)


def decoder(**options):
    return Decoder(16, 2, heads=2, attn_dim_head=8, **options)


def model(stack=None, **options):
    return TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack or decoder(), **options)


def dense(params, x):
    return x @ params["weight"].T + params.get("bias", 0.0)


def test_token_embedding_positions_and_logits():
    net = model(emb_dim=12, post_emb_norm=True)
    params = net.params
    x = params["token_emb"]["weight"][TOKENS] + params["pos_emb"]["weight"][:10] * 12**-0.5
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    out = net.attn_layers(dense(params["project_emb"], x), params=params["attn_layers"])
    np.testing.assert_allclose(net(TOKENS), dense(params["to_logits"], out), atol=2e-5)
    logits, embeddings = net(TOKENS, return_logits_and_embeddings=True)
    np.testing.assert_allclose(embeddings, out, atol=2e-5)
    np.testing.assert_array_equal(net(TOKENS, return_embeddings=True), embeddings)
    shifted = net(TOKENS, pos=np.arange(10) + 3)
    assert float(jnp.abs(shifted - logits).max()) > 1e-3


@pytest.mark.slow
def test_tied_embedding_sinusoidal_positions_and_sums():
    net = model(tie_embedding=True, scaled_sinu_pos_emb=True)
    params = net.params
    half = 10000.0 ** (-np.arange(8) / 8)
    angle = np.arange(10)[:, None] * half
    waves = np.concatenate([np.sin(angle), np.cos(angle)], -1) * np.asarray(params["pos_emb"]["scale"])
    added = rng.standard_normal((2, 10, 16)).astype(np.float32)
    x = params["token_emb"]["weight"][TOKENS] + waves + added
    want = net.attn_layers(x, params=params["attn_layers"]) @ params["token_emb"]["weight"].T
    np.testing.assert_allclose(net(TOKENS, sum_embeds=jnp.asarray(added)), want, atol=2e-5)


@pytest.mark.parametrize("options, has", [({}, True), ({"alibi_pos_bias": True}, True), ({"rel_pos_bias": True}, False),
                                          ({"rotary_pos_emb": True}, False)])  # fmt: skip
def test_where_an_absolute_embedding_is_used(options, has):
    assert ("pos_emb" in jax.eval_shape(model(decoder(**options)).init, jax.random.PRNGKey(0))) == has
    with_none = model(decoder(**options), use_abs_pos_emb=False)
    assert "pos_emb" not in jax.eval_shape(with_none.init, jax.random.PRNGKey(0))


def test_memory_tokens_and_prepended_embeddings():
    """Memory tokens are seen and removed, whatever the mask; vectors in front have outputs of their own."""
    net = model(num_memory_tokens=3, use_abs_pos_emb=False)
    params, mask = net.params, np.ones((2, 10), bool)
    mask[0, 6:] = False
    x = params["token_emb"]["weight"][TOKENS]
    memory = jnp.broadcast_to(params["memory_tokens"], (2, 3, 16))
    wide = np.pad(mask, ((0, 0), (3, 0)), constant_values=True)
    out = net.attn_layers(jnp.concatenate([memory, x], 1), mask=wide, params=params["attn_layers"])[:, 3:]
    np.testing.assert_allclose(net(TOKENS, mask=mask, return_embeddings=True), out, atol=2e-5)
    front = jnp.asarray(rng.standard_normal((2, 2, 16)), jnp.float32)
    assert net(TOKENS, prepend_embeds=front).shape == (2, 12, 11)


@pytest.mark.slow
def test_mems_equal_the_whole_sequence():
    """With rotary positions the second half, given the hidden states of the first, has the whole's outputs."""
    net = model(decoder(rotary_pos_emb=True), max_mem_len=8)
    whole = net(TOKENS)
    first, mems = net(TOKENS[:, :6], return_mems=True)
    second, mems = net(TOKENS[:, 6:], mems=mems, return_mems=True)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=2e-5)
    assert [x.shape for x in mems] == [(2, 8, 16)] * 2


def test_weights_of_attention():
    net = model()
    logits, weights = net(TOKENS, return_attn=True)
    np.testing.assert_allclose(logits, net(TOKENS), atol=2e-5)
    assert [x.shape for x in weights] == [(2, 2, 10, 10)] * 2
    np.testing.assert_allclose(weights[0].sum(-1), 1.0, atol=1e-5)
    assert not np.triu(np.asarray(weights[0]), 1).any()


def test_continuous_wrapper():
    net = ContinuousTransformerWrapper(
        dim_in=5, dim_out=3, max_seq_len=12, attn_layers=Encoder(16, 1, heads=2, attn_dim_head=8)
    )
    x = jnp.asarray(rng.standard_normal((2, 7, 5)), jnp.float32)
    params = net.params
    inside = dense(params["project_in"], x) + params["pos_emb"]["weight"][:7] / 4.0
    out = net.attn_layers(inside, params=params["attn_layers"])
    np.testing.assert_allclose(net(x), dense(params["project_out"], out), atol=2e-5)
    np.testing.assert_allclose(net(x, return_embeddings=True), out, atol=2e-5)
    assert net(x, return_attn=True)[1][0].shape == (2, 2, 7, 7)


def decoding(name):
    """A model of `DECODING`, and the keywords that give it a context."""
    stack, options = DECODING[name]
    layers = Decoder(**dict({"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}, **stack))
    net = TransformerWrapper(attn_layers=layers, **dict({"num_tokens": 11, "max_seq_len": 16}, **options))
    context = np.random.default_rng(1).standard_normal((2, 5, 16)).astype(np.float32)
    return net, {"context": context} if stack.get("cross_attend") else {}


def slow_but(*fast):
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in DECODING]


@pytest.mark.parametrize("name", slow_but("alibi", "cross"))
def test_cached_decoding_equals_the_whole_sequence(name):
    """A prompt, single tokens, and two at once; places that no token has reached yet are hidden."""
    net, seeing = decoding(name)
    step = jax.jit(lambda tokens, cache: net(tokens, cache=cache, **seeing))
    logits, cache = net(TOKENS[:, :6], cache=12, **seeing)
    outs = [logits]
    for start, stop in ((6, 7), (7, 8), (8, 10)):
        logits, cache = step(TOKENS[:, start:stop], cache)
        outs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), net(TOKENS, **seeing), atol=5e-5)


@pytest.mark.parametrize("name", slow_but("alibi"))
def test_generated_tokens_do_not_depend_on_the_cache(name):
    net, seeing = decoding(name)
    wrapper, prompt = AutoregressiveWrapper(net, pad_value=10), TOKENS[:, :4]
    assert wrapper.explain().endswith("generation caches the keys and values of self-attention")
    cached, whole = (
        wrapper.generate(prompt, 6, temperature=0.9, top_k=5, seed=3, cache_kv=kept, **seeing) for kept in (None, False)
    )
    assert cached.shape == (2, 6) and cached.dtype == jnp.int32
    np.testing.assert_array_equal(cached, whole)


@pytest.mark.slow
def test_greedy_tokens_and_the_end():
    """Greedy tokens are the largest logits; nothing but padding after the end."""
    wrapper = AutoregressiveWrapper(model(decoder(alibi_pos_bias=True)), pad_value=10)
    prompt = TOKENS[:, :4]
    drawn = wrapper.generate(prompt, 6, temperature=0.9, top_k=5, seed=3)
    greedy = wrapper.generate(prompt[0], 3, temperature=0.0)
    tokens = list(prompt[0])
    for token in np.asarray(greedy):
        assert token == int(wrapper.net(np.array([tokens]), params=wrapper.params["net"])[0, -1].argmax())
        tokens.append(token)
    end = int(drawn[0, 1])
    stopped = np.asarray(wrapper.generate(prompt, 6, temperature=0.9, top_k=5, seed=3, eos_token=end))
    first = list(np.asarray(drawn[0])).index(end)
    assert (stopped[0, first + 1 :] == 10).all()


@pytest.mark.slow
def test_loss_and_training():
    wrapper = AutoregressiveWrapper(model())
    tokens = np.array(TOKENS)
    tokens[1, 7:] = -100
    logits = np.asarray(wrapper.net(np.where(tokens < 0, 0, tokens)[:, :-1], params=wrapper.params["net"]), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = [-np.log(chances[b, i, tokens[b, i + 1]]) for b in range(2) for i in range(9) if tokens[b, i + 1] >= 0]
    np.testing.assert_allclose(wrapper(tokens), np.mean(losses), rtol=1e-5)
    step = jax.jit(jax.value_and_grad(lambda params: wrapper(tokens, params=params)))
    params, seen = wrapper.params, []
    for _ in range(4):
        loss, grads = step(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        seen.append(float(loss))
    assert seen[-1] < seen[0]


BAD_MODELS = [
    ({"tie_embedding": True, "logits_dim": 7}, "products with the token embedding"),
    ({"tie_embedding": True, "emb_dim": 8}, "'emb_dim' must be the stack's dim"),
    ({"scaled_sinu_pos_emb": True, "use_abs_pos_emb": False}, "'scaled_sinu_pos_emb' must be False"),
    ({"num_token": 3}, "'num_token' must be one of num_tokens"),
    ({"attn_layers": 3}, "'attn_layers' must be an Encoder"),
]


@pytest.mark.parametrize("options, match", BAD_MODELS)
def test_refuses_models(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        TransformerWrapper(**dict({"num_tokens": 11, "max_seq_len": 16, "attn_layers": decoder()}, **options))


def test_refuses_calls():
    net, wrapper = model(), AutoregressiveWrapper(model())
    for call, match in (
        (lambda: net(np.zeros((2, 17), np.int32)), "at most max_seq_len = 16"),
        (lambda: net(TOKENS, return_mems=True), "'return_mems' must be False when max_mem_len is 0"),
        (lambda: net(TOKENS, return_attn=True, return_mems=True), "'return_attn' must be False"),
        (lambda: net(TOKENS.astype(np.float32)), "'x' must be an int array"),
        (lambda: model(use_abs_pos_emb=False)(TOKENS, pos=np.arange(10)), "'pos' must be left out"),
        (lambda: wrapper.generate(TOKENS, 7), "at most max_seq_len = 16"),
        (lambda: model(Encoder(16, 1))(TOKENS, cache=12), "the stack is not causal"),
        (lambda: net(TOKENS, cache=9), "'cache' must be an int >= 10"),
        (lambda: net(TOKENS, cache=12, mask=np.ones((2, 10))), "'mask' must be left out with a cache"),
        (lambda: AutoregressiveWrapper(model(Encoder(16, 1))), "'net' must be causal"),
        (
            lambda: AutoregressiveWrapper(model(decoder(shift_tokens=1))).generate(TOKENS, 2, cache_kv=True),
            "shift_tokens reads the tokens before",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            call()


def test_explain_and_print():
    wrapper = AutoregressiveWrapper(model(decoder(shift_tokens=1)))
    assert "generation caches nothing: shift_tokens reads the tokens before" in wrapper.explain()
    assert "TransformerWrapper(num_tokens=11, max_seq_len=16)" in repr(wrapper)
    assert wrapper.num_parameters() == sum(x.size for x in jax.tree.leaves(wrapper.params))
