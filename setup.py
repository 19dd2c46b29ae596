"""All metadata of the wheel, for every setuptools from Python 3.7's own to the newest, and nothing but setuptools.

The metadata is here and not in pyproject.toml because `python setup.py install` must work on the Python 3.7-3.9
machines of the Ascend 910, whose setuptools cannot read a [project] table. `build.sh` asks `requirements()` what to
install.
"""

import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
PACKAGES = {"flash_attention": "train", "flash_attention_infer": "infer"}  # package -> the folder that holds it

# JAX needs a newer Python than the rest of the package; the marker keeps `[test]` installable on Python 3.7.
_JAX = 'jax{}>=0.6; python_version >= "3.10"'
_ABSL = 'absl-py; python_version >= "3.10"'  # Pallas Mosaic GPU imports it, and jax does not ask for it
EXTRAS = {
    "mindspore": ["mindspore>=2.2", "numpy<2"],  # MindSpore breaks with numpy 2 on tensor-scalar arithmetic
    "jax": [_JAX.format("")],
    "cuda": [_JAX.format("[cuda12]"), _ABSL],
    "tpu": [_JAX.format("[tpu]")],
    "bench": ["torch==2.13.0", "matplotlib"],  # the release that the published comparisons were measured with
    "test": [
        "pytest>=7",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "matplotlib",
        "ruff",
        "vermin",
        'setuptools>=70.1; python_version >= "3.8"',  # the tests build the wheel; from here on it brings bdist_wheel
        'wheel; python_version < "3.8"',
        _ABSL,
    ],
    "docs": ["matplotlib"],
    "flax": [_JAX.format(""), 'flax>=0.10; python_version >= "3.10"'],
    "onnx": ["onnx>=1.14", "onnxruntime>=1.16"],
}
EXTRAS["dev"] = sorted({line for name in ("jax", "test", "docs") for line in EXTRAS[name]})
INSTALL_REQUIRES = ["numpy>=1.17"]


def requirements(*extras):
    """Requirement lines of the package with these extras, as a list for `pip install -r`."""
    return INSTALL_REQUIRES + [line for name in extras for line in EXTRAS[name]]


def _read(*parts):
    path = os.path.join(ROOT, *parts)
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as stream:
        return stream.read()


def version():
    """The CalVer string of flash_attention/_version.py, read as text: building must import nothing."""
    return re.search(r'^__version__ = "([^"]+)"', _read("train", "flash_attention", "_version.py"), re.M).group(1)


def data_files(package):
    """Every file of `package` that is not a module of it (py.typed, Ascend sources, ...), relative to the package."""
    top = os.path.join(ROOT, PACKAGES[package], package)
    found, modules = [], {os.path.dirname(top)}  # `modules`: the folders whose .py files find_packages takes
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name != "__pycache__"]
        if "__init__.py" in names and os.path.dirname(folder) in modules:
            modules.add(folder)
            names = [name for name in names if not name.endswith(".py")]
        found += [os.path.relpath(os.path.join(folder, name), top) for name in names if not name.endswith(".pyc")]
    return sorted(found)


def can_build_wheels():
    """True when this Python's setuptools builds a wheel by itself, without packages that pip would have to fetch."""
    try:
        from setuptools.dist import Distribution

        return Distribution().get_command_class("bdist_wheel") is not None
    except Exception:  # distutils' own exception type, which cannot be imported where setuptools is missing
        return False


def install_with_pip(options):
    """`python setup.py install` by way of pip: setuptools' own command makes eggs and cannot fetch numpy any more."""
    isolation = ["--no-build-isolation"] if can_build_wheels() else []
    return subprocess.call([sys.executable, "-m", "pip", "install"] + isolation + options + [ROOT])


def main():
    """Run setuptools with the metadata above."""
    os.chdir(ROOT)  # train/setup.py calls this file from another folder
    if sys.argv[1:] in (["install"], ["install", "--user"]):
        sys.exit(install_with_pip(sys.argv[2:]))
    # setuptools packs whatever it finds in build/lib, also modules that were deleted since an earlier build.
    shutil.rmtree(os.path.join("build", "lib"), ignore_errors=True)

    from setuptools import find_packages, setup

    setup(
        name="flash_attention",
        version=version(),
        description="FlashAttention-2 for MindSpore on Ascend, with a JAX twin for TPU, GPU and CPU",
        long_description=_read("README.md"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        python_requires=">=3.7",
        package_dir={package: folder + "/" + package for package, folder in PACKAGES.items()},
        packages=[found for folder in sorted(set(PACKAGES.values())) for found in find_packages(folder)],
        package_data={package: data_files(package) for package in PACKAGES},
        install_requires=INSTALL_REQUIRES,
        extras_require=EXTRAS,
        zip_safe=False,
        classifiers=[
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3 :: Only",
            "Operating System :: OS Independent",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
    )


if __name__ == "__main__":
    main()
