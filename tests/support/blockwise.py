"""Properties of blockwise attention and of its loss, once for both frameworks. Judges: core.reference, a plain loss."""

import functools
from typing import NamedTuple, Optional, Tuple

import numpy as np
import pytest
from support.judge import check

from flash_attention.core import reference
from flash_attention.core.mechanisms import blockwise as shared
from flash_attention.core.spec import AttentionSpec, Operands

B, H, D = 2, 3, 8


class Case(NamedTuple):
    """One attention call; a bias of `bias_shape` hides some keys by -inf, and all keys of query 5."""

    name: str
    q_len: int
    kv_len: int
    causal: bool
    chunks: Tuple[Optional[int], Optional[int]]
    bias_shape: Optional[Tuple[int, ...]] = None
    dtype: str = "float32"

    def options(self):
        q_chunk, k_chunk = self.chunks
        return {"causal_mask": self.causal, "query_chunk_size": q_chunk, "key_chunk_size": k_chunk}


BIASED = Case("causal, Nq < Nk, bias with -inf", 21, 40, True, (8, 16), (B, 1, 21, 40))
PLAIN = Case("causal, ragged", 37, 37, True, (16, 8))
OTHERS = [
    PLAIN,
    Case("Nq > Nk, one chunk of queries, bias a head and key", 40, 21, False, (None, 5), (1, H, 1, 21)),
    Case("causal, Nq > Nk, fp16", 40, 21, True, (64, 8), None, "float16"),
    Case("causal, bf16", 24, 24, True, (8, 8), (1, H, 24, 24), "bfloat16"),
]


@functools.lru_cache(maxsize=None)
def draws(case):
    """q (scaled), k, v, d_out (B, N, H, D) and the bias or None; exact in bfloat16."""
    rng = np.random.default_rng(case.q_len)
    shapes = [(B, n, H, D) for n in (case.q_len, case.kv_len, case.kv_len, case.q_len)]
    q, k, v, d_out = [np.round(rng.standard_normal(shape) * 16) / 16 for shape in shapes]
    if case.bias_shape is None:
        return [q / 4, k, v, d_out], None
    bias = np.round(rng.standard_normal(case.bias_shape) * 16) / 16
    bias[rng.random(case.bias_shape) < 0.2] = -np.inf
    if case.bias_shape[2] > 1:
        bias[:, :, 5] = -np.inf
    return [q / 4, k, v, d_out], bias


def dense(xp, case):
    """Results by name, BNHD, of the plain formula without a scale and with the diagonal at the top left."""
    tensors, bias = draws(case)
    q, k, v, d_out = (np.asarray(x.swapaxes(1, 2), xp.float64) for x in tensors)
    spec = AttentionSpec(
        B, H, H, case.q_len, case.kv_len, D, scale=1.0, causal=case.causal, q_offset=0, bias_shape=case.bias_shape
    )
    operands = Operands(bias=None if bias is None else bias.astype(xp.float64))
    out = reference.attention(xp, spec, q, k, v, operands)[0]
    grads = reference.attention_grad(spec, q, k, v, operands, d_out)
    results = {name: grads[name].swapaxes(1, 2) for name in ("query", "key", "value")}
    results["out"] = out.swapaxes(1, 2)
    return results if bias is None else dict(results, bias=grads["bias"])


