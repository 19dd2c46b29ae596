"""Rules for every file: import arrows, Python 3.7 syntax, docstrings, no machine's paths, tests that can fail, ruff.

The arrows: core <- ascend <- ops <- nn; core <- jax; integrations and tools on top; flash_attention_infer imports
flash_attention, never the reverse; jax and ops meet in one bridge file.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
TRAIN, INFER, TESTS = ROOT / "train", ROOT / "infer", ROOT / "tests"
pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

# layer -> (layers of flash_attention it may import, frameworks it may import)
ARROWS = {
    "": (set(), set()),  # flash_attention/__init__.py and _version.py
    "core": (set(), set()),
    "ascend": ({"core"}, set()),
    "ops": ({"core", "ascend"}, {"mindspore"}),
    "nn": ({"core", "ascend", "ops"}, {"mindspore"}),
    "jax": ({"core"}, {"jax"}),
    "integrations": ({"core", "ops", "nn", "jax"}, {"mindspore", "jax"}),
    "tools": ({"core", "ascend", "ops", "nn", "jax", "integrations"}, {"mindspore", "jax", "torch"}),
    "__main__": ({"tools"}, set()),
}
FRAMEWORKS = {"mindspore", "jax", "torch"}


def python_files(*folders):
    return sorted(path for folder in folders for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path, top):
    parts = list(path.relative_to(top).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def literal_text(node):
    """The text of a string literal, else None."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def imported_names(path, top):
    """Absolute dotted names imported anywhere in a file; relative imports and import_module("literal") are resolved."""
    package = list(path.relative_to(top).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield ".".join(base + [alias.name])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            literal = literal_text(node.args[0]) if node.args else None
            if literal:
                yield ".".join(package) + literal if literal.startswith(".") else literal


def layer_of(dotted):
    """'core' of 'flash_attention.core.plan', '' of 'flash_attention.__version__', None outside the package."""
    parts = dotted.split(".")
    if parts[0] != "flash_attention":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ARROWS else ""


def broken_arrows(files, top):
    """Lines 'file imports name' that the table forbids, and the ops files that import JAX or the twin."""
    broken, bridges = [], set()
    for path in files:
        layer = layer_of(".".join(module_name(path, top)))
        layers, frameworks = ARROWS[layer]
        for name in imported_names(path, top):
            target, line = layer_of(name), "{} imports {}".format(path.relative_to(top), name)
            first = name.split(".")[0]
            if layer == "ops" and (target == "jax" or first == "jax"):
                bridges.add(str(path.relative_to(top)))
            elif target and target != layer and target not in layers:
                broken.append(line)
            elif first == "flash_attention_infer" or (first in FRAMEWORKS and first not in frameworks):
                broken.append(line)
    return broken, bridges


def test_import_arrows():
    files = python_files(TRAIN / "flash_attention")
    assert len(files) > 10
    broken, bridges = broken_arrows(files, TRAIN)
    assert broken == []
    assert len(bridges) <= 1, "jax and ops meet in one file, but got {}".format(sorted(bridges))


def test_import_arrows_are_seen(tmp_path):
    """The checker itself: upward, sideways, framework and infer imports are found in every form."""
    cases = {
        "core/a.py": ("from ..ops import x", "import jax.numpy", "def f():\n    from flash_attention.nn import y"),
        "ops/b.py": ("from flash_attention_infer import z", "import_module('flash_attention.nn')"),
        "jax/c.py": ("import mindspore", "from flash_attention import ops"),
    }
    for name, bodies in cases.items():
        for body in bodies:
            path = tmp_path / "flash_attention" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
            assert len(broken_arrows([path], tmp_path)[0]) == 1, body
            path.write_text("from flash_attention.core import spec\nfrom ..core.plan import TilePlan\nimport numpy")
            assert broken_arrows([path], tmp_path) == ([], set())
    for name in ("p.py", "q.py"):
        (tmp_path / "flash_attention" / "ops" / name).write_text("def run():\n    from ..jax import engines")
    assert len(broken_arrows(python_files(tmp_path / "flash_attention" / "ops"), tmp_path)[1]) == 2


def test_core_imports_numpy_and_the_standard_library_only():
    standard = getattr(sys, "stdlib_module_names", None)
    if standard is None:
        pytest.skip("the list of standard modules needs Python 3.10")
    allowed = set(standard) | {"numpy", "flash_attention"}
    for path in python_files(TRAIN / "flash_attention" / "core"):
        assert {name.split(".")[0] for name in imported_names(path, TRAIN)} <= allowed, str(path)


# --- Python 3.7 -----------------------------------------------------------------------------------
def python37_files():
    """Files that Ascend 910 machines load: all but the JAX twin, the JAX half of infer, and tests that import JAX."""
    files = [ROOT / "setup.py"] + python_files(TRAIN, INFER)
    files = [path for path in files if not any("jax" in part for part in path.relative_to(ROOT).parts)]
    for path in python_files(TESTS):
        if not any(name.split(".")[0] == "jax" or layer_of(name) == "jax" for name in imported_names(path, TESTS)):
            files.append(path)
    return files


def test_python37_syntax():
    options = {"feature_version": (3, 7)} if sys.version_info >= (3, 8) else {}
    broken = []
    for path in python37_files():
        try:
            ast.parse(path.read_text(encoding="utf-8"), **options)
        except SyntaxError as error:
            broken.append("{}:{}: {}".format(path.relative_to(ROOT), error.lineno, error.msg))
    assert broken == []


def test_python37_standard_library():
    pytest.importorskip("vermin")
    command = [sys.executable, "-c", "import vermin; vermin.main()", "-t=3.7-", "--no-tips", "--violations"]
    command += ["--exclude", "importlib.metadata"]  # imported behind a feature test
    done = subprocess.run(
        command + [str(path) for path in python37_files()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")


# --- files ----------------------------------------------------------------------------------------
def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT)) for path in python_files(TRAIN, INFER, TESTS) if not ast.get_docstring(tree(path))
    ]
    assert silent == []


TEXT = {".py", ".sh", ".md", ".toml", ".json", ".txt", ".cfg", ".csv", ".yml", ".yaml", ""}
MACHINE_PATH = re.compile(r"(?<![\w.<>-])/(?:work|root|home/\w+|Users/\w+|opt/envs)/[\w.]")


def test_no_file_names_a_path_of_somebodys_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=str(ROOT), stdout=subprocess.PIPE
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    found = []
    for name in listed.stdout.decode("utf-8").splitlines():
        path = ROOT / name
        if path.suffix in TEXT and path.is_file() and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    found.append("{}:{}: {}".format(name, number, line.strip()))
    assert found == []
    assert MACHINE_PATH.search("open('/home/ann/x')") and not MACHINE_PATH.search("https://host/work/page")


def _can_fail(function):
    """True when a test asserts, expects an exception, or hands the judgement to a call that says so by its name."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("raises", "fail", "figure") or re.match(r"_?(assert|check|expect|run|judge)", name):
                return True
    return False


def test_every_test_can_fail():
    tests, idle = 0, []
    for path in python_files(TESTS):
        if path.name.startswith("test_"):
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    tests += 1
                    if not _can_fail(node):
                        idle.append("{}::{}".format(path.relative_to(ROOT), node.name))
    assert tests > 5
    assert idle == []


def test_no_package_files_below_tests():
    assert [str(path) for path in TESTS.rglob("__init__.py")] == []


def test_ruff():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")
