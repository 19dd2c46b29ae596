"""The child process that runs candidates of one framework: reads a JSON command a line, answers a JSON line.

Run by :mod:`measure` as ``python -m flash_attention.tools.bench.worker FRAMEWORK``. One process a framework keeps the
thread pools of the others out of its timings; the parent stops it (SIGSTOP) while another one is asked.
"""

import ctypes
import functools
import gc
import importlib
import json
import os
import sys
import time

MODULES = {
    "jax": "in_jax",
    "torch": "in_torch",
    "mindspore": "in_mindspore",
    "mindformers": "in_libraries",
    "mindone": "in_libraries",
    "tokamax": "in_jax",
    "ringattention": "in_jax",
    "ejkernel": "in_jax",
}


def peak_bytes():
    """Highest resident set of this process so far (VmHWM); None where the system does not tell."""
    return _status("VmHWM")


def resident_bytes():
    """Resident set of this process now (VmRSS); None where the system does not tell."""
    return _status("VmRSS")


def _status(name):
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as stream:
            lines = [line.split() for line in stream if line.startswith(name + ":")]
    except OSError:
        return None
    return int(lines[0][1]) * 1024 if lines else None


def _reset_peak():
    """Make VmHWM start again from VmRSS, where the kernel allows it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
            stream.write("5")
    except OSError:
        pass


def _trim():
    """Give freed memory back to the system (glibc), so that the next call cannot hide in it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _timed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def best_seconds(call, budget=0.3):
    """Shortest of the calls that fit into ``budget`` seconds, after one untimed call."""
    call()
    times = [_timed(call)]
    while sum(times) < budget:
        times.append(_timed(call))
    return min(times)


class LazyArrays(dict):
    """A case's arrays by name, drawn when the first one is asked for: not every candidate needs them.

    ``keep``: the next case of the same sizes finds them drawn.
    """

    def __init__(self, case, keep=False):
        super().__init__()
        self.case, self.keep = case, keep

    def __missing__(self, name):
        self.update(_kept_arrays(self.case.sizes()) if self.keep else self.case.arrays())
        return dict.__getitem__(self, name)


@functools.lru_cache(maxsize=1)
def _kept_arrays(case):
    return case.arrays()


class Desk:
    """The candidates at hand, by key, and the commands."""

    def __init__(self, framework):
        self.module = importlib.import_module("flash_attention.tools.bench." + MODULES[framework.partition("/")[0]])
        self.entries = {}

    def module_of(self, candidate):
        """The framework's module, or that of a candidate 'MODULE:NAME' of another package."""
        module = candidate.rpartition(":")[0]
        return importlib.import_module(module) if module else self.module

    def build(self, case, direction, candidate, arrays, **options):
        """``(call, results)`` of a candidate."""
        return self.module_of(candidate).build(case, direction, candidate.rpartition(":")[2], arrays, **options)

    def prepare(self, key, case, direction, candidate):
        """Build a candidate and call it twice: the first call compiles."""
        arrays = LazyArrays(case, keep=True)
        call, results = self.build(case, direction, candidate, arrays)
        first, second = _timed(call), _timed(call)
        self.entries[key] = call, results, case, arrays, candidate.partition("/")[0]
        return {"first_s": first, "second_s": second}

    def time(self, key, repeats):
        """Mean seconds of ``repeats`` calls after an untimed one.

        The untimed call brings caches and memory back: what other processes have freed meanwhile a virtual machine
        returns to its host, and getting it again made first calls up to three times as long.
        """
        call = self.entries[key][0]
        call()
        return {"seconds": _timed(lambda: [call() for _ in range(repeats)]) / repeats}

    def error(self, key):
        """Error of the last call's results against float64."""
        from flash_attention.tools.bench import judge

        _, results, case, arrays, name = self.entries[key]
        return {"error": judge.error(case, arrays, *results(), name)}

    def forget(self):
        """Drop all candidates and their tensors; the arrays drawn last stay for the next case of the same sizes."""
        self.entries.clear()
        gc.collect()
        return {}

    def memory(self, case, direction, candidate):
        """Memory of a call: ``extra_bytes`` beyond inputs and framework; ``peak_bytes`` of the process.

        The extra is the peak of a second call beyond what was resident before the first: results count, compilers do
        not, but what a framework keeps in its pool does. The peak is of everything, compilers too.

        Where a program can be compiled without running it (JAX), that is done before the first measurement.
        """
        for length in (192, 256):  # two: MindSpore's second graph grows the process once more (by about 100 MB)
            small = case.shrunk(length)
            self.build(small, direction, candidate, LazyArrays(small))[0]()
        ahead = {"ahead": True} if hasattr(self.module_of(candidate), "compile_only") else {}
        call, _ = self.build(case, direction, candidate, LazyArrays(case), **ahead)
        _trim()
        before = resident_bytes()
        if before is None:
            return {"failed": "this system does not report VmHWM"}
        call()
        first_peak = peak_bytes()
        _trim()
        _reset_peak()
        seconds = _timed(call)
        peak = peak_bytes()
        return {"peak_bytes": max(first_peak, peak), "extra_bytes": max(0, peak - before), "seconds": seconds}

    def compile(self, case, direction, candidate):
        """Compile time; a small call first, so that the framework's own start is not counted."""
        if not hasattr(self.module, "compile_seconds"):
            return {"failed": "nothing is compiled"}
        small = case.shrunk()
        self.module.compile_seconds(small, direction, candidate)
        return {"seconds": self.module.compile_seconds(case, direction, candidate)}

    def limits(self):
        """The framework's own limits on this machine."""
        return self.module.limits(best_seconds)


def main():
    """Answer commands until stdin closes. Whatever libraries print goes to stderr, never into the answers."""
    from flash_attention.tools.bench.cases import Case

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    desk = Desk(sys.argv[1])
    answer({"pid": os.getpid()})
    for line in sys.stdin:
        message = json.loads(line)
        command = getattr(desk, message.pop("command"))
        if "case" in message:
            message["case"] = Case.from_json(message["case"])
        try:
            answer(command(**message))
        except Exception as error:  # reported to the parent, which writes it into the table
            answer({"failed": "{}: {}".format(type(error).__name__, str(error).strip().split("\n")[0])})


if __name__ == "__main__":
    main()
