"""Cross-modal attention in JAX: the layer and the block in float64, masks, the learned key, the joint embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.cross_modal import BAD_LAYERS, CONTEXT, KEEP, X_OUT, X
from support.layers import attention, check_layer, dense, split

from flash_attention.core.mechanisms.cross_modal import LOGIT_SCALES
from flash_attention.jax import CrossModalAttention, CrossModalBlock, info_nce, l2_normalize, logit_scale

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def layer(params, x, context):
    """softmax over the context's tokens and one learned key."""
    rows = (x.shape[0], 1, x.shape[2])
    q = split(dense(params["to_q"], x), 4)
    k, v = (
        split(jnp.concatenate([dense(params[name], context), jnp.broadcast_to(params[extra], rows)], 1), 4)
        for name, extra in (("to_k", "bias_k"), ("to_v", "bias_v"))
    )
    return dense(params["to_out"], attention(q, k, v).reshape(x.shape))


def norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["weight"] + params["bias"]


def block(params, x, context):
    """The two residual branches with their scales."""
    attended = layer(params["attention"], norm(params["norm_1"], x), norm(params["norm_context"], context))
    x = x + params["scale_1"] * attended
    hidden = dense(params["fc_in"], norm(params["norm_2"], x))
    gelu = 0.5 * hidden * (1.0 + jax.scipy.special.erf(hidden / np.sqrt(2.0)))
    return x + params["scale_2"] * dense(params["fc_out"], gelu)


def test_layer():
    made = CrossModalAttention(16, 4, 12)
    got = in_jax.run_layer(made, [X, CONTEXT], X_OUT)
    check_layer(got, layer, made.params, [X, CONTEXT], X_OUT)


def test_block():
    """Layer scales of 0.5, so that both branches count."""
    made = CrossModalBlock(16, 4, 12, layer_scale="per_channel", layer_scale_init=0.5)
    got = in_jax.run_layer(made, [X, CONTEXT], X_OUT)
    check_layer(got, block, made.params, [X, CONTEXT], X_OUT)


def test_masks_and_the_order_of_tokens():
    made = CrossModalAttention(16, 4, 12)
    x, context = jnp.asarray(X, jnp.float32), jnp.asarray(CONTEXT, jnp.float32)
    want = made(x, context, key_padding_mask=KEEP)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(made(x, context[:, order], key_padding_mask=KEEP[:, order]), want, atol=1e-5)
    np.testing.assert_allclose(made(x, context, np.repeat(KEEP[:, None], 5, 1)), want, atol=1e-6)
    hidden = jnp.where(KEEP[..., None], context, 1e3)
    np.testing.assert_allclose(made(x, hidden, key_padding_mask=KEEP), want, atol=1e-6)


def test_only_the_learned_value_is_left():
    made = CrossModalAttention(16, 4, 12)
    out = made(jnp.asarray(X, jnp.float32), jnp.asarray(CONTEXT, jnp.float32), key_padding_mask=np.zeros((2, 7)))
    params = made.params
    want = params["bias_v"][0, 0] @ params["to_out"]["weight"].T + params["to_out"]["bias"]
    np.testing.assert_allclose(out, np.broadcast_to(want, out.shape), atol=1e-6)
    bare = CrossModalAttention(16, 4, 12, add_bias_kv=False, bias=False)
    out = bare(jnp.asarray(X, jnp.float32), jnp.asarray(CONTEXT, jnp.float32), key_padding_mask=np.zeros((2, 7)))
    assert not np.asarray(out).any()


def test_self_attention_half_precision_dropout():
    made = CrossModalAttention(16, 4, dropout=0.5, dtype=jnp.float16)
    x = jnp.asarray(X, jnp.float32)
    out = made(x)
    assert out.dtype == jnp.float16 and bool(jnp.isfinite(out).all())
    dropped = made(x, deterministic=False, dropout_rng=jax.random.PRNGKey(0))
    assert bool((dropped != out).any())
    with pytest.raises(ValueError, match="'dropout_rng' must be a PRNG key"):
        made(x, deterministic=False)


def test_joint_embedding():
    a, b = jnp.asarray(X_OUT[0], jnp.float32), jnp.asarray(X[0], jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(l2_normalize(a), axis=-1), 1.0, rtol=1e-6)
    assert not np.asarray(l2_normalize(jnp.zeros((2, 3)))).any()
    assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 3)))).all()
    np.testing.assert_allclose(logit_scale(jnp.log(jnp.asarray([14.3, 1e4]))), [14.3, 100.0], rtol=1e-5)
    assert LOGIT_SCALES["audio"] == 20.0
    logits = 3.0 * np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    rows = np.log(np.exp(logits).sum(1)) + np.log(np.exp(logits).sum(0)) - 2 * np.diagonal(logits)
    np.testing.assert_allclose(info_nce(a, b, 3.0), 0.5 * rows.mean(), rtol=1e-5)


@pytest.mark.parametrize("options, match", BAD_LAYERS)
def test_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        CrossModalBlock(**dict({"dim": 16, "num_heads": 4}, **options))


def test_refuses_inputs():
    x, context = jnp.ones((2, 5, 16)), jnp.ones((2, 7, 12))
    for arguments, match in (
        ((x, x), "'context' must be of shape"),
        ((context, context), "'x' must be of shape"),
        ((x, context, np.ones((7, 5))), "'attn_mask' must be of shape"),
        ((x, context, None, np.ones((2, 5))), "'key_padding_mask' must be of shape"),
    ):
        with pytest.raises(ValueError, match=match):
            CrossModalAttention(16, 4, 12)(*arguments)
