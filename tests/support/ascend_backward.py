"""The Ascend 910 backward kernel over the conformance suite: run a case, compare its gradients."""

from dataclasses import replace

import numpy as np

from conformance import make_inputs, run_naive, run_reference
from flash_attention.ascend import simulated
from tolerances import GRADIENTS, assert_close

NAMES = ("query", "key", "value", "bias", "slopes", "sinks")


def fp16_gradients(case):
    """A case of the shared list as the backward kernel can take it."""
    return replace(case, dtype="float16", layout="BNSD", gradients=True)


def half_tensors(case):
    """query, key, value and d_out of a case in float16."""
    inputs = make_inputs(case)
    return [x.astype(np.float16) for x in (inputs.query, inputs.key, inputs.value, inputs.d_out)]


def run_backward_kernel(case, tiles=None, **options):
    """Forward kernel, then backward kernel: gradients by the suite's names, and ``lse``."""
    inputs = make_inputs(case)
    query, key, value, d_out = half_tensors(case)
    out, lse = simulated.forward(inputs.spec, query, key, value, inputs.operands)
    saved = (query, key, value, inputs.operands, out, lse)
    grads = simulated.backward(inputs.spec, saved, (d_out, inputs.d_lse), tiles=tiles, **options)
    return dict({name: grad for name, grad in zip(NAMES, grads) if grad is not None}, lse=lse)


def assert_gradients_match(case, got):
    """All gradients against float64 by the table's fp16 rule; a query that sees no key has gradient exactly 0."""
    want, naive = run_reference(case), run_naive(case)
    assert not got["query"][np.isneginf(want["lse"])].any(), "a query that sees no key must have gradient exactly 0"
    names = [name for name in want if name not in ("out", "lse")]
    assert set(got) == set(names) | {"lse"}
    select = [{name: results[name] for name in names} for results in (got, want) + tuple(naive)]
    assert_close(select[0], select[1], select[2:], "float16", GRADIENTS)
