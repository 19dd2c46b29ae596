"""`python -m flash_attention launch`: exit codes, a process that dies, one that hangs, and real JAX processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flash_attention.tools import launch

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
PROCESSES = Path(__file__).resolve().parents[3] / "support" / "processes.py"

# Every script starts like this: it knows its rank, leaves its process id behind, and waits for the two others.
HEAD = """
import glob, os, sys, time
from flash_attention.tools.launch import progress
rank = int(os.environ["FLASH_LAUNCH_RANK"])
with open(os.path.join(sys.argv[1], "pid%d" % rank), "w") as stream:
    stream.write(str(os.getpid()))
while len(glob.glob(os.path.join(sys.argv[1], "pid*"))) < 3:
    time.sleep(0.05)
def steps():
    for step in range(600):
        progress(step)
        time.sleep(0.1)
"""
FINE = "print('rank', rank, 'of', os.environ['FLASH_LAUNCH_SIZE'], sys.argv[2:])\nprogress(1)\n"
DIES = "if rank == 1:\n    progress('17')\n    time.sleep(1)\n    sys.exit(3)\nsteps()\n"
KILLED = "if rank == 0:\n    progress(4)\n    time.sleep(1)\n    os.kill(os.getpid(), 9)\nsteps()\n"
HANGS = "if rank == 2:\n    progress('23')\n    time.sleep(600)\nsteps()\n"
NEVER_STARTS = "if rank == 1:\n    time.sleep(600)\nsteps()\n"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
DEAF += "if rank == 1:\n    time.sleep(1)\n    sys.exit(5)\nsteps()\n"


def command(*words):
    return [sys.executable, "-m", "flash_attention", "launch"] + [str(word) for word in words]


def environment():
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))


def start(folder, body, *options):
    """(exit code, stdout, stderr) of a launch of three processes."""
    script = folder / "script.py"
    script.write_text(HEAD + body)
    done = subprocess.run(
        command("-n", 3, *options, script, folder, "--flag"), env=environment(), timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def assert_all_gone(folder):
    for rank in range(3):
        pid = int((folder / "pid{}".format(rank)).read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_outputs_are_marked_and_success_is_zero(tmp_path):
    code, output, errors = start(tmp_path, FINE)
    assert code == 0 and errors == ""
    assert sorted(output.splitlines()) == ["[{0}] rank {0} of 3 ['--flag']".format(rank) for rank in range(3)]


@pytest.mark.parametrize(
    "body, options, message",
    [
        (DIES, (), "rank 1 exited with code 3 after step 17; the others were ended"),
        (KILLED, (), "rank 0 was killed by signal 9 after step 4; the others were ended"),
        (HANGS, ("--timeout", 2), "rank 2 has made no progress for 2 s after step 23; the others were ended"),
        (NEVER_STARTS, ("--startup-timeout", 3), "rank 1 has made no progress for 3 s before its first step"),
        (DEAF, (), "rank 1 exited with code 5 before its first step; the others were ended"),
    ],
    ids=["dies", "killed", "hangs", "never starts", "ignores SIGTERM"],
)
def test_one_ends_all(tmp_path, body, options, message):
    code, _, errors = start(tmp_path, body, *options)
    assert code == 1 and message in errors
    assert_all_gone(tmp_path)


def test_ending_the_launcher_ends_the_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HEAD + "steps()\n")
    process = subprocess.Popen(command("-n", 3, script, tmp_path), env=environment(), stdout=subprocess.DEVNULL)
    limit = time.time() + 60
    while len(list(tmp_path.glob("pid*"))) < 3 and time.time() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert_all_gone(tmp_path)


@pytest.mark.parametrize("words", [("-n", 0, "script.py"), ("-n", 1, "--timeout", 0, "x.py"), ("-n", 1, "absent.py")])
def test_bad_arguments(words):
    done = subprocess.run(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60
    )
    assert done.returncode == 2 and b"launch" in done.stderr


def test_progress_outside_of_the_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv(launch.PROGRESS, raising=False)
    launch.progress(1)
    monkeypatch.setenv(launch.PROGRESS, str(tmp_path / "0"))
    launch.progress(2)
    assert [path.name for path in tmp_path.iterdir()] == ["0"] and (tmp_path / "0").read_text() == "2"


def test_collective_flags_are_those_that_this_jaxlib_knows(monkeypatch):
    flags = launch.collective_flags(77)
    assert all(flag.startswith("--xla_cpu_collective_") for flag in flags.split())
    monkeypatch.setattr(launch, "_known", lambda name: "terminate" in name)
    assert launch.collective_flags(77) == "--xla_cpu_collective_call_terminate_timeout_seconds=77"


def run_jax(processes):
    words = command("-n", processes, "--timeout", 300, PROCESSES)
    variables = dict(environment(), JAX_PLATFORMS="cpu")
    done = subprocess.run(words, env=variables, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, output[-3000:] + done.stderr.decode("utf-8", "replace")
    for rank in range(processes):
        for name in ("ring", "window", "ulysses"):
            assert "[{0}] {1} {0} equal".format(rank, name) in output


def test_two_jax_processes():
    pytest.importorskip("jax")
    run_jax(2)


@pytest.mark.slow
def test_four_jax_processes():
    pytest.importorskip("jax")
    run_jax(4)
