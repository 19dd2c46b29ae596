"""The command line: info, check, plan, and bench with its parts (cases, judge, workers, rounds, figures, resuming)."""

import csv
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flash_attention.ascend import cost
from flash_attention.core import reference
from flash_attention.core.engine import Engine, EngineTable
from flash_attention.core.errors import Reason
from flash_attention.core.plan import make_plan
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.tools import check, cli, info, machine
from flash_attention.tools.bench import distance, judge, limits, measure, registry, report
from flash_attention.tools.bench import run as bench_run
from flash_attention.tools.bench.cases import SEED, Case, round_to
from flash_attention.tools.frontends import FRONT_ENDS, FrontEnd

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
NAMES = (
    "jax-dense", "jax-windows", "jax-options", "jax-small", "jax-decode", "jax-compile", "jax-memory",
    "ms-dense", "ms-windows", "ms-small", "ms-memory", "ms-compile", "scaling", "example",
)  # fmt: skip
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


# --- machine, info, plan --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, want",
    [
        ("model name : x\nflags : fpu avx2 avx512f avx512_bf16\n", "A"),
        ("flags\t\t: fpu avx2 avx512f\n", "B"),
        ("Features : fp asimd\n", "other"),
        ("", "other"),
    ],
)
def test_cpu_class_from_flags(text, want):
    assert machine.cpu_class(text) == want


@pytest.mark.parametrize(
    "text, want", [("0\n", machine.HALTING), ("2000000\n", "idle cores poll 2000 us first"), (None, None)]
)
def test_what_idle_cores_do(tmp_path, text, want):
    path = tmp_path / "guest_halt_poll_ns"
    if text is not None:
        path.write_text(text)
    assert machine.idle_cores(str(path)) == want


def test_versions_name_what_is_and_what_is_not_installed():
    found = machine.versions()
    assert found["numpy"] == np.__version__
    assert machine.package_version("no-such-package-here") is None
    assert set(found) == {"flash_attention", "python", "numpy", "mindspore", "jax", "jaxlib", "torch", "CANN"}
    assert machine.versions(("pytest",))["pytest"] == pytest.__version__


