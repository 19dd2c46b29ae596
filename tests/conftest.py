"""What every test shares: import paths, `--engine`, skips for want of hardware, the deadline, the daily order, figures.

It works from the root and from inside any folder of tests, with the sources or with an installed wheel.
"""

import ast
import datetime
import importlib.util
import os
import sys
import time

import pytest

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
sys.path.insert(0, TESTS)  # conformance, tolerances, must_show

import must_show  # noqa: E402  (needs the path above)

pytest.register_assert_rewrite("conformance", "tolerances")


def _use_sources_unless_installed():
    """Put train/ and infer/ on the path, except where the wheel or PYTHONPATH already gives the package."""
    spec = importlib.util.find_spec("flash_attention")
    if spec is None or spec.origin is None:  # no origin: only a folder of that name, such as this one's neighbour
        sys.path[:0] = [os.path.join(ROOT, "train"), os.path.join(ROOT, "infer")]


_use_sources_unless_installed()


def has(module):
    """True when `module` can be imported here. Looks, does not import."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a missing parent package
        return False


# --- options --------------------------------------------------------------------------------------
def pytest_addoption(parser):
    parser.addoption(
        "--engine", default=None, metavar="NAME",
        help="run the MindSpore cases with this engine (portable, jax, aclnn, tik) instead of each that runs here",
    )  # fmt: skip


@pytest.fixture
def engine_option(request):
    """The value of --engine, or None."""
    return request.config.getoption("--engine")


def pytest_configure(config):
    # Modules that parametrize over engines are imported before any fixture exists: they read the variable.
    if config.getoption("--engine"):
        os.environ["FLASH_TEST_ENGINE"] = config.getoption("--engine")
    config._flash_left_out = {}  # why -> test files
    config._flash_not_reached = []


# --- what cannot run here -------------------------------------------------------------------------
FRAMEWORK_OF = {
    "mindspore": "mindspore",
    "flash_attention.nn": "mindspore",
    "flash_attention.ops": "mindspore",
    "jax": "jax",
    "flash_attention.jax": "jax",
    "mindformers": "mindformers",
    "mindone": "mindone",
    "flash_attention_infer.nn": "mindspore",
    "flash_attention_infer.jax": "jax",
}


def _imports(path):
    """Dotted names imported at the top level. Imports inside `try`, `if` and functions are the file's own care."""
    with open(str(path), encoding="utf-8") as stream:
        body = ast.parse(stream.read()).body
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.module + "." + alias.name


def missing_framework(path):
    """The framework or model library that the test file imports and that is not installed, else None."""
    for name in _imports(path):
        for prefix, framework in FRAMEWORK_OF.items():
            if (name + ".").startswith(prefix + ".") and not has(framework):
                return framework
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path, config):
    name = collection_path.name
    if name.startswith("test_") and name.endswith(".py"):
        framework = missing_framework(collection_path)
        if framework:
            why = "{} is not installed".format(framework)
            config._flash_left_out.setdefault(why, []).append(os.path.relpath(str(collection_path), ROOT))
            return True
        if os.environ.get("FLASH_JAX") and "jax" not in collection_path.read_text(encoding="utf-8").lower():
            why = "FLASH_JAX runs the JAX suite alone"
            config._flash_left_out.setdefault(why, []).append(os.path.relpath(str(collection_path), ROOT))
            return True
    return None


NEEDS = {
    "ascend": (lambda: os.path.exists("/dev/davinci_manager"), "needs an Ascend device"),
    "gpu": (lambda: os.path.exists("/dev/nvidiactl"), "needs a GPU"),
    "cann": (lambda: has("tbe"), "needs CANN (no module named tbe)"),
}


def pytest_collection_modifyitems(config, items):
    for marker, (present, reason) in NEEDS.items():
        if not present():
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))
    if os.environ.get("FLASH_ROTATE"):
        items[:] = rotated(items, datetime.date.today())


def rotated(items, day):
    """`items` (objects with .path), starting at another file on each day: a deadline cuts off another part each day."""
    groups = {}
    for item in items:
        groups.setdefault(str(item.path), []).append(item)
    files = list(groups)
    first = day.timetuple().tm_yday % max(len(files), 1)
    return [item for name in files[first:] + files[:first] for item in groups[name]]


# --- the deadline ---------------------------------------------------------------------------------
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Once FLASH_DEADLINE (seconds since the epoch) has passed, note the test instead of running it."""
    if time.time() < float(os.environ.get("FLASH_DEADLINE") or "inf"):
        return None
    item.config._flash_not_reached.append(item.nodeid)
    return True


def pytest_terminal_summary(terminalreporter, config):
    write = terminalreporter.write_line
    for why, files in sorted(config._flash_left_out.items()):
        terminalreporter.section("left out: {}".format(why), sep="-")
        for name in sorted(set(files)):
            write(name)
    if config._flash_not_reached:
        terminalreporter.section("deadline: {} tests not reached".format(len(config._flash_not_reached)), sep="-")
        counts = {}
        for nodeid in config._flash_not_reached:
            counts[nodeid.split("[")[0]] = counts.get(nodeid.split("[")[0], 0) + 1
        for name, count in counts.items():
            write("{}  ({})".format(name, count))


# --- several processes (pytest-xdist) ---------------------------------------------------------------
NOTES = ("_flash_left_out", "_flash_not_reached")


def pytest_sessionfinish(session):
    """A worker hands its notes to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update({name: getattr(session.config, name) for name in NOTES})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    output = getattr(node, "workeroutput", {})  # a worker that crashed has none
    for why, files in output.get("_flash_left_out", {}).items():
        node.config._flash_left_out.setdefault(why, []).extend(files)
    node.config._flash_not_reached += output.get("_flash_not_reached", [])


# --- MindSpore's two modes ------------------------------------------------------------------------
@pytest.fixture(params=["pynative", "graph"])
def mode(request):
    """Runs the test in PyNative and in graph mode; gives the mode's name."""
    import mindspore as ms

    before = ms.get_context("mode")
    ms.set_context(mode={"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}[request.param])
    yield request.param
    ms.set_context(mode=before)


@pytest.fixture(scope="session", autouse=True)
def dispatched_in_line():
    """PyNative on a CPU dispatches from the test's own thread: beside the kernels' threads, on two cores, another one
    makes short calls several times as slow."""
    ms = sys.modules.get("mindspore")  # imported with the test files that need it
    if ms is not None and ms.get_context("device_target") == "CPU":
        ms.set_context(pynative_synchronize=True)


# --- figures --------------------------------------------------------------------------------------
FIGURE = "flash_figure"


@pytest.fixture
def figure(request):
    """`figure(name, value, bound=None, unit="", ...)` records a "Must show" figure; fails beyond its bound.

    `at_least=True`: the bound is a lower one. `largest=True`: many tests share the figure, the largest of a run counts.

    The figure is kept whether or not the test fails, so that the table of `bash build.sh test all` shows by how much.
    Write the name as a literal: the table finds in the sources which figures exist, and lists those not measured.
    """

    def record(name, value, *rest, **options):
        entry = must_show.entry(name, value, *rest, **options)
        request.node.user_properties.append((FIGURE, entry))
        assert must_show.holds(entry), "{} must be {}, but got {}.".format(
            name, must_show.bound_text(entry), must_show.value_text(entry)
        )

    return record


def pytest_runtest_logreport(report):
    """Keep the figures of a test that has run: in the one process that reports, so that workers need no lock."""
    if report.when == "call" and "PYTEST_XDIST_WORKER" not in os.environ:
        must_show.keep([entry for name, entry in report.user_properties if name == FIGURE])
