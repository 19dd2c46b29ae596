"""Large calls, each in a process of its own: peak memory of the documented example, and growth up to 65,536 tokens."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import support.large

pytestmark = [pytest.mark.slow, pytest.mark.level1, pytest.mark.platform_x86_cpu]
ENGINES = {"jax": "jax", "mindspore:portable": "mindspore", "mindspore:jax": "mindspore"}  # engine -> framework


def measure(engine, *what):
    """Peak memory in bytes of `support/large.py` for one call."""
    framework = ENGINES[engine]
    for module in {framework, "jax"} if "jax" in engine else {framework}:
        if importlib.util.find_spec(module) is None:
            pytest.skip("needs {}".format(module))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), GLOG_v="3")
    command = [sys.executable, support.large.__file__, engine] + [str(word) for word in what]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=900)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    result = json.loads(done.stdout.decode().splitlines()[-1])
    assert result["finite"]
    return result["peak"]


@pytest.mark.parametrize("engine", ENGINES)
def test_documented_example(engine, figure):
    """(2, 16, 4096, 128), window 7 and 0, dropout 0.1, compact mask, forward and backward: under 4 GB."""
    figure("documented example, peak memory, {}".format(engine), measure(engine, "documented") / 2**30, 4.0, "GiB")


@pytest.mark.parametrize("engine", ENGINES)
def test_65536_tokens(engine, figure):
    """Forward and backward with 8 blocks to each side; memory grows linearly."""
    short, middle, full = (measure(engine, "long", length) for length in (16384, 32768, 65536))
    per_token = (full - middle) / 32768
    figure("S = 65,536, peak memory, {}".format(engine), full / 2**30, 4.0, "GiB")
    figure("memory of a token (D = 64, fp32, forward + backward), {}".format(engine), per_token, 65536, "bytes")
    # Twice the tokens, at most twice the growth (allocators round up).
    figure(
        "growth of memory, 32K-64K over 16K-32K, {}".format(engine),
        (full - middle) / max(middle - short, 2**24),
        3.0,
        "x",
    )
