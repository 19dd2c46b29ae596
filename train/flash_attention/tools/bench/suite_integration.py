"""Benchmarks of a training step inside model libraries: their own attention beside our engines, S = 2,048.

`bench --integration` runs those whose library is installed; each library has an environment of its own.
"""

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.registry import Benchmark, Entry, Job, quotient, register, said
from flash_attention.tools.machine import package_version

_GROUPED = Case(1, 8, 2048, 64, causal=True, kv_heads=2)
_PLAIN = Case(1, 8, 2048, 64, causal=True)
_ALIBI = Case(1, 8, 2048, 64, causal=True, alibi=True)
_GROUPED_MODELS = dict.fromkeys(("llama", "mistral", "qwen2"), _GROUPED)
_ALIBI_MODELS = dict.fromkeys(("mpt", "falcon", "bloom"), _ALIBI)
_MODELS = {
    "mindformers": {"LLaMA": _GROUPED},
    "mindformers-1.3": {"BLOOM": _ALIBI},
    "mindone": dict(_GROUPED_MODELS, gpt2=_PLAIN, **_ALIBI_MODELS),
}
_LIBRARIES = {"mindformers": "mindformers 1.9.0", "mindformers-1.3": "mindformers 1.3.2", "mindone": "mindone 0.5.0"}
OWN = "eager"
_ATTENTIONS = (OWN, "portable", "jax")
_STEP = "fwd+bwd"


def _lacking(requirement):
    name, version = requirement.split()
    return None if package_version(name) == version else requirement


def _jobs(name, library):
    jobs = []
    for model, case in _MODELS[name].items():
        entries = tuple(Entry(attention, library, "{} {}".format(model, attention), case) for attention in _ATTENTIONS)
        jobs += [Job("{} step".format(model), _STEP, entries, kind, OWN) for kind in ("time", "memory")]
    return jobs


def _figures(name, results):
    figures = []
    for model in _MODELS[name]:
        key = "{} step".format(model)
        memory = {x: results.value(key, _STEP, x, "extra_bytes", "memory") for x in _ATTENTIONS}
        for engine in _ATTENTIONS[1:]:
            label = "{} {}, S=2,048, {}: ".format(name, model, engine)
            figures.append(said(label + "gain over the library's own", results.ratio(key, _STEP, OWN, engine), "x"))
            share = quotient(memory[engine], memory[OWN])
            figures.append(said(label + "memory / the library's own", share, "x"))
    return figures


for _name, _requirement in _LIBRARIES.items():
    _library = _requirement.split()[0]
    register(
        Benchmark(
            _name,
            "a training step of {}, two layers, in {}".format(", ".join(_MODELS[_name]), _requirement),
            lambda name=_name, library=_library: _jobs(name, library),
            lambda results, machine, name=_name: _figures(name, results),
            ("mindspore",),
            budget=12.0,
            library=_library,
            refusal=lambda requirement=_requirement: _lacking(requirement),
        )
    )