def test_cann_version_is_read_from_its_file(tmp_path, monkeypatch):
    (tmp_path / "version.cfg").write_text("# header\nruntime_running_version=[8.0.RC2:8.0.RC2]\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert machine.cann_version() == "8.0.RC2"


def test_info_shows_each_engine_and_the_reason_of_those_that_refuse():
    table, reason = EngineTable("engine"), Reason("dtype", "float32", "float16", "Cast it.")
    table.add(Engine("half", None, lambda spec: None if spec.dtype == "float16" else reason, note="simulated"))
    table.add(Engine("never", None, lambda spec: reason, order=1))
    rows, refused = info.engine_rows(table)
    assert rows == [["half", "runs: float16", "simulated"], ["never", "no", ""]]
    assert refused == ["no never: 'dtype' must be float16, but got float32. Cast it."]


def test_info_prints_the_installed_frameworks(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "class {}".format(machine.cpu_class()) in text
    for front_end in FRONT_ENDS:
        if front_end.missing():
            assert front_end.missing() in text
        else:
            assert all(engine.name in text for engine in front_end.engines())


def test_front_end_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_framework.py").write_text("import no_such_library_below_it")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = "broken_framework cannot be imported: No module named 'no_such_library_below_it'"
    assert FrontEnd("X", "broken_framework", "x").missing() == broken
    assert FrontEnd("X", "no_such_framework", "x").missing() == "no_such_framework is not installed"
    assert FrontEnd("X", "numpy", "x", python=(9, 9)).missing() == "needs Python 9.9 or newer"
    assert FrontEnd("X", "numpy", "x").missing() is None


def test_plan_draws_the_plan_of_the_core(capsys):
    words = "plan --q-len 1000 --kv-len 1100 --causal --prev 2 --block-size 64 --tile 96 80 --cores 3"
    assert cli.main(words.split()) == 0
    spec = AttentionSpec(1, 1, 1, 1000, 1100, 64, causal=True, prev_block_num=2, block_size=64)
    plan = make_plan(spec.band, 100, 96, 80, 3)
    loads = " ".join(map(str, plan.core_loads()))
    assert capsys.readouterr().out == "{}\ntiles per core: {}\n".format(plan, loads)


def test_plan_takes_the_block_size_and_tile_of_the_strategy(capsys):
    cli.main("plan --q-len 256 --window 10 0 --strategy wukong --head-dim 40".split())
    wukong = capsys.readouterr().out
    cli.main("plan --q-len 256 --window 10 0".split())
    assert "tiles of 128 x 128" in capsys.readouterr().out
    assert "tiles of" in wukong


@pytest.mark.parametrize(
    "words, message",
    [
        ("--q-len 0", "'q_len' must be an int >= 1, but got 0"),
        ("--prev -1", "'prev_block_num' must be an int >= 0, but got -1"),
        ("--window -1 0", "'local_window_size' must be None, an int >= 0 or a pair"),
        ("--tile 0 128", "must be >= 1"),
        ("--strategy none", "invalid choice"),
    ],
)
def test_plan_refuses_bad_sizes(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan"] + words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


ASCEND = "plan --ascend --q-len 256 --heads 2 --head-dim 64 --causal".split()


def test_plan_predicts_the_ascend_kernels(capsys):
    assert cli.main(ASCEND) == 0
    text = capsys.readouterr().out
    spec = AttentionSpec(1, 2, 2, 256, 256, 64, "float16", causal=True, tiling="sparse")
    for direction in cost.FLOPS:
        got = cost.predict(spec, direction)
        assert "{} kernel\n{}\n".format(direction, got.budget) in text
        assert "{:.3f} ms, {:.0f} TFLOPS".format(1e3 * got.seconds, got.tflops) in text
    front = "kernel in front of the backward one: {:.3f} ms".format(1e3 * cost.predict(spec, "preprocess").seconds)
    assert front in text
    assert all(scenario.name in text for scenario in cost.SCENARIOS)
    assert "not measured on a device" in text


def test_plan_shows_what_the_auto_strategy_chose_from(capsys):
    """One line a kernel that has a choice; strategies that leave none print no such line."""
    assert cli.main(ASCEND) == 0
    assert "chose" not in capsys.readouterr().out
    assert cli.main(ASCEND + ["--strategy", "auto"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "chose" in line]
    assert len(lines) == 2  # forward and backward
    for line in lines:
        times = [float(time) for time in re.findall(r"([0-9.]+) ms", line)]
        assert line.startswith("strategy 'auto' chose the first of ") and len(times) == 2
        assert times == sorted(times)


def test_plan_draws_the_ascend_kernels(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cost, "SCENARIOS", (cost.ASSUMED,))
    path = tmp_path / "kernel.png"
    assert cli.main(ASCEND + ["--plot", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10000


@pytest.mark.parametrize(
    "words, message",
    [
        ("--heads 4", "'plot, batch and heads' must be given with --ascend only"),
        ("--ascend --tile 64 64", "'tile and cores' must be left out with --ascend"),
        ("--ascend --heads 0", "'heads' must be an int >= 1, but got 0"),
        ("--ascend --head-dim 300", "'head_dim' must be at most 256, but got 300"),
        ("--ascend 910B", "invalid choice"),
    ],
)
def test_plan_refuses_what_it_would_ignore(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan"] + words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "flash_attention", "plan", "--q-len", "128"]
    root = str(Path(cli.__file__).resolve().parents[2])
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=root), stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    assert done.stdout.decode().startswith("1 x 1 tiles of 128 x 128: 1 visited (0 partial)")


# --- check ----------------------------------------------------------------------------------------
def _numpy_results(case, arrays, spoil=0.0):
    """The truth in float32: what a sound engine gives; ``spoil`` is added to the output."""
    want = check.truth(case, arrays)
    rounded = {way: {name: x.astype(np.float32) for name, x in want[way].items()} for way in want}
    rounded["forward"]["out"] = rounded["forward"]["out"] + np.float32(spoil)
    return rounded


def _check_with(monkeypatch, runner, number=slice(0, 1)):
    chosen = check.cases()[number]
    monkeypatch.setattr(check, "cases", lambda: chosen)
    monkeypatch.setattr(check, "runners", lambda: ([runner], []))
    return cli.main(["check"])


def test_check_passes_a_sound_engine(monkeypatch, capsys):
    runner = check.Runner("sound", lambda spec: None, _numpy_results)
    assert _check_with(monkeypatch, runner, slice(None)) == 0
    assert "1 of 1 engines checked agree" in capsys.readouterr().out


def test_check_fails_a_wrong_engine(monkeypatch, capsys):
    runner = check.Runner("wrong", lambda spec: None, lambda case, arrays: _numpy_results(case, arrays, 1e-3))
    assert _check_with(monkeypatch, runner) == 1
    assert "FAILED    wrong: plain: error above what is allowed" in capsys.readouterr().out


def test_check_reports_an_engine_that_raises(monkeypatch, capsys):
    def broken(case, arrays):
        raise RuntimeError("no memory\nsecond line")

    assert _check_with(monkeypatch, check.Runner("broken", lambda spec: None, broken)) == 1
    assert "FAILED    broken: plain: RuntimeError: no memory\n" in capsys.readouterr().out


def test_check_shows_refusals(monkeypatch, capsys):
    reason = Reason("dtype", "float32", "float16")
    assert _check_with(monkeypatch, check.Runner("half", lambda spec: reason, _numpy_results)) == 0
    assert "refused (dtype)" in capsys.readouterr().out


def test_check_without_any_engine_fails(monkeypatch):
    monkeypatch.setattr(check, "runners", lambda: ([], ["nothing"]))
    assert cli.main(["check"]) == 1


def test_check_notices_nan_and_dead_rows():
    case = next(case for case in check.cases() if "dead rows" in case.name)
    want = check.truth(case, check.inputs(case))["forward"]
    assert np.isneginf(want["lse"]).any()
    assert check.share(case, want, want) == 0
    assert check.share(case, want, dict(want, out=want["out"] * np.nan)) == float("inf")
    assert check.share(case, want, dict(want, lse=np.where(np.isneginf(want["lse"]), 0, want["lse"]))) == float("inf")


def test_check_covers_every_restriction():
    specs = [case.spec for case in check.cases()]
    assert {spec.dtype for spec in specs} == {"float16", "bfloat16", "float32"}
    features = ("causal", "local_window_size", "mask_shape", "bias_shape", "alibi_shape", "segments", "q_lengths")
    features += ("kv_lengths", "soft_cap", "sinks", "dropout_rate")
    assert all(any(getattr(spec, name) for spec in specs) for name in features)
    assert any(spec.group > 1 for spec in specs) and any(spec.prev_block_num < 65536 for spec in specs)


@pytest.mark.skipif(all(front_end.missing() for front_end in FRONT_ENDS), reason="needs MindSpore or JAX")
def test_check_agrees_on_this_computer(monkeypatch, capsys):
    chosen = [case for case in check.cases() if case.name in ("causal bfloat16", "soft cap and sinks")]
    monkeypatch.setattr(check, "cases", lambda: chosen)
    assert cli.main(["check"]) == 0, capsys.readouterr().out


# --- bench: cases and judge -----------------------------------------------------------------------
CASES = [
    Case(1, 2, 100, 16),
    Case(2, 4, 70, 8, causal=True, kv_heads=2, alibi=True),
    Case(1, 2, 96, 8, window=(9, 3), segments=3, soft_cap=4.0),
    Case(1, 2, 300, 8, blocks=(1, 0), compact=True, dropout=0.25),
    Case(1, 4, 1, 16, kv_heads=2, kv_len=90),
]


@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_case_survives_json(case):
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_flops_count_the_visible_pairs(case):
    pairs = case.dense_mask().sum()
    assert case.forward_flops() == 4 * case.batch * case.heads * case.head_dim * pairs


def test_rounding_is_to_nearest_even():
    x = np.array([1.0, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -3.14159], np.float32)
    assert round_to(x, "bfloat16").tolist() == [1.0, 1.0, 1.0 + 2.0**-6, -3.140625]
    assert round_to(x, "float16").tolist() == x.astype(np.float16).tolist()
    assert round_to(x, "float32") is x


def _exact(case, arrays):
    """Dense float64 (out, d_query) of a whole case."""
    given = case.operands()
    operands = Operands(
        mask=given.get("mask"),
        slopes=given.get("alibi_slopes"),
        q_segment_ids=given.get("q_segment_ids"),
        kv_segment_ids=given.get("kv_segment_ids"),
        dropout_seed=np.uint32(SEED) if case.dropout else None,
    )
    q, k, v, d_out = (arrays[name].astype(np.float64) for name in ("query", "key", "value", "d_out"))
    out, _ = reference.attention(np, case.spec(), q, k, v, operands)
    return out, reference.attention_grad(case.spec(), q, k, v, operands, d_out)["query"]


@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_judge_agrees_with_the_dense_reference(case):
    arrays = case.arrays()
    out, d_query = _exact(case, arrays)
    found = judge.error(case, arrays, out, d_query)
    assert set(found) == ({"out"} if case.dropout else {"out", "d_query"})
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("row", [0, 50, -1])
def test_judge_finds_a_wrong_row(row):
    case = CASES[0]
    arrays = case.arrays()
    out, d_query = _exact(case, arrays)
    spoilt = out.copy()
    spoilt[-1, -1, row] += 1e-3
    assert judge.error(case, arrays, spoilt)["out"] > 1e-4
    spoilt[-1, -1, row] = np.nan
    assert judge.error(case, arrays, spoilt)["out"] == float("inf")
    assert judge.error(case, arrays, None, d_query)["d_query"] < 1e-12


@needs_jax
@pytest.mark.parametrize(
    "candidate",
    ["hash4", "dilated"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("qk50", "landmark", "blockwise")],
)
def test_judge_knows_what_mechanisms_see(candidate):
    from flash_attention.tools.bench import in_jax

    case = Case(1, 2, 4200 if candidate == "dilated" else 300, 16, causal=True)
    arrays = case.arrays()
    call, results = in_jax.build(case, "fwd+bwd", candidate, arrays)
    call()
    found = judge.error(case, arrays, *results(), candidate)
    assert set(found) == {"out", "d_query"} and max(found.values()) < 1e-5
    if candidate != "blockwise":
        assert judge.error(case, arrays, *results())["out"] > 1e-2  # it is not plain attention


# --- bench: rounds --------------------------------------------------------------------------------
class FakePool:
    """Stands for the workers: each label takes ``seconds[label]``; ``script`` may raise."""

    def __init__(self, seconds, script=None):
        self.seconds, self.script, self.log = seconds, script or (lambda command, key: None), []

    def get(self, framework):
        return self

    def forget(self):
        self.log.append(("forget", ""))

    def ask(self, command, key, repeats=1, **fields):
        self.log.append((command, key))
        self.script(command, key)
        return {
            "prepare": {"first_s": 1.0, "second_s": self.seconds[key]},
            "time": {"seconds": self.seconds[key] * repeats / max(repeats, 1)},
            "error": {"error": {"out": 1e-7}},
        }[command]


def _job(labels="ab", kind="time", base="a"):
    return registry.Job("k", "fwd", tuple(registry.Entry(x, "jax", x, CASES[0]) for x in labels), kind, base)


def test_rounds_interleave_and_start_with_another_candidate_each_time():
    pool = FakePool({"a": 0.1, "b": 0.2})
    found = measure.time_job(pool, _job(), budget=1.3)
    turns = "".join(key for command, key in pool.log if command == "time")
    assert turns == "abbaabba"  # 1.3 s hold four rounds of 0.3 s
    assert found["b"]["median_s"] == 0.2 and len(found["b"]["times"]) == 4
    assert measure.ratio(found["b"]["times"], found["a"]["times"]) == 2.0


def test_a_round_of_minutes_is_run_once_and_others_three_times():
    slow = measure.time_job(FakePool({"a": 61.0, "b": 1.0}), _job())
    assert len(slow["a"]["times"]) == 1
    assert len(measure.time_job(FakePool({"a": 6.0, "b": 1.0}), _job())["a"]["times"]) == 3


def _cores(trips, **options):
    """Cores whose round trips take these times, the last one from then on."""
    trips = list(trips)
    return distance.Cores(lambda: trips.pop(0) if len(trips) > 1 else trips[0], nearest=100.0, **options)


@pytest.mark.parametrize(
    "trips, rounds, far",
    [
        ([110.0], 4, 0),
        ([110.0, 300.0, 110.0], 4, 0),  # the first round is far and made good by a fifth
        ([110.0] * 3 + [300.0], 3, 2),  # eight rounds are run, one of them near: two far ones make it three
        ([None], 4, 0),
    ],
)
def test_rounds_with_cores_far_apart_are_repeated(trips, rounds, far):
    found = measure.time_job(FakePool({"a": 0.1, "b": 0.2}), _job(), budget=1.3, cores=_cores(trips))
    assert len(found["a"]["times"]) == rounds and found["a"]["far_rounds"] == found["b"]["far_rounds"] == far


@pytest.mark.parametrize(
    "again, kept",
    [
        ({"a": {"far_rounds": 0}}, {"a": {"far_rounds": 0}}),
        ({"a": {"far_rounds": 3}}, {"a": {"far_rounds": 2}}),  # no better: the first one stays
        ({"a": {"failed": "died"}}, {"a": {"far_rounds": 2}}),
    ],
)
def test_jobs_timed_with_cores_far_apart_get_a_second_chance_at_the_end(again, kept, tmp_path, monkeypatch):
    near, far = registry.Job("near", "fwd", (), "time", None), registry.Job("far", "fwd", (), "time", None)
    answers = {far.id: [{"a": {"far_rounds": 2}}, again], near.id: [{"a": {"far_rounds": 0}}]}
    asked = []

    def measure_job(pool, job, *rest):
        asked.append(job.id)
        return answers[job.id].pop(0)

    monkeypatch.setattr(bench_run, "measure_job", measure_job)
    partial = bench_run.Partial(str(tmp_path / "x.partial"), {})
    args = SimpleNamespace(minutes=1.0, quick=False)
    assert bench_run.run_jobs([far, near], partial, None, SimpleNamespace(name="x", budget=1.0), args, None)
    assert asked == [far.id, near.id, far.id]
    assert partial.content["jobs"] == {far.id: kept, near.id: {"a": {"far_rounds": 0}}}


def test_waiting_for_near_cores_ends_with_the_patience():
    cores = _cores([300.0, 300.0, 110.0, 300.0], patience=0.25)
    assert cores.wait(pause=0.1)
    assert not cores.wait(pause=0.1)
    assert cores.patience < 0.05 and cores.nearest == 100.0


def test_round_trip_between_two_cores():
    trip = distance.round_trip()
    assert trip is None or 10 < trip < 1e6


def test_nearest_round_trip_is_found_in_earlier_results(tmp_path):
    assert bench_run.nearest_round_trip(str(tmp_path)) is None
    for name, cpu, limit in (
        ("a", machine.cpu_name(), {"cores": {"round_trip_ns": 250.0}}),
        ("b", "other", None),
        ("c", machine.cpu_name(), {}),
    ):
        limits = limit if limit is not None else {"cores": {"round_trip_ns": 1.0}}
        path = tmp_path / "{}-{}.json".format(name, machine.cpu_class())
        path.write_text(json.dumps({"cpu": cpu, "limits": limits}))
    assert bench_run.nearest_round_trip(str(tmp_path)) == 250.0


def test_a_candidate_that_refuses_does_not_stop_the_others():
    def refuse(command, key):
        if key == "b":
            raise measure.Failed("needs CANN")

    found = measure.time_job(FakePool({"a": 1.0, "b": 1.0}, refuse), _job())
    assert found["b"] == {"failed": "needs CANN"} and found["a"]["median_s"] == 1.0


@pytest.mark.parametrize("at", ["prepare", "time"])
def test_when_a_process_dies_the_others_are_prepared_again(at):
    def die(command, key):
        if (command, key) == (at, "b"):
            raise measure.WorkerDied("out of memory")

    pool = FakePool({"a": 1.0, "b": 1.0}, die)
    found = measure.time_job(pool, _job(), budget=0)
    assert found["b"] == {"failed": "out of memory"} and found["a"]["median_s"] == 1.0
    assert [key for command, key in pool.log if command == "prepare"] == ["a", "b", "a"]


def test_median_and_ratio():
    assert measure.median([3.0, 1.0, 2.0]) == 2.0
    assert measure.median([4.0, 1.0]) == 2.5
    assert measure.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0  # of the ratios, not of the medians


# --- bench: workers -------------------------------------------------------------------------------
def test_a_framework_that_is_absent_is_named():
    with pytest.raises(measure.Failed, match="^not installed$"):
        measure.Worker("no_such_framework")


@pytest.fixture
def worker():
    made = measure.Worker("jax")
    yield made
    made.close()


def _is_stopped(pid):
    """True once the kernel shows the process as stopped; the signal takes a moment on a busy machine."""
    for _ in range(100):
        if Path("/proc/{}/stat".format(pid)).read_text().rsplit(")", 1)[1].split()[0] == "T":
            return True
        time.sleep(0.05)
    return False


@needs_jax
def test_a_process_of_its_own():
    pool = measure.Pool()
    try:
        shared, apart = pool.get("jax"), pool.get("jax/apart")
        assert apart is pool.get("jax/apart") and apart.process.pid != shared.process.pid
        fields = {"case": CASES[0].to_json(), "direction": "fwd", "candidate": "naive"}
        assert apart.ask("prepare", key="x", **fields)["first_s"] > 0
    finally:
        pool.close()


@needs_jax
@needs_proc
def test_an_idle_worker_is_stopped_and_answers_when_asked(worker):
    assert _is_stopped(worker.process.pid)
    with pytest.raises(measure.Failed, match="KeyError: 'nothing'"):
        worker.ask("error", key="nothing")
    fields = {"case": CASES[0].to_json(), "direction": "fwd", "candidate": "naive"}
    with pytest.raises(measure.Failed, match="ValueError"):
        worker.ask("prepare", key="x", **dict(fields, candidate="no such engine"))
    assert worker.ask("prepare", key="x", **fields)["second_s"] > 0
    assert worker.ask("error", key="x")["error"]["out"] < 1e-5
    assert _is_stopped(worker.process.pid)
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(measure.WorkerDied, match="the jax process ended"):
        worker.ask("forget")


@needs_jax
def test_a_worker_that_takes_too_long_is_ended(worker):
    with pytest.raises(measure.WorkerDied, match="took longer than 0 s"):
        worker.ask("limits", limit=0.01)
    assert worker.process.poll() is not None


@needs_jax
@needs_proc
def test_memory_of_a_dense_formula_grows_with_its_scores():
    case = Case(1, 2, 2048, 16)
    entries = tuple(registry.Entry(name, "jax", name, case) for name in ("naive", "xla"))
    found = measure.fresh_job(registry.Job("k", "fwd", entries, "memory"), "memory")
    scores = 2 * 2048**2 * 4
    assert found["naive"]["extra_bytes"] > scores
    assert found["xla"]["extra_bytes"] < found["naive"]["extra_bytes"]
    assert found["naive"]["peak_bytes"] > found["naive"]["extra_bytes"]


# --- bench: registry, figures, report ---------------------------------------------------------------
def test_every_benchmark_is_registered_with_distinct_jobs():
    benchmarks = registry.load()
    assert set(NAMES) <= set(benchmarks)
    for benchmark in benchmarks.values():
        ids = [job.id for job in benchmark.jobs()]
        assert ids and len(set(ids)) == len(ids)
        for job in benchmark.jobs():
            labels = [entry.label for entry in job.entries]
            assert len(set(labels)) == len(labels) and (job.base is None or job.base in labels)


def test_peers_need_one_that_is_installed(monkeypatch):
    from flash_attention.tools.bench import suite_peers

    refusal = registry.load()["peers"].refusal
    monkeypatch.setattr(suite_peers, "installed", lambda name: name == "ejkernel")
    assert refusal() is None
    monkeypatch.setattr(suite_peers, "installed", lambda name: False)
    assert refusal() == "one of tokamax, ringattention, ejkernel, which `bash build.sh bench peers` installs"


@pytest.mark.parametrize("cpu_class", ["A", "B"])
def test_figures_of_an_empty_run_are_not_measured_and_of_a_full_one_all_are(cpu_class):
    where = {"cpu_class": cpu_class, "limits": {"numpy": {"read_gbytes": 20.0}}}
    for benchmark in registry.load().values():
        empty = benchmark.figures(registry.Results({}), where)
        assert empty and all(figure["value"] is None and figure["ok"] is None for figure in empty)
        full = {
            job.id: {
                entry.label: {"median_s": 2.0, "times": [2.0], "seconds": 1.0, "extra_bytes": 4e6, "peak_bytes": 5e6}
                for entry in job.entries
            }
            for job in benchmark.jobs()
        }
        figures = benchmark.figures(registry.Results(full), where)
        assert len({figure["name"] for figure in figures}) == len(figures)
        for figure in figures:
            assert figure["value"] is not None, figure
            assert (figure["ok"] is None) == (figure["bound"] is None)


def test_bounds():
    assert registry.at_most("n", 1.0, 1.0)["ok"] is True and registry.at_most("n", 1.1, 1.0)["ok"] is False
    assert registry.at_least("n", 1.0, 1.0)["ok"] is True and registry.at_least("n", 0.9, 1.0)["ok"] is False
    assert registry.at_least("n", None, 1.0)["ok"] is None and registry.said("n", 3.0, "s")["ok"] is None
    assert registry.worst([1.0, None, 3.0]) == 3.0 and registry.worst([None]) is None
    assert registry.quotient(None, 2) is None and registry.quotient(3.0, 2) == 1.5


def test_limits_of_numpy_are_positive():
    assert min(limits.numpy_limits().values()) > 0


def _document(tmp_path):
    job = _job()
    first = {"median_s": 1.0, "times": [1.0], "error": {"out": 1e-6}}
    finished = {job.id: {"a": first, "b": {"failed": "not installed"}}}
    rows = report.rows_of([job, _job(kind="memory")], finished)
    return {"name": "n", "cpu_class": "A", "rows": rows}, str(tmp_path / "sub" / "n.json")


def test_rows_table_and_files(tmp_path):
    document, path = _document(tmp_path)
    first, second = document["rows"]
    assert first["ratio"] == 1.0 and first["gflops"] == CASES[0].forward_flops() / 1e9
    assert second["failed"] == "not installed" and "not installed" in report.table(document["rows"])
    report.write(path, document)
    assert json.loads(Path(path).read_text()) == document
    with open(path.replace(".json", ".csv"), newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["label"] for line in lines] == ["a", "b"] and lines[0]["error"] == "1e-06"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    document, _ = _document(tmp_path)
    report.plot(str(tmp_path / "n.png"), document)
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")


def test_source_digest_follows_the_code_it_names(tmp_path, monkeypatch):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text("x = 1")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "tools" / "machine.py"))
    before = machine.source_digest(("core",))
    assert machine.source_digest(("core", "jax")) == before  # no such folder
    (tmp_path / "core" / "a.py").write_text("x = 2")
    assert machine.source_digest(("core",)) != before
    (tmp_path / "on_top").mkdir()
    (tmp_path / "on_top" / "__init__.py").write_text("x = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_package = machine.source_digest(("core",), "on_top")
    assert with_package != machine.source_digest(("core",))
    (tmp_path / "on_top" / "__init__.py").write_text("x = 2")
    assert machine.source_digest(("core",), "on_top") != with_package


# --- bench: the command -----------------------------------------------------------------------------
@pytest.fixture
def tiny(monkeypatch):
    """A registered benchmark of two jobs that measures nothing real; counts what it measured."""
    measured = []

    def fake(pool, job, budget, cores, quick=False):
        measured.append(job.id)
        return {entry.label: {"median_s": 1.0, "times": [1.0]} for entry in job.entries}

    jobs = [_job(), _job()._replace(key="k2")]
    figures = [registry.said("f", 1.0, "s")]
    benchmark = registry.Benchmark("tiny", "for this test", lambda: jobs, lambda results, machine: figures, ())
    monkeypatch.setitem(registry.BENCHMARKS, "tiny", benchmark)
    monkeypatch.setattr(bench_run, "measure_job", fake)
    return measured


def test_bench_writes_what_it_promises(tiny, tmp_path, capsys):
    assert cli.main(["bench", "tiny", "--out", str(tmp_path)]) == 0
    path = tmp_path / "tiny-{}.json".format(machine.cpu_class())
    document = json.loads(path.read_text())
    assert {"name", "date", "versions", "cpu_class", "limits", "rows", "figures", "command"} <= set(document)
    assert document["command"] == "bash build.sh bench tiny" and document["figures"][0]["name"] == "f"
    assert document["limits"]["numpy"]["matmul_float32_gflops"] > 0 and len(document["rows"]) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.with_suffix(".csv").name, path.name]
    assert "k2" in capsys.readouterr().out


def test_bench_resumes_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    clock = itertools.chain([0, 0, 61 * 60], itertools.repeat(0))
    monkeypatch.setattr(bench_run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(bench_run.limits, "measure", lambda pool, frameworks: {"numpy": {"read_gbytes": 1.0}})
    words = ["bench", "tiny", "--out", str(tmp_path), "--minutes", "60"]
    assert cli.main(words) == 3
    assert tiny == ["time k fwd"] and [p.name for p in tmp_path.iterdir()][0].endswith(".partial")
    assert "run the same command again" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert tiny == ["time k fwd", "time k2 fwd"]
    assert not list(tmp_path.glob("*.partial"))


def test_partial_results_of_other_code_are_not_mixed_in(tmp_path, capsys):
    path = str(tmp_path / "x.partial")
    bench_run.Partial(path, {"source": "1"}).keep_job("j", {"a": 1})
    assert bench_run.Partial(path, {"source": "1"}).content["jobs"] == {"j": {"a": 1}}
    assert bench_run.Partial(path, {"source": "1"}, fresh=True).content["jobs"] == {}
    assert bench_run.Partial(path, {"source": "2"}).content["jobs"] == {}
    assert "measuring again" in capsys.readouterr().out


def test_bench_lists_and_refuses_names(capsys):
    assert cli.main(["bench", "--list"]) == 0
    assert all(name in capsys.readouterr().out for name in ["jax-dense"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "no-such-name"])
    assert stop.value.code == 2 and "no-such-name" in capsys.readouterr().err


def test_quick_keeps_two_small_jobs():
    jobs = bench_run.quick_jobs(registry.load()["jax-decode"].jobs())
    assert len(jobs) == 2
    assert all(entry.case.spec().kv_len <= 256 for job in jobs for entry in job.entries)


@needs_jax
def test_bench_runs_end_to_end(tmp_path):
    assert cli.main(["bench", "jax-small", "--quick", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "jax-small-{}-quick.json".format(machine.cpu_class())).read_text())
    mine = [row for row in document["rows"] if row["label"] == "xla"]
    assert len(mine) == 2 and all(row["median_s"] > 0 and row["ratio"] > 0 for row in mine)
    assert all(max(row["error"].values()) < 1e-5 for row in mine)
    assert document["figures"] == [] and document["limits"]["jax"]["exp_gelem"] > 0
    if importlib.util.find_spec("torch") is None:
        assert all(row["failed"] == "not installed" for row in document["rows"] if row["label"] == "torch")


@pytest.mark.skipif(importlib.util.find_spec("mindspore") is None, reason="needs MindSpore")
@pytest.mark.parametrize("direction", registry.DIRECTIONS)
def test_mindspore_candidates_agree_with_float64(direction):
    case = replace(CASES[1], kv_heads=None, alibi=False, q_len=64)
    labels = ("naive", "portable", "portable/pynative")
    job = registry.Job("k", direction, tuple(registry.Entry(x, "mindspore", x, case) for x in labels))
    pool = measure.Pool()
    try:
        found = measure.time_job(pool, job, budget=0)
    finally:
        pool.close()
    for label in labels:
        assert max(found[label]["error"].values()) < 1e-5, found[label]


def test_class_of_the_gpu(monkeypatch):
    """What the results of `bench gpu` are named after."""

    def absent(command):
        raise FileNotFoundError(command[0])

    for told, want in ((b"NVIDIA H200\n", "H200"), (b"NVIDIA A100-SXM4-80GB\nNVIDIA T4\n", "A100-SXM4-80GB")):
        monkeypatch.setattr(machine.subprocess, "check_output", lambda command, told=told: told)
        assert machine.gpu_class() == want
    monkeypatch.setattr(machine.subprocess, "check_output", absent)
    assert machine.gpu_class() == "none"
    assert registry.load()["gpu"].place is machine.gpu_class and registry.load()["peers"].place is machine.cpu_class
