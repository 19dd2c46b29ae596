"""`python -m flash_attention launch`: start local processes of a script, watch them, end all when one fails or hangs.

The script calls ``flash_attention.jax.distributed.initialize()`` first of all, and :func:`progress` once a step.
Nothing here imports a framework.
"""

import argparse
import importlib.util
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ADDRESS, SIZE, RANK = "FLASH_LAUNCH_ADDRESS", "FLASH_LAUNCH_SIZE", "FLASH_LAUNCH_RANK"
PROGRESS = "FLASH_LAUNCH_PROGRESS"
COLLECTIVE_SECONDS = 1800
_POLL = 0.1  # seconds between two looks at the processes
_LONGEST = 1.0  # a longer time between two looks counts as this: the machine slept, or the launcher itself was stopped
_GRACE = 5.0  # seconds between asking a process to end and killing it


def progress(step):
    """Say that ``step`` is done (any text or number). Outside of the launcher it does nothing."""
    path = os.environ.get(PROGRESS)
    if path:
        with open(path + ".new", "w") as stream:
            stream.write(str(step))
        os.replace(path + ".new", path)  # never seen half written


def collective_flags(seconds=COLLECTIVE_SECONDS):
    """XLA_FLAGS that let a CPU collective wait ``seconds`` for its slowest member.

    XLA ends the whole process when the members of a collective do not meet within 40 s, which on a host with fewer
    cores than devices is no error: they compute one after the other. Old versions know no such flag and would refuse to
    start with it, so it is looked up in the library first; there the limit cannot be changed.
    """
    wanted = {
        "xla_cpu_collective_call_warn_stuck_timeout_seconds": seconds // 2,
        "xla_cpu_collective_call_terminate_timeout_seconds": seconds,
        "xla_cpu_collective_timeout_seconds": seconds,
    }
    return " ".join("--{}={}".format(name, value) for name, value in wanted.items() if _known(name))


def _known(flag):
    found = importlib.util.find_spec("jaxlib")
    if found is None:
        return False
    for folder in found.submodule_search_locations:
        for name in os.listdir(folder):
            if name.startswith(("libjax_common", "xla_extension")):
                with open(os.path.join(folder, name), "rb") as stream:
                    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as library:
                        return library.find(flag.encode()) >= 0
    return False


def add_arguments(parser):
    """What to start, and how long to wait for it."""
    parser.add_argument("-n", type=int, required=True, metavar="N", help="processes to start")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds a step may take (60)")
    parser.add_argument(
        "--startup-timeout", type=float, default=600.0, metavar="S", help="seconds until the first step (600)"
    )
    parser.add_argument("script", help="a Python script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run(args):
    """Start, watch, end; returns 0 when every process did, else 1 (2 for bad arguments)."""
    if args.n < 1 or args.timeout <= 0 or args.startup_timeout <= 0:
        args.parser.error("-n, --timeout and --startup-timeout must be positive")
    if not os.path.exists(args.script):
        args.parser.error("no such script: {}".format(args.script))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` ends the processes
    command = [sys.executable, "-u", args.script] + args.arguments
    folder = tempfile.mkdtemp(prefix="flash_launch_")
    ranks = []
    try:
        address = "127.0.0.1:{}".format(_free_port())
        for rank in range(args.n):
            ranks.append(_Rank(rank, command, _environment(rank, args.n, address, folder)))
        problem = _watch(ranks, args.timeout, args.startup_timeout)
    finally:
        _end(ranks)
        shutil.rmtree(folder)
    if problem:
        sys.stderr.write("launch: {}; the others were ended\n".format(problem))
    return 1 if problem else 0


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _environment(rank, size, address, folder):
    values = dict(os.environ)
    values.update({ADDRESS: address, SIZE: str(size), RANK: str(rank)})
    values[PROGRESS] = os.path.join(folder, str(rank))
    flags = values.get("XLA_FLAGS", "")
    if "collective" not in flags:
        values["XLA_FLAGS"] = "{} {}".format(flags, collective_flags()).strip()
    values.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")  # between processes XLA has no other on a CPU
    return values


class _Rank:
    """One process in a session of its own, its output marked with its rank, and its progress."""

    def __init__(self, rank, command, environment):
        self.rank, self.file = rank, environment[PROGRESS]
        self.step, self.waited = None, 0.0  # seconds since its last report
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.reader = threading.Thread(target=self._copy_output, daemon=True)
        self.reader.start()

    def _copy_output(self):
        for line in self.process.stdout:
            sys.stdout.write("[{}] {}\n".format(self.rank, line.decode("utf-8", "replace").rstrip("\n")))
            sys.stdout.flush()

    def look(self, passed):
        """Note a new step, or that ``passed`` more seconds went by without one."""
        self.waited += passed
        try:
            with open(self.file) as stream:
                step = stream.read()
                stamp = os.fstat(stream.fileno()).st_mtime_ns
        except OSError:  # no report yet
            return
        if (step, stamp) != self.step:
            self.step, self.waited = (step, stamp), 0.0

    def last(self):
        """Its last step, in words."""
        return "before its first step" if self.step is None else "after step {}".format(self.step[0])

    def signal(self, number):
        """Send a signal to the process and what it has started."""
        try:
            os.killpg(self.process.pid, number)
        except OSError:  # gone already
            pass


def _watch(ranks, timeout, startup_timeout):
    """Until all have ended: None; or what went wrong with the first that did."""
    now = time.monotonic()
    while True:
        before, now = now, time.monotonic()
        running = [rank for rank in ranks if rank.process.poll() is None]
        for rank in ranks:
            rank.look(min(now - before, _LONGEST))
            code = rank.process.returncode
            if code:
                how = "was killed by signal {}".format(-code) if code < 0 else "exited with code {}".format(code)
                return "rank {} {} {}".format(rank.rank, how, rank.last())
        for rank in running:
            limit = startup_timeout if rank.step is None else timeout
            if rank.waited > limit:
                return "rank {} has made no progress for {:g} s {}".format(rank.rank, limit, rank.last())
        if not running:
            return None
        time.sleep(_POLL)


def _end(ranks):
    for number in (signal.SIGTERM, signal.SIGKILL):
        for rank in ranks:
            if rank.process.poll() is None:
                rank.signal(number)
        limit = time.monotonic() + _GRACE
        while time.monotonic() < limit and any(rank.process.poll() is None for rank in ranks):
            time.sleep(_POLL)
    for rank in ranks:
        rank.process.wait()
        rank.signal(signal.SIGKILL)  # children that outlived it
        rank.reader.join(_GRACE)
        rank.process.stdout.close()
