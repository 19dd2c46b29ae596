"""A call in parts, side by side (jax/engines/parallel.py): the same results as in one piece."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from conformance import Case, make_inputs, tagged
from flash_attention.core.spec import AttentionSpec
from flash_attention.jax.engines import parallel, xla

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

NARROW = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}  # shares of gradients are rounded before their sum
FEATURES = [
    Case(
        name="features a head and a batch",
        mask="heads",
        bias="full",
        slopes="alibi-batch",
        ids="lengths",
        offset="traced-batch",
        sinks=True,
        dropout=0.2,
    ),  # fmt: skip
    Case(name="shared features", mask="keys", bias="keys", slopes="alibi", ids="segments", dropout=0.2, cotangent=True),
]
SINGLE = [case for case in tagged("ci") if case.heads[0] * case.heads[2] > 1 and case.values == "normal"]


def by_batch(cases):
    """The cases with one key/value head, so that only the batch can be split."""
    return [replace(case, heads=(2, 4, 1), name=case.name + ", by batch") for case in cases]


CASES = FEATURES + by_batch(FEATURES)
CASES += [pytest.param(case, marks=pytest.mark.slow) for case in SINGLE + by_batch(SINGLE)]


def inputs_of(case):
    """numpy tensors in the case's dtype: (spec, saved without results, cotangents)."""
    found = make_inputs(case)
    q, k, v, d_out = (np.asarray(jnp.asarray(x, case.dtype)) for x in found[1:5])
    operands = found.operands
    if operands.mask is not None:
        operands = operands._replace(mask=operands.mask > 0)
    return found.spec, (q, k, v, operands), (d_out, found.d_lse)


def close(got, want, dtype):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    assert np.array_equal(np.isfinite(got), finite)
    size = np.abs(want[finite]).max(initial=1.0)
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=NARROW[dtype] * size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_give_what_the_whole_gives(case, monkeypatch):
    spec, inputs, cotangents = inputs_of(case)
    parts = parallel.parts_of(spec, 2)
    assert len(parts) == 2 and {part.axis for part in parts} == {1 if spec.kv_heads > 1 else 0}
    monkeypatch.setattr(parallel, "_plan", lambda spec: (parts, parallel._pool()))

    out, lse = xla.forward_pass(spec, *inputs)
    for got, want, dtype in zip(parallel.forward_pass(spec, *inputs), (out, lse), (case.dtype, "float32")):
        close(got, want, dtype)
    saved = inputs + (np.asarray(out), np.asarray(lse))
    if case.gradients:
        for got, want in zip(
            parallel.backward_pass(spec, saved, cotangents), xla.backward_pass(spec, saved, cotangents)
        ):
            assert (got is None) == (want is None)
            if want is not None:
                close(got, want, case.dtype)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_parts_of_a_part_drop_what_the_whole_drops(kv_heads, monkeypatch):
    """A call that has an origin of its own, as a share of dp and mp has: its parts count from there."""
    case = replace(FEATURES[1], heads=(2, 4, kv_heads), dropout=0.5)
    spec, inputs, _ = inputs_of(case)
    spec = replace(spec, origin=(3, 8, 0, 5))
    monkeypatch.setattr(parallel, "_plan", lambda spec: (parallel.parts_of(spec, 2), parallel._pool()))
    out, lse = parallel.forward_pass(spec, *inputs)
    want, want_lse = xla.forward_pass(spec, *inputs)
    close(out, want, "float32")
    close(lse, want_lse, "float32")
    elsewhere, _ = xla.forward_pass(replace(spec, origin=(0, 0, 0, 0)), *inputs)
    assert np.abs(np.asarray(elsewhere) - np.asarray(want)).max() > 0.1


def test_small_calls_and_single_heads_stay_whole():
    small = AttentionSpec(batch=1, heads=8, kv_heads=8, q_len=256, kv_len=256, head_dim=64)
    assert parallel._plan(small) == (None, None)
    one = AttentionSpec(batch=1, heads=8, kv_heads=1, q_len=1024, kv_len=1024, head_dim=64)
    assert parallel._plan(one) == (None, None)


@pytest.mark.parametrize(
    "batch, kv_heads, most, want",
    [(1, 8, 4, (1, 4)), (1, 6, 4, (1, 3)), (4, 1, 2, (0, 2)), (3, 5, 2, (0, 1)), (1, 7, 16, (1, 7))],
)
def test_parts_are_equal_and_cover_everything(batch, kv_heads, most, want):
    spec = AttentionSpec(batch=batch, heads=2 * kv_heads, kv_heads=kv_heads, q_len=64, kv_len=64, head_dim=8)
    parts = parallel.parts_of(spec, most)
    assert (parts[0].axis, len(parts)) == want
    covered = [n for part in parts for n in range(part.keys.start, part.keys.stop)]
    assert covered == list(range((batch, kv_heads)[parts[0].axis]))
