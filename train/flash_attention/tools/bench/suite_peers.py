"""Benchmark beside what a JAX user would pick: jax.nn, tokamax, ringattention, ejkernel, where they are installed."""

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.registry import DIRECTIONS, Benchmark, Job, beside, register, said
from flash_attention.tools.machine import installed

OURS = "xla"
PEERS = ("tokamax", "ringattention", "ejkernel")

_CASES = {
    "S2048 D64": Case(1, 8, 2048, 64),
    "S2048 D64 causal": Case(1, 8, 2048, 64, causal=True),
    "S4096 D128 causal": Case(1, 8, 4096, 128, causal=True),
    "window 1024 S8192": Case(1, 1, 8192, 64, window=(1024, 1024)),
}


def _jobs():
    return [
        Job(key, way, beside(case, (OURS,), ("jax.nn",) + PEERS), base=OURS)
        for key, case in _CASES.items()
        for way in DIRECTIONS
    ]


def _figures(results, machine):
    del machine
    figures = []
    for key in _CASES:
        for way in DIRECTIONS:
            for name in ("jax.nn",) + PEERS:
                gain = results.ratio(key, way, name, OURS)
                figures.append(said("peers {} {}: gain over {}".format(key, way, name), gain, "x"))
    return figures


def _refusal():
    """What is missing: an environment without any of them has nothing to say."""
    if any(map(installed, PEERS)):
        return None
    return "one of {}, which `bash build.sh bench peers` installs".format(", ".join(PEERS))


register(
    Benchmark(
        "peers",
        "beside jax.nn, tokamax, ringattention, ejkernel",
        _jobs,
        _figures,
        ("jax",),
        20.0,
        packages=PEERS,
        refusal=_refusal,
    )
)
