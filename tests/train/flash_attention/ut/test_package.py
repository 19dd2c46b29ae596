"""The wheel holds exactly the packages, installs and imports numpy only; the shims in train/ make the same.

It is built from a copy of the sources, offline where setuptools can build a wheel by itself (the `test` extra
brings such a setuptools).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PACKAGES = {"flash_attention": "train", "flash_attention_infer": "infer"}
pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def clean_environment(**variables):
    """This process's environment without its PYTHONPATH and without settings of build.sh, and with `variables`."""
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH" and not name.startswith("FLASH_")}
    env.update({name: str(value) for name, value in variables.items()})
    return env


def run(*command, cwd, **variables):
    """Run a command in a clean environment; its output is the message when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=str(cwd),
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    text = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, "{} failed:\n{}".format(" ".join(map(str, command)), text)
    return text


def source_files(root=ROOT):
    """Every file of both packages, relative to the folder that holds the package."""
    found = set()
    for package, folder in PACKAGES.items():
        for path in (root / folder / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(path.relative_to(root / folder).as_posix())
    return found


def package_files(names):
    """The files of `names` that belong to the two packages (not metadata, not byte code)."""
    return {name for name in names if name.split("/")[0] in PACKAGES and "__pycache__" not in name}


def copy_of_sources(target):
    for name in ("LICENSE", "README.md", "build.sh", "setup.py", "pyproject.toml"):
        if (ROOT / name).exists():
            shutil.copy(str(ROOT / name), str(target))
    for folder in ("train", "infer"):
        ignore = shutil.ignore_patterns("__pycache__", "dist", "build", "*.egg-info", "rank_*", "kernel_meta")
        shutil.copytree(str(ROOT / folder), str(target / folder), ignore=ignore)
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_of_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wheel(sources):
    """The wheel of `bash build.sh`, built beside a stale build/lib that must not leak into it."""
    stale = sources / "build" / "lib" / "flash_attention" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    run("bash", "build.sh", cwd=sources, FLASH_PYTHON=sys.executable)
    wheels = list((sources / "dist").glob("*.whl"))
    assert len(wheels) == 1, wheels
    return wheels[0]


def test_wheel_holds_exactly_the_packages(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        names = archive.namelist()
    assert package_files(names) == source_files()
    assert {"flash_attention/py.typed", "flash_attention_infer/py.typed"} <= set(names)
    others = {name.split("/")[0] for name in names} - set(PACKAGES)
    assert len(others) == 1 and others.pop().endswith(".dist-info")


def test_wheel_has_its_checksum(wheel):
    digest, name = Path(str(wheel) + ".sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel.name)


def test_wheel_metadata(wheel):
    from flash_attention import __version__

    assert wheel.name == "flash_attention-{}-py3-none-any.whl".format(__version__)
    with zipfile.ZipFile(str(wheel)) as archive:
        metadata = Parser().parsestr(
            archive.read("flash_attention-{}.dist-info/METADATA".format(__version__)).decode("utf-8")
        )
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert metadata["Requires-Python"] == ">=3.7"
    assert metadata["License"] == "Apache-2.0"
    extras = "mindspore jax cuda tpu flax onnx bench test docs dev"
    assert set(metadata.get_all("Provides-Extra")) == set(extras.split())
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.replace(" ", "").strip("()") for line in always] == ["numpy>=1.17"]


@pytest.fixture
def environment(tmp_path):
    """A fresh environment that also sees this one's numpy, setuptools, jax and mindspore: (its python, its site)."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    import numpy

    (site / "zz_outer.pth").write_text(str(Path(numpy.__file__).parents[1]) + "\n")
    return python, site


def test_wheel_installs_and_imports_numpy_only(wheel, environment, tmp_path):
    """Where numpy, jax and mindspore can all be imported, the installed package loads no framework."""
    python, site = environment
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    probe = (
        "import sys, flash_attention, flash_attention_infer, flash_attention.core.reference\n"
        "print(flash_attention.__file__, *[m for m in ('jax', 'mindspore', 'torch') if m in sys.modules])"
    )
    assert run(python, "-c", probe, cwd=tmp_path).split() == [str(site / "flash_attention" / "__init__.py")]


def test_core_imports_no_framework():
    probe = (
        "import importlib, pkgutil, sys, flash_attention.core as core\n"
        "names = [m.name for m in pkgutil.walk_packages(core.__path__, 'flash_attention.core.')]\n"
        "assert names\n"
        "for name in names: importlib.import_module(name)\n"
        "print([m for m in ('jax', 'mindspore', 'torch') if m in sys.modules])"
    )
    assert run(sys.executable, "-c", probe, cwd=ROOT, PYTHONPATH=ROOT / "train").strip() == "[]"


def test_build_in_train_makes_the_same_wheel(wheel, tmp_path):
    copy = copy_of_sources(tmp_path)
    run("bash", "build.sh", cwd=copy / "train", FLASH_PYTHON=sys.executable)
    with zipfile.ZipFile(str(copy / "train" / "dist" / wheel.name)) as shim, zipfile.ZipFile(str(wheel)) as archive:
        assert sorted(shim.namelist()) == sorted(archive.namelist())


def test_setup_py_install_in_train_installs_the_same_files(environment, tmp_path):
    python, site = environment
    copy = copy_of_sources(tmp_path)
    run(python, "setup.py", "install", cwd=copy / "train")
    installed = [path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()]
    assert package_files(installed) == source_files()
    assert run(python, "-m", "pip", "uninstall", "-y", "flash_attention", cwd=tmp_path)
    assert not (site / "flash_attention").exists()


def test_build_sh_names_the_remedy_for_a_wrong_interpreter(sources):
    done = subprocess.run(
        ["bash", "build.sh", "env"], cwd=str(sources), env=clean_environment(FLASH_PYTHON="no-such-python"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.decode().strip() == (
        "build.sh: FLASH_PYTHON must be a Python from 3.10 to 3.12 that has venv, but got no-such-python."
    )
    assert not (sources / ".venv").exists()