class Attention:
    """A framework gives `run`, `functions`, and `function(**options)` of (q, k, v[, bias])."""

    def forward(self, tensors, **options):
        return self.run(self.function(**options), tensors)[0]

    def check_case(self, case, **options):
        (q, k, v, d_out), bias = draws(case)
        call = self.function(**dict(case.options(), **options))
        out, grads = self.run(call, [q, k, v] + ([] if bias is None else [bias]), d_out, case.dtype)
        got = dict(zip(("out", "query", "key", "value", "bias"), [out] + grads))
        check(got, functools.partial(dense, case=case), case.dtype, self.functions)
        if bias is not None and bias.shape[2] > 1:
            assert not out[:, 5].any() and not got["query"][:, 5].any()

    def test_equals_dense(self):
        self.check_case(BIASED)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
    def test_equals_dense_in_other_cases(self, case):
        self.check_case(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("policy", [None, "everything_saveable", "dots_saveable"])
    def test_policy_changes_nothing(self, policy):
        self.check_case(BIASED, policy=policy, prevent_cse=True)

    @pytest.mark.slow
    def test_chunks_change_nothing(self):
        (q, k, v, _), _ = draws(PLAIN)
        whole = self.forward([q, k, v])
        for chunks in ((1, 37), (36, 5), (100, None)):
            out = self.forward([q, k, v], query_chunk_size=chunks[0], key_chunk_size=chunks[1])
            np.testing.assert_allclose(out, whole, atol=2e-6)

    @pytest.mark.slow
    def test_a_large_finite_bias_removes_nothing(self):
        """-1e9 on every key is a number like any other: rows stay finite, and later keys stay hidden."""
        (q, k, v, _), _ = draws(PLAIN)
        out = self.forward([q, k, v, np.full((1, 1, 37, 37), -1e9)], query_chunk_size=16, key_chunk_size=8)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[:, 0], v[:, 0], atol=1e-6)

    @pytest.mark.slow
    def test_later_key_chunks_are_skipped(self):
        """NaN in the keys and values of later chunks changes nothing in the chunks before, gradients too."""
        (q, k, v, d_out), _ = draws(PLAIN)
        call = self.function(query_chunk_size=8, key_chunk_size=8)
        d_out = d_out.copy()
        d_out[:, 16:] = 0.0
        cut = [x[:, :16] for x in (q, k, v)]
        want, want_grads = self.run(call, cut, d_out[:, :16])
        k, v = k.copy(), v.copy()
        k[:, 16:], v[:, 16:] = np.nan, np.nan
        np.testing.assert_array_equal(self.run(call, [q[:, :16], k, v])[0], want)
        _, grads = self.run(call, [q[:, :16], k, v], d_out[:, :16])
        for grad, wanted in zip(grads, want_grads):
            np.testing.assert_allclose(grad[:, :16], wanted, atol=1e-6)
            assert not grad[:, 16:].any()

    @pytest.mark.parametrize("change, error, match", [
        ({"policy": "some"}, KeyError, "'policy' must be None or one of"),
        ({"prevent_cse": 1}, TypeError, "'prevent_cse' must be a bool"),
        ({"causal_mask": 1}, TypeError, "'causal_mask' must be a bool"),
        ({"query_chunk_size": 0}, ValueError, "'query_chunk_size' must be an int >= 1"),
        ({"key_chunk_size": 1.5}, TypeError, "'key_chunk_size' must be an int >= 1"),
        ({"attn_pdrop": 1.0}, ValueError, "'attn_pdrop' must be a float in"),
    ])  # fmt: skip
    def test_refuses(self, change, error, match):
        with pytest.raises(error, match=match):
            self.forward(draws(PLAIN)[0][:3], **change)

    def test_refuses_shapes(self):
        self.check_refused_shapes()

    def check_refused_shapes(self):
        q, k, v, _ = draws(PLAIN)[0]
        for tensors, match in (
            ([q, k[:, :, :2], v], "'key' must be of shape \\(B, N, H, D\\)"),
            ([q, k, v[:, :9]], "'value' must be of the key's shape"),
            ([q, k, v, np.zeros((37, 37))], "'bias' must be of four axes"),
            ([q, k, v, np.zeros((1, 2, 37, 37))], "'bias' must be of four axes"),
        ):
            with pytest.raises(ValueError, match=match):
                self.forward(tensors)


# --- the loss -------------------------------------------------------------------------------------
rng = np.random.default_rng(2)
VOCABULARY, WIDTH = 11, 6
LOGITS = np.round(rng.standard_normal((2, 9, VOCABULARY)) * 32) / 16
HIDDEN, WEIGHT, BIAS = rng.standard_normal((2, 9, WIDTH)), rng.standard_normal((VOCABULARY, WIDTH)), rng.random(11)
VALID = (rng.random((2, 9)) < 0.6).astype(np.int32)
TOKENS = np.where(VALID, rng.integers(0, VOCABULARY, (2, 9)), 10**6).astype(np.int32)
TOKENS[0, :4] = LOGITS[0, :4].argmax(-1)  # some right guesses
TOKENS[VALID == 0] = 10**6  # ignored, though no word of the vocabulary
FUSED = HIDDEN @ WEIGHT.T + BIAS


