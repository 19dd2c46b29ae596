"""CoLT5 in JAX: the router's properties, the layers in float64 in a form without gather and scatter, masks, cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.colt5 import (
    ATTENTION,
    BAD_ATTENTION,
    BAD_FEED_FORWARD,
    BAD_ROUTERS,
    BLOCK,
    CONTEXT,
    CROSS,
    FEED_FORWARD,
    MASK,
    X_OUT,
    Router,
    X,
)
from support.layers import attention, check_draws, check_layer, dense, split

from flash_attention.core.mechanisms import colt5 as shared
from flash_attention.jax import (
    ConditionalRoutedAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedTransformerBlock,
    CoordinateDescentRouter,
    coor_descent,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
DIM = X.shape[-1]


class TestRouter(Router):
    @staticmethod
    def descent(s, **options):
        return np.asarray(jax.jit(functools.partial(coor_descent, **options))(jnp.asarray(s, jnp.float32)))

    @staticmethod
    def route(weight, x, num_tokens, mask, **options):
        router = CoordinateDescentRouter(DIM, num_routing_tokens=len(weight), **options)
        router.params = {"weight": jnp.asarray(weight, jnp.float32)}
        return [None if y is None else np.asarray(y) for y in router(jnp.asarray(x, jnp.float32), num_tokens, mask)]


@pytest.mark.parametrize("options, match", BAD_ROUTERS)
def test_router_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        CoordinateDescentRouter(**dict({"dim": DIM}, **options))
    with pytest.raises(ValueError, match="'num_tokens' must be an int >= 1"):
        CoordinateDescentRouter(DIM)(jnp.ones((1, 3, DIM)), 0)
    with pytest.raises(ValueError, match="'mask' must be of shape"):
        CoordinateDescentRouter(DIM)(jnp.ones((1, 3, DIM)), 2, np.ones((1, 4)))


# --- the layers, in a form that computes both branches for every token ----------------------------
def soft_choice(scores, k, kept):
    """The router's coordinate descent with jax.nn's logsumexp."""
    schedule, final = shared.epsilons(20, 0.03, 4.0, 0.7)

    def step(b, eps):
        peak = jax.nn.logsumexp((scores + b) / eps, -1, where=kept, keepdims=True)
        a = eps * (np.log(k) - peak)
        return -jnp.maximum(scores + a, 0.0), a

    b, a = jax.lax.scan(step, -scores, jnp.asarray(schedule, scores.dtype))
    return jnp.where(kept, jnp.exp((scores + a[-1] + b) / final), 0.0)


def routed(params, x, count, kept=None):
    """(B, R, N): whether a token is among the `count` routed ones, and its straight-through gate."""
    scores = jnp.einsum("bnd,rd->brn", x, params["weight"])
    kept = jnp.ones(scores.shape, bool) if kept is None else jnp.broadcast_to(kept[:, None], scores.shape)
    if x.shape[1] <= count:
        return jnp.ones(scores.shape, bool), jnp.ones(scores.shape, x.dtype), kept
    soft = soft_choice(scores, min(count * 9 / 8, x.shape[1]), kept)
    order = jnp.argsort(-jnp.where(kept, scores, -jnp.inf), -1, stable=True)
    chosen = jnp.argsort(order, -1) < count
    return chosen, jnp.where(kept, 1.0 + soft - jax.lax.stop_gradient(soft), 0.0), kept


def rms(params, x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + shared.NORM_EPSILON) * params["weight"]


def network(params, x):
    hidden = dense(params["fc_in"], rms(params["norm"], x))
    gelu = 0.5 * hidden * (1.0 + jax.scipy.special.erf(hidden / np.sqrt(2.0)))
    return dense(params["fc_out"], gelu)


def feed_forward(params, x, count=6, kept=None):
    chosen, gate, _ = routed(params["router"], x, count, kept)
    heavy = (chosen * gate)[:, 0, :, None] * network(params["heavy"], x)
    return network(params["light"], x) + heavy


def light(params, x, kept=None):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * params["norm"]["weight"] + params["norm"]["bias"]
    q, k, v = (split(dense(params[name], normed), 3) for name in ("to_q", "to_k", "to_v"))
    near = np.abs(np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])) <= 3
    seen = near if kept is None else near & kept[:, None, None]
    alive = jnp.broadcast_to(seen, (x.shape[0], 1) + near.shape).any(-1)[:, 0, :, None, None]
    out = jnp.where(alive, attention(q, k, v, seen=seen | ~alive.swapaxes(1, 2).reshape(x.shape[0], 1, -1, 1)), 0.0)
    return dense(params["to_out"], out.reshape(x.shape[:2] + (-1,)))


def heavy(params, x, context, counts, kept=None, context_kept=None, sets=1, keys=False, queries=False):
    chosen_q, gate_q, _ = routed(params["router_q"], x, counts[0], kept)
    chosen_kv, gate_kv, valid = routed(params["router_kv"], context, counts[1], context_kept)
    by_head = [jnp.repeat(y, 4 // sets, 1) for y in (chosen_kv & valid, gate_kv)]  # (B, H, Nk)
    q = split(dense(params["to_q"], rms(params["norm"], x)), 4)
    k, v = (split(dense(params[name], rms(params["norm"], context)), 4) for name in ("to_k", "to_v"))
    factor = by_head[1].swapaxes(1, 2)[..., None]
    v = v * factor
    k, q = k * factor if keys else k, q * gate_q[:, 0, :, None, None] if queries else q
    null_k, null_v = (jnp.broadcast_to(params[n], (x.shape[0], 1, 4, 5)) for n in ("null_k", "null_v"))
    k, v = jnp.concatenate([k, null_k], 1), jnp.concatenate([v, null_v], 1)  # last here: the order does not matter
    seen = jnp.pad(by_head[0], ((0, 0), (0, 0), (0, 1)), constant_values=True)[:, :, None]
    out = dense(params["to_out"], attention(q, k, v, seen=seen).reshape(x.shape[:2] + (-1,)))
    null = params.get("null_q", jnp.zeros(x.shape[-1], x.dtype))
    return jnp.where(chosen_q[:, 0, :, None], out * gate_q[:, 0, :, None], null)


def routed_attention(params, x, counts=(5, 6), kept=None, **options):
    return light(params["light"], x, kept) + heavy(params["heavy"], x, x, counts, kept, kept, **options)


def block(params, x):
    x = x + routed_attention(params["attention"], x)
    return x + feed_forward(params["feed_forward"], x)


FORMULAS = {
    "queries and keys by score": (
        {"num_routed_kv": 2, "multiply_keys_by_score": True, "multiply_queries_by_score": True},
        functools.partial(routed_attention, sets=2, keys=True, queries=True),
    ),
    "no null queries": ({"use_null_q_tokens": False}, routed_attention),
    "all tokens routed": (
        {"num_heavy_tokens_q": 17, "num_heavy_tokens_kv": 40},
        functools.partial(routed_attention, counts=(17, 40)),
    ),
}
NARROW = 0.1 * X  # scores so close that the soft choice is undecided, and its gradient not 0


@pytest.mark.parametrize("name", [
    "queries and keys by score",
    pytest.param("no null queries", marks=pytest.mark.slow),
    pytest.param("all tokens routed", marks=pytest.mark.slow),
])  # fmt: skip
def test_attention(name):
    options, formula = FORMULAS[name]
    layer = ConditionalRoutedAttention(DIM, **dict(ATTENTION, **options))
    got = in_jax.run_layer(layer, [NARROW], X_OUT)
    check_layer(got, formula, layer.params, [NARROW], X_OUT)
    if name != "all tokens routed":
        assert got[2]["heavy.router_q.weight"].any() and got[2]["heavy.router_kv.weight"].any()


@pytest.mark.slow
def test_feed_forward():
    layer = ConditionalRoutedFeedForward(DIM, **FEED_FORWARD)
    got = in_jax.run_layer(layer, [NARROW], X_OUT)
    check_layer(got, feed_forward, layer.params, [NARROW], X_OUT)
    assert got[2]["router.weight"].any()


@pytest.mark.slow
def test_block():
    layer = ConditionalRoutedTransformerBlock(DIM, **BLOCK)
    draws = [(sign * X, share * X_OUT) for sign in (1, -1) for share in (1, 0.7, 0.3)]
    runs = [(in_jax.run_layer(layer, [x], d_out), [x], d_out) for x, d_out in draws]
    check_draws(runs, block, layer.params)


_cross = functools.partial(heavy, counts=(5, 7), sets=2)


@pytest.mark.slow
def test_cross_attention():
    layer = ConditionalRoutedCrossAttention(DIM, **CROSS)
    got = in_jax.run_layer(layer, [NARROW, 0.1 * CONTEXT], X_OUT)
    check_layer(got, _cross_of_layer, layer.params, [NARROW, 0.1 * CONTEXT], X_OUT)


def _cross_of_layer(params, x, context):
    return _cross(params["heavy"], x, context)


# --- properties -----------------------------------------------------------------------------------
def _float32(x):
    return jnp.asarray(x, jnp.float32)


def test_as_many_heavy_tokens_as_there_are_is_the_dense_layer():
    layer = ConditionalRoutedFeedForward(DIM, **dict(FEED_FORWARD, num_heavy_tokens=17))
    x, params = _float32(X), layer.params
    np.testing.assert_allclose(layer(x), network(params["light"], x) + network(params["heavy"], x), atol=1e-5)


def test_rows_that_are_not_routed_are_light_and_null():
    layer = ConditionalRoutedAttention(DIM, **ATTENTION)
    x, params = _float32(X), layer.params
    indices = layer.heavy.router_q(x, 5, params=params["heavy"]["router_q"]).indices[:, 0]
    rest = np.ones(X.shape[:2], bool)
    rest[np.arange(2)[:, None], indices] = False
    assert rest.sum() == 2 * 12
    want = light(params["light"], x) + params["heavy"]["null_q"]
    np.testing.assert_allclose(layer(x)[rest], want[rest], atol=1e-5)
    assert not np.isclose(layer(x)[~rest], want[~rest], atol=1e-3).all(-1).any()


@pytest.mark.slow
@pytest.mark.parametrize("count", [9, 14])
def test_masked_tokens_influence_no_valid_row(count):
    """With enough valid tokens, and with too few."""
    sizes = {"num_heavy_attn_tokens_q": count, "num_heavy_attn_tokens_kv": count, "num_heavy_ff_tokens": count}
    layer = jax.jit(ConditionalRoutedTransformerBlock(DIM, **dict(BLOCK, **sizes)))
    want = layer(_float32(X), MASK)
    out = layer(_float32(np.where(MASK[..., None], X, 7.0 * X[:, ::-1])), MASK)
    np.testing.assert_allclose(out[MASK], want[MASK], atol=1e-5)
    assert np.isfinite(np.asarray(layer(_float32(X), np.zeros_like(MASK)))).all()  # nothing is valid


@pytest.mark.slow
def test_an_unrouted_key_leaves_the_heavy_branch_unchanged():
    layer = ConditionalRoutedAttention(DIM, **ATTENTION)
    x, params = _float32(X), layer.params["heavy"]
    scores = [np.asarray(x @ params[name]["weight"][0]) for name in ("router_q", "router_kv")]
    last = [np.argsort(-s, -1)[0] for s in scores]
    token = next(t for t in last[1][::-1] if t in last[0][6:] and t in last[1][7:])
    other = x.at[0, token, 0].add(1e-2)  # not enough to be selected
    changed = layer.heavy(other, other, params=params) - layer.heavy(x, x, params=params)
    np.testing.assert_allclose(changed, 0.0, atol=1e-6)
    assert jnp.abs(light(layer.params["light"], other) - light(layer.params["light"], x)).max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype):
    layer = ConditionalRoutedTransformerBlock(DIM, dtype=dtype, **BLOCK)
    out = layer(_float32(X), MASK)
    assert out.dtype == dtype and bool(jnp.isfinite(out).all())
    grads = jax.grad(lambda params: layer(_float32(X), params=params).astype(jnp.float32).sum())(layer.params)
    assert all(bool(jnp.isfinite(grad).all()) for grad in jax.tree.leaves(grads))


@pytest.mark.slow
def test_cross_attention_masks():
    layer = ConditionalRoutedCrossAttention(DIM, **CROSS)
    kept = np.arange(23)[None] < np.array([[20], [9]])
    want = layer(_float32(X), _float32(CONTEXT), MASK, kept)
    hidden = layer(_float32(X), _float32(np.where(kept[..., None], CONTEXT, 9.0)), MASK, kept)
    np.testing.assert_allclose(hidden, want, atol=1e-6)


@pytest.mark.parametrize("options, match", BAD_ATTENTION)
def test_attention_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        ConditionalRoutedAttention(DIM, **dict(ATTENTION, **options))


@pytest.mark.parametrize("options, match", BAD_FEED_FORWARD)
def test_feed_forward_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        ConditionalRoutedFeedForward(DIM, **dict(FEED_FORWARD, **options))


def test_inputs_are_checked():
    x = _float32(X)
    for layer in (ConditionalRoutedAttention(DIM, **ATTENTION), ConditionalRoutedFeedForward(DIM, **FEED_FORWARD)):
        with pytest.raises(ValueError, match="'x' must be of shape \\(B, N, 12\\)"):
            layer(x[..., :5])
        with pytest.raises(ValueError, match="'mask' must be of shape \\(2, 17\\)"):
            layer(x, MASK[:, :9])
        with pytest.raises(ValueError, match="bias="):
            layer(x, -np.ones(MASK.shape))
    cross = ConditionalRoutedCrossAttention(DIM, **CROSS)
    with pytest.raises(ValueError, match="'context' must be of shape"):
        cross(x, x[..., :5])
    with pytest.raises(ValueError, match="'context_mask' must be of shape \\(2, 17\\)"):
        cross(x, x, None, MASK[:, :9])
    with pytest.raises(ValueError, match="'num_sets_kv' must be a divisor"):
        ConditionalRoutedCrossAttention(DIM, **dict(CROSS, num_sets_kv=3))
    with pytest.raises(TypeError):
        ConditionalRoutedTransformerBlock(DIM, **dict(BLOCK, window=3))


# --- cost -----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_cost_is_linear_in_the_length(figure):
    """Pairs by count, and the memory of the compiled program."""
    light_pairs, heavy_pairs = shared.pairs(8192, 128, 512, 512)
    assert light_pairs <= 8192 * 129 and heavy_pairs == 512 * 513
    figure("CoLT5, 8,192 tokens, 512 routed: pairs / dense", (light_pairs + heavy_pairs) / 8192**2, 1 / 40)
    layer = ConditionalRoutedAttention(
        32, num_heavy_tokens_q=64, num_heavy_tokens_kv=64, light_heads=2, heavy_heads=2, light_dim_head=16,
        heavy_dim_head=16,
    )  # fmt: skip
    params = layer.params
    used = []
    for length in (2048, 8192):
        x = jax.ShapeDtypeStruct((1, length, 32), jnp.float32)
        compiled = jax.jit(jax.grad(lambda x: layer(x, params=params).sum())).lower(x).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes)
    figure("CoLT5, gradients: temporary memory, 8,192 / 2,048 tokens", used[1] / used[0], 4.5, "x")
    assert used[1] < 8192**2 * 4 / 4
