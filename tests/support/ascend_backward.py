"""The Ascend 910 backward kernel over the conformance suite: run a case, compare its gradients."""

from dataclasses import replace

import numpy as np

from conformance import assert_matches, judge, make_inputs
from flash_attention.ascend import simulated

NAMES = ("query", "key", "value", "bias", "slopes", "sinks")


def fp16_gradients(case):
    """A case of the shared list as the backward kernel can take it."""
    return replace(case, dtype="float16", layout="BNSD", gradients=True)


def half_tensors(case):
    """query, key, value and d_out of a case in float16."""
    inputs = make_inputs(case)
    return [x.astype(np.float16) for x in (inputs.query, inputs.key, inputs.value, inputs.d_out)]


def run_backward_kernel(case, tiles=None, **options):
    """Forward kernel, then backward kernel: gradients and ``lse`` by name; tiles as in ``ascend.run_kernel``."""
    inputs = make_inputs(case)
    spec = replace(inputs.spec, tiling="sparse")
    query, key, value, d_out = half_tensors(case)
    out, lse = simulated.forward(spec, query, key, value, inputs.operands)
    saved = (query, key, value, inputs.operands, out, lse)
    grads = simulated.backward(spec, saved, (d_out, inputs.d_lse), tiles=tiles, **options)
    return dict({name: grad for name, grad in zip(NAMES, grads) if grad is not None}, lse=lse)


def judge_backward_kernel(case, tiles=None, **options):
    """All gradients against float64 by the table's fp16 rule; a query that sees no key has gradient exactly 0.

    The LSE is the forward kernel's, and judged with it.
    """

    def gradients(draw):
        got = run_backward_kernel(draw, tiles, **options)
        return {name: grad for name, grad in got.items() if name != "lse"}

    judge(gradients, case, without=("out", "lse"))


def assert_gradients_match(case, got):
    """The same for the gradients of one run."""
    assert_matches({case: {name: grad for name, grad in got.items() if name != "lse"}}, without=("out", "lse"))
