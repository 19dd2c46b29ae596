"""Asks workers in turn: interleaved timing, peak memory and compile time of fresh processes.

Why processes: the thread pools of MindSpore, JAX and torch fight over the cores, and MindSpore's launcher thread spins
even when idle. Each framework therefore lives in a child of its own that is stopped (SIGSTOP) whenever it is not asked.
Rounds interleave the candidates and start with another one each time, so that a slow minute hits all of them;
ratios are medians of the ratios within a round.
"""

import atexit
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile

from flash_attention.tools.bench.distance import Cores
from flash_attention.tools.machine import installed

_SHORT_CALL = 0.05  # seconds; shorter calls are repeated within a turn until they fill this
_ENVIRONMENT = {
    "GLOG_v": "3",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
}
LIMIT = 300.0  # seconds one command may take
START_LIMIT = 120.0


class Failed(Exception):
    """A candidate could not be measured; the text says why and goes into the table."""


class WorkerDied(Failed):
    """The process ended or hung: everything prepared in it is lost."""


class Worker:
    """A child process of one framework, stopped between commands."""

    def __init__(self, framework):
        if not installed(framework.partition("/")[0]):
            raise Failed("not installed")
        self.framework = framework
        self.log = tempfile.TemporaryFile()
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flash_attention.tools.bench.worker", framework],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=dict({**_ENVIRONMENT, **os.environ}, PYTHONPATH=path),
        )
        atexit.register(self.close)
        self._read(START_LIMIT)
        self._signal(signal.SIGSTOP)

    def ask(self, command, limit=LIMIT, **fields):
        """Send a command, wait for its answer.

        Raises:
            Failed: the candidate refuses or raised. WorkerDied: the process ended, or took longer than ``limit``.
        """
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write((json.dumps(dict(fields, command=command)) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            raise self._died("ended") from None
        answer = self._read(limit)
        self._signal(signal.SIGSTOP)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def close(self):
        """End the process."""
        atexit.unregister(self.close)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            try:
                stream.close()
            except OSError:  # unsent bytes of a process that is gone
                pass

    def _signal(self, number):
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def _read(self, limit):
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        if not ready:
            raise self._died("took longer than {:.0f} s".format(limit))
        line = self.process.stdout.readline()
        if not line:
            raise self._died("ended")
        return json.loads(line.decode())

    def _died(self, how):
        self.process.kill()
        code = self.process.wait()
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 2000))
        last = self.log.read().decode(errors="replace").strip().split("\n")[-1]
        self.close()
        detail = " (exit {}) {}".format(code, last[:200]).rstrip() if how == "ended" else ""
        return WorkerDied("the {} process {}{}".format(self.framework, how, detail))


class Pool:
    """One living worker a framework, started when first needed."""

    def __init__(self):
        self.workers = {}

    def get(self, framework):
        """The worker of ``framework``; a dead one is replaced."""
        worker = self.workers.get(framework)
        if worker is None or worker.process.poll() is not None:
            worker = self.workers[framework] = Worker(framework)
        return worker

    def forget(self):
        """Free the tensors of all workers."""
        for worker in self.workers.values():
            if worker.process.poll() is None:
                worker.ask("forget")

    def close(self):
        """End all workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def time_job(pool, job, budget=8.0, most_rounds=15, cores=None):
    """Time the entries of a job in interleaved rounds.

    Args:
        pool: :class:`Pool`; job: :class:`~flash_attention.tools.bench.registry.Job`.
        budget: seconds the rounds should take; at least 3 rounds are run, 1 where a round takes over 60 s.
        cores: :class:`~flash_attention.tools.bench.distance.Cores`: rounds in which they are far apart are repeated.

    Returns:
        ``{label: {"median_s", "times", "first_s", "error", "far_rounds"} or {"failed"}}``; ``far_rounds`` of the times
        were measured while the cores were far apart, because there were too few others.
    """
    failed = {}
    while True:
        try:
            return dict(_interleaved(pool, job, failed, budget, most_rounds, cores or Cores(lambda: None)), **failed)
        except _EntryDied as death:  # the others of that process are prepared again, without this one
            failed[death.label] = {"failed": str(death)}
        finally:
            pool.forget()


class _EntryDied(Exception):
    def __init__(self, label, text):
        super().__init__(text)
        self.label = label


def _ask(pool, entry, command, **fields):
    try:
        return pool.get(entry.framework).ask(command, key=entry.label, **fields)
    except WorkerDied as death:
        raise _EntryDied(entry.label, str(death)) from death


def _interleaved(pool, job, failed, budget, most_rounds, cores):
    found = {}
    for entry in job.entries:
        if entry.label not in failed:
            try:
                found[entry.label] = _ask(pool, entry, "prepare", **entry.fields(job.direction))
            except Failed as reason:
                failed[entry.label] = {"failed": str(reason)}
    entries = [entry for entry in job.entries if entry.label in found]
    rounds, far = _rounds(pool, entries, found, _round_count(found, budget, most_rounds), cores)
    for entry in entries:
        result = found[entry.label]
        result.pop("second_s")
        times = [times[entry.label] for times in rounds]
        result.update(median_s=median(times), times=[float("%.5g" % t) for t in times], far_rounds=far)
        try:
            result.update(_ask(pool, entry, "error"))
        except Failed as reason:
            result["error_failed"] = str(reason)
    return found


def _round_count(found, budget, most_rounds):
    one_round = sum(max(x["second_s"], _SHORT_CALL) for x in found.values())
    return 1 if one_round > 60 else int(min(most_rounds, max(3, budget / max(one_round, 1e-6))))


def _rounds(pool, entries, found, count, cores):
    """``count`` rounds ``{label: seconds}``, each beginning with another entry, and how many of them were far.

    A round is far when the cores were far apart before or after it. Twice as many rounds are run at most; far ones
    count only where fewer than three (or ``count``) others remain.
    """
    repeats = {label: int(math.ceil(_SHORT_CALL / max(x["second_s"], 1e-6))) for label, x in found.items()}
    near, far = [], []
    while entries and len(near) < count and len(near) + len(far) < 2 * count:
        turn = (len(near) + len(far)) % len(entries)
        was_near = cores.wait()
        times = {
            entry.label: _ask(pool, entry, "time", repeats=repeats[entry.label])["seconds"]
            for entry in entries[turn:] + entries[:turn]
        }
        (near if was_near and cores.near() else far).append(times)
    missing = max(0, min(3, count) - len(near))
    return near + far[:missing], len(far[:missing])


def fresh_job(job, command):
    """Ask ``command`` ('memory' or 'compile') of each entry in a process of its own."""
    found = {}
    for entry in job.entries:
        worker = None
        try:
            worker = Worker(entry.framework)
            found[entry.label] = worker.ask(command, **entry.fields(job.direction))
        except Failed as reason:
            found[entry.label] = {"failed": str(reason)}
        finally:
            if worker is not None:
                worker.close()
    return found


def median(values):
    """Middle value; mean of the two middle ones of an even number."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else 0.5 * (ordered[middle - 1] + ordered[middle])


def ratio(times, base_times):
    """Median over rounds of (time / base time of the same round)."""
    return median([a / b for a, b in zip(times, base_times)])
