"""Which JAX engine `auto` takes on which platform: one table, by what was measured. `info` prints it.

An engine that no row names runs only when it is asked for by name. A row is added with the measurement that it rests
on, never before: a kernel that was only interpreted or only compiled is in none.
"""

from dataclasses import replace
from typing import NamedTuple, Tuple

from flash_attention.jax.engines.platforms import backend


class Choice(NamedTuple):
    """The engines that `auto` takes on a platform, the first that supports a call, and why."""

    backend: str
    engines: Tuple[str, ...]
    because: str


TABLE = (
    Choice("cpu", ("xla",), "measured beside torch and jax.nn, see docs/benchmarks"),
    Choice("cuda", ("cudnn", "pallas", "xla"), "measured on an H200, see docs/benchmarks"),
    Choice("rocm", ("xla",), "nothing was measured on an AMD GPU; 'pallas' runs when asked for by name"),
    Choice("tpu", ("xla",), "nothing was measured on a TPU; 'splash' runs when asked for by name"),
)
_ELSEWHERE = Choice("elsewhere", ("xla",), "the engine that needs no kernel of its own")


def here():
    """The row of the platform at hand."""
    return next((row for row in TABLE if row.backend == backend()), _ELSEWHERE)


def ranked(engine):
    """``engine`` with the order and the ``pays`` that the table gives it."""
    places = [row.engines.index(engine.name) for row in TABLE + (_ELSEWHERE,) if engine.name in row.engines]
    if not places:
        return replace(engine, order=None)
    return replace(engine, order=max(places), pays=lambda spec: engine.name in here().engines and engine.pays(spec))
