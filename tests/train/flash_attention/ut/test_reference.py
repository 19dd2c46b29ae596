"""core/reference.py, the judge itself: against sums written out, and its explicit backward against differences."""

import numpy as np
import pytest

from conformance import Case, make_inputs, run_reference
from flash_attention.core import reference

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
EVERYTHING = Case(
    lengths=(9, 13), head_dim=5, heads=(2, 4, 2), band="causal", mask="rows", bias="heads", slopes="alibi",
    logits="cap", sinks=True, ids="segments", offset="offset23", dropout=0.3, cotangent=True,
)  # fmt: skip


def test_against_sums_written_out():
    """One (batch, head, query) at a time, in Python numbers, for a call without exotic features."""
    inputs = make_inputs(Case(lengths=(5, 7), head_dim=3, heads=(2, 4, 2), band="causal", slopes="alibi"))
    results = run_reference(Case(lengths=(5, 7), head_dim=3, heads=(2, 4, 2), band="causal", slopes="alibi"))
    for b, h, i in np.ndindex(2, 4, 5):
        p = i + 7 - 5
        scores = [
            float(inputs.query[b, h, i].astype(np.float64) @ inputs.key[b, h // 2, j]) / np.sqrt(3)
            - float(inputs.operands.slopes[h]) * abs(p - j)
            for j in range(p + 1)
        ]
        weights = np.exp(scores)
        want = weights @ inputs.value[b, h // 2, : p + 1].astype(np.float64) / weights.sum()
        np.testing.assert_allclose(results["out"][b, h, i], want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(results["lse"][b, h, i], np.log(weights.sum()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "slopes", "sinks"])
def test_gradient_against_differences(name):
    """The directional derivative along a random direction, by central differences."""
    inputs = make_inputs(EVERYTHING)
    grad = run_reference(EVERYTHING)[name]
    wide = {field: np.asarray(getattr(inputs.operands, field), np.float64) for field in ("bias", "slopes", "sinks")}
    arrays = dict(zip(("query", "key", "value"), (x.astype(np.float64) for x in inputs[1:4])), **wide)
    direction = np.random.default_rng(3).standard_normal(arrays[name].shape)

    def loss(step):
        moved = dict(arrays, **{name: arrays[name] + step * direction})
        operands = inputs.operands._replace(**{field: moved[field] for field in wide})
        out, lse = reference.attention(np, inputs.spec, moved["query"], moved["key"], moved["value"], operands)
        return (out * inputs.d_out).sum() + (np.where(np.isneginf(lse), 0, lse) * inputs.d_lse).sum()

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert numeric == pytest.approx((grad * direction).sum(), rel=1e-7)


def test_a_row_that_sees_nothing():
    case = Case(lengths=(20, 10), band="causal", sinks=True, cotangent=True, bias="full")
    results = run_reference(case)
    assert np.isneginf(results["lse"][:, :, :10]).all() and np.isfinite(results["lse"][:, :, 10:]).all()
    for name in ("out", "query", "bias"):
        assert not results[name][:, :, :10].any() and np.isfinite(results[name]).all()
