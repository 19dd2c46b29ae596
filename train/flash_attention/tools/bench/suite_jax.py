"""Benchmarks of the JAX twin on the CPU, beside torch's C++ kernel and jax.nn. Bounds: the project's targets."""

from dataclasses import replace

from flash_attention.tools.bench.cases import BYTES, SHORT, Case
from flash_attention.tools.bench.measure import median
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
    worst,
)

OURS = "xla"
ALL = ("jax", "torch")


def _versus(key, case, direction, candidates=("xla", "torch", "jax.nn"), kind="time", base="torch"):
    """A job in which several candidates compute one case."""
    entries = tuple(Entry(name, "torch" if name == "torch" else "jax", name, case) for name in candidates)
    return Job(key, direction, entries, kind, base if base in candidates else None)


# --- dense ----------------------------------------------------------------------------------------------------------

_DENSE_HEADS = {1024: 8, 2048: 8, 4096: 4, 8192: 2}  # fewer heads where a call would take many seconds


def _dense_grid():
    for dim in (64, 128):
        for length, heads in _DENSE_HEADS.items():
            for dtype in ("float32", "bfloat16"):
                for causal in (True, False):
                    case = Case(1, heads, length, dim, dtype=dtype, causal=causal)
                    yield "S{} D{} {}{}".format(length, dim, SHORT[dtype], " causal" if causal else ""), case


def _dense_jobs():
    return [_versus(key, case, direction) for key, case in _dense_grid() for direction in DIRECTIONS]


def _dense_figures(results, machine):
    grid = [(key, case, direction) for key, case in _dense_grid() for direction in DIRECTIONS]
    to_torch = {(key, way): results.ratio(key, way, OURS, "torch") for key, case, way in grid}
    weak = {(key, way) for key, case, way in grid if case.head_dim == 128 and case.causal and way == "fwd"}
    plain = worst((x for name, x in to_torch.items() if name not in weak))
    weakest = worst(to_torch[name] for name in weak)
    known = [x for x in to_torch.values() if x is not None]
    middle = median(known) if known else None
    first = machine["cpu_class"] == "A"
    figures = [
        at_most("dense: median of the grid, time / torch's", middle, 1.0 if first else 1.1),
        at_most("dense: worst of the grid, time / torch's", plain, 1.25 if first else 1.4),
        at_most("dense: worst D=128 causal forward, time / torch's", weakest, 1.5 if first else 1.4),
    ]
    if not first:
        half = worst(to_torch[key, way] for key, case, way in grid if case.dtype == "bfloat16" and way == "fwd+bwd")
        figures.append(at_most("dense: worst bf16 forward + backward, time / torch's", half, 0.35))
    for causal, bound in ((True, 2.5 if first else 2.2), (False, 2.0 if first else 1.6)):
        gains = [results.ratio(key, way, "jax.nn", OURS) for key, case, way in grid if case.causal == causal]
        name = "dense{}: least gain over jax.nn".format(" causal" if causal else "")
        figures.append(at_least(name, worst(gains, min), bound))
    return figures


register(Benchmark("jax-dense", "dense, S 1K-8K, D 64 and 128, f32 and bf16", _dense_jobs, _dense_figures, ALL))


# --- windows --------------------------------------------------------------------------------------------------------

_WINDOWS = {
    "window 1024 S16384 {}".format(SHORT[dtype]): Case(1, 2, 16384, 64, dtype=dtype, window=(1024, 1024))
    for dtype in ("float32", "bfloat16")
}


def _window_jobs():
    timed = [_versus(key, case, way) for key, case in _WINDOWS.items() for way in DIRECTIONS]
    return timed + [_versus(key, case, way, kind="memory") for key, case in _WINDOWS.items() for way in DIRECTIONS]


def _window_figures(results, machine):
    del machine
    both = [(key, way) for key in _WINDOWS for way in DIRECTIONS]
    extra = worst(results.value(key, way, OURS, "extra_bytes", "memory") for key, way in both)
    return [
        at_least("windows: least gain over torch with a mask", _least_gain(results, both, "torch"), 7),
        at_least("windows: least gain over jax.nn", _least_gain(results, both, "jax.nn"), 12),
        at_most("windows: memory beyond the inputs", quotient(extra, 1e6), 100, "MB"),
    ]


def _least_gain(results, pairs, other):
    return worst((results.ratio(key, way, other, OURS) for key, way in pairs), min)


register(Benchmark("jax-windows", "+-1024 tokens at S=16,384", _window_jobs, _window_figures, ALL, budget=20.0))


# --- options --------------------------------------------------------------------------------------------------------

_PLAIN = Case(1, 8, 4096, 64, causal=True)
_OPTIONS = {
    "plain": _PLAIN,
    "ALiBi": replace(_PLAIN, alibi=True),
    "soft cap": replace(_PLAIN, soft_cap=30.0),
    "segments": replace(_PLAIN, segments=4),
    "GQA": replace(_PLAIN, kv_heads=2),
    "dropout": replace(_PLAIN, dropout=0.1),
}


def _option_jobs():
    entries = tuple(Entry(label, "jax", OURS, case) for label, case in _OPTIONS.items())
    peers = [_versus("ALiBi beside others", _OPTIONS["ALiBi"], way) for way in DIRECTIONS]
    return [Job("options S4096 D64 causal", way, entries, base="plain") for way in DIRECTIONS] + peers