class Loss:
    """A framework gives `loss(logits, tokens, valid, **options)` and `fused(hidden, weight, tokens, valid, bias,
    **options)`, numpy in, `(loss, accuracy, gradients of the loss)` out."""

    @pytest.mark.parametrize("size, reduction", [
        (4, "chunk_mean"),
        (7, "token_mean"),
        pytest.param(None, "token_mean", marks=pytest.mark.slow),
        pytest.param(18, "chunk_mean", marks=pytest.mark.slow),
    ])  # fmt: skip
    def test_equals_the_plain_mean(self, size, reduction):
        self.check_mean(size, reduction)

    def check_mean(self, size, reduction):
        want = shared.cross_entropy(LOGITS, TOKENS, VALID, size, reduction)
        loss, accuracy, (grad,) = self.loss(LOGITS, TOKENS, VALID, chunk_size=size, reduction=reduction)
        np.testing.assert_allclose([loss, accuracy], want[:2], rtol=1e-5)
        np.testing.assert_allclose(grad, want[2], atol=1e-6)
        if size in (None, 18):
            token_mean = shared.cross_entropy(LOGITS, TOKENS, VALID)
            np.testing.assert_allclose(want[:2], token_mean[:2], rtol=1e-12)

    def test_fused_equals_the_plain_mean(self):
        self.check_fused()

    def check_fused(self):
        want = shared.cross_entropy(FUSED, TOKENS, VALID)
        loss, accuracy, (d_hidden, d_weight, d_bias) = self.fused(HIDDEN, WEIGHT, TOKENS, VALID, BIAS, chunk_size=4)
        np.testing.assert_allclose([loss, accuracy], want[:2], rtol=1e-5)
        d_logits = want[2].reshape(-1, VOCABULARY)
        np.testing.assert_allclose(d_hidden.reshape(-1, WIDTH), d_logits @ WEIGHT, atol=1e-6)
        np.testing.assert_allclose(d_weight, d_logits.T @ HIDDEN.reshape(-1, WIDTH), atol=1e-6)
        np.testing.assert_allclose(d_bias, d_logits.sum(0), atol=1e-6)
        one = self.fused(HIDDEN, WEIGHT, TOKENS, VALID, BIAS, chunk_size=5, reduction="chunk_mean")
        np.testing.assert_allclose(one[:2], shared.cross_entropy(FUSED, TOKENS, VALID, 5, "chunk_mean")[:2], rtol=1e-5)

    @pytest.mark.slow
    def test_nothing_valid(self):
        self.check_nothing_valid()

    def check_nothing_valid(self):
        for found in (
            self.loss(LOGITS, TOKENS, np.zeros_like(VALID), chunk_size=4),
            self.fused(HIDDEN, WEIGHT, TOKENS, np.zeros_like(VALID), BIAS, chunk_size=4),
        ):
            assert found[0] == found[1] == 0.0
            assert not any(grad.any() for grad in found[2])

    @pytest.mark.slow
    def test_all_valid_and_large_logits(self):
        tokens = LOGITS.argmax(-1).astype(np.int32)
        loss, accuracy, (grad,) = self.loss(1e4 * LOGITS, tokens, None, chunk_size=7)
        want = shared.cross_entropy(1e4 * LOGITS, tokens)
        assert np.isfinite(grad).all() and accuracy == 1.0
        np.testing.assert_allclose(loss, want[0], atol=1e-3)

    @pytest.mark.parametrize("change, error, match", [
        ({"tokens": TOKENS.astype(np.float32)}, TypeError, "'tokens' must be an integer tensor"),
        ({"tokens": TOKENS[:, :5]}, ValueError, "'tokens' must be of shape"),
        ({"valid": VALID[:1]}, ValueError, "'valid' must be of shape"),
        ({"logits": LOGITS[0]}, ValueError, "'logits' must be of shape"),
        ({"chunk_size": 0}, ValueError, "'chunk_size' must be an int >= 1"),
        ({"reduction": "mean"}, ValueError, "'reduction' must be one of 'token_mean', 'chunk_mean'"),
        ({"policy": "some"}, KeyError, "'policy' must be None or one of"),
    ])  # fmt: skip
    def test_loss_refuses(self, change, error, match):
        call = dict({"logits": LOGITS, "tokens": TOKENS, "valid": VALID}, **change)
        with pytest.raises(error, match=match):
            self.loss(call.pop("logits"), call.pop("tokens"), call.pop("valid"), **call)

    def test_fused_refuses(self):
        with pytest.raises(ValueError, match="'weight' must be of shape \\(V, 6\\)"):
            self.fused(HIDDEN, WEIGHT.T, TOKENS, VALID, BIAS)
        with pytest.raises(ValueError, match="'bias' must be of shape \\(11,\\)"):
            self.fused(HIDDEN, WEIGHT, TOKENS, VALID, BIAS[:4])


# --- the block ------------------------------------------------------------------------------------
X, X_OUT = rng.standard_normal((2, 2, 21, 16))
SIZES = {
    "q_chunk_size": 8, "k_chunk_size": 4, "hidden_size": 16, "num_heads": 2, "rotary_dim": 4, "intermediate_size": 24,
}  # fmt: skip
KEEP = (rng.random((2, 1, 21, 21)) < 0.7).astype(np.float32)
KEEP[:, :, 3] = 0.0  # a query that sees nothing
BAD_BLOCKS = [
    ({"num_heads": 3}, ValueError, "'hidden_size' must be a multiple of num_heads = 3"),
    ({"q_chunk_size": 0}, ValueError, "'q_chunk_size' must be an int >= 1"),
    ({"intermediate_size": None}, TypeError, "'intermediate_size' must be an int >= 1"),
    ({"rotary_dim": 3}, ValueError, "'rotary_dim' must be even"),
    ({"rotary_dim": 10}, ValueError, "'rotary_dim' must be an int in \\[2, 8\\]"),
    ({"activation_function": "tanh"}, ValueError, "'activation_function' must be one of"),
    ({"resid_pdrop": 1.0}, ValueError, "'resid_pdrop' must be a float in"),
    ({"causal": 1}, TypeError, "'causal' must be a bool"),
    ({"policy": "all"}, KeyError, "'policy' must be None or one of"),
    ({"layer_norm_epsilon": 0.0}, ValueError, "'layer_norm_epsilon' must be"),
]
BAD_CALLS = [
    (((2, 21, 8), None, None), "'hidden_states' must be of shape \\(B, S, 16\\)"),
    (((2, 21, 16), (21, 21), None), "'attention_mask' must be of shape \\(2, 21\\)"),
    (((2, 21, 16), (2, 3, 21, 21), None), "'attention_mask' must be of shape"),
    (((2, 21, 16), None, (21,)), "'position_ids' must be of shape \\(1\\|2, 21\\)"),
]
