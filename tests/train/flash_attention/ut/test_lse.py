"""core/lse.py: attention over parts of the keys, merged, is attention over all of them."""

from dataclasses import replace

import numpy as np
import pytest

from conformance import Case, make_inputs
from flash_attention.core import reference
from flash_attention.core.lse import merge

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def parts_of(cuts, mask):
    """(out, lse) of each part of the keys between `cuts`, and of all keys."""
    inputs = make_inputs(Case(lengths=(20, 30), heads=(2, 2, 2), mask="rows"))
    q, k, v = (x.astype(np.float64) for x in inputs[1:4])
    operands = inputs.operands._replace(mask=mask)

    def part(a, b):
        spec = replace(inputs.spec, kv_len=b - a, q_offset=None, mask_shape=(1, 1, 20, b - a))
        return reference.attention(np, spec, q, k[:, :, a:b], v[:, :, a:b], operands._replace(mask=mask[..., a:b]))

    return [part(a, b) for a, b in zip(cuts, cuts[1:])], part(0, 30)


@pytest.mark.parametrize("cuts", [(0, 30), (0, 7, 30), (0, 1, 2, 15, 29, 30)])
def test_merge_is_exact(cuts):
    mask = np.random.default_rng(0).random((1, 1, 20, 30)) < 0.5
    mask[:, :, 3] = False  # sees nothing in any part
    mask[:, :, 5, :7] = False  # sees nothing in the first part
    parts, (out, lse) = parts_of(cuts, mask)
    merged = merge(np, [part[0] for part in parts], [part[1] for part in parts])
    np.testing.assert_allclose(merged[0], out, atol=1e-14)
    np.testing.assert_allclose(merged[1], lse, atol=1e-14)
    assert np.isneginf(merged[1][:, :, 3]).all() and not merged[0][:, :, 3].any()


def test_order_does_not_matter_and_large_values_do_not_overflow():
    outs = [np.ones((1, 2, 3)), 2 * np.ones((1, 2, 3))]
    lses = [np.array([[1e4, -np.inf]]), np.array([[1e4 + np.log(3.0), 5.0]])]
    out, lse = merge(np, outs, lses)
    np.testing.assert_allclose(out[0], [[1.75] * 3, [2.0] * 3])
    np.testing.assert_allclose(lse, [[1e4 + np.log(4.0), 5.0]])
    again = merge(np, outs[::-1], lses[::-1])
    np.testing.assert_array_equal(out, again[0])
    np.testing.assert_array_equal(lse, again[1])
