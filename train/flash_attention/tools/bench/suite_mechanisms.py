"""Benchmarks of the mechanisms: cost against the length, beside the dense core call at the same length.

Bounds of time are shares of the pairs that are saved (`core/mechanisms`, "cost" of each), those of memory say that it
grows with the length and not with its square.
"""

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.registry import (
    DIRECTIONS,
    Benchmark,
    Entry,
    Job,
    at_least,
    at_most,
    quotient,
    register,
    said,
)

_FRAMEWORKS = ("jax", "mindspore")


def _case(length):
    return Case(1, 2, length, 64, causal=True)


def _key(length):
    return "S{}".format(length)


def _entries(framework, names, case):
    title = {"jax": "JAX", "mindspore": "MindSpore"}[framework]
    return tuple(Entry("{} {}".format(title, name), framework, name, case) for name in names)


def _memory_jobs(names, lengths, case=_case):
    """Extra memory of the JAX candidates, gradients included."""
    return [Job(_key(length), "fwd+bwd", _entries("jax", names, case(length)), "memory") for length in lengths]


def _memory_growth(results, names, lengths):
    """Twice the length, at most 2.5 times the memory: linear, with room for what does not grow evenly."""
    figures = []
    for name in names:
        used = [results.value(_key(n), "fwd+bwd", "JAX " + name, "extra_bytes", "memory") for n in lengths]
        label = "{} fwd+bwd: extra memory, S={:,} / S={:,}".format(name, *reversed(lengths))
        figures.append(at_most(label, quotient(used[1], used[0]), 2.5))
    return figures


# --- dilated attention: w0 = 2,048 tokens, segments and rates doubling up to the whole length -------------------------

_LENGTHS = (16384, 65536, 262144, 1048576)
_DENSE_UP_TO = {"fwd": 65536, "fwd+bwd": 16384}
_TIMED_UP_TO = {"fwd": 1048576, "fwd+bwd": 262144}  # beyond, one call in the process whose memory is measured
_MEMORY = 24.0  # GB, the machine that a million tokens shall fit into


def _dilated_jobs():
    jobs = []
    for way in DIRECTIONS:
        for length in [n for n in _LENGTHS if n <= _TIMED_UP_TO[way]]:
            names = ("dilated", "xla") if length <= _DENSE_UP_TO[way] else ("dilated",)
            entries = _entries("jax", names, _case(length))
            if way == "fwd" and length == _LENGTHS[0]:
                entries += _entries("mindspore", ("dilated",), _case(length))
            jobs.append(Job(_key(length), way, entries, base="JAX xla" if len(names) > 1 else None))
    longest = _entries("jax", ("dilated",), _case(_LENGTHS[-1]))
    return jobs + [Job(_key(_LENGTHS[-1]), way, longest, "memory") for way in DIRECTIONS]


def _dilated_figures(results, machine):
    del machine
    figures, last = [], _key(_LENGTHS[-1])
    for way in DIRECTIONS:
        times = {n: results.value(_key(n), way, "JAX dilated") for n in _LENGTHS if n <= _TIMED_UP_TO[way]}
        times.setdefault(_LENGTHS[-1], results.value(last, way, "JAX dilated", "seconds", "memory"))
        for short, long in zip(_LENGTHS, _LENGTHS[1:]):  # four times the length, patterns of its own at each
            name = "dilated {}: time, S={:,} / S={:,}".format(way, long, short)
            figures.append(at_most(name, quotient(times[long], times[short]), 5.0))
        dense = _DENSE_UP_TO[way]
        gain = results.ratio(_key(dense), way, "JAX xla", "JAX dilated")
        figures.append(at_least("dilated {}: gain over dense at S={:,}".format(way, dense), gain, 1.5))
        figures.append(said("dilated {}: S=1,048,576, time".format(way), times[_LENGTHS[-1]], "s"))
        peak = results.value(last, way, "JAX dilated", "peak_bytes", "memory")
        name = "dilated {}: S=1,048,576, peak memory of the process".format(way)
        figures.append(at_most(name, quotient(peak, 1e9), _MEMORY, "GB"))
    return figures


# --- dynamic sparse and landmark attention: fewer pairs, or as many, beside the dense core at the same length ---------

_SPARSE_LENGTHS = (8192, 16384)
_GAINS = {"hash4": 1.5, "hash16": 3.0, "qk50": 2.0, "qk25": 4.0}  # pairs saved: 4, 16, 4, 16 times
_HELD = ("hash16", "qk25", "landmark")
_MS_SPARSE = ("hash16/pynative", "qk25/pynative", "landmark")


def _sparse_jobs():
    jobs = []
    for way in DIRECTIONS:
        entries = _entries("jax", ("xla",) + tuple(_GAINS) + ("landmark",), _case(_SPARSE_LENGTHS[1]))
        jobs.append(Job(_key(_SPARSE_LENGTHS[1]), way, entries, base="JAX xla"))
        entries = _entries("mindspore", ("portable",) + _MS_SPARSE, _case(4096))
        jobs.append(Job("S4096", way, entries, base="MindSpore portable"))
    return jobs + _memory_jobs(_HELD, _SPARSE_LENGTHS)


