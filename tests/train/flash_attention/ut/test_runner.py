"""The test runner itself: tests/conftest.py and tests/must_show.py."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import must_show
import pytest

ROOT = Path(__file__).resolve().parents[4]
pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.fixture
def project(tmp_path):
    """Runs pytest in a new project with our conftest: `project(files, *arguments, **env)` -> (exit code, output)."""
    (tmp_path / "tests").mkdir()
    shutil.copy(str(ROOT / "pyproject.toml"), str(tmp_path))
    for name in ("conftest.py", "must_show.py"):
        shutil.copy(str(ROOT / "tests" / name), str(tmp_path / "tests"))

    def run(files, *arguments, cwd=".", **variables):
        for name, text in files.items():
            path = tmp_path / "tests" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        env = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        env.update(variables)
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"] + list(arguments)
        done = subprocess.run(
            command, cwd=str(tmp_path / cwd), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120
        )
        return done.returncode, done.stdout.decode("utf-8", "replace")

    run.path = tmp_path
    return run


PASS = "def test_one():\n    assert True\n"


# A test that runs until the deadline has passed, whatever the machine's speed.
PASSES_DEADLINE = "import os\ndef test_long():\n    os.environ['FLASH_DEADLINE'] = '1'\n"


def test_deadline_stops_between_tests_and_names_the_rest(project):
    files = {"test_a.py": PASSES_DEADLINE + "def test_after():\n    assert False\n", "test_b.py": PASS}
    exit_code, text = project(files, FLASH_DEADLINE=str(time.time() + 1000))
    assert exit_code == 0, text
    assert "1 passed" in text and "failed" not in text
    assert "deadline: 2 tests not reached" in text
    assert "tests/test_a.py::test_after  (1)" in text and "tests/test_b.py::test_one  (1)" in text


def test_failure_before_the_deadline_still_fails(project):
    files = {"test_a.py": PASSES_DEADLINE + "    assert False\ndef test_after():\n    pass\n"}
    exit_code, text = project(files)
    assert exit_code == 1 and "1 failed" in text and "1 tests not reached" in text


def test_every_file_comes_first_on_some_day(project):
    """Rotation shows in the order of a real run, and over as many days as there are files each one leads once."""
    files = {"test_a.py": PASS, "test_b.py": PASS, "test_c.py": PASS}
    probe = (
        "import datetime, types, conftest\n"
        "def test_rotation():\n"
        "    items = [types.SimpleNamespace(path=p, n=n) for p in 'abc' for n in (1, 2)]\n"
        "    days = [datetime.date(2026, 12, 30) + datetime.timedelta(d) for d in range(-2, 1)]\n"
        "    orders = [[i.path + str(i.n) for i in conftest.rotated(items, day)] for day in days]\n"
        "    assert {order[0] for order in orders} == {'a1', 'b1', 'c1'}\n"
        "    assert all(order.index(p + '2') == order.index(p + '1') + 1 for order in orders for p in 'abc')\n"
    )
    exit_code, text = project(dict(files, **{"test_z.py": probe}), FLASH_ROTATE="1")
    assert exit_code == 0 and "4 passed" in text, text


def test_files_of_a_missing_framework_are_left_out_and_named(project):
    files = {
        "test_a.py": PASS,
        "test_ms.py": "import mindspore\n" + PASS,
        "test_cell.py": "from flash_attention.nn.layer import x\n" + PASS,
        "test_own_care.py": "import pytest\ndef test_skips():\n    pytest.importorskip('mindspore')\n",
    }
    hide = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name in ('mindspore', 'jax') else find(name, *more)\n"
    )
    (project.path / "hide.py").write_text(hide)
    exit_code, text = project(files, "-k", "one", "-p", "hide", PYTHONPATH=str(project.path))
    assert exit_code == 0 and "1 passed" in text, text
    assert "left out: mindspore is not installed" in text
    assert "tests/test_ms.py" in text and "tests/test_cell.py" in text


def test_the_jax_suite_leaves_out_what_never_mentions_jax(project):
    files = {"test_a.py": PASS, "test_b.py": "# about jax\n" + PASS}
    exit_code, text = project(files, FLASH_JAX="newest")
    assert exit_code == 0 and "1 passed" in text, text
    assert "left out: FLASH_JAX runs the JAX suite alone" in text and "tests/test_a.py" in text


def test_unknown_marker_and_unknown_hardware(project):
    exit_code, text = project({"test_a.py": "import pytest\n@pytest.mark.levle0\n" + PASS})
    assert exit_code != 0 and "'levle0' not found in `markers`" in text
    exit_code, text = project({"test_a.py": "import pytest\n@pytest.mark.cann\n" + PASS})
    assert exit_code == 0 and "needs CANN (no module named tbe)" in text


@pytest.mark.parametrize("cwd", [".", "tests", "tests/train/flash_attention/ut"])
def test_engine_option_works_from_every_folder(project, cwd):
    test = (
        "import os\n"
        "def test_one(engine_option):\n"
        "    assert engine_option == os.environ['FLASH_TEST_ENGINE'] == 'tik'\n"
    )
    exit_code, text = project({"train/flash_attention/ut/test_a.py": test}, "--engine", "tik", cwd=cwd)
    assert exit_code == 0 and "1 passed" in text, text


def test_figure_records_and_fails_beyond_its_bound(project):
    tests = (
        "def test_good(figure):\n    figure('error', 0.5, 1, 'ulp')\n"
        "def test_bad(figure):\n    figure('rate', 2, 3, at_least=True)\n"
    )
    exit_code, text = project({"test_a.py": tests}, FLASH_COMMAND="bash build.sh test")
    assert exit_code == 1 and "rate must be >= 3, but got 2." in text and "1 passed" in text
    stored = json.loads((project.path / ".flash" / "figures.json").read_text())
    assert {name: (entry["value"], entry["command"]) for name, entry in stored.items()} == {
        "error": (0.5, "bash build.sh test"),
        "rate": (2.0, "bash build.sh test"),
    }


# --- the table -------------------------------------------------------------------------------------
def test_workers_hand_over_figures_and_what_was_left_out(project):
    pytest.importorskip("xdist")
    files = {  # one file a worker
        "test_a.py": "# about jax\ndef test_a(figure):\n    figure('error', 1)\n",
        "test_b.py": "# about jax\ndef test_b(figure):\n    figure('rate', 2)\n" + PASSES_DEADLINE + PASS,
        "test_c.py": PASS,
    }
    exit_code, text = project(files, "-n", "2", "--dist", "loadfile", FLASH_JAX="newest", FLASH_DEADLINE="9e9")
    assert exit_code == 0 and "3 passed" in text, text
    assert "deadline: 1 tests not reached" in text and "tests/test_b.py::test_one  (1)" in text
    assert "left out: FLASH_JAX runs the JAX suite alone" in text and "tests/test_c.py" in text
    stored = json.loads((project.path / ".flash" / "figures.json").read_text())
    assert {name: entry["value"] for name, entry in stored.items()} == {"error": 1.0, "rate": 2.0}


def test_table_tells_now_from_before_and_lists_what_is_missing(tmp_path):
    store = str(tmp_path / "figures.json")
    must_show.keep([must_show.entry("largest error", 3.0, 4, "ulp"), must_show.entry("old", 7)], path=store)
    for value in (2.0, 3.0, 1.0):
        must_show.keep([must_show.entry("largest error", value, 4, "ulp", largest=True)], path=store)
    figures = must_show.load(store)
    now = figures["largest error"]["time"]
    figures["old"].update(time=86400 * 365.5, command="bash build.sh test all")
    bench = [
        {
            "name": "speed",
            "value": 2.0,
            "bound": 1.5,
            "unit": "x",
            "date": "2026-01-02",
            "command": "bash build.sh bench a",
        }
    ]
    table = must_show.rows(figures, bench, ["old", "never run"], since=now - 1)
    assert table == [
        ("largest error", "3 ulp", "<= 4 ulp", "ok", "measured now"),
        ("old", "7", "-", "-", "measured 1971-01-01 by `bash build.sh test all`"),
        ("speed", "2 x", "<= 1.5 x", "MISSED", "measured 2026-01-02 by `bash build.sh bench a`"),
        ("never run", "", "", "", "not measured"),
    ]
    lines = must_show.draw(table).splitlines()
    assert (
        len(lines) == 6 and lines[4].startswith("speed ") and len({line.find("measured") for line in lines[2:5]}) == 1
    )


def test_names_are_found_in_the_sources(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_x(figure):\n    figure('a b', 1)\n    figure('c' + name, 1)\n")
    (tmp_path / "helper.py").write_text("figure('no test file', 1)\n")
    assert must_show.declared(str(tmp_path)) == ["a b"]


def test_nan_misses_every_bound():
    for at_least in (False, True):
        assert not must_show.holds({"value": float("nan"), "bound": 1.0, "at_least": at_least})
