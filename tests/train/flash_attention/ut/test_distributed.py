"""Attention over a mesh of 8 forced CPU devices equals one device's, and sends what the formulas say, no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.many_devices import DILATED, EQUAL, SLOW_DILATED, SLOW_EQUAL, VOLUMES

from flash_attention.core.errors import UnsupportedError
from flash_attention.core.ranges import visible
from flash_attention.core.spec import AttentionSpec
from flash_attention.jax.distributed import Axes, attention, make_mesh
from flash_attention.jax.distributed.plan import make_plan
from flash_attention.tools.launch import collective_flags

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
SCRIPT = Path(__file__).resolve().parents[3] / "support" / "many_devices.py"


def run(words, timeout=800):
    """{word: result} of support/many_devices.py in a process with 8 devices."""
    flags = "--xla_force_host_platform_device_count=8 " + collective_flags()
    environment = dict(
        os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join(filter(None, sys.path))
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT)] + words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-3000:]
    results = {}
    for line in done.stdout.decode("utf-8").splitlines():
        results.update(json.loads(line))
    return dict(results, log=done.stderr.decode("utf-8", "replace"))


FAST_VOLUMES = ("ring, causal", "ring, window")


@pytest.fixture(scope="module")
def fast():
    """All fast cases in one process, compiled quickly."""
    words = ["equal:" + name for name in EQUAL] + ["volumes:" + name for name in FAST_VOLUMES]
    words += ["dilated:" + name for name in DILATED]
    return run(["quickly"] + words)


def assert_equal(results, tolerance=2e-5):
    assert {"out", "lse", "query", "key", "value"} <= {what for what, _, _ in results}
    for what, error, largest in results:
        assert error <= tolerance * max(1.0, largest), "{}: error {:.3g}, largest value {:.3g}".format(
            what, error, largest
        )


@pytest.mark.parametrize("name", EQUAL)
def test_equals_one_device(fast, name):
    assert_equal(fast["equal:" + name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_EQUAL)
def test_equals_one_device_slow(name):
    tolerance = 2.0**-6 if "bf16" in name else 2e-5
    assert_equal(run(["quickly", "equal:" + name])["equal:" + name], tolerance)


def assert_close(results):
    for what, error, largest in results:
        assert error <= 2e-5 * max(1.0, largest), "{}: {:.3g} of {:.3g}".format(what, error, largest)


@pytest.mark.parametrize("name", DILATED)
def test_dilated_attention_equals_one_device(fast, name):
    assert_close(fast["dilated:" + name])


@pytest.mark.slow
def test_dilated_attention_equals_one_device_slow():
    found = run(["quickly", "dilated_layer"] + ["dilated:" + name for name in SLOW_DILATED])
    for name in SLOW_DILATED:
        assert_close(found["dilated:" + name])
    assert len(found["dilated_layer"]) == 10
    assert_close(found["dilated_layer"])


@pytest.mark.slow
def test_dilated_attention_gathers_what_is_kept():
    found = run(["dilated_volume"])["dilated_volume"]
    # Kept tokens of a device (64 / rate), and as many from each other member: keys and values, 32 heads of 8 floats.
    for shared in (2, 4, 8):
        kept = 64 // (4 * shared)
        assert found[str(shared)] == {"all-gather": 2 * kept * (shared - 1) * 32 * 8 * 4}


def test_replication_is_said(fast):
    assert "2 kv heads do not divide by tp = 4: replicated" in fast["log"]
    assert "batch 1 is not split by all of ('fsdp', 'dp')" not in fast["log"]  # that mesh does not split the batch


def assert_volume(found):
    assert sum(found["forward"].values()) == found["forward formula"]
    if "both" in found:
        # These hops are unrolled to be counted; XLA may then keep the keys that have travelled forward.
        assert sum(found["both"].values()) in (found["both formula"], found["keys kept"])


@pytest.mark.parametrize("name", FAST_VOLUMES)
def test_volume_equals_the_formula(fast, name):
    assert_volume(fast["volumes:" + name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VOLUMES if name not in FAST_VOLUMES])
def test_volume_equals_the_formula_slow(name):
    assert_volume(run(["quickly", "volumes:" + name])["volumes:" + name])


def test_hops_outside_the_window_are_absent(fast):
    # 256 tokens on 8 devices: 40 to the left are 2 groups of 32, 10 to the right one.
    window = fast["volumes:ring, window"]
    assert window["hops"] == [[1, 2], [-1, 1]] and not window["zigzag"]
    one_hop = 2 * 4 * 8 * 32 * 4  # keys and values: heads, head_dim, tokens of a device, bytes
    assert window["forward"] == {"collective-permute": 3 * one_hop}
    causal = fast["volumes:ring, causal"]
    assert causal["hops"] == [[1, 7]] and causal["zigzag"]


@pytest.mark.slow
def test_documented_example():
    errors = run(["example"])["example"]
    assert {"vanilla", "flash_attn2", "ring", "ulysses", "blockwise", "local", "triangle"} < set(errors)
    assert max(errors.values()) < 5e-6


@pytest.mark.slow
def test_mechanisms_over_heads_and_sequence():
    errors = run(["quickly", "module"])["module"]
    assert len(errors) == 10 and max(errors.values()) < 5e-6


@pytest.mark.slow
def test_documented_example_at_its_size():
    assert run(["large"])["large"] <= 2e9


@pytest.mark.slow
def test_memory_falls_with_the_devices():
    found = run(["memory"])["memory"]
    assert found["8"] <= found["2"] / 3


@pytest.mark.slow
def test_a_million_tokens():
    found = run(["million"], timeout=850)["million"]
    assert found["finite"] and max(found["errors"]) < 1e-3


# --- plans ----------------------------------------------------------------------------------------
class FakeMesh:
    """What a plan reads of a mesh."""

    def __init__(self, **shape):
        self.shape = shape


def plan_of(spec, strategy=None, ulysses=None, **shape):
    return make_plan("test", spec, FakeMesh(**shape), Axes(), strategy, ulysses)


def causal_spec(length=1000, **fields):
    return AttentionSpec(**dict(dict(batch=1, heads=8, kv_heads=8, q_len=length, kv_len=length, head_dim=64), **fields))


def test_zigzag_balances_the_work():
    """Visible pairs a group, counted one by one: within 5% of each other (contiguous shards: a factor of 15)."""
    spec = causal_spec(1024, causal=True)
    plan = plan_of(spec, "ring", sp=8)
    seen = visible(spec.band, np.arange(1024)[:, None], np.arange(1024)[None, :]).sum(1)
    loads = [
        sum(seen[start : start + plan.q_chunk].sum() for start in plan.starts(group, plan.q_chunk))
        for group in range(8)
    ]
    assert plan.zigzag and max(loads) <= 1.05 * min(loads) and sum(loads) == seen.sum()


@pytest.mark.parametrize("window", [(0, 0), (100, 0), (130, 5), (0, 400), (900, 900), (None, 10)])
@pytest.mark.parametrize("lengths", [(1000, 1000), (300, 1000), (1000, 300)])
def test_hops_reach_every_visible_key_and_no_further(lengths, window):
    spec = causal_spec(q_len=lengths[0], kv_len=lengths[1], local_window_size=window)
    plan = plan_of(spec, "ring", sp=8)
    if plan.zigzag:
        assert plan.full_turn
        return
    position = np.arange(lengths[0])[:, None] + spec.offset
    queries, keys = np.nonzero(visible(spec.band, position, np.arange(lengths[1])[None, :]))
    distance = queries // plan.q_chunk - keys // plan.kv_chunk
    up, down = max(distance.max(), 0), max(-distance.min(), 0)
    padded = 1 if plan.q_pad else 0  # padding counts as queries
    if plan.full_turn:
        assert up + down + 2 * padded >= 7
    else:
        reach = dict(plan.hops)
        assert up <= reach.get(1, 0) <= up + padded and down <= reach.get(-1, 0) <= down + padded


def test_automatic_choice():
    assert plan_of(causal_spec(), sp=1).strategy == "local"
    assert plan_of(causal_spec(q_len=1), sp=8).strategy == "merge"
    assert plan_of(causal_spec(64), sp=8).strategy in ("gather", "ulysses")  # few bytes: few messages win
    long = causal_spec(2**20, kv_heads=1, heads=1, causal=True, local_window_size=(1024, 0))
    assert plan_of(long, sp=8).strategy == "ring"
    assert plan_of(causal_spec(2**16, heads=64, kv_heads=64), sp=8).strategy == "ulysses"


def test_axes_that_do_not_divide_are_replicated():
    plan = plan_of(causal_spec(batch=1, heads=6, kv_heads=3), dp=1, fsdp=4, tp=2, sp=2)
    assert plan.batch is None and plan.batch_parts == 1
    assert plan.heads == "tp" and plan.kv_heads is None and plan.local_kv_heads == 3
    assert any("batch 1 is not split" in note for note in plan.notes)
    assert any("3 kv heads do not divide by tp = 2" in note for note in plan.notes)
    assert "a device sends" in str(plan)
    odd = plan_of(causal_spec(heads=7, kv_heads=7), tp=2, sp=2)
    assert odd.heads is None and any("heads 7 is not split" in note for note in odd.notes)


REFUSED = {
    "'heads' must be a multiple of 8 on a device": ({"strategy": "ulysses"}, {"heads": 4, "kv_heads": 4}),
    "'ulysses' must be a divisor of the 8 devices": ({"strategy": "ring+ulysses", "ulysses": 3}, {}),
    "'ulysses' must be given with strategy='ring.ulysses'": ({"strategy": "ring", "ulysses": 2}, {}),
    "'strategy' must be None or one of 'ring'": ({"strategy": "rings"}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    options, fields = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        plan_of(causal_spec(**fields), sp=8, **options)


def test_float64_is_refused_with_the_engines_reason():
    x = jnp.zeros((1, 4, 1, 4), jnp.float32)
    mesh = make_mesh((1, 1, 1, -1), devices=jax.devices()[:1])
    assert attention(x, x, x, mesh=mesh).shape == x.shape
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:
        from jax.experimental import enable_x64

        context = enable_x64()
    with context, pytest.raises(UnsupportedError, match="'dtype' must be float16, bfloat16 or float32"):
        attention(*[jnp.zeros((1, 4, 1, 4), jnp.float64)] * 3, mesh=mesh)
