"""The rule of `tolerances` for mechanisms: a plain formula gives the float64 results and the naive ones.

A formula is `compute(xp) -> {name: array}`, in the dtype `xp.float64` (float32 when it runs as the naive version), with
`core.reference` and `xp.matmul` for its products. Names are 'out', 'lse' and those of the gradients.
"""

from unittest import mock

import numpy as np

from conformance import ORDERS, NaivePrecision
from flash_attention.core import reference
from tolerances import FORWARD, GRADIENTS, assert_close


def naive_results(compute, dtype, functions=None):
    """What the naive implementation gives: one dict for each order of summation."""
    runs = []
    for order in range(ORDERS if dtype == "float32" else 1):
        narrow = NaivePrecision(dtype, order, functions)
        with mock.patch.multiple(reference, np=narrow, distance=narrow.distance), np.errstate(all="ignore"):
            runs.append(compute(narrow))
    return runs


def check(got, compute, dtype="float32", functions=None, plain=None, exps=1):
    """Fail unless each result in `got` is as close to the formula's float64 result as the table of tolerances asks.

    `plain`: the formula of the naive implementation, where that would compute in other steps than the judge; `exps` as
    in `tolerances.assert_close`. As in `conformance.judge`, where a bound is missed the naive results are made again
    with the framework's own matrix product, whose sums may be rounded otherwise than numpy's.
    """
    try:
        _check(got, compute, dtype, functions, plain, exps)
    except AssertionError:
        if not hasattr(functions, "with_products"):
            raise
        _check(got, compute, dtype, functions.with_products, plain, exps)


def _check(got, compute, dtype, functions, plain, exps):
    want, naive = compute(np), naive_results(plain or compute, dtype, functions)
    for forward, direction in ((True, FORWARD), (False, GRADIENTS)):
        names = [name for name in got if (name in ("out", "lse")) == forward]
        if names:
            select = [{name: results[name] for name in names} for results in [got, want] + naive]
            assert_close(select[0], select[1], select[2:], dtype, direction, exps)
