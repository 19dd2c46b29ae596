"""Landmark attention in JAX: the properties of support/landmark.py, the published class, traced patterns, memory."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.jax_engines import in_float64
from support.landmark import BEST, IRREGULAR, REGULAR, Landmark, MoreLandmark, dense, draws

from flash_attention.core.errors import UnsupportedError
from flash_attention.core.mechanisms import landmark as shared
from flash_attention.jax import FlexibleAttentionModule, FusedLandmarkAttention, fused_landmark_attention
from flash_attention.jax.mechanisms import landmark_tiles

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


class _InJax:
    run, judged = staticmethod(in_jax.run_eagerly), staticmethod(in_jax.run)
    functions, exps = in_jax.FUNCTIONS, 1

    @staticmethod
    def call(landmarks, **options):
        return functools.partial(fused_landmark_attention, is_mem=landmarks, **options)


class TestInJax(_InJax, Landmark):
    pass


@pytest.mark.slow
class TestMoreInJax(_InJax, MoreLandmark):
    pass


@pytest.mark.parametrize("case", [IRREGULAR, pytest.param(BEST, marks=pytest.mark.slow)], ids=lambda case: case.name)
def test_traced_pattern(case):
    """A pattern that is not known while tracing, also with the best sections only."""
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in draws(case))
    out = jax.jit(functools.partial(fused_landmark_attention, **case.options()))(q, k, v, case.landmarks())
    np.testing.assert_allclose(out, dense(np, case)["out"], atol=2e-6)


@pytest.mark.parametrize("case", [REGULAR, pytest.param(IRREGULAR, marks=pytest.mark.slow)], ids=lambda case: case.name)
def test_float64(case):
    with in_float64():
        *given, d_out = (jnp.asarray(x) for x in draws(case))
        call = functools.partial(fused_landmark_attention, is_mem=case.landmarks(), **case.options())
        out, pullback = jax.vjp(call, *given)
        got = dict(zip(("out", "query", "key", "value"), (out, *pullback(d_out))))
    for name, want in dense(np, case).items():
        assert got[name].dtype == np.float64
        np.testing.assert_allclose(got[name], want, atol=1e-12)


def test_gradient_of_the_formula():
    """The judge's explicit gradient against finite differences of its output."""
    rng, case = np.random.default_rng(0), IRREGULAR._replace(top_k=2)
    *tensors, d_out = (x + 0.01 * rng.standard_normal(x.shape) for x in draws(case))  # no two landmarks score alike
    grads = shared.formula(np, *tensors, case.landmarks(), d_out, top_k_blocks=2)
    for n, name in enumerate(("query", "key", "value")):
        step = rng.standard_normal(tensors[n].shape)
        ends = []
        for sign in (1e-6, -1e-6):
            moved = [x + sign * step if m == n else x for m, x in enumerate(tensors)]
            out = shared.formula(np, *moved, case.landmarks(), d_out, top_k_blocks=2)["out"]
            ends.append((out * d_out).sum())
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, (grads[name] * step).sum(), rtol=1e-6)


def test_class():
    case = REGULAR._replace(q_len=29)
    q, k, v, d_out = (jnp.asarray(x, jnp.float32) for x in draws(case))
    out, pullback = jax.vjp(lambda *x: fused_landmark_attention(*x, case.landmarks(), 0.3, 8), q, k, v)
    ctx = SimpleNamespace()
    np.testing.assert_array_equal(FusedLandmarkAttention.forward(ctx, q, k, v, 2, 0.3, 8), out)
    grads = FusedLandmarkAttention.backward(ctx, d_out)
    assert grads[3:] == (None, None, None)
    of_apply = jax.vjp(lambda *x: FusedLandmarkAttention.apply(*x, 2, 0.3, 8), q, k, v)[1](d_out)
    for mine, applied, want in zip(grads, of_apply, pullback(d_out)):
        np.testing.assert_array_equal(mine, want)
        np.testing.assert_array_equal(applied, want)
    with pytest.raises(ValueError, match="'n_prefix_q' must be 16 keys before the queries / block_size 8, but got 16"):
        FusedLandmarkAttention.apply(q, k, v, 16, 0.3, 8)


def test_published_example():
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 12, 128, 64)), jnp.float32)
    assert fused_landmark_attention(q, k, v, jnp.zeros(128, bool)).shape == (8, 12, 128, 64)


def test_mechanism_of_the_registry():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((3, 2, 40, 4, 8)))
    sizes = {"num_attention_heads": 4, "num_kv_heads": 2, "head_dims": 8, "sm_scale": 0.5, "block_size": 8}
    module = FlexibleAttentionModule(attn_mechanism="landmark", **sizes)
    out = module(query_states=q, key_states=k[:, :, :2], value_states=v[:, :, :2], causal=True)
    by_head = [jnp.swapaxes(x, 1, 2) for x in (q, k[:, :, [0, 0, 1, 1]], v[:, :, [0, 0, 1, 1]])]
    want = jnp.swapaxes(fused_landmark_attention(*by_head, shared.regular(40, 8), 0.5, 8), 1, 2)
    np.testing.assert_allclose(out.attention_outputs, want, atol=1e-6)
    with pytest.raises(UnsupportedError, match="'causal' must be True"):
        module(query_states=q, key_states=k[:, :, :2], value_states=v[:, :, :2], causal=False)


# --- cost -----------------------------------------------------------------------------------------------------------
def test_half_of_the_tiles_and_linear_memory(figure):
    static = landmark_tiles.Static(1, 8192, 8192, 1.0, 64)
    visits = [
        int(landmark_tiles._visits(static, landmark_tiles._rows(static, jnp.int32(i))[1]))
        for i in range(static.q_tiles)
    ]
    assert static.q_tiles == static.kv_tiles == 16
    figure("landmark, 8,192 tokens: tiles visited / all", sum(visits) / 16**2, 17 / 32)

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
        grad = jax.grad(lambda *x: fused_landmark_attention(*x, shared.regular(length, 64)).sum(), (0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    figure("landmark, gradients: temporary memory, 8,192 / 4,096 tokens", temporary(8192) / temporary(4096), 2.2, "x")


def test_retrieval_costs_few_pairs(figure):
    """Compiled operations of one query, against attention over all keys."""
    length, block = 8192, 64
    shapes = [jax.ShapeDtypeStruct((1, 1, n, 64), jnp.float32) for n in (1, length, length)]

    def flops(call):
        cost = jax.jit(call).lower(*shapes).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    call = functools.partial(fused_landmark_attention, is_mem=shared.regular(length, block), top_k_blocks=4)
    share = flops(call) / (4 * length * 64)
    figure("landmark, 4 best of 128 blocks: compiled FLOPs / attention to all keys", share, 0.3)
