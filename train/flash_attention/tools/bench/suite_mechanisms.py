"""Benchmarks of the mechanisms: cost against the length, beside the dense core call at the same length."""

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.registry import (
    Benchmark,
    Entry,
    Job,
    at_least,
    at_most,
    quotient,
    register,
    said,
)

# --- dilated attention: w0 = 2,048 tokens, segments and rates doubling up to the whole length -------------------------

_LENGTHS = (16384, 65536, 262144, 1048576)
_DENSE_UP_TO = {"fwd": 65536, "fwd+bwd": 16384}
_DILATED_UP_TO = {"fwd": 1048576, "fwd+bwd": 262144}


def _case(length):
    return Case(1, 2, length, 64, causal=True)


def _dilated_jobs():
    jobs = []
    for way, longest in _DILATED_UP_TO.items():
        for length in [n for n in _LENGTHS if n <= longest]:
            names = ("dilated", "xla") if length <= _DENSE_UP_TO[way] else ("dilated",)
            entries = tuple(Entry("JAX " + name, "jax", name, _case(length)) for name in names)
            if way == "fwd" and length == _LENGTHS[0]:
                entries += (Entry("MindSpore dilated", "mindspore", "dilated", _case(length)),)
            jobs.append(Job("S{}".format(length), way, entries, base="JAX xla" if len(names) > 1 else None))
    longest = (Entry("JAX dilated", "jax", "dilated", _case(_LENGTHS[-1])),)
    return jobs + [Job("S{}".format(_LENGTHS[-1]), "fwd", longest, "memory")]


def _dilated_figures(results, machine):
    del machine
    figures = []
    for way, longest in _DILATED_UP_TO.items():
        times = {n: results.value("S{}".format(n), way, "JAX dilated") for n in _LENGTHS if n <= longest}
        for short, long in zip(list(times), list(times)[1:]):
            name = "dilated {}: time, S={:,} / S={:,}".format(way, long, short)
            figures.append(at_most(name, quotient(times[long], times[short]), 5.0))
        dense = _DENSE_UP_TO[way]
        gain = results.ratio("S{}".format(dense), way, "JAX xla", "JAX dilated")
        figures.append(at_least("dilated {}: gain over dense at S={:,}".format(way, dense), gain, 1.5))
    last = "S{}".format(_LENGTHS[-1])
    figures.append(said("dilated fwd: S=1,048,576, time", results.value(last, "fwd", "JAX dilated"), "s"))
    peak = results.value(last, "fwd", "JAX dilated", "peak_bytes", "memory")
    figures.append(at_most("dilated fwd: S=1,048,576, peak memory of the process", quotient(peak, 1e9), 24.0, "GB"))
    return figures


# --- dynamic sparse and landmark attention: fewer pairs, or as many, beside the dense core at the same length ---------

_SPARSE_LENGTHS = {"fwd": 16384, "fwd+bwd": 16384}
_SPARSE = ("hash4", "hash16", "qk50", "qk25", "landmark")


def _sparse_jobs():
    jobs = []
    for way, length in _SPARSE_LENGTHS.items():
        entries = [Entry("JAX " + name, "jax", name, _case(length)) for name in ("xla",) + _SPARSE]
        jobs.append(Job("S{}".format(length), way, tuple(entries), base="JAX xla"))
    names = ("portable", "hash16/pynative", "qk25/pynative", "landmark")
    entries = [Entry("MindSpore " + name, "mindspore", name, _case(4096)) for name in names]
    return jobs + [Job("S4096", "fwd", tuple(entries), base="MindSpore portable")]


def _sparse_figures(results, machine):
    del machine
    figures = []
    for way, length in _SPARSE_LENGTHS.items():
        for name, bound in (("hash4", 1.5), ("hash16", 3.0), ("qk50", 2.0), ("qk25", 4.0)):
            gain = results.ratio("S{}".format(length), way, "JAX xla", "JAX " + name)
            figures.append(at_least("{} {}: gain over dense at S={:,}".format(name, way, length), gain, bound))
        cost = results.ratio("S{}".format(length), way, "JAX landmark", "JAX xla")
        figures.append(at_most("landmark {}: time over dense at S={:,}".format(way, length), cost, 4.0))
    for name in ("hash16/pynative", "qk25/pynative"):
        gain = results.ratio("S4096", "fwd", "MindSpore portable", "MindSpore " + name)
        figures.append(said("MindSpore {}: gain over dense at S=4,096".format(name), gain, "x"))
    return figures


