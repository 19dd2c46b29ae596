"""Benchmark of the GPU engines on an NVIDIA GPU, bfloat16, D = 128. Ready to run; not run yet: no GPU was at hand.

Bounds: the project's targets for an H200. Run it before an engine is entered in ``jax/engines/choice.py``.
"""

from dataclasses import replace

from flash_attention.tools import machine
from flash_attention.tools.bench.cases import BYTES, Case
from flash_attention.tools.bench.registry import (
    DIRECTIONS,
    Benchmark,
    Entry,
    Job,
    at_least,
    at_most,
    quotient,
    register,
    worst,
)
from flash_attention.tools.bench.suite_peers import PEERS, entries

OURS = "pallas"
_SCORES = Case(8, 16, 8192, 128, dtype="bfloat16")
_CAUSAL = replace(_SCORES, causal=True)
_DENSE = {"full": _SCORES, "causal": _CAUSAL, "causal window 1024": replace(_CAUSAL, window=(1024, 0))}
_PLANS = {
    "window +-1024": replace(_SCORES, window=(1024, 1024)),
    "blocks 8 x 128": replace(_SCORES, blocks=(8, 8)),
    "ALiBi causal": replace(_CAUSAL, alibi=True),
    "soft cap causal": replace(_CAUSAL, soft_cap=30.0),
    "segments": replace(_CAUSAL, segments=8),
}
_DECODE = Case(16, 32, 1, 128, dtype="bfloat16", kv_heads=8, kv_len=32768)


def _jobs():
    jobs = []
    for key, case in _DENSE.items():
        compared = entries(case, (OURS, "cudnn", "xla")) + (Entry("torch", "torch", "torch", case),)
        jobs += [Job(key, way, compared, base="cudnn") for way in DIRECTIONS]
    for key, case in _PLANS.items():
        jobs += [Job(key, way, entries(case, (OURS, "xla")), base=OURS) for way in DIRECTIONS]
    return jobs + [Job("decode", "fwd", entries(_DECODE, (OURS, "xla")), base=OURS)]


def _figures(results, found):
    del found
    figures = []
    for key in _DENSE:
        for way, bound in zip(DIRECTIONS, (1.10, 1.15)):
            ratios = [results.ratio(key, way, OURS, name) for name in ("cudnn", "torch")]
            bound = 1.15 if "window" in key else bound
            name = "gpu {} {}: time / the better of cuDNN and torch".format(key, way)
            figures.append(at_most(name, worst(ratios), bound))
    for key in _PLANS:
        for way in DIRECTIONS:
            gains = [results.ratio(key, way, name, OURS) for name in ("jax.nn",) + PEERS]
            figures.append(at_least("gpu {} {}: gain over the best peer".format(key, way), worst(gains, min), 3.0))
    size = 2 * _DECODE.batch * _DECODE.kv_heads * _DECODE.kv_len * _DECODE.head_dim * BYTES[_DECODE.dtype]
    rate = quotient(size / 1e9, results.value("decode", "fwd", OURS))
    figures.append(at_least("gpu decode: share of 4.8 TB/s (H200)", quotient(rate, 4800.0), 0.75, ""))
    return figures


register(
    Benchmark(
        "gpu",
        "GPU engines beside cuDNN, torch and peers (needs an NVIDIA GPU)",
        _jobs,
        _figures,
        ("jax", "torch"),
        refusal=machine.gpu_missing,
    )
)
