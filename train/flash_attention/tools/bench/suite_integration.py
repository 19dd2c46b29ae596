"""Benchmarks of a training step inside model libraries: their own attention beside our engines, S = 2,048.

`bench --integration` runs those whose library is installed; each library has an environment of its own.
"""

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.registry import Benchmark, Entry, Job, quotient, register, said

_GROUPED = Case(1, 8, 2048, 64, causal=True, kv_heads=2)
_ALIBI = Case(1, 8, 2048, 64, causal=True, alibi=True)
_MODELS = {"mindformers": {"LLaMA": _GROUPED}, "mindone": {"llama": _GROUPED, "bloom": _ALIBI}}
_ATTENTIONS = ("eager", "portable", "jax")
_STEP = "fwd+bwd"


def _jobs(library):
    jobs = []
    for model, case in _MODELS[library].items():
        entries = tuple(Entry(name, library, "{} {}".format(model, name), case) for name in _ATTENTIONS)
        jobs += [Job("{} step".format(model), _STEP, entries, kind, "eager") for kind in ("time", "memory")]
    return jobs


def _figures(library, results):
    figures = []
    for model in _MODELS[library]:
        key = "{} step".format(model)
        for name in _ATTENTIONS[1:]:
            label = "{} {}, S=2,048, {}: ".format(library, model, name)
            figures.append(said(label + "gain over the library's own", results.ratio(key, _STEP, "eager", name), "x"))
            ours, theirs = (results.value(key, _STEP, label, "extra_bytes", "memory") for label in (name, "eager"))
            figures.append(said(label + "memory / the library's own", quotient(ours, theirs), "x"))
    return figures


for _library in _MODELS:
    register(
        Benchmark(
            _library,
            "a training step of {}, two layers".format(" and ".join(_MODELS[_library])),
            lambda library=_library: _jobs(library),
            lambda results, machine, library=_library: _figures(library, results),
            ("mindspore",),
            budget=30.0,
            library=_library,
        )
    )