def _sparse_figures(results, machine):
    del machine
    figures, length = [], _SPARSE_LENGTHS[1]
    for way in DIRECTIONS:
        for name, bound in _GAINS.items():
            gain = results.ratio(_key(length), way, "JAX xla", "JAX " + name)
            figures.append(at_least("{} {}: gain over dense at S={:,}".format(name, way, length), gain, bound))
        cost = results.ratio(_key(length), way, "JAX landmark", "JAX xla")
        figures.append(at_most("landmark {}: time over dense at S={:,}".format(way, length), cost, 4.0))
        for name in _MS_SPARSE:
            gain = results.ratio("S4096", way, "MindSpore portable", "MindSpore " + name)
            figures.append(said("MindSpore {} {}: gain over dense at S=4,096".format(name, way), gain, "x"))
    return figures + _memory_growth(results, _HELD, _SPARSE_LENGTHS)


# --- blockwise attention in chunks of 512, beside the dense formula and the core call ---------------------------------

_CHUNKED = (2048, 8192)
_LONG = 16384  # the dense formula would hold 2 GB of scores


def _blockwise_jobs():
    jobs = []
    for way in DIRECTIONS:
        for length in _CHUNKED:
            entries = _entries("jax", ("blockwise", "naive", "xla"), _case(length))
            if length == _CHUNKED[0]:
                entries += _entries("mindspore", ("blockwise", "naive"), _case(length))
            jobs.append(Job(_key(length), way, entries, base="JAX naive"))
        for length in (_CHUNKED[-1], _LONG):
            names = ("blockwise", "naive") if length == _CHUNKED[-1] else ("blockwise",)
            jobs.append(Job(_key(length), way, _entries("jax", names, _case(length)), "memory"))
    return jobs


def _blockwise_figures(results, machine):
    del machine
    figures = []
    last, longer = (_key(length) for length in (_CHUNKED[-1], _LONG))
    for way in DIRECTIONS:
        gain = results.ratio(last, way, "JAX naive", "JAX blockwise")
        figures.append(
            at_least("blockwise {}: gain over the dense formula at S={:,}".format(way, _CHUNKED[-1]), gain, 1.5)
        )
        cost = results.ratio(last, way, "JAX blockwise", "JAX xla")
        figures.append(said("blockwise {}: time over the core call at S={:,}".format(way, _CHUNKED[-1]), cost, "x"))
        gain = results.ratio(_key(_CHUNKED[0]), way, "MindSpore naive", "MindSpore blockwise")
        name = "MindSpore blockwise {}: gain over the dense formula at S={:,}".format(way, _CHUNKED[0])
        figures.append(said(name, gain, "x"))
        extra = [results.value(key, way, "JAX blockwise", "extra_bytes", "memory") for key in (last, longer)]
        dense = results.value(last, way, "JAX naive", "extra_bytes", "memory")
        growth = "blockwise {}: extra memory, S={:,} / S={:,}".format(way, _LONG, _CHUNKED[-1])
        figures.append(at_most(growth, quotient(extra[1], extra[0]), 2.5))
        name = "blockwise {}: extra memory, share of the dense formula's at S={:,}".format(way, _CHUNKED[-1])
        figures.append(at_most(name, quotient(extra[0], dense), 0.25))
    return figures


# --- CoLT5's attention layer beside dense attention of the same width -------------------------------------------------

_ROUTED = (4096, 8192)


def _wide(length):
    return Case(1, 8, length, 64)


def _colt5_jobs():
    jobs = []
    for way in DIRECTIONS:
        for length in _ROUTED:
            entries = _entries("jax", ("colt5", "dense layer"), _wide(length))
            if length == _ROUTED[0]:
                entries += _entries("mindspore", ("colt5",), _wide(length))
            jobs.append(Job(_key(length), way, entries, base="JAX dense layer"))
    return jobs + _memory_jobs(("colt5",), _ROUTED, _wide)


def _colt5_figures(results, machine):
    del machine
    figures = []
    for way in DIRECTIONS:
        for length in _ROUTED:
            gain = results.ratio(_key(length), way, "JAX dense layer", "JAX colt5")
            name = "colt5 {}: gain over the dense layer at S={:,}".format(way, length)
            figures.append(at_least(name, gain, 1.5))
    return figures + _memory_growth(results, ("colt5",), _ROUTED)


register(
    Benchmark(
        "blockwise", "chunked attention beside the dense formula", _blockwise_jobs, _blockwise_figures, _FRAMEWORKS
    )
)
register(Benchmark("dilated", "LongNet's mixture to S=1,048,576", _dilated_jobs, _dilated_figures, _FRAMEWORKS, 20.0))
register(Benchmark("sparse", "buckets, kept tokens, landmarks", _sparse_jobs, _sparse_figures, _FRAMEWORKS, 20.0))
register(Benchmark("colt5", "CoLT5's layer beside a dense one", _colt5_jobs, _colt5_figures, _FRAMEWORKS))
