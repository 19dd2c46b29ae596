"""What computer this is: CPU class, versions, devices. Read by `info`, `check` and `bench`."""

import glob
import hashlib
import importlib.util
import os
import platform
import re
import subprocess

from flash_attention.core.cores import cores

PACKAGES = ("numpy", "mindspore", "jax", "jaxlib", "torch")


def _cpuinfo():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return stream.read()
    except OSError:
        return ""


def cpu_class(cpuinfo=None):
    """'A' (AVX-512 with BF16 instructions), 'B' (AVX2) or 'other'; speed ratios differ between them.

    Args:
        cpuinfo: text in the format of /proc/cpuinfo; None reads that file.
    """
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo() if cpuinfo is None else cpuinfo, re.M)
    flags = set(line.group(1).split()) if line else set()
    if "avx512_bf16" in flags:
        return "A"
    return "B" if "avx2" in flags else "other"


def cpu_name():
    """The processor's name, and the number of cores this process may use."""
    line = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.M)
    return "{}, {} cores".format(line.group(1).strip() if line else platform.machine(), cores())


_HALT_POLL = "/sys/module/haltpoll/parameters/guest_halt_poll_ns"
HALTING = (
    "idle cores halt at once, and waking one costs so much that XLA and MindSpore can take twice their time; as root: "
    "echo 2000000 > {0}; echo N > {1}".format(_HALT_POLL, _HALT_POLL.replace("poll_ns", "poll_allow_shrink"))
)


def idle_cores(path=_HALT_POLL):
    """What a virtual machine's cores do before they halt: :data:`HALTING`, 'idle cores poll N us first', or None.

    On a bare machine a sleeping thread wakes in microseconds. In a virtual one whose cores halt the host must put the
    core back to work; libraries whose idle threads sleep (XLA, MindSpore) pay for that at every small operation, those
    whose threads spin (OpenMP: torch, numpy) do not. None: the kernel has no such setting.
    """
    try:
        with open(path, encoding="ascii") as stream:
            nanoseconds = int(stream.read())
    except (OSError, ValueError):
        return None
    return "idle cores poll {:g} us first".format(nanoseconds / 1e3) if nanoseconds else HALTING


def gpu_missing(pattern="/dev/nvidia[0-9]*"):
    """None, or what this computer lacks to compute on an NVIDIA GPU, worded to follow "needs"."""
    if not glob.glob(pattern):
        return "an NVIDIA GPU, and there is none here (no {})".format(pattern)
    if not any(installed(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        return "JAX with CUDA: pip install 'jax[cuda12]'"
    return None


def gpu_class():
    """The first NVIDIA GPU's name without its maker's ('H200'), as the driver tells it; 'none' where there is none."""
    try:
        told = subprocess.check_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).decode()
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return told.splitlines()[0].replace("NVIDIA", "").strip().replace(" ", "-")


def package_version(name):
    """Installed version of a distribution without importing it; None when it is not installed."""
    try:
        from importlib import metadata
    except ImportError:  # Python 3.7
        import pkg_resources

        try:
            return pkg_resources.get_distribution(name).version
        except pkg_resources.DistributionNotFound:
            return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed(name):
    """True when the module can be imported."""
    return importlib.util.find_spec(name) is not None


def cann_version():
    """Version of the CANN toolkit, from its own version file; None where there is none."""
    homes = [os.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    homes += ["/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/latest"]
    for home in filter(None, homes):
        for path in sorted(path for part in ("", "*") for path in glob.glob(os.path.join(home, part, "version.*"))):
            with open(path, encoding="utf-8", errors="replace") as stream:
                found = re.search(r"[Vv]ersion\D*([0-9][\w.]+)", stream.read())
            if found:
                return found.group(1)
    return None


def versions(others=()):
    """``{name: version or None}`` of this package, Python, every framework, CANN and ``others``."""
    from flash_attention import __version__

    found = {"flash_attention": __version__, "python": platform.python_version()}
    found.update((name, package_version(name)) for name in PACKAGES + tuple(others))
    found["CANN"] = cann_version()
    return found


def source_digest(parts=("core", "jax", "nn", "ops"), package=None):
    """Short hash of the code in these sub-packages: results of other code are not mixed with its results.

    ``package``: the name of another package whose code goes in whole.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folders = [os.path.join(root, part) for part in parts]
    if package is not None:
        folders += importlib.util.find_spec(package).submodule_search_locations
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(glob.glob(os.path.join(folder, "**", "*.py"), recursive=True)):
            with open(path, "rb") as stream:
                digest.update(stream.read())
    return digest.hexdigest()[:12]
