"""Deliberate mistakes in the Ascend kernels, as small changes of the source of the kernels' own functions.

A mutation is written against the kernels and the documented interface only. ``old`` occurs once in the function, so a
mutation that no longer fits the source is an error, not a mutation that changes nothing.
"""

import inspect
import textwrap
from typing import Callable, NamedTuple


class Mutation(NamedTuple):
    """``old`` becomes ``new`` in ``function``.

    Attributes:
        call: the call of ``test_ascend_mutations.CALLS`` that should show it.
        kernels: those that it concerns, where not all of its list do.
    """

    name: str
    function: Callable
    old: str
    new: str
    call: str = "causal"
    kernels: tuple = ()


def mutated_code(mutation):
    """The code object of the changed function."""
    function = getattr(mutation.function, "fget", None) or mutation.function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.old) == 1, "'{}' does not fit the source any more".format(mutation.name)
    source = "\n".join(line for line in source.splitlines() if not line.startswith("@"))
    namespace = {}
    exec(compile(source.replace(mutation.old, mutation.new), inspect.getfile(function), "exec"), function.__globals__,
         namespace)  # fmt: skip
    return namespace[function.__name__].__code__


def apply(mutation, monkeypatch):
    """Change the function wherever it is referred to, until the end of the test."""
    function = getattr(mutation.function, "fget", None) or mutation.function
    monkeypatch.setattr(function, "__code__", mutated_code(mutation))
