"""The caches' benchmarks: what is measured, what is too large, and that a worker's candidates run."""

import importlib

import numpy as np
import pytest

from flash_attention.tools.bench import registry
from flash_attention.tools.bench.worker import Desk
from flash_attention_infer.tools import bench

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def test_every_pair_is_measured_or_too_large():
    made, refused = (bench.pairs(fitting) for fitting in (True, False))
    assert len(made) + len(refused) == 56 and {(1, 1024), (1, 131072), (64, 1024)} <= set(made)
    assert max(bench.cache_bytes(*pair) for pair in made) <= 8e9 < min(bench.cache_bytes(*pair) for pair in refused)
    assert bench.cache_bytes(64, 131072) == 64 * 131072 * 2 * 8 * 128 * 4


@pytest.mark.parametrize("name, framework", [("jax-cache", "jax"), ("ms-cache", "mindspore")])
def test_figures(name, framework):
    """Tokens a second are the step's new tokens over its time; the others say their size."""
    benchmark = registry.load()[name]
    jobs = benchmark.jobs()
    finished = {job.id: {entry.label: {"seconds": 0.5} for entry in job.entries} for job in jobs}
    figures = {one["name"]: one for one in benchmark.figures(registry.Results(finished), {})}
    assert figures[framework + " decode, batch 8, cache 2K"]["value"] == 16
    assert figures[framework + " prefill, batch 8, cache 2K"]["value"] == 256
    large = figures[framework + " batch 64, cache 128K: too large, a cache of"]
    assert (large["value"], large["unit"]) == (68.72, "GB")


def test_allocator_bytes():
    assert 0.7 < bench.allocator_bytes(2**16, 8) < 1.2


@pytest.mark.parametrize("framework", ["jax", "mindspore"])
def test_a_worker_runs_the_candidates(framework):
    pytest.importorskip(framework)
    desk = Desk(framework)
    for job in registry.load()[{"jax": "jax-cache", "mindspore": "ms-cache"}[framework]].jobs()[-1:]:
        for entry in job.entries:
            case = entry.case.shrunk(48)
            call, results = desk.build(case, "fwd", entry.candidate, {})
            call()
            call()  # the tokens of the first call were taken back: there is no room for more
            assert results() == (None, None)
    module = importlib.import_module("flash_attention_infer.tools.cached_in_" + framework)
    assert desk.module_of(entry.candidate) is module and desk.module_of("auto") is desk.module


def test_arrays_are_drawn_when_asked_for():
    from flash_attention.tools.bench.cases import Case
    from flash_attention.tools.bench.worker import LazyArrays

    case = Case(1, 1, 4, 8)
    arrays = LazyArrays(case)
    assert not arrays
    np.testing.assert_array_equal(arrays["value"], case.arrays()["value"])
    assert set(arrays) == {"query", "key", "value", "d_out"}
