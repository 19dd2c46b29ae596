"""Properties of dilated attention, once for both frameworks.

The judge is the identity that defines a mixture: one softmax over all keys with the additive bias log(number of
patterns in which the query sees the key), dense and in float64.
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from support.judge import check

from flash_attention.core import reference
from flash_attention.core.lse import merge
from flash_attention.core.mechanisms import dilated as shared
from flash_attention.core.mechanisms.positions import t5_bucket_table
from flash_attention.core.spec import AttentionSpec, Operands

B, D = 2, 8


class Case(NamedTuple):
    """One call; `bias` gives a T5 table."""

    name: str
    length: int
    heads: int
    segment_size: object
    dilation_rate: object
    causal: bool = False
    head_offset: str = "mod"
    bias: bool = False
    dtype: str = "float32"

    def options(self):
        names = ("segment_size", "dilation_rate", "head_offset")
        return dict({name: getattr(self, name) for name in names}, is_causal=self.causal)

    def patterns(self):
        sizes = shared.check_call("test", self.segment_size, self.dilation_rate, self.head_offset)
        return shared.make_patterns(self.length, self.heads, *sizes, self.head_offset)


MIXTURE = Case("mixture, causal, ragged", 50, 4, (16, 32), (1, 3), causal=True)
CASES = [
    MIXTURE,
    Case("mixture, ragged, block offsets", 50, 4, (16, 32), (1, 3), head_offset="block"),
    Case("single, w no multiple of r, fp16", 37, 3, 12, 5, dtype="float16"),
    Case("T5 bias, fewer heads than the rate", 40, 2, (10, 40), (1, 4), causal=True, bias=True),
    Case("T5 bias, both directions, bf16", 40, 2, (10, 20), (1, 2), bias=True, dtype="bfloat16"),
    pytest.param(Case("one pattern of rate 1: block diagonal", 40, 2, 12, 1), marks=pytest.mark.slow),
]


@functools.lru_cache(maxsize=None)
def draws(case):
    """q, k, v, d_out (B, N, H, D), exact in bfloat16, and the T5 table or None."""
    rng = np.random.default_rng(case.length)
    tensors = np.round(rng.standard_normal((4, B, case.length, case.heads, D)) * 16) / 16
    return list(tensors), np.round(rng.standard_normal((32, case.heads)) * 16) / 16 if case.bias else None


def dense(xp, case, counts=None, stop_weight_grad=False):
    """Results by name, BNHD, by the identity. The table's gradient is the sum of its pairs' gradients."""
    (q, k, v, d_out), table = draws(case)
    q, k, v, d_out = (np.asarray(x.swapaxes(1, 2), xp.float64) for x in (q, k, v, d_out))
    counts = shared.pair_counts(case.patterns(), case.causal) if counts is None else counts
    bias = np.log(np.maximum(counts, 1))[None].astype(xp.float64)
    buckets = t5_bucket_table(case.length, case.length, bidirectional=not case.causal)
    if table is not None:
        bias = bias + table.T[:, buckets].astype(xp.float64)
    shape = (1,) + counts.shape
    spec = AttentionSpec(B, case.heads, case.heads, case.length, case.length, D, mask_shape=shape, bias_shape=shape)
    operands = Operands(mask=counts[None] > 0, bias=bias)
    out, lse = reference.attention(xp, spec, q, k, v, operands)
    grads = reference.attention_grad(spec, q, k, v, operands, d_out)
    results = {name: grads[name].swapaxes(1, 2) for name in ("query", "key", "value")}
    if table is not None:
        results["table"] = np.zeros(table.shape, xp.float64)
        np.add.at(results["table"], buckets, grads["bias"][0].transpose(1, 2, 0))
    return dict(results, out=out.swapaxes(1, 2))


def alone(xp, case):
    """`[(spec, operands, out, lse)]` of each pattern, BHND, and q, k, v, d_out."""
    (q, k, v, d_out), table = draws(case)
    tensors = [np.asarray(x.swapaxes(1, 2), xp.float64) for x in (q, k, v, d_out)]
    bias = None
    if table is not None:
        buckets = t5_bucket_table(case.length, case.length, bidirectional=not case.causal)
        bias = table.T[None, :, buckets].astype(xp.float64)
    parts = []
    for pattern in case.patterns():
        seen = shared.pair_counts((pattern,), case.causal)[None] > 0
        shapes = dict(mask_shape=seen.shape, bias_shape=None if bias is None else bias.shape)
        spec = AttentionSpec(B, case.heads, case.heads, case.length, case.length, D, **shapes)
        operands = Operands(mask=seen, bias=bias)
        parts.append((spec, operands) + tuple(reference.attention(xp, spec, *tensors[:3], operands)))
    return parts, tensors


def pattern_by_pattern(xp, case):
    """:func:`dense`, with the output as one writes a mixture: a softmax a pattern, merged by their sums."""
    parts, _ = alone(xp, case)
    out, _ = merge(xp, [part[2] for part in parts], [part[3] for part in parts])
    return dict(dense(xp, case), out=out.swapaxes(1, 2))


def frozen_weights(xp, case):
    """Gradients with the mixture's weights held fixed: each pattern alone, with its share of the cotangent."""
    parts, (q, k, v, d_out) = alone(xp, case)
    _, total = merge(xp, [part[2] for part in parts], [part[3] for part in parts])
    results = {}
    for spec, operands, _, lse in parts:
        weight = xp.exp(lse - np.where(np.isneginf(total), 0, total))
        grads = reference.attention_grad(spec, q, k, v, operands, weight[..., None] * d_out)
        for name, grad in grads.items():
            results[name] = results.get(name, 0) + grad.swapaxes(1, 2)
    return results