def _option_figures(results, machine):
    del machine
    figures = []
    for label in list(_OPTIONS)[1:]:
        for way in DIRECTIONS:
            value = results.ratio("options S4096 D64 causal", way, label, "plain")
            figures.append(at_most("options: {} {}, time / plain".format(label, way), value, 1.4))
    for way in DIRECTIONS:
        value = results.ratio("ALiBi beside others", way, "jax.nn", OURS)
        figures.append(said("options: ALiBi {}, gain over jax.nn with a bias".format(way), value, "x"))
    return figures


register(Benchmark("jax-options", "every option against plain", _option_jobs, _option_figures, ALL, budget=20.0))


# --- small calls ----------------------------------------------------------------------------------------------------


def _small_jobs():
    return [
        _versus("B{} S{}".format(batch, length), Case(batch, 8, length, 64, causal=True), way, base="jax.nn")
        for batch in (1, 8)
        for length in (64, 128, 256)
        for way in DIRECTIONS
    ]


def _small_figures(results, machine):
    del machine
    pairs = [(job.key, job.direction) for job in _small_jobs()]
    value = worst(results.ratio(key, way, OURS, "jax.nn") for key, way in pairs)
    return [at_most("small calls: worst time / jax.nn's", value, 1.1)]


register(Benchmark("jax-small", "B 1 and 8, S up to 256", _small_jobs, _small_figures, ALL, 4.0))


# --- decode ---------------------------------------------------------------------------------------------------------

_DECODE = {
    "cache {} {}".format(cache, SHORT[dtype]): Case(1, 32, 1, 128, dtype=dtype, kv_heads=8, kv_len=cache)
    for cache in (8192, 32768)
    for dtype in ("float32", "bfloat16")
}


def _decode_jobs():
    return [_versus(key, case, "fwd") for key, case in _DECODE.items()]


def _decode_figures(results, machine):
    read = worst(limit.get("read_gbytes") for limit in machine["limits"].values())  # the fastest reader is the limit
    figures = []
    for key, case in _DECODE.items():
        spec = case.spec()
        size = 2 * spec.kv_heads * spec.kv_len * spec.head_dim * BYTES[case.dtype]
        share = quotient(size / read / 1e9, results.value(key, "fwd", OURS))
        name = "decode {}: share of the memory bandwidth".format(key)
        figures.append(at_least(name, share, 0.6, "") if case.dtype == "float32" else said(name, share, ""))
        gain = results.ratio(key, "fwd", "torch", OURS)
        name = "decode {}: gain over torch".format(key)
        figures.append(at_least(name, gain, 3) if case.dtype == "float32" else said(name, gain, "x"))
    for cache in (8192, 32768):
        half, full = (results.value("cache {} {}".format(cache, dtype), "fwd", OURS) for dtype in ("bf16", "f32"))
        figures.append(at_most("decode cache {}: bf16 time / f32 time".format(cache), quotient(half, full), 1.0))
    return figures


register(Benchmark("jax-decode", "one query, 32 and 8 heads, cache 8K and 32K", _decode_jobs, _decode_figures, ALL))


# --- compile time and memory ----------------------------------------------------------------------------------------

_COMPILE = {length: Case(1, 8, length, 64, causal=True, window=(1024, 0)) for length in (1024, 16384, 131072, 1048576)}


def _compile_jobs():
    windowed = [
        _versus("window S{}".format(length), case, way, (OURS,), "compile")
        for length, case in _COMPILE.items()
        for way in DIRECTIONS
    ]
    dense = Case(1, 8, 8192, 128, causal=True)
    return windowed + [_versus("dense S8192", dense, way, (OURS, "jax.nn"), "compile") for way in DIRECTIONS]


def _compile_figures(results, machine):
    del machine
    figures = []
    for way in DIRECTIONS:
        times = {n: results.value("window S{}".format(n), way, OURS, "seconds", "compile") for n in _COMPILE}
        longest, shortest = times[max(times)], times[16384]
        figures.append(at_most("compile {}: longest of S 1K-1M".format(way), worst(times.values()), 2.0, "s"))
        figures.append(at_most("compile {}: S=1M / S=16K".format(way), quotient(longest, shortest), 1.5))
        dense = results.value("dense S8192", way, OURS, "seconds", "compile")
        figures.append(at_most("compile {}: dense S=8K".format(way), dense, 2.0, "s"))
    return figures


register(Benchmark("jax-compile", "compile time from S=1K to 1M", _compile_jobs, _compile_figures, ("jax",)))

_MEMORY = {
    "dense S4096 D128": Case(1, 8, 4096, 128, causal=True),
    "dense S8192 D64": Case(1, 4, 8192, 64, causal=True),
    "dense S8192 D64 bf16": Case(1, 4, 8192, 64, dtype="bfloat16", causal=True),
}


def _memory_jobs():
    return [_versus(key, case, way, kind="memory") for key, case in _MEMORY.items() for way in DIRECTIONS]


def _memory_figures(results, machine):
    del machine
    figures = []
    for key, case in _MEMORY.items():
        for way in DIRECTIONS:
            extra = quotient(results.value(key, way, OURS, "extra_bytes", "memory"), 1e6)
            bound = round((2 * case.input_bytes() + 64 * 2**20) / 1e6)
            figures.append(at_most("memory {} {}: beyond the inputs".format(key, way), extra, bound, "MB"))
    return figures


register(Benchmark("jax-memory", "peak memory of one call in a fresh process", _memory_jobs, _memory_figures, ("jax",)))
