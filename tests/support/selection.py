"""Which values of a parametrized test run in the fast suite."""

import pytest


def mostly_slow(values, fast):
    """Parameters of a test: those named in `fast` always run, the others are marked `slow`.

    Args:
        values: a list, or a dict by test id.
        fast: the values of a list, or the ids of a dict, that the fast suite runs; each must be one of them.
    """
    named = values if isinstance(values, dict) else {str(value): value for value in values}
    fast = {str(one) for one in fast}
    assert fast <= set(named), "no such parameters: {}".format(sorted(fast - set(named)))
    return [
        pytest.param(value, id=name, marks=() if name in fast else pytest.mark.slow) for name, value in named.items()
    ]


def unpacked(parameters):
    """Parameters whose single value is a tuple, as parameters of several arguments."""
    return [pytest.param(*one.values[0], id=one.id, marks=one.marks) for one in parameters]
