"""Benchmark of the transformer wrappers: a training step of a decoder beside the same one with naive attention.

Six layers of 8 heads of 64 (x-transformers' defaults), S = 2,048. Memory is what a step needs beyond the weights and
the optimiser's state; it counts the gradients of the weights too, which both have, so that the bound on the share is
the stricter for it.
"""

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.registry import Benchmark, Entry, Job, at_most, quotient, register, said
from flash_attention.tools.bench.wrappers import NAIVE, STEP

_TITLES = {"jax": "JAX", "mindspore": "MindSpore"}
_LENGTH, _SHORT = 2048, 1024
_WHOLE_ROWS = "talking heads"


def _key(framework, length):
    return "{} step S{}".format(_TITLES[framework], length)


def _job(framework, length, names, kind):
    case = Case(1, 8, length, 64, causal=True)
    module = "flash_attention.tools.bench.wrappers_in_{}".format(framework)
    entries = tuple(Entry(name, framework, "{}:{}".format(module, name), case) for name in names)
    return Job(_key(framework, length), STEP, entries, kind, NAIVE if kind == "time" else None)


def _jobs():
    jobs = [_job(framework, _LENGTH, ("fused", NAIVE), "time") for framework in _TITLES]
    for framework in _TITLES:
        jobs.append(_job(framework, _SHORT, (_WHOLE_ROWS,), "memory"))
        jobs.append(_job(framework, _LENGTH, ("fused", NAIVE, _WHOLE_ROWS), "memory"))
    return jobs


def _figures(results, machine):
    del machine
    figures = []
    for framework, title in _TITLES.items():
        key, name = _key(framework, _LENGTH), "{} decoder, 6 layers, S=2,048: ".format(title)
        figures.append(said(name + "time of a step", results.value(key, STEP, "fused"), "s"))
        figures.append(at_most(name + "time / naive's", results.ratio(key, STEP, "fused", NAIVE), 1.0))
        extra = {
            label: results.value(key, STEP, label, "extra_bytes", "memory") for label in ("fused", NAIVE, _WHOLE_ROWS)
        }
        figures.append(said(name + "memory of a step", quotient(extra["fused"], 1e6), "MB"))
        figures.append(at_most(name + "memory / naive's", quotient(extra["fused"], extra[NAIVE]), 0.5))
        figures.append(
            said(name + "memory with talking heads / naive's", quotient(extra[_WHOLE_ROWS], extra[NAIVE]), "x")
        )
        short = results.value(_key(framework, _SHORT), STEP, _WHOLE_ROWS, "extra_bytes", "memory")
        growth = "{} decoder with talking heads: memory, S=2,048 / S=1,024".format(title)
        figures.append(at_most(growth, quotient(extra[_WHOLE_ROWS], short), 2.5))
    return figures


register(
    Benchmark(
        "wrappers",
        "a training step of a decoder, beside naive attention",
        _jobs,
        _figures,
        tuple(_TITLES),
        budget=30.0,
    )
)
