"""Cached decoding of the wrappers in MindSpore: the logits and tokens of the whole sequence, and JAX's tokens."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support import in_mindspore
from support.transformer import DECODING

from flash_attention.core.mechanisms.weights import unflatten_params
from flash_attention.nn import AutoregressiveWrapper, Decoder, TransformerWrapper, weights_of

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 11, (2, 10)).astype(np.int32)
CONTEXT = rng.standard_normal((2, 5, 16)).astype(np.float32)


def made(name):
    """The decoder of a row of `DECODING`, and the context that it reads or None."""
    stack, options = DECODING[name]
    layers = Decoder(engine="portable", **dict({"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}, **stack))
    net = TransformerWrapper(attn_layers=layers, **dict({"num_tokens": 11, "max_seq_len": 16}, **options))
    return net.set_train(False), CONTEXT if stack.get("cross_attend") else None


def called(net, tokens, context, cache):
    """``(logits, cache)`` of the next tokens."""
    context = None if context is None else Tensor(context)
    cache = cache if isinstance(cache, int) else ms.mutable(cache)
    return net(
        Tensor(tokens), None, context, None, None, False, False, False, None, False, None, None, None, cache
    )  # fmt: skip


# Every length is compiled in graph mode: fewer of them there.
PARTS = {"pynative": ((0, 5), (5, 6), (6, 7), (7, 8), (8, 10)), "graph": ((0, 9), (9, 10))}


def cases(*fast, graph=tuple(DECODING)):
    """Rows of `DECODING` in both modes, in graph mode those of ``graph``; all but the ``fast`` pairs are slow."""
    return [
        pytest.param(name, mode, marks=[] if (name, mode) in fast else pytest.mark.slow)
        for name in DECODING
        for mode in in_mindspore.MODES
        if mode == "pynative" or name in graph
    ]


@pytest.mark.parametrize("name, mode", cases(("alibi", "pynative")))
def test_cached_decoding_equals_the_whole_sequence(name, mode):
    """A prompt, single tokens, and (in PyNative) two at once; places that no token has reached yet are hidden."""
    net, context = made(name)
    with in_mindspore.mode(mode):
        want = net(Tensor(TOKENS), None, None if context is None else Tensor(context)).asnumpy()
        cache, outs = 12, []
        for start, stop in PARTS[mode]:
            logits, cache = called(net, TOKENS[:, start:stop], context, cache)
            outs.append(logits.asnumpy())
    np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=5e-5)
    assert int(cache[0].asnumpy()) == 10 + net.memories and len(cache[1]) == 2


@pytest.mark.parametrize("name, mode", cases(graph=tuple(DECODING)[::3]))
def test_generated_tokens_do_not_depend_on_the_cache(name, mode):
    """Cached or not, and in JAX with the same weights."""
    pytest.importorskip("jax")
    import flash_attention.jax as twins

    net, context = made(name)
    wrapper, seeing = AutoregressiveWrapper(net, pad_value=10), None if context is None else Tensor(context)
    assert wrapper.explain().endswith("generation caches the keys and values of self-attention")
    options = {"temperature": 0.9, "top_k": 5, "seed": 3}
    with in_mindspore.mode(mode):
        cached, whole = (
            wrapper.generate(Tensor(TOKENS[:, :5]), 6, context=seeing, cache_kv=kept, **options).asnumpy()
            for kept in (None, False)
        )
    np.testing.assert_array_equal(cached, whole)
    stack, more = DECODING[name]
    layers = twins.Decoder(**dict({"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}, **stack))
    twin = twins.TransformerWrapper(attn_layers=layers, **dict({"num_tokens": 11, "max_seq_len": 16}, **more))
    twin = twins.AutoregressiveWrapper(twin, pad_value=10)
    twin.params = {"net": unflatten_params(weights_of(net))}
    np.testing.assert_array_equal(cached, twin.generate(TOKENS[:, :5], 6, context=context, **options))


@pytest.mark.slow
def test_half_precision():
    """The cache has the stack's dtype; its numbers are those of the whole sequence, rounded."""
    stack = Decoder(16, 2, heads=2, attn_dim_head=8, rotary_pos_emb=True, dtype=ms.float16, engine="portable")
    net = TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack).set_train(False)
    first, cache = called(net, TOKENS[:, :7], None, 10)
    second, cache = called(net, TOKENS[:, 7:], None, cache)
    assert first.dtype == ms.float16 and all(x.dtype == ms.float16 for pair in cache[1] for x in pair)
    got = np.concatenate([first.asnumpy(), second.asnumpy()], 1)
    np.testing.assert_allclose(got, net(Tensor(TOKENS)).asnumpy(), atol=1e-2)


def test_one_compilation_for_all_tokens():
    """In graph mode a token compiles nothing that the one before has compiled."""
    net, _ = made("learned")
    with in_mindspore.mode("graph"):
        cache, compiled = 10, []
        for place in range(4, 7):
            _, cache = called(net, TOKENS[:, :4] if place == 4 else TOKENS[:, place - 1 : place], None, cache)
            compiled.append(len(net.compile_cache))
    assert compiled == [1, 2, 2]


def test_refuses():
    net, _ = made("learned")
    tokens = Tensor(TOKENS)
    for arguments, match in (
        ((None, None, None, None, False, False, False, None, True), "'return_attn' must be left out with a cache"),
        ((Tensor(np.ones((2, 10))),) + (None,) * 3 + (False,) * 3 + (None, False), "'mask' must be left out"),
    ):
        with pytest.raises(ValueError, match=match):
            net(tokens, *arguments, None, None, None, 12)
    with pytest.raises(ValueError, match="'cache' must be an int >= 10"):
        called(net, TOKENS, None, 9)
    stack = Decoder(16, 1, heads=2, shift_tokens=1)
    shifting = TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack)
    with pytest.raises(ValueError, match="'cache' must be left out .shift_tokens reads the tokens before"):
        called(shifting, TOKENS, None, 12)
    wrapper = AutoregressiveWrapper(shifting)
    assert "generation caches nothing: shift_tokens reads the tokens before" in wrapper.explain()
    with pytest.raises(ValueError, match="'cache_kv' must be None or False .shift_tokens"):
        wrapper.generate(Tensor(TOKENS), 2, cache_kv=True)
    assert wrapper.generate(Tensor(TOKENS[:, :3]), 2, temperature=0).shape == (2, 2)
