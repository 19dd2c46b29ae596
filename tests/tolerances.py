"""How wrong a result may be: one table by dtype and direction, used by every comparison with the float64 reference.

    error <= max(2 x error of the naive implementation, 4 eps x largest reference value)

Errors are largest absolute differences over a tensor, from the float64 reference, on the same draws. The naive
implementation is the same formula (`core.reference`) in the precision of the call: every matrix product takes and
gives tensors of the input dtype, everything between two products is float32. That is what attention written with a
framework's own operators does when its softmax is float32; it uses the framework's own exp and log where those are
less accurate than numpy's (MindSpore on the CPU: 70 units in the last place).

A rounding error is a draw of chance, and the largest of a few of them (four slopes, one query) a fickle one. Hence
the naive implementation of float32 runs in several orders of summation, its error counts as at least three times its
root mean square, and as a share of the tensor's largest value it is taken over all tensors of a direction: gradients
that come from the same dS share their bound. Calls of few rows are judged by many draws where one is not enough
(`in_two_looks`).
"""

from typing import NamedTuple, Sequence

import numpy as np

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


class Bound(NamedTuple):
    """Allowed error: the larger of `naive` times the naive error and `eps` times machine epsilon times the largest."""

    naive: float
    eps: float


FORWARD, GRADIENTS = "forward", "gradients"
TABLE = {(dtype, direction): Bound(naive=2.0, eps=4.0) for dtype in EPS for direction in (FORWARD, GRADIENTS)}


def largest(x):
    """Largest finite magnitude, 0 for an empty tensor."""
    x = np.abs(np.asarray(x, np.float64))
    return float(np.max(x, initial=0.0, where=np.isfinite(x)))


def error(got, want):
    """Largest absolute difference; inf where one is not finite and the other is not equal to it."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(got) & np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite]):
        return float("inf")
    return largest(got[finite] - want[finite])


def _naive_error(results, want):
    """At least three times the root mean square: what the largest error would be if the tensor were larger."""
    with np.errstate(invalid="ignore"):  # -inf of a dead row's LSE
        difference = np.asarray(results, np.float64) - np.asarray(want, np.float64)
    finite = difference[np.isfinite(difference)]
    return max(error(results, want), 3.0 * float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0)


def allowed(want, naive, dtype, direction):
    """The largest error that the table allows for each tensor.

    Args:
        want: float64 tensors of one direction by name; naive: several such dicts of naive results.
    """
    bound = TABLE[dtype, direction]
    errors = {name: max(_naive_error(results[name], want[name]) for results in naive) for name in want}
    shares = [errors[name] / largest(want[name]) for name in want if largest(want[name])]
    # A tensor that is zero but for rounding, or a naive overflow, says nothing about the others.
    share = max([share for share in shares if share < _MEANINGLESS * EPS[dtype]], default=0.0)
    top = max(largest(x) for x in want.values())
    limits = {}
    for name, x in want.items():
        own = errors[name] if np.isfinite(errors[name]) else 0.0
        # What cancels to zero in exact arithmetic (dQ with a single key) is judged by the size of its direction.
        size = largest(x) if largest(x) > EPS[dtype] * top else top
        limits[name] = max(bound.naive * max(own, share * largest(x)), bound.eps * EPS[dtype] * size)
    return limits


_MEANINGLESS = 64.0  # a naive error beyond so many eps of the largest value


def assert_close(got, want, naive, dtype, direction, exps=1):
    """Fail unless every tensor of `got` is as close to the float64 one in `want` as the table asks.

    Returns the largest error as a share of what is allowed.

    `exps`: how often a probability passes through exp where the naive implementation does it once. It matters in
    MindSpore, whose exp is up to 50 units off on the CPU, and nowhere else.
    """
    limits, worst = allowed(want, naive, dtype, direction), 0.0
    for name in want:
        result = np.asarray(got[name], np.float64)
        assert result.shape == np.shape(want[name]), "{}: shape {}, not {}".format(
            name, result.shape, np.shape(want[name])
        )
        found, limit = error(result, want[name]), exps * limits[name]
        assert found <= limit, "{}: error {:.3g}, allowed {:.3g} ({:.2f} times); largest value {:.3g}".format(
            name, found, limit, found / limit if limit else float("inf"), largest(want[name])
        )
        worst = max(worst, found / limit if limit else 0.0)
    return worst


class Draw(NamedTuple):
    """Results of one draw by name: those to be judged, float64's, and those of each run of the naive version."""

    got: dict
    want: dict
    naive: Sequence[dict]


def assert_draws_close(draws, dtype, exps=1):
    """Every result of several draws by the table, 'out' and 'lse' as forward, all others as gradients.

    What counts is the largest error of all draws, of the naive implementation too. Returns it as
    :func:`assert_close` does.
    """
    names = list(draws[0].got)
    forward = [name for name in names if name in ("out", "lse")]
    gradients = [name for name in names if name not in forward]
    return max(
        assert_part_close(draws, part, dtype, direction, exps)
        for part, direction in ((forward, FORWARD), (gradients, GRADIENTS))
    )


def assert_part_close(draws, names, dtype, direction, exps=1):
    """:func:`assert_draws_close` of the tensors ``names``, which share a bound; 0 where there are none."""
    if not names:
        return 0.0

    def stacked(runs):
        return {name: np.stack([np.asarray(run[name], np.float64) for run in runs]) for name in names}

    got, want, naive = zip(*draws)
    return assert_close(stacked(got), stacked(want), [stacked(runs) for runs in zip(*naive)], dtype, direction, exps)


def in_two_looks(look, functions):
    """``look(functions, again=False)``; where that misses a bound ``look(functions, again=True)`` decides.

    The largest of a few rounding errors is a draw of chance, so the second look may take more draws. Its naive results
    take the framework's own matrix product (``functions.with_products``), whose sums may be rounded otherwise than
    numpy's.
    """
    try:
        return look(functions, again=False)
    except AssertionError:
        return look(getattr(functions, "with_products", functions), again=True)
