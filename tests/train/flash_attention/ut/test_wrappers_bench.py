"""The benchmark of the transformer wrappers: its candidates train the same model, its figures say what they name."""

import pytest

from flash_attention.tools.bench import registry, wrappers
from flash_attention.tools.bench.cases import Case, same_pairs
from flash_attention.tools.bench.worker import Desk

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
CASE = Case(1, 2, 32, 8, causal=True)


def losses(framework, candidate, steps=3):
    """Losses of the first steps of a worker's candidate."""
    name = "flash_attention.tools.bench.wrappers_in_{}:{}".format(framework, candidate)
    call, results = Desk(framework).build(CASE, wrappers.STEP, name, {})
    assert results() == (None, None)
    return [call() for _ in range(steps)]


@pytest.mark.parametrize("framework", ["jax", pytest.param("mindspore", marks=pytest.mark.slow)])
def test_candidates_train_the_same_model(framework, monkeypatch):
    """Naive attention changes no loss, talking heads do; Adam lowers each."""
    pytest.importorskip(framework)
    monkeypatch.setattr(wrappers, "DEPTH", 1)
    monkeypatch.setattr(wrappers, "RATE", 1e-2)
    found = {name: losses(framework, name) for name in (wrappers.NAIVE,) + tuple(wrappers.CANDIDATES)}
    assert found["fused"] == pytest.approx(found[wrappers.NAIVE], rel=1e-4)
    assert found["talking heads"][0] != pytest.approx(found["fused"][0], rel=1e-6)
    assert all(values[2] < values[0] for values in found.values())


def test_refuses():
    with pytest.raises(ValueError, match="a training step is 'fwd\\+bwd', but got 'fwd'"):
        wrappers.check_direction("fwd")
    with pytest.raises(ValueError, match="a candidate is one of naive, fused, talking heads, but got 'dense'"):
        wrappers.stack_options(CASE, "dense", None)
    with pytest.raises(ValueError, match="a plain causal one"):
        wrappers.stack_options(Case(1, 2, 32, 8), "fused", None)


def test_figures():
    """Shares are of the naive model's; a candidate of a module of its own has no rate of one attention call."""
    benchmark = registry.load()["wrappers"]
    jobs, finished = benchmark.jobs(), {}
    seconds, extra = {"fused": 1.0, "naive": 2.0}, {"fused": 3e8, "naive": 1e9, "talking heads": 4e8}
    for job in jobs:
        short = "S1024" in job.key
        finished[job.id] = {
            e.label: {"median_s": seconds[e.label], "times": [seconds[e.label]]}
            if job.kind == "time"
            else {"extra_bytes": extra[e.label] / (2 if short else 1)}
            for e in job.entries
        }
        assert not any(same_pairs(e.candidate) for e in job.entries)
    figures = {one["name"]: one for one in benchmark.figures(registry.Results(finished), {})}
    for title in ("JAX", "MindSpore"):
        start = title + " decoder, 6 layers, S=2,048: "
        assert figures[start + "time / naive's"]["value"] == 0.5 and figures[start + "time / naive's"]["ok"]
        assert figures[start + "memory / naive's"]["value"] == 0.3
        assert figures[title + " decoder with talking heads: memory, S=2,048 / S=1,024"]["value"] == 2.0
