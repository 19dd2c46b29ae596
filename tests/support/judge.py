"""The rule of `tolerances` for mechanisms: a plain formula gives the float64 results and the naive ones.

A formula is `compute(xp) -> {name: array}`, in the dtype `xp.float64` (float32 when it runs as the naive version), with
`core.reference` and `xp.matmul` for its products. Names are 'out', 'lse' and those of the gradients.
"""

import numpy as np

from conformance import naive_results
from tolerances import Draw, assert_draws_close, in_two_looks


def check(got, compute, dtype="float32", functions=None, plain=None, exps=1):
    """Fail unless each result in `got` is as close to the formula's float64 result as the table of tolerances asks.

    `plain`: the formula of the naive implementation, where that would compute in other steps than the judge; `exps` as
    in `tolerances.assert_close`. The second look takes the framework's own matrix product, as in `conformance.judge`.
    """

    def look(functions, again):
        del again
        naive = naive_results(plain or compute, dtype, functions)
        return assert_draws_close([Draw(got, compute(np), naive)], dtype, exps)

    in_two_looks(look, functions)
