"""The transformer wrappers in MindSpore: the twin's numbers with its weights, graphs, training, checkpoints, tokens."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support import in_mindspore
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
    arguments,
    draws,
    masks,
    randomised,
)

from flash_attention.core.mechanisms.weights import unflatten_params
from flash_attention.nn import (
    Attention,
    AttentionLayers,
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    FeedForward,
    TransformerWrapper,
    load_weights,
    weights_of,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
MODES = ["pynative", pytest.param("graph", marks=pytest.mark.slow)]
CLASSES = {ATTENTION: Attention, FEED_FORWARD: FeedForward, LAYERS: AttentionLayers}
X, CONTEXT, D_OUT = draws()
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 10)).astype(np.int32)


class _Masked(nn.Cell):
    """A stack with masks that are constants, so that its inputs are all float."""

    def __init__(self, stack, crosses):
        super().__init__()
        self.stack, self.crosses = stack, crosses
        self.mask, self.context_mask, self.attn_mask = (Tensor(mask) for mask in masks())

    def construct(self, *tensors):
        if self.crosses:
            return self.stack(tensors[0], tensors[1], self.mask, self.context_mask, self.attn_mask)
        return self.stack(tensors[0], None, self.mask, None, self.attn_mask)


def check_twin(extra, mode):
    """Output and all gradients are those of the JAX stack with the same weights and masks."""
    pytest.importorskip("jax")
    import jax
    import jax.numpy as jnp
    from support import in_jax

    from flash_attention.jax import AttentionLayers as Twin

    cell, twin = AttentionLayers(engine="portable", **arguments(extra)), Twin(**arguments(extra))
    weights = randomised(unflatten_params(weights_of(cell)))
    load_weights(cell, weights)
    crosses = "c" in cell.stack.layers.order
    mask, context_mask, attn_mask = masks()
    arrays = [X, CONTEXT] if crosses else [X]
    with in_mindspore.mode(mode):
        got = in_mindspore.run_layer(_Masked(cell, crosses), arrays, D_OUT)

    class Call:
        params = jax.tree.map(jnp.asarray, weights)

        def __call__(self, x, context=None, params=None):
            return twin(x, context, mask, context_mask if crosses else None, attn_mask, params=params)

    want = in_jax.run_layer(Call(), arrays, D_OUT)
    names = {"stack." + name: x for name, x in want[2].items()}
    assert set(got[2]) == set(names)
    pairs = [("out", got[0], want[0])] + [("input", a, b) for a, b in zip(got[1], want[1])]
    for name, mine, other in pairs + [(name, got[2][name], names[name]) for name in names]:
        bound = 1e-4 * max(1.0, np.abs(other).max())
        np.testing.assert_allclose(mine, other, atol=bound, err_msg=name)


@pytest.mark.parametrize("name, mode", [
    pytest.param(name, mode, marks=[] if (name, mode) == ("decoder", "pynative") else pytest.mark.slow)
    for name in COMBINED for mode in in_mindspore.MODES
])  # fmt: skip
def test_combined_options_equal_the_twin(name, mode):
    check_twin(COMBINED[name], mode)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.option)
def test_each_option_equals_the_twin(case):
    check_twin(case.arguments, "pynative")


@pytest.mark.parametrize("owner, options, match", ILLEGAL, ids=[str(sorted(row[1])) for row in ILLEGAL])
def test_illegal_options_say_why(owner, options, match):
    sizes = {ATTENTION: {"dim": DIM, "heads": HEADS}, FEED_FORWARD: {"dim": DIM}, LAYERS: {"dim": DIM, "depth": 2}}
    with pytest.raises((ValueError, TypeError), match=match):
        CLASSES[owner](**dict(sizes[owner], **options))


def test_fused_equals_formed_with_dropout():
    """In training both paths drop the same places, also among the learned keys."""
    options = dict(kv_heads=2, causal=True, num_mem_kv=3, max_attend_past=4, dropout=0.3, value_dim_head=5)
    fused = Attention(DIM, HEAD, HEADS, engine="portable", **options)
    formed = Attention(DIM, HEAD, HEADS, engine="portable", flash=False, **options)
    load_weights(formed, weights_of(fused))
    assert fused.explain().startswith("fused:") and formed.explain().startswith("formed:")
    x = Tensor(X.astype(np.float32))
    plain = fused(x).asnumpy()
    np.testing.assert_allclose(formed(x).asnumpy(), plain, atol=2e-5)
    formed.salt = fused.salt  # else each Cell drops places of its own
    outs = [cell.set_train()(x).asnumpy() for cell in (fused, formed)]
    np.testing.assert_allclose(outs[0], outs[1], atol=2e-5)
    assert np.abs(outs[0] - plain).max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_attention_by_mechanism(mode):
    x = Tensor(X.astype(np.float32))
    local = Attention(DIM, HEAD, HEADS, True, attention="local", attention_options={"local_window_size": (3, 0)})
    plain = Attention(DIM, HEAD, HEADS, True, max_attend_past=3, engine="portable")
    load_weights(plain, weights_of(local))
    with in_mindspore.mode(mode):
        np.testing.assert_allclose(local(x).asnumpy(), plain(x).asnumpy(), atol=1e-5)
        with pytest.raises(ValueError, match="'causal' must be True"):
            Encoder(DIM, 1, attn_attention="triangle")(x)


def pair(mindspore_options=None, stack=None, **options):
    """(MindSpore model, JAX model with its weights): a small decoder over 11 tokens."""
    pytest.importorskip("jax")
    import flash_attention.jax as twins

    stack = dict({"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}, **(stack or {}))
    made = dict({"num_tokens": 11, "max_seq_len": 16}, **options)
    cell = TransformerWrapper(attn_layers=Decoder(engine="portable", **stack), **made)
    twin = twins.TransformerWrapper(attn_layers=twins.Decoder(**stack), **made)
    twin.params = unflatten_params(weights_of(cell))
    return cell, twin


@pytest.mark.parametrize("options", [
    {"emb_dim": 12, "post_emb_norm": True, "num_memory_tokens": 3},
    pytest.param({"tie_embedding": True, "scaled_sinu_pos_emb": True}, marks=pytest.mark.slow),
], ids=["memory", "tied"])  # fmt: skip
def test_model_equals_the_twin(options):
    cell, twin = pair(**options)
    mask = np.ones((2, 10), bool)
    mask[0, 6:] = False
    got = cell(Tensor(TOKENS), Tensor(mask))
    np.testing.assert_allclose(got.asnumpy(), twin(TOKENS, mask=mask), atol=5e-5)


@pytest.mark.slow
def test_mems_weights_and_embeddings_equal_the_twin():
    cell, twin = pair(max_mem_len=8, stack={"rotary_pos_emb": True})
    tokens = Tensor(TOKENS)
    _, mems = cell(tokens[:, :6], None, None, None, None, False, False, True)
    second, mems = cell(tokens[:, 6:], None, None, None, None, False, False, True, mems)
    np.testing.assert_allclose(second.asnumpy(), twin(TOKENS)[:, 6:], atol=5e-5)
    assert [x.shape for x in mems] == [(2, 8, 16)] * 2
    _, weights = cell(tokens, None, None, None, None, False, False, False, None, True)
    for mine, other in zip(weights, twin(TOKENS, return_attn=True)[1]):
        np.testing.assert_allclose(mine.asnumpy(), other, atol=2e-5)
    front = np.random.default_rng(1).standard_normal((2, 2, 16)).astype(np.float32)
    got = cell(tokens, None, None, None, None, True, False, False, None, False, Tensor(front))
    want = twin(TOKENS, return_embeddings=True, prepend_embeds=front)
    np.testing.assert_allclose(got.asnumpy(), want, atol=5e-5)


def test_loss_and_generated_tokens_equal_the_twin():
    """The same seed draws the same tokens in both frameworks; nothing but padding after the end."""
    cell, twin = pair(stack={"alibi_pos_bias": True})
    from flash_attention.jax import AutoregressiveWrapper as Twin

    mine, other = AutoregressiveWrapper(cell, pad_value=10), Twin(twin, pad_value=10)
    other.params = {"net": twin.params}
    tokens = np.array(TOKENS)
    tokens[1, 7:] = -100
    np.testing.assert_allclose(float(mine(Tensor(tokens)).asnumpy()), other(tokens), rtol=1e-5)
    prompt, options = TOKENS[:, :4], dict(temperature=0.9, top_k=5, seed=3)
    drawn = mine.generate(Tensor(prompt), 6, **options).asnumpy()
    np.testing.assert_array_equal(drawn, other.generate(prompt, 6, **options))
    end = int(drawn[0, 1])
    stopped = mine.generate(Tensor(prompt), 6, eos_token=end, **options).asnumpy()
    np.testing.assert_array_equal(stopped, other.generate(prompt, 6, eos_token=end, **options))


@pytest.mark.slow
@pytest.mark.parametrize("mode", in_mindspore.MODES)
def test_training_steps(mode):
    """Adam lowers the loss of a decoder that drops, skips layers and recomputes."""
    stack = Decoder(
        16, 1, heads=2, attn_dim_head=8, attn_dropout=0.1, ff_dropout=0.1, layer_dropout=0.1, recompute=True,
        engine="portable",
    )  # fmt: skip
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack))
    with in_mindspore.mode(mode):
        step = nn.TrainOneStepCell(model, nn.Adam(model.trainable_params(), 1e-2))
        losses = [float(step.set_train()(Tensor(TOKENS)).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()


def test_checkpoint(tmp_path):
    def make():
        return ContinuousTransformerWrapper(
            dim_in=5, dim_out=3, max_seq_len=12, attn_layers=Encoder(16, 1, heads=2, attn_dim_head=8, engine="portable")
        )

    x = Tensor(np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32))
    in_mindspore.check_checkpoint(make(), make(), x, tmp_path)


def test_half_precision_and_print():
    layer = Decoder(DIM, 1, heads=HEADS, attn_dim_head=HEAD, alibi_pos_bias=True, dtype=ms.float16, engine="portable")
    out = layer(Tensor(X.astype(np.float32)))
    assert out.dtype == ms.float16 and np.isfinite(out.asnumpy()).all()
    assert "dim=16, depth=1, heads=4, causal=True" in str(layer)
    assert layer.num_parameters() == sum(x.size for x in weights_of(layer).values())
    assert layer.explain() == "layers 0 (Attention): fused: every option fits the core call; memory O(N)"


@pytest.mark.slow
def test_decoder_is_causal():
    layer = Decoder(DIM, 2, heads=HEADS, shift_tokens=1, alibi_pos_bias=True, attn_num_mem_kv=1, engine="portable")
    weight = Tensor(D_OUT[:, 4].astype(np.float32))  # of a plain sum LayerNorm leaves no gradient
    grad = ops.grad(lambda x: (layer(x)[:, 4] * weight).sum())(Tensor(X.astype(np.float32))).asnumpy()
    assert grad[:, :5].any(axis=-1).all() and not grad[:, 5:].any()
