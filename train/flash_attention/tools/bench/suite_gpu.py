"""Benchmark of the GPU engines on an NVIDIA GPU, bfloat16, D = 128: what ``jax/engines/choice.py`` rests on.

Bounds: the project's targets for an H200. cuDNN with a dense mask or bias ("jax.nn cudnn") counts among the peers.
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
    beside,
    quotient,
    register,
    said,
    worst,
)

OURS = "pallas"
NEXT = "mosaic"
"""Not run on a device yet: whether `auto` takes it on Hopper rests on what it gains here."""

_SCORES = Case(8, 16, 8192, 128, dtype="bfloat16")
_CAUSAL = replace(_SCORES, causal=True)
_DENSE = {"full": _SCORES, "causal": _CAUSAL, "causal window 1024": replace(_CAUSAL, window=(1024, 0))}
# A quarter of the heads: peers hold all scores, in float32 and several times in the backward direction.
_FEWER, _FEWER_CAUSAL = replace(_SCORES, batch=2), replace(_CAUSAL, batch=2)
_PLANS = {
    "window +-1024": replace(_FEWER, window=(1024, 1024)),
    "blocks 8 x 128": replace(_FEWER, blocks=(8, 8)),
    "ALiBi causal": replace(_FEWER_CAUSAL, alibi=True),
    "soft cap causal": replace(_FEWER_CAUSAL, soft_cap=30.0),
    "segments": replace(_FEWER_CAUSAL, segments=8),
}
_PLAIN_OF_PLANS = "causal, a quarter of the heads"
_FLOAT32 = replace(_FEWER_CAUSAL, q_len=4096, dtype="float32")
_SHORT = Case(8, 8, 256, 64, dtype="bfloat16", causal=True)
_DECODE = Case(32, 32, 1, 128, dtype="bfloat16", kv_heads=8, kv_len=32768)
PEERS = ("jax.nn", "jax.nn cudnn", "tokamax", "ejkernel")


def _next(case):
    """The entry of :data:`NEXT`, in a process of its own: what fails there must not take the others' device along."""
    return (Entry(NEXT, "jax/" + NEXT, NEXT, case),)


def _jobs():
    jobs = []
    for key, case in _DENSE.items():
        compared = beside(case, (OURS, "auto", "cudnn"), ("tokamax", "torch")) + _next(case)
        jobs += [Job(key, way, compared, base="cudnn") for way in DIRECTIONS]
    for key, case in _PLANS.items():
        jobs += [Job(key, way, beside(case, (OURS,), PEERS) + _next(case), base=OURS) for way in DIRECTIONS]
    jobs += [Job(_PLAIN_OF_PLANS, way, beside(_FEWER_CAUSAL, (OURS,), ()), base=OURS) for way in DIRECTIONS]
    for key, case in (("float32", _FLOAT32), ("short", _SHORT)):
        jobs += [Job(key, way, beside(case, ("auto", OURS, "xla"), ("jax.nn",)), base="auto") for way in DIRECTIONS]
    return jobs + [Job("decode", "fwd", beside(_DECODE, (OURS,), ("jax.nn", "torch")), base=OURS)]


def _figures(results, found):
    del found
    figures = []
    for key in _DENSE:
        for way, bound in zip(DIRECTIONS, (1.10, 1.15)):
            bound = 1.15 if "window" in key else bound
            for ours in ("auto", OURS):
                ratios = [results.ratio(key, way, ours, name) for name in ("cudnn", "torch")]
                name = "gpu {} {}: {}, time / the better of cuDNN and torch".format(key, way, ours)
                figures.append(
                    at_most(name, worst(ratios), bound) if ours == "auto" else said(name, worst(ratios), "x")
                )
    for key in _PLANS:
        for way in DIRECTIONS:
            gains = [results.ratio(key, way, name, OURS) for name in PEERS]
            figures.append(at_least("gpu {} {}: gain over the best peer".format(key, way), worst(gains, min), 3.0))
    for key in (*_DENSE, *_PLANS):
        for way in DIRECTIONS:
            name = "gpu {} {}: {}, time / that of {}".format(key, way, NEXT, OURS)
            figures.append(said(name, results.ratio(key, way, NEXT, OURS), "x"))
    for key in ("float32", "short"):
        for way in DIRECTIONS:
            figures.append(
                said("gpu {} {}: gain over jax.nn".format(key, way), results.ratio(key, way, "jax.nn", "auto"), "x")
            )
            figures.append(
                said("gpu {} {}: gain over xla".format(key, way), results.ratio(key, way, "xla", "auto"), "x")
            )
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
        budget=1.0,
        packages=("tokamax", "ejkernel"),
        refusal=machine.gpu_missing,
        place=machine.gpu_class,
    )
)
