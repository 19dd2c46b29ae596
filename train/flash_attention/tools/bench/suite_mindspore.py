"""Benchmarks of the MindSpore engines on the CPU, and the two that run in both frameworks: `scaling`, `example`.

Base of the ratios: `naive`, the plain formula in MindSpore operators under ms.jit. Bounds: the project's targets.
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
    worst,
)

BOTH = ("mindspore", "torch")
ENGINES = ("portable", "jax")


def _versus(key, case, direction, candidates=("naive", "portable", "jax", "torch"), kind="time"):
    entries = tuple(Entry(name, "torch" if name == "torch" else "mindspore", name, case) for name in candidates)
    return Job(key, direction, entries, kind, "naive" if "naive" in candidates else None)


def _gain_figures(results, bounds):
    """Gain over naive for ``{(key, engine): (forward bound, forward + backward bound)}``."""
    return [
        at_least("{} {} {}: gain over naive".format(key, engine, way), results.ratio(key, way, "naive", engine), bound)
        for (key, engine), pair in bounds.items()
        for way, bound in zip(DIRECTIONS, pair)
    ]


# --- dense and windows ------------------------------------------------------------------------------------------------

_DENSE = {
    "causal S1024 D64": Case(1, 8, 1024, 64, causal=True),
    "causal S2048 D64": Case(1, 8, 2048, 64, causal=True),
    "causal S4096 D64": Case(1, 8, 4096, 64, causal=True),
    "causal S4096 D128": Case(1, 4, 4096, 128, causal=True),
}
_DENSE_BOUNDS = {
    ("causal S1024 D64", "portable"): (0.9, 1.2),
    ("causal S4096 D64", "portable"): (2.4, 3.0),
    ("causal S4096 D128", "portable"): (1.6, 2.2),
    ("causal S1024 D64", "jax"): (2.0, 2.5),
    ("causal S4096 D64", "jax"): (3.0, 4.0),
    ("causal S4096 D128", "jax"): (2.2, 3.0),
}


def _dense_jobs():
    return [_versus(key, case, way) for key, case in _DENSE.items() for way in DIRECTIONS]


def _dense_figures(results, machine):
    del machine
    return _gain_figures(results, _DENSE_BOUNDS)


register(Benchmark("ms-dense", "causal, S 1K-4K, against naive", _dense_jobs, _dense_figures, BOTH, budget=25.0))

_WINDOWS = {
    "window 8x128 S4096": Case(1, 8, 4096, 64, causal=True, blocks=(8, 0)),
    "window 8x128 S8192": Case(1, 2, 8192, 64, causal=True, blocks=(8, 0)),
}
_LONG = {"window 8x128 S16384": Case(1, 2, 16384, 64, causal=True, blocks=(8, 0))}
_WINDOW_BOUNDS = {
    ("window 8x128 S4096", "portable"): (4.5, 5.0),
    ("window 8x128 S4096", "jax"): (4.5, 7.0),
}


def _window_jobs():
    long = ("portable", "jax", "torch")
    return [_versus(key, case, way) for key, case in _WINDOWS.items() for way in DIRECTIONS] + [
        _versus(key, case, way, long) for key, case in _LONG.items() for way in DIRECTIONS
    ]


def _window_figures(results, machine):
    del machine
    long = [
        said("window 8x128 S16384 {} {}: time".format(engine, way), results.value(key, way, engine), "s")
        for key in _LONG
        for engine in ENGINES
        for way in DIRECTIONS
    ]
    return _gain_figures(results, _WINDOW_BOUNDS) + long


register(Benchmark("ms-windows", "8 blocks of 128 to the left", _window_jobs, _window_figures, BOTH, budget=25.0))


# --- small calls ------------------------------------------------------------------------------------------------------


def _small_jobs():
    return [
        _versus("B{} S{}".format(batch, length), Case(batch, 8, length, 64, causal=True), way, candidates)
        for candidates in [("naive", "portable", "jax", "auto")]
        for batch in (1, 8)
        for length in (64, 128, 256)
        for way in DIRECTIONS
    ]


def _small_figures(results, machine):
    del machine
    pairs = [(job.key, job.direction) for job in _small_jobs()]
    gain = worst((results.ratio(key, way, "naive", "portable") for key, way in pairs), min)
    faster = worst(
        quotient(results.ratio(key, way, "auto", "naive"), worst(_engine_ratios(results, key, way), min))
        for key, way in pairs
    )
    return [
        at_least("MindSpore small calls: least gain of portable over naive", gain, 0.8),
        at_most("MindSpore small calls: worst time of auto / the faster engine", faster, 1.2),
    ]


def _engine_ratios(results, key, way):
    return [results.ratio(key, way, engine, "naive") for engine in ENGINES]


register(Benchmark("ms-small", "B 1 and 8, S up to 256", _small_jobs, _small_figures, BOTH, budget=6.0))


# --- memory -----------------------------------------------------------------------------------------------------------

_MEMORY = {length: Case(1, 8, length, 64, causal=True) for length in (2048, 4096, 8192)}
_MORE_HEADS = Case(1, 16, 4096, 64, causal=True)
"""8 heads more than ``_MEMORY[4096]``: what they need more is not the graph's own memory, which 16 rows of tiles make
large (80 MB forward, 270 MB with gradients, whatever the tensors' sizes)."""
_TOKEN_BOUNDS = {"fwd": 5 * 1024, "fwd+bwd": 13 * 1024}


def _memory_jobs():
    jobs = []
    for length, case in _MEMORY.items():
        candidates = ("naive",) + ENGINES if length <= 4096 else ENGINES
        jobs += [_versus("S{}".format(length), case, way, candidates, "memory") for way in DIRECTIONS]
    return jobs + [_versus("S4096 16 heads", _MORE_HEADS, way, ENGINES, "memory") for way in DIRECTIONS]


def _memory_figures(results, machine):
    del machine
    figures = []
    for way in DIRECTIONS:
        extra = {n: results.value("S{}".format(n), way, "portable", "extra_bytes", "memory") for n in _MEMORY}
        more = {name: results.value("S4096 16 heads", way, name, "extra_bytes", "memory") for name in ENGINES}
        per_token = None if more["portable"] is None else quotient(more["portable"] - extra[4096], 4096 * 8)
        name = "portable {}: memory per token of each further head".format(way)
        figures.append(at_most(name, per_token, _TOKEN_BOUNDS[way], "bytes"))
        name = "portable {}: memory per token and head, graph included".format(way)
        figures.append(said(name, quotient(extra[4096], 4096 * 8), "bytes"))
        figures.append(at_most("portable {}: memory, S=8K / S=4K".format(way), quotient(extra[8192], extra[4096]), 2.2))
        naive = quotient(results.value("S4096", way, "naive", "extra_bytes", "memory"), 4096 * 8)
        figures.append(said("naive {}: memory per token and head".format(way), naive, "bytes"))
        bridge = quotient(results.value("S4096", way, "jax", "extra_bytes", "memory"), 1e6)
        bound = round((2 * _MEMORY[4096].input_bytes() + 64 * 2**20) / 1e6)
        figures.append(at_most("jax engine in MindSpore {}: beyond the inputs, S=4K".format(way), bridge, bound, "MB"))
    return figures


register(Benchmark("ms-memory", "peak memory of one call", _memory_jobs, _memory_figures, ("mindspore",)))


# --- compile time -----------------------------------------------------------------------------------------------------

_COMPILE = {
    "causal S4096": (Case(1, 8, 4096, 64, causal=True), {"portable": 15, "jax": 3}),
    "causal S16384": (Case(1, 1, 16384, 64, causal=True), {"portable": 15, "jax": 3}),
    "window 8x128 S65536": (Case(1, 1, 65536, 64, causal=True, blocks=(8, 0)), {"portable": 60, "jax": 3}),
}


def _compile_jobs():
    return [
        _versus(key, case, way, tuple(bounds), "compile")
        for key, (case, bounds) in _COMPILE.items()
        for way in DIRECTIONS
    ]


def _compile_figures(results, machine):
    del machine
    return [
        at_most(
            "{} {} {}: first graph call beyond the second".format(key, engine, way),
            results.value(key, way, engine, "seconds", "compile"),
            bound,
            "s",
        )
        for key, (_, bounds) in _COMPILE.items()
        for engine, bound in bounds.items()
        for way in DIRECTIONS
    ]


register(Benchmark("ms-compile", "time of the first graph call", _compile_jobs, _compile_figures, ("mindspore",)))


# --- both frameworks: scaling and the documented example --------------------------------------------------------------

_THREE = (
    ("MindSpore portable", "mindspore", "portable"),
    ("MindSpore jax", "mindspore", "jax"),
    ("JAX xla", "jax", "xla"),
)
_SCALING = {n: Case(1, 1, n, 64, blocks=(8, 8)) for n in (16384, 32768, 65536)}


def _across(key, case, direction, kind):
    entries = tuple(Entry(label, framework, name, case) for label, framework, name in _THREE)
    return Job(key, direction, entries, kind, "JAX xla" if kind == "time" else None)


def _scaling_jobs():
    return [
        _across("window 8+8 S{}".format(length), case, "fwd+bwd", kind)
        for length, case in _SCALING.items()
        for kind in ("time", "memory")
    ]


def _scaling_figures(results, machine):
    del machine
    figures = []
    for label, _, _ in _THREE:
        key = "window 8+8 S{}".format
        extra = {n: results.value(key(n), "fwd+bwd", label, "extra_bytes", "memory") for n in _SCALING}
        time = {n: results.value(key(n), "fwd+bwd", label) for n in _SCALING}
        grown = quotient(None if None in extra.values() else extra[65536] - extra[32768], 32768)
        name = "scaling {}: ".format(label)
        figures.append(said(name + "S=65,536 fwd+bwd, time", time[65536], "s"))
        figures.append(said(name + "bytes per token beyond the inputs", quotient(extra[65536], 65536), "bytes"))
        figures.append(said(name + "bytes for each further token", grown, "bytes"))
        figures.append(at_most(name + "memory, S=64K / S=32K", quotient(extra[65536], extra[32768]), 2.2))
        figures.append(at_most(name + "time, S=64K / S=32K", quotient(time[65536], time[32768]), 2.5))
    return figures


_EVERY = ("mindspore", "jax")
register(Benchmark("scaling", "S to 65,536, window of 8 blocks each side", _scaling_jobs, _scaling_figures, _EVERY))

_EXAMPLE = Case(2, 16, 4096, 128, dtype="float16", blocks=(7, 0), dropout=0.1, compact=True)


def _example_jobs():
    return [_across("documented call", _EXAMPLE, way, kind) for way in DIRECTIONS for kind in ("time", "memory")]


def _example_figures(results, machine):
    del machine
    figures = []
    for label, _, _ in _THREE:
        for way in DIRECTIONS:
            name = "example {} {}: ".format(label, way)
            peak = quotient(results.value("documented call", way, label, "peak_bytes", "memory"), 1e9)
            figures.append(at_most(name + "peak memory of the process", peak, 4.0, "GB"))
            figures.append(said(name + "time", results.value("documented call", way, label), "s"))
    return figures


_ABOUT = "(2,16,4096,128), prev 7, next 0, dropout 0.1, compact mask"
register(Benchmark("example", _ABOUT, _example_jobs, _example_figures, _EVERY, budget=15.0))
