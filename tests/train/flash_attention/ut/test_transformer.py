"""The transformer wrappers in JAX: every option against a dense formula in float64, illegal pairs, fused == formed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax, transformer_formula
from support.layers import check_layer
from support.transformer import (
    ATTENTION,
    CASES,
    COMBINED,
    DIM,
    FEED_FORWARD,
    HEAD,
    HEADS,
    ILLEGAL,
    LAYERS,
    B,
    N,
    arguments,
    draws,
    masks,
    randomised,
    stack_of,
)

from flash_attention.core.mechanisms.weights import flatten_params
from flash_attention.jax import (
    Attention,
    AttentionLayers,
    CrossAttender,
    Decoder,
    Encoder,
    FeedForward,
    dilated_attention,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
CLASSES = {ATTENTION: Attention, FEED_FORWARD: FeedForward, LAYERS: AttentionLayers}
X, CONTEXT, D_OUT = draws()


def check_stack(extra, with_masks):
    """Output and all gradients of a stack of these options against the formula."""
    layer = AttentionLayers(**arguments(extra))
    layer.params = jax.tree.map(jnp.asarray, randomised(layer.params))
    crosses = "c" in layer.stack.layers.order
    mask, context_mask, attn_mask = masks() if with_masks else (None, None, None)
    context_mask = context_mask if crosses else None

    def call(x, context=None, params=None):
        return layer(x, context, mask, context_mask, attn_mask, params=params)

    call.params = layer.params
    arrays = [X, CONTEXT] if crosses else [X]
    formula = functools.partial(
        _formula, stack_of(extra), mask=mask, context_mask=context_mask, attn_mask=attn_mask
    )  # fmt: skip
    check_layer(in_jax.run_layer(_Call(call), arrays, D_OUT), formula, layer.params, arrays, D_OUT)


class _Call:
    """A function with parameters, as `in_jax.run_layer` calls a layer."""

    def __init__(self, call):
        self.call, self.params = call, call.params

    def __call__(self, *arrays, params):
        return self.call(*arrays, params=params)


def _formula(stack, params, x, context=None, **given):
    return transformer_formula.run_stack(stack, params, x, context, **given)


@pytest.mark.parametrize("name", ["decoder", "formed", pytest.param("cross", marks=pytest.mark.slow)])
def test_combined_options_forward(name):
    """The output alone, near the formula in float32: the fast half of the test below."""
    layer, crosses = AttentionLayers(**arguments(COMBINED[name])), "c" in stack_of(COMBINED[name]).layers.order
    params = jax.tree.map(jnp.asarray, randomised(layer.params))
    mask, context_mask, attn_mask = masks()
    x, context = jnp.asarray(X, jnp.float32), jnp.asarray(CONTEXT, jnp.float32) if crosses else None
    given = (context, mask, context_mask if crosses else None, attn_mask)
    want = jax.jit(functools.partial(transformer_formula.run_stack, stack_of(COMBINED[name])))(params, x, *given)
    np.testing.assert_allclose(jax.jit(layer)(x, *given, params=params), want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
def test_combined_options(name):
    check_stack(COMBINED[name], with_masks=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.option)
def test_each_option(case):
    check_stack(case.arguments, with_masks=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.option)
def test_each_option_matters(case):
    """It has weights of its own, or the output with the same weights is another."""
    layer, plain = AttentionLayers(**arguments(case.arguments)), AttentionLayers(**arguments(case.without))
    names = [{name: x.shape for name, x in flatten_params(made.params).items()} for made in (layer, plain)]
    if names[0] != names[1]:
        return
    params = plain.params if case.option != "deepnorm" else layer.params
    outputs = []
    for made in (layer, plain):
        context = jnp.asarray(CONTEXT, jnp.float32) if "c" in made.stack.layers.order else None
        outputs.append(made(jnp.asarray(X, jnp.float32), context, params=params))
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 1e-4


def test_every_option_is_tested():
    """The table names each option that changes a result without dropping, and the combined stacks hold all but few."""
    import dataclasses

    from flash_attention.core.transformer.attention import AttentionOptions
    from flash_attention.core.transformer.layers import FeedForwardOptions, LayersOptions

    elsewhere = {"dim", "dim_head", "heads", "depth", "dropout", "flash", "attention", "attention_options",
                 "zero_init_output", "zero_init_branch_output", "layer_dropout", "recompute"}  # fmt: skip
    for owner, options in ((ATTENTION, AttentionOptions), (FEED_FORWARD, FeedForwardOptions), (LAYERS, LayersOptions)):
        names = {field.name for field in dataclasses.fields(options)} - elsewhere
        if owner == LAYERS:
            names -= {"causal"}
        assert names == {case.option for case in CASES if case.owner == owner}


@pytest.mark.parametrize("owner, options, match", ILLEGAL, ids=[str(sorted(row[1])) for row in ILLEGAL])
def test_illegal_options_say_why(owner, options, match):
    sizes = {ATTENTION: {"dim": DIM, "heads": HEADS}, FEED_FORWARD: {"dim": DIM}, LAYERS: {"dim": DIM, "depth": 2}}
    with pytest.raises((ValueError, TypeError), match=match):
        CLASSES[owner](**dict(sizes[owner], **options))


@pytest.mark.parametrize("cls", [Encoder, Decoder, CrossAttender])
def test_what_a_class_fixes_is_no_argument(cls):
    name = next(iter(cls.fixed))
    with pytest.raises(ValueError, match="'{}' must be left out".format(name)):
        cls(DIM, 1, **{name: True})


def test_fused_equals_formed_with_dropout():
    """The same numbers, gradients included, whichever way the softmax is computed."""
    options = dict(kv_heads=2, causal=True, num_mem_kv=3, max_attend_past=4, dropout=0.3, value_dim_head=5)
    fused = Attention(DIM, HEAD, HEADS, **options)
    formed = Attention(DIM, HEAD, HEADS, flash=False, **options)
    assert fused.explain().startswith("fused:") and formed.explain().startswith("formed:")
    x, key = jnp.asarray(X, jnp.float32), jax.random.PRNGKey(3)

    def results(layer):
        @jax.jit
        def run(params, x):
            call = functools.partial(layer, mask=masks()[0], deterministic=False, dropout_rng=key)
            out, pullback = jax.vjp(lambda params, x: call(x, params=params), params, x)
            return out, pullback(jnp.asarray(D_OUT, jnp.float32))

        return run(fused.params, x)

    got, want = results(fused), results(formed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    assert float(jnp.abs(got[0] - fused(x, mask=masks()[0])).max()) > 1e-2


@pytest.mark.slow
def test_long_rows_are_formed_in_tiles():
    """More queries than a tile holds, and the memory of the backward pass is that of tiles, not of all scores."""
    layer = Attention(8, 4, 2, causal=True, talking_heads=True)
    x = jax.ShapeDtypeStruct((1, 2048, 8), jnp.float32)

    def loss(params, x):
        return layer(x, params=params).sum()

    compiled = jax.jit(jax.grad(loss)).lower(layer.params, x).compile()
    one_matrix = 2 * 2048 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one_matrix
    small = jnp.asarray(np.random.default_rng(0).standard_normal((1, 300, 8)), jnp.float32)
    np.testing.assert_allclose(layer(small)[:, :150], layer(small[:, :150]), atol=1e-5)


@pytest.mark.parametrize(
    "attention, options, plain",
    [
        ("triangle", {}, {}),
        ("local", {"local_window_size": (3, 0)}, {"max_attend_past": 3}),
        (functools.partial(dilated_attention, segment_size=N, dilation_rate=1), {}, {}),
    ],
    ids=["triangle", "local", "dilated"],
)
def test_attention_by_mechanism(attention, options, plain):
    x = jnp.asarray(X, jnp.float32)
    layer = Attention(DIM, HEAD, HEADS, True, attention=attention, attention_options=options or None)
    want = Attention(DIM, HEAD, HEADS, True, **plain)(x, params=layer.params)
    np.testing.assert_allclose(layer(x), want, atol=1e-5)
    assert layer.explain().startswith("mechanism:")


def test_mechanisms_refuse_with_their_reason():
    x = jnp.asarray(X, jnp.float32)
    with pytest.raises(ValueError, match="'local_window_size' must be given"):
        Attention(DIM, attention="local")(x)
    with pytest.raises(ValueError, match="'mask' must be left out"):
        Attention(DIM, causal=True, attention="landmark")(x, mask=masks()[0])
    with pytest.raises(ValueError, match="'causal' must be True"):
        Encoder(DIM, 1, attn_attention="triangle")(x)
    with pytest.raises(ValueError, match="'alibi_slopes' must be left out"):
        Decoder(DIM, 1, alibi_pos_bias=True, attn_attention="landmark")(x)


def test_masks_of_every_rank_and_rows_that_see_nothing():
    layer = Attention(DIM, HEAD, HEADS)
    x, attn_mask = jnp.asarray(X, jnp.float32), np.array(masks()[2])
    attn_mask[:, 4] = False
    outs = [layer(x, attn_mask=m) for m in (attn_mask, attn_mask[None], np.repeat(attn_mask[None], B, 0))]
    for out in outs:
        np.testing.assert_allclose(out, outs[0], atol=1e-6)
    assert not np.asarray(outs[0][:, 4]).any()
    np.testing.assert_allclose(
        layer(x, attn_mask=attn_mask[0]), layer(x, attn_mask=np.repeat(attn_mask[:1], HEADS, 0)), atol=1e-6
    )
    with pytest.raises(ValueError, match="'attn_mask' must be of shape"):
        layer(x, attn_mask=attn_mask[:, :4])
    with pytest.raises(ValueError, match="'mask' must be of shape"):
        layer(x, mask=np.ones((B, N + 1)))


def test_stack_refuses_missing_and_ignored_inputs():
    x = jnp.asarray(X, jnp.float32)
    with pytest.raises(ValueError, match="'context' must be given"):
        CrossAttender(DIM, 1)(x)
    with pytest.raises(ValueError, match="'context' must be left out"):
        Decoder(DIM, 1)(x, x)
    with pytest.raises(ValueError, match="'dropout_rng' must be a PRNG key"):
        Decoder(DIM, 1, ff_dropout=0.1)(x, deterministic=False)


@pytest.mark.slow
def test_training_details():
    """Dropout acts in training, layers are skipped, branches begin at 0, recompute changes nothing."""
    x, key = jnp.asarray(X, jnp.float32), jax.random.PRNGKey(0)
    quiet = Decoder(DIM, 1, heads=HEADS, zero_init_branch_output=True)
    centred = x - x.mean(-1, keepdims=True)
    want = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(quiet(x), want, atol=1e-5)
    skipping = Decoder(DIM, 3, heads=HEADS, layer_dropout=0.5, ff_dropout=0.2)
    first = skipping(x, deterministic=False, dropout_rng=key)
    assert float(jnp.abs(first - skipping(x)).max()) > 1e-2
    np.testing.assert_array_equal(first, skipping(x, deterministic=False, dropout_rng=key))
    plain = Decoder(DIM, 2, heads=HEADS, alibi_pos_bias=True, residual_attn=True)
    again = Decoder(DIM, 2, heads=HEADS, alibi_pos_bias=True, residual_attn=True, recompute=True)
    grads = [jax.jit(jax.grad(lambda p, s=s: s(x, params=p).sum()))(plain.params) for s in (plain, again)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


@pytest.mark.slow
def test_decoder_is_causal():
    layer = Decoder(DIM, 2, heads=HEADS, shift_tokens=1, alibi_pos_bias=True, attn_num_mem_kv=1)
    weight = jnp.asarray(D_OUT[:, 4], jnp.float32)  # of a plain sum LayerNorm leaves no gradient
    grad = jax.jit(jax.grad(lambda x: (layer(x)[:, 4] * weight).sum()))(jnp.asarray(X, jnp.float32))
    assert np.asarray(grad[:, :5]).any(axis=-1).all() and not np.asarray(grad[:, 5:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", COMBINED)
def test_half_precision(name, dtype):
    """Near float32's result, and finite."""
    layer = AttentionLayers(**arguments(COMBINED[name]), dtype=dtype)
    exact = AttentionLayers(**arguments(COMBINED[name]))
    context = jnp.asarray(CONTEXT, jnp.float32) if "c" in layer.stack.layers.order else None
    x = jnp.asarray(X, jnp.float32)
    out = layer(x, context, params=exact.params)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), exact(x, context), atol=0.05 if dtype == jnp.float16 else 0.3)


def test_print_and_counts():
    layer = Decoder(DIM, 2, heads=HEADS, attn_dim_head=HEAD, attn_talking_heads=True)
    size = sum(x.size for x in jax.tree.leaves(layer.params))
    assert layer.num_parameters() == size
    text = repr(layer)
    assert text.startswith("Decoder(dim=16, depth=2, heads=4, causal=True)")
    assert "  0, 2: Attention(dim=16, dim_head=8, heads=4, causal=True, talking_heads=True)" in text
    assert "{:,} parameters".format(size) in text
    assert layer.explain().startswith("layers 0, 2 (Attention): formed: talking_heads needs whole rows")
