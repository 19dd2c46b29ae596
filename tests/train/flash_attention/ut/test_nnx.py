"""attention_fn of flax.nnx.MultiHeadAttention: Flax's own call and meaning, and Flax itself where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention.core.errors import UnsupportedError
from flash_attention.jax import flash_attention
from flash_attention.jax.nnx import attention_fn

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_flax(query, key, value, **options):
    """The call that nnx.MultiHeadAttention makes, keyword by keyword."""
    made = dict(mask=None, dropout_rng=None, dropout_rate=0.0, broadcast_dropout=True, deterministic=True, dtype=None,
                precision=None, module=None)  # fmt: skip
    return attention_fn(query, key, value, **dict(made, **options))


def plain(query, key, value, mask=None, bias=0.0):
    """Softmax attention of any number of batch axes; the mask keeps where True."""
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) * query.shape[-1] ** -0.5 + bias
    if mask is not None:
        scores = jnp.where(jnp.asarray(mask) > 0, scores, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)


KEEP = np.random.default_rng(1).random((2, 1, 5, 7)) < 0.6
KEEP[..., 0] = True


MASKS = {"none": None, "bool": KEEP, "float": KEEP.astype(np.float32), "one row": KEEP[:1], "no batch": KEEP[0]}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_masks_keep_where_true(mask):
    query, key, value = drawn(2, 5, 3, 8), drawn(2, 7, 3, 8, seed=1), drawn(2, 7, 3, 8, seed=2)
    want = plain(query, key, value, mask)
    np.testing.assert_allclose(by_flax(query, key, value, mask=mask), want, atol=2e-6)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_batch_axes(batch):
    query, key, value = (drawn(*batch, 5, 2, 8, seed=seed) for seed in range(3))
    mask = np.tri(5, dtype=bool).reshape((1,) * len(batch) + (1, 5, 5))
    bias = drawn(*batch[:1], *(1,) * len(batch[1:]), 2, 5, 5, seed=4)
    want = plain(query, key, value, mask, bias)
    np.testing.assert_allclose(by_flax(query, key, value, mask=mask, bias=bias), want, atol=2e-6)


def test_causal_is_top_left():
    query, key, value = drawn(1, 3, 2, 8), drawn(1, 6, 2, 8, seed=1), drawn(1, 6, 2, 8, seed=2)
    want = plain(query, key, value, np.tri(3, 6, dtype=bool))
    np.testing.assert_allclose(by_flax(query, key, value, is_causal=True), want, atol=2e-6)


def test_dropout_and_dtype():
    query, key, value = (drawn(1, 4, 2, 8, seed=seed) for seed in range(3))
    key_of = jax.random.PRNGKey(3)
    got = by_flax(query, key, value, deterministic=False, dropout_rate=0.5, broadcast_dropout=False, dropout_rng=key_of)
    seed = jax.random.bits(key_of, (), "uint32")
    want = flash_attention(query, key, value, dropout_rate=0.5, dropout_seed=seed)
    np.testing.assert_array_equal(got, want)
    still = by_flax(query, key, value, deterministic=True, dropout_rate=0.5)
    np.testing.assert_array_equal(still, flash_attention(query, key, value))
    assert by_flax(query, key, value, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert by_flax(query.astype(jnp.bfloat16), key, value).dtype == jnp.float32


@pytest.mark.parametrize("options, match", [
    ({"precision": "highest"}, "'precision' must be None, but got highest"),
    ({"module": object()}, "'module' must be None, but got a module. .*sow_weights"),
    ({"deterministic": False, "dropout_rate": 0.1}, "'broadcast_dropout' must be False where dropout acts"),
])  # fmt: skip
def test_refuses_what_no_engine_has(options, match):
    x = drawn(1, 4, 2, 8)
    with pytest.raises(UnsupportedError, match=match):
        by_flax(x, x, x, **options)


def test_inside_flax():
    """The layer with our function gives what it gives with its own: a forward, gradients, and decoding by its cache."""
    nnx = pytest.importorskip("flax.nnx")

    def layer(**options):
        return nnx.MultiHeadAttention(num_heads=2, in_features=16, decode=False, rngs=nnx.Rngs(0), **options)

    ours, theirs = layer(attention_fn=attention_fn), layer()
    x = drawn(2, 6, 16)
    mask = nnx.make_causal_mask(x[..., 0])
    np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), atol=1e-5)
    loss = nnx.grad(lambda model: (model(x, mask=mask) ** 2).sum())
    gradients = [jax.tree.leaves(nnx.state(loss(model))) for model in (ours, theirs)]
    for got, want in zip(*gradients):
        np.testing.assert_allclose(got, want, atol=1e-4)
    ours.init_cache(x.shape)
    steps = [ours(x[:, n : n + 1], decode=True) for n in range(6)]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), theirs(x, mask=mask), atol=1e-5)
