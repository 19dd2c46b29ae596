"""Multi-query and grouped-query attention in JAX: properties of support/multi_query.py, and the layer in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.layers import attention, check_layer, dense, split
from support.multi_query import BAD_LAYERS, Grouped, H, kv_heads_of, rng

from flash_attention.jax import MultiQueryAttention, grouped_query_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
X, D_OUT = rng.standard_normal((2, 2, 9, 16))


class TestInJax(Grouped):
    run, functions = staticmethod(in_jax.run), in_jax.FUNCTIONS

    @staticmethod
    def function(**options):
        return functools.partial(grouped_query_attention, **options)


def formula(params, x, mapping="interleave", kv_heads=2, causal=True):
    q = split(dense(params["to_q"], x), H)
    k, v = (split(dense(params[name], x), kv_heads)[:, :, kv_heads_of(mapping, kv_heads)] for name in ("to_k", "to_v"))
    seen = jnp.tri(x.shape[1], dtype=bool) if causal else True
    return dense(params["to_out"], attention(q, k, v, seen=seen).reshape(x.shape[:2] + (-1,)))


@pytest.mark.parametrize("mapping, bias", [("interleave", False), ("tile", True)])
def test_layer(mapping, bias):
    layer = MultiQueryAttention(16, H, kv_heads=2, causal=True, kv_head_mapping=mapping, bias=bias)
    got = in_jax.run_layer(layer, [X], D_OUT)
    check_layer(got, functools.partial(formula, mapping=mapping), layer.params, [X], D_OUT)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cache_holds_kv_heads_and_decodes_as_the_full_call(kv_heads):
    layer = MultiQueryAttention(16, H, kv_heads=kv_heads, causal=True)
    x = jnp.asarray(X, jnp.float32)
    want = layer(x)
    outs, cache = [], None
    for start, stop in ((0, 5), (5, 8), (8, 9)):
        out, cache = layer(x[:, start:stop], cache=cache, return_cache=True)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=1e-5)
    full = MultiQueryAttention(16, H, kv_heads=H).init(jax.random.PRNGKey(0))["to_k"]["weight"].size
    assert cache[0].shape == (2, 9, kv_heads, 4)
    assert layer.params["to_k"]["weight"].size * H == full * kv_heads


def test_context_and_mask():
    layer = MultiQueryAttention(16, H, dim_head=8)
    x, context = jnp.asarray(X[:, :5], jnp.float32), jnp.asarray(D_OUT, jnp.float32)
    mask = jnp.arange(9) < 6
    hidden = layer(x, context.at[:, 6:].set(7.0), mask[None, None, None])
    np.testing.assert_allclose(hidden, layer(x, context[:, :6]), atol=1e-5)


def test_layer_in_half_precision_and_parameters_of_ones_own():
    layer = MultiQueryAttention(16, H, kv_heads=2, dtype=jnp.float16)
    out = layer(jnp.asarray(X, jnp.float32))
    assert out.dtype == jnp.float16 and bool(jnp.isfinite(out).all())
    other = layer.init(jax.random.PRNGKey(1))
    assert not np.allclose(layer(X), layer(X, params=other), atol=1e-2)


@pytest.mark.parametrize("options, match", BAD_LAYERS)
def test_layer_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        MultiQueryAttention(**dict({"dim": 16, "heads": H}, **options))
