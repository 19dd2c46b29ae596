"""Dilated attention in JAX: the properties of support/dilated.py, the layer in float64, xPos at length, linear cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.dilated import BAD_LAYERS, LAYER, X_OUT, Dilated, X
from support.layers import attention, check_layer, dense, split
from support.positions import xpos_judge

from flash_attention.core.errors import UnsupportedError
from flash_attention.core.mechanisms import dilated as shared
from flash_attention.core.mechanisms.positions import t5_bucket_table, xpos_reach
from flash_attention.jax import DilatedAttention, FlexibleAttentionModule, dilated_attention
from flash_attention.tools.bench.cases import geometric_patterns

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


class TestInJax(Dilated):
    run, functions = staticmethod(in_jax.run), in_jax.FUNCTIONS

    @staticmethod
    def function(segment_size, dilation_rate, **options):
        def call(q, k, v, table=None):
            return dilated_attention(q, k, v, segment_size, dilation_rate, rel_pos_table=table, **options)

        return call


# --- the layer ------------------------------------------------------------------------------------
def formula(params, x, causal=True):
    """Projections, xPos at global positions, T5 bias, one softmax with log counts."""
    q, k, v = (split(dense(params[name], x), 2) for name in ("to_q", "to_k", "to_v"))
    eye = np.eye(8)[:, None, :].repeat(x.shape[1], 1)
    up, down = (jnp.asarray(xpos_judge(eye, 0, scaled, 512), x.dtype) for scaled in (False, True))  # (in, n, out)
    q, k = jnp.einsum("bnhi,ino->bnho", q, up), jnp.einsum("bnhi,ino->bnho", k, down)
    patterns = shared.make_patterns(x.shape[1], 2, LAYER["segment_size"], LAYER["dilation_rate"])
    counts = shared.pair_counts(patterns, causal)
    bias = params["rel_pos_bias"]["weight"].T[:, t5_bucket_table(*counts.shape[1:], bidirectional=not causal)]
    bias = bias + np.log(np.maximum(counts, 1)).astype(x.dtype)
    return dense(params["to_out"], attention(q, k, v, bias, counts > 0).reshape(x.shape))


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layer(causal):
    layer = DilatedAttention(16, 2, causal=causal, **LAYER)
    got = in_jax.run_layer(layer, [X], X_OUT)
    check_layer(got, formula if causal else _both_ways, layer.params, [X], X_OUT)


_both_ways = functools.partial(formula, causal=False)


@pytest.mark.slow
def test_recompute_changes_nothing():
    one, two = DilatedAttention(16, 2, **LAYER), DilatedAttention(16, 2, recompute=True, **LAYER)
    for a, b in zip(
        jax.tree.leaves(in_jax.run_layer(one, [X], X_OUT)), jax.tree.leaves(in_jax.run_layer(two, [X], X_OUT))
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_aliases():
    one = DilatedAttention(d_model=16, num_heads=2, dilation_rate=2, segment_size=8, casual=True)
    two = DilatedAttention(16, 2, 2, 8, causal=True)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(one(x), two(x))


def test_dropout():
    layer = DilatedAttention(16, 2, 1, 8, dropout=0.5)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(layer(x), DilatedAttention(16, 2, 1, 8)(x))
    one, two = (layer(x, deterministic=False, dropout_rng=jax.random.PRNGKey(n)) for n in (0, 1))
    assert not np.allclose(one, two)
    # Before the output projection: the dropped places of one channel are an exact half on average.
    plain = DilatedAttention(16, 2, 1, 8, dropout=0.5)
    plain.params = dict(layer.params, to_out={"weight": jnp.eye(16), "bias": jnp.zeros(16)})
    dropped = plain(x, deterministic=False, dropout_rng=jax.random.PRNGKey(2))
    kept = np.asarray(dropped != 0)
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(np.asarray(dropped)[kept], 2 * np.asarray(plain(x))[kept], rtol=1e-5)
    with pytest.raises(ValueError, match="'dropout_rng' must be a PRNG key"):
        layer(x, deterministic=False)


@pytest.mark.parametrize("options, match", BAD_LAYERS)
def test_layer_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        DilatedAttention(**dict({"dim": 16, "heads": 2, "dilation_rate": 1, "segment_size": 8}, **options))


def test_layer_refuses_an_input():
    with pytest.raises(ValueError, match="'x' must be of shape \\(B, N, 16\\)"):
        DilatedAttention(16, 2)(jnp.ones((2, 5, 8)))


def test_distributed_needs_an_axis_on_several_devices(monkeypatch):
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(
        DilatedAttention(16, 2, 1, 8, Distributed=True)(x), DilatedAttention(16, 2, 1, 8)(x)
    )  # one device: the flag changes nothing
    with pytest.raises(ValueError, match="'axis_name' must be None with Distributed=False, but got 'sp'"):
        DilatedAttention(16, 2, axis_name="sp")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="'axis_name' must be the mesh axis that splits the sequence"):
        DilatedAttention(16, 2, Distributed=True)


SPLITS = {
    "'segment_size' must be a divisor of the 16 tokens of a device, or a multiple that divides all 64": ((24,), (1,)),
    "'segment_size' must be a divisor of the 16 tokens .* but got 48. Pad the sequence": ((48,), (1,)),
    "'dilation_rate' must be a divisor of the 16 tokens of a device where a segment is shared, but got 3": (
        (32,),
        (3,),
    ),
}


@pytest.mark.parametrize("message", SPLITS)
def test_segments_that_do_not_fit_the_devices(message):
    with pytest.raises(ValueError, match=message):
        shared.make_shares("dilated_attention", 16, 4, *SPLITS[message], "mod", 4)


def test_shares_of_devices():
    inside, over_two, over_all = shared.make_shares("test", 16, 4, (8, 32, 4096), (3, 4, 8), "mod", 4)
    assert (inside.members, over_two.members, over_all.members) == (1, 2, 4)
    assert over_two.local.slots == 4 and over_two.segment.slots == 8 and over_all.segment.segment == 64
    alone = shared.make_shares("test", 50, 4, (16, 4096), (3, 4), "mod", 1)  # one device takes any length
    assert [share.local for share in alone] == list(shared.make_patterns(50, 4, (16, 4096), (3, 4)))
    with pytest.raises(
        ValueError, match="'segment_size' must be at most 65391 tokens with use_xpos=True where several"
    ):
        shared.check_shared_xpos("test", shared.Pattern(2**17, 2**17, 4, (0,)))


# --- xPos at length -------------------------------------------------------------------------------
def test_xpos_in_tiles_of_a_long_segment():
    """A segment longer than one centre can hold: finite, and equal to a small one where distances are the same."""
    rate = xpos_reach("float32") // 4
    q, k, v = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((3, 1, 12 * rate, 1, 4)))
    pattern = shared.make_patterns(12 * rate, 1, (12 * rate,), (rate,))[0]
    assert len(shared.xpos_tiles("test", pattern, True)) == 6
    call = functools.partial(
        dilated_attention, segment_size=12 * rate, dilation_rate=rate, is_causal=True, use_xpos=True
    )
    out = jax.jit(call)(q, k, v)  # one compilation for all tiles
    kept = [np.asarray(x, np.float64)[0, ::rate, 0] for x in (q, k, v)]
    scores = np.full((12, 12), -np.inf)
    for i in range(12):
        for j in range(i + 1):  # exact scores from the distance alone
            start = (i - j) * rate
            pair = xpos_judge(kept[0][None, i], start, False, 512, 0) @ xpos_judge(kept[1][None, j], 0, True, 512, 0).T
            scores[i, j] = pair.item() / 2.0
    weights = np.exp(scores - scores.max(1, keepdims=True))
    want = weights / weights.sum(1, keepdims=True) @ kept[2]
    np.testing.assert_allclose(np.asarray(out)[0, ::rate, 0], want, atol=1e-4)


def test_xpos_refuses_a_long_segment_without_causality():
    x = jnp.ones((1, 70000, 1, 2))
    with pytest.raises(ValueError, match="'segment_size' must be at most 65391 tokens"):
        jax.eval_shape(
            functools.partial(dilated_attention, segment_size=70000, dilation_rate=7, use_xpos=True), x, x, x
        )


def test_mechanism_of_the_registry():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((3, 2, 40, 4, 8)))
    tensors = {"query_states": q, "key_states": k[:, :, :2], "value_states": v[:, :, :2]}
    sizes = {"num_attention_heads": 4, "num_kv_heads": 2, "head_dims": 8}
    patterns = {"segment_size": [8, 16], "dilation_rate": (1, 2)}
    out = FlexibleAttentionModule(attn_mechanism="dilated", sm_scale=0.5, **sizes, **patterns)(**tensors)
    shared_heads = (x[:, :, [0, 0, 1, 1]] for x in (k, v))
    want = dilated_attention(q, *shared_heads, (8, 16), (1, 2), is_causal=True, scale=0.5)
    np.testing.assert_allclose(out.attention_outputs, want, atol=1e-6)
    with pytest.raises(UnsupportedError, match="For 'dilated', 'dilation_rate' must be given, but got None"):
        FlexibleAttentionModule(attn_mechanism="dilated", segment_size=8, **sizes)(**tensors)
    with pytest.raises(UnsupportedError, match="For 'vanilla', 'segment_size' must be left out"):
        FlexibleAttentionModule(attn_mechanism="vanilla", segment_size=8, **sizes)(**tensors)


# --- cost -----------------------------------------------------------------------------------------
GEOMETRIC = {"segment_size": (64, 128, 256, 512), "dilation_rate": (1, 2, 4, 8)}


def test_pairs_grow_linearly(figure):
    counts = [shared.pairs_per_head(shared.make_patterns(n, 2, *GEOMETRIC.values()), True) for n in (4096, 8192)]
    assert counts[1] == 2 * counts[0] < 4096 * 64 * 2
    sizes, rates = geometric_patterns(2**20)
    pairs = shared.pairs_per_head(shared.make_patterns(2**20, 2, sizes, rates), True)
    figure("dilated, 1,048,576 tokens, w0 = 2,048: pairs a token", pairs / 2**20, 2 * 2048 / 2)
    # Padding included, and nothing but padding beyond what is seen.
    for n in (512, 700):
        patterns = shared.make_patterns(n, 8, *GEOMETRIC.values())
        seen = shared.pair_counts(patterns, False).sum() / 8.0
        assert seen <= shared.pairs_per_head(patterns, False) <= (1.0 if n == 512 else 2.0) * seen


@pytest.mark.slow
def test_compiled_flops_double_with_the_length(figure):
    def flops(n):
        x = jax.ShapeDtypeStruct((1, n, 8, 16), jnp.float32)
        call = functools.partial(dilated_attention, **GEOMETRIC, is_causal=True, implementation="reference")
        cost = jax.jit(call).lower(x, x, x).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    growth = flops(2048) / flops(1024)
    assert growth > 1.8
    figure("dilated: compiled FLOPs, 2,048 / 1,024 tokens", growth, 2.2, "x")


# --- the published examples -----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("shape, options", [
    ((16, 1000, 512), {"dim": 512, "heads": 8, "dilation_rate": 4, "segment_size": 64}),
    ((16, 32, 512), {"d_model": 512, "num_heads": 8, "dilation_rate": 2, "segment_size": 16}),
    ((16, 128, 512), {"dim": 512, "heads": 8, "dilation_rate": 4, "segment_size": 64, "casual": True,
                      "use_xpos": True, "use_rel_pos_bias": True, "dtype": jnp.float16}),
], ids=lambda x: str(x) if isinstance(x, tuple) else "")  # fmt: skip
def test_published_examples(shape, options):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), options.get("dtype", jnp.float32))
    out = DilatedAttention(**options)(x)
    assert out.shape == shape and out.dtype == x.dtype and bool(jnp.isfinite(out).all())
