"""Benchmarks by registration: a suite module calls :func:`register`; a new suite is one line in ``SUITES``."""

import importlib
from typing import Callable, NamedTuple, Optional, Tuple

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.measure import ratio
from flash_attention.tools.machine import cpu_class, installed, versions

SUITES = (
    ("flash_attention", "flash_attention.tools.bench.suite_jax"),
    ("flash_attention", "flash_attention.tools.bench.suite_peers"),
    ("flash_attention", "flash_attention.tools.bench.suite_gpu"),
    ("flash_attention", "flash_attention.tools.bench.suite_mindspore"),
    ("flash_attention", "flash_attention.tools.bench.suite_mechanisms"),
    ("flash_attention", "flash_attention.tools.bench.suite_wrappers"),
    ("flash_attention", "flash_attention.tools.bench.suite_integration"),
    ("flash_attention_infer", "flash_attention_infer.tools.bench"),
)

DIRECTIONS = ("fwd", "fwd+bwd")
FRAMEWORKS = ("jax", "mindspore", "torch", "tokamax", "ringattention", "ejkernel")
"""What the entries of one attention call each are of, the libraries that compute by JAX included."""


class Entry(NamedTuple):
    """One thing to measure: ``candidate`` of ``framework`` on ``case``, called ``label`` in the tables.

    Those of one framework share a process; with 'framework/NAME' a candidate has another one.
    """

    label: str
    framework: str
    candidate: str
    case: Case

    def fields(self, direction):
        """What a worker must be told."""
        return {"case": self.case.to_json(), "direction": direction, "candidate": self.candidate}


def beside(case, ours, peers):
    """Entries of our engines and of what jax.nn offers, in one process, and of every other library, in its own."""
    in_jax = tuple(ours) + tuple(name for name in peers if name.startswith("jax.nn"))
    others = [name for name in peers if name not in in_jax]
    return tuple(
        [Entry(name, "jax", name, case) for name in in_jax] + [Entry(name, name, name, case) for name in others]
    )


class Job(NamedTuple):
    """Entries that are compared with one another.

    Attributes:
        key: name within the benchmark.
        direction: 'fwd' or 'fwd+bwd'.
        entries: what is compared.
        kind: 'time' (interleaved), 'memory' or 'compile' (fresh processes).
        base: label that ratios refer to; None = no ratios.
    """

    key: str
    direction: str
    entries: Tuple[Entry, ...]
    kind: str = "time"
    base: Optional[str] = None

    @property
    def id(self):
        """Key of the finished job in files."""
        return "{} {} {}".format(self.kind, self.key, self.direction)


class Benchmark(NamedTuple):
    """A named benchmark of at most 20 minutes on 2 cores.

    Attributes:
        name, about: what `bench` lists.
        jobs: ``jobs() -> list of Job``.
        figures: ``figures(results, machine) -> list of figure dicts`` from :class:`Results`; ``machine`` has
            'cpu_class' and 'limits'.
        frameworks: whose limits are measured with it.
        budget: seconds that the rounds of one job should take.
        library: the model library whose environment it needs; such benchmarks run by name or by --integration.
        packages: others whose versions are kept with the results.
        refusal: ``refusal() -> None``, or what this computer lacks for it, worded to follow "needs".
        package: a package on top of this one whose code decides the results too.
        place: ``place() -> str``, the class of what computes: in the names of the files and beside the figures.
    """

    name: str
    about: str
    jobs: Callable
    figures: Callable
    frameworks: Tuple[str, ...]
    budget: float = 8.0
    library: Optional[str] = None
    packages: Tuple[str, ...] = ()
    refusal: Callable[[], Optional[str]] = lambda: None
    package: Optional[str] = None
    place: Callable[[], str] = cpu_class

    @property
    def sources(self):
        """Sub-packages whose code decides its results (MindSpore may compute with the JAX engine)."""
        parts = ("core", "jax") + (("nn", "ops") if "mindspore" in self.frameworks else ())
        return parts + (("integrations",) if self.library else ())

    @property
    def versions(self):
        """``{name: version or None}`` of what decides its results."""
        return versions(self.packages + ((self.library,) if self.library else ()))


BENCHMARKS = {}


def register(benchmark):
    """Add a benchmark under its name; a second one of the same name is an error."""
    if benchmark.name in BENCHMARKS:
        raise ValueError("benchmark '{}' is registered already".format(benchmark.name))
    BENCHMARKS[benchmark.name] = benchmark


def load():
    """Import the suites that are installed; returns ``BENCHMARKS``."""
    for package, module in SUITES:
        if package == "flash_attention" or (installed(package) and _exists(module)):
            importlib.import_module(module)
    return BENCHMARKS


def _exists(module):
    try:
        return installed(module)
    except ModuleNotFoundError:  # a parent package of it is absent
        return False


class Results:
    """Finished jobs as the figures see them. A value that was not measured is None."""

    def __init__(self, finished):
        self.finished = finished

    def value(self, key, direction, label, field="median_s", kind="time"):
        """One measured number."""
        entry = self._entry(kind, key, direction, label)
        return None if entry is None else entry.get(field)

    def ratio(self, key, direction, label, base):
        """Time of ``label`` divided by time of ``base``."""
        mine, other = (self._entry("time", key, direction, name) for name in (label, base))
        if not (mine and other and mine.get("times") and other.get("times")):
            return None
        return ratio(mine["times"], other["times"])

    def _entry(self, kind, key, direction, label):
        return self.finished.get("{} {} {}".format(kind, key, direction), {}).get(label)


def at_most(name, value, bound, unit="x"):
    """A figure that should be at most ``bound``; a value of None means it was not measured."""
    return _figure(name, value, bound, unit, False)


def at_least(name, value, bound, unit="x"):
    """A figure that should be at least ``bound``."""
    return _figure(name, value, bound, unit, True)


def said(name, value, unit):
    """A figure without a bound."""
    return _figure(name, value, None, unit, False)


def _figure(name, value, bound, unit, at_least):
    ok = None
    if value is not None:
        value = float("{:.4g}".format(value))
        ok = None if bound is None else value >= bound if at_least else value <= bound
    return {"name": name, "value": value, "bound": bound, "unit": unit, "at_least": at_least, "ok": ok}


def worst(values, pick=max):
    """``pick`` of the values that were measured; None when none was."""
    known = [x for x in values if x is not None]
    return pick(known) if known else None


def quotient(a, b):
    """``a / b``, None when either was not measured."""
    return None if a is None or not b else a / b