_FRAMEWORKS = ("jax", "mindspore")

# --- blockwise attention in chunks of 512, beside the dense formula ---------------------------------------------------

_CHUNKED = (2048, 8192)
_LONG = 16384  # the dense formula would hold 2 GB of scores


def _blockwise_jobs():
    jobs = []
    for way in ("fwd", "fwd+bwd"):
        for length in _CHUNKED:
            entries = tuple(Entry("JAX " + name, "jax", name, _case(length)) for name in ("blockwise", "naive"))
            if length == _CHUNKED[0]:
                entries += (Entry("MindSpore blockwise", "mindspore", "blockwise", _case(length)),)
            jobs.append(Job("S{}".format(length), way, entries, base="JAX naive"))
        for length in (_CHUNKED[-1], _LONG):
            names = ("blockwise", "naive") if length == _CHUNKED[-1] else ("blockwise",)
            entries = tuple(Entry("JAX " + name, "jax", name, _case(length)) for name in names)
            jobs.append(Job("S{}".format(length), way, entries, "memory"))
    return jobs


def _blockwise_figures(results, machine):
    del machine
    figures = []
    last, longer = ("S{}".format(length) for length in (_CHUNKED[-1], _LONG))
    for way in ("fwd", "fwd+bwd"):
        gain = results.ratio(last, way, "JAX naive", "JAX blockwise")
        figures.append(
            at_least("blockwise {}: gain over the dense formula at S={:,}".format(way, _CHUNKED[-1]), gain, 1.5)
        )
        extra = [results.value(key, way, "JAX blockwise", "extra_bytes", "memory") for key in (last, longer)]
        dense = results.value(last, way, "JAX naive", "extra_bytes", "memory")
        growth = "blockwise {}: extra memory, S={:,} / S={:,}".format(way, _LONG, _CHUNKED[-1])
        figures.append(at_most(growth, quotient(extra[1], extra[0]), 2.5))
        name = "blockwise {}: extra memory, share of the dense formula's at S={:,}".format(way, _CHUNKED[-1])
        figures.append(at_most(name, quotient(extra[0], dense), 0.25))
    return figures


# --- CoLT5's attention layer beside dense attention of the same width -------------------------------------------------

_ROUTED = (4096, 8192)


def _colt5_jobs():
    jobs = []
    for way in ("fwd", "fwd+bwd"):
        for length in _ROUTED:
            case = Case(1, 8, length, 64)
            entries = tuple(Entry("JAX " + name, "jax", name, case) for name in ("colt5", "dense layer"))
            if length == _ROUTED[0] and way == "fwd":
                entries += (Entry("MindSpore colt5", "mindspore", "colt5", case),)
            jobs.append(Job("S{}".format(length), way, entries, base="JAX dense layer"))
    return jobs


def _colt5_figures(results, machine):
    del machine
    figures = []
    for way in ("fwd", "fwd+bwd"):
        for length in _ROUTED:
            gain = results.ratio("S{}".format(length), way, "JAX dense layer", "JAX colt5")
            name = "colt5 {}: gain over the dense layer at S={:,}".format(way, length)
            figures.append(at_least(name, gain, 1.5))
    return figures


register(
    Benchmark(
        "blockwise", "chunked attention beside the dense formula", _blockwise_jobs, _blockwise_figures, _FRAMEWORKS
    )
)
register(Benchmark("dilated", "LongNet's mixture to S=1,048,576", _dilated_jobs, _dilated_figures, _FRAMEWORKS, 20.0))
register(Benchmark("sparse", "buckets, kept tokens, landmarks", _sparse_jobs, _sparse_figures, _FRAMEWORKS, 20.0))
register(Benchmark("colt5", "CoLT5's layer beside a dense one", _colt5_jobs, _colt5_figures, _FRAMEWORKS))