class Dilated:
    """A framework gives `run`, `functions`, and `function(**options)` of (q, k, v[, table])."""

    exps = 1

    def results(self, case, **options):
        (q, k, v, d_out), table = draws(case)
        tensors = [q, k, v] + ([table] if case.bias else [])
        out, grads = self.run(self.function(**dict(case.options(), **options)), tensors, d_out, case.dtype)
        return dict(zip(("out", "query", "key", "value", "table"), [out] + grads))

    def check_case(self, case):
        """Compare output and gradients of a case with the judge."""
        plain = functools.partial(pattern_by_pattern, case=case)
        got = self.results(case)
        check(got, functools.partial(dense, case=case), case.dtype, self.functions, plain, self.exps)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_equals_one_softmax_with_counts(self, case):
        self.check_case(case)

    def test_frozen_weights(self):
        got = self.results(MIXTURE, stop_weight_grad=True)
        del got["out"]
        check(got, functools.partial(frozen_weights, case=MIXTURE), "float32", self.functions, exps=self.exps)

    def forward(self, tensors, **options):
        return self.run(self.function(**options), tensors)[0]

    def test_one_dense_segment_is_attention(self):
        case = Case("", 21, 2, 64, 1, causal=True)
        ones = np.tri(21, dtype=int)[None].repeat(2, 0)
        check({"out": self.forward(draws(case)[0][:3], **case.options())}, lambda xp: dense(xp, case, ones),
              "float32", self.functions)  # fmt: skip

    def test_single_pattern(self):
        """Equal patterns mix to the single one; what a head does not keep is exactly 0; segments do not mix."""
        case = Case("", 24, 2, 12, 3)
        q, k, v, _ = draws(case)[0]
        one = self.forward([q, k, v], **case.options())
        twice = self.forward([q, k, v], segment_size=[12, 12], dilation_rate=[3, 3])
        np.testing.assert_allclose(twice, one, atol=1e-6)
        kept = case.patterns()[0].kept()
        assert not one.transpose(0, 2, 1, 3)[:, ~kept].any() and (one.transpose(0, 2, 1, 3)[:, kept] != 0).all()
        other = k.copy()
        other[:, 0] = 50.0  # kept by head 0 in segment 0
        moved = self.forward([q, other, v], **case.options()) != one
        assert moved[:, :12, 0].any() and not moved[:, 12:].any() and not moved[:, :, 1].any()

    def test_causal(self):
        """A later key or value changes nothing before it."""
        (q, k, v, _), _ = draws(MIXTURE)
        one = self.forward([q, k, v], **MIXTURE.options())
        k, v = k.copy(), v.copy()
        k[:, 30:], v[:, 30:] = 9.0, -9.0
        np.testing.assert_array_equal(self.forward([q, k, v], **MIXTURE.options())[:, :30], one[:, :30])

    def test_what_no_pattern_keeps_is_never_read(self):
        case = Case("", 24, 2, 12, 3, causal=True)
        q, k, v, d_out = (x.copy() for x in draws(case)[0])
        want, want_grads = self.run(self.function(**case.options()), [q, k, v], d_out)
        lost = ~case.patterns()[0].kept().T
        for x in (q, k, v, d_out):
            x[:, lost] = np.nan
        out, grads = self.run(self.function(**case.options()), [q, k, v], d_out)
        np.testing.assert_array_equal(out, want)
        for got, grad in zip(grads, want_grads):
            np.testing.assert_array_equal(got, grad)
            assert not got[:, lost].any()

    @pytest.mark.parametrize("change, match", [
        ({"dilation_rate": 0}, "'dilation_rate' must be an int >= 1"),
        ({"segment_size": 0}, "'segment_size' must be an int >= 1"),
        ({"segment_size": (4, 8)}, "'dilation_rate' must be as many numbers as segment_size, 2"),
        ({"segment_size": 2.5}, "'segment_size' must be an int or a sequence of ints"),
        ({"head_offset": "none"}, "'head_offset' must be one of 'mod', 'block'"),
    ])  # fmt: skip
    def test_refuses(self, change, match):
        tensors = draws(MIXTURE)[0][:3]
        with pytest.raises((ValueError, TypeError), match=match):
            self.forward(tensors, **dict({"segment_size": 8, "dilation_rate": 2}, **change))
        with pytest.raises(ValueError, match="'key' must be of the query's shape"):
            self.forward([tensors[0], tensors[1][:, :9], tensors[2]], segment_size=8, dilation_rate=2)


BAD_LAYERS = [
    ({"heads": 3}, "'dim' must be a multiple of heads = 3"),
    ({"dilation_rate": (1, 2)}, "'dilation_rate' must be as many numbers"),
    ({"d_model": 8}, "'d_model' must be absent or equal to dim = 16"),
    ({"causal": True, "casual": False}, "'casual' must be absent or equal"),
    ({"dropout": 1.0}, "'dropout' must be"),
    ({"Distributed": 1}, "'Distributed' must be a bool"),
    ({"use_xpos": 1}, "'use_xpos' must be a bool"),
    ({"heads": 16, "use_xpos": True}, "'dim' must be an even number of features a head"),
]
LAYER = {"dilation_rate": (1, 3), "segment_size": (8, 20), "use_xpos": True, "use_rel_pos_bias": True}
X, X_OUT = np.random.default_rng(3).standard_normal((2, 2, 33, 16))
