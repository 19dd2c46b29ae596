"""Context parallelism in MindSpore: one process, messages that cannot block, and 2 and 4 processes under msrun."""

import inspect
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.ranks import CASES, CELLS, OTHERS, SLOW_CASES, D

from flash_attention.core.errors import UnsupportedError
from flash_attention.nn import DilatedAttention, FlashAttention, RingAttention, UlyssesAttention
from flash_attention.ops.collectives import ALONE, choose, current_group, device, gathered

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
SCRIPT = Path(__file__).resolve().parents[3] / "support" / "ranks.py"


def run(processes, how, names, folder):
    """{rank: {case: [(what, error, largest value)]}} of support/ranks.py in so many processes."""
    if shutil.which("msrun") is None and not Path(sys.executable).with_name("msrun").exists():
        pytest.skip("this MindSpore has no msrun")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    variables = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), GLOG_v="3")
    variables["PATH"] = os.path.dirname(sys.executable) + os.pathsep + variables["PATH"]  # msrun starts `python`
    for name in ("MS_NODE_TIMEOUT", "MS_TOPO_TIMEOUT", "MS_RECEIVE_MSG_TIMEOUT"):
        variables[name] = "600"  # a loaded computer is slow, not dead
    words = ["msrun", "--worker_num={}".format(processes), "--local_worker_num={}".format(processes)]
    words += ["--master_port={}".format(port), "--log_dir={}".format(folder / "log"), "--join=True"]
    words += [str(SCRIPT), str(folder), how] + list(names)
    done = subprocess.run(
        words, env=variables, timeout=900, cwd=str(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")[-3000:]
    return {rank: json.loads((folder / "{}.json".format(rank)).read_text()) for rank in range(processes)}


def assert_equal(found, names):
    for rank, cases in found.items():
        assert set(cases) == set(names)
        for name, results in cases.items():
            tolerance = 2.0**-8 if "fp16" in name else 2e-5
            for what, error, largest in results:
                message = "{}, rank {}, {}: error {:.3g} of {:.3g}".format(name, rank, what, error, largest)
                assert error <= tolerance * max(1.0, largest), message


# In a graph each case is compiled by every rank: few of them a test, on four ranks those that two cannot show.
RUNS = {
    "2, graph, ring and Ulysses": list(CASES),
    "2, graph, collectives": ["collectives", "dilated, both ways"],
    "2, graph, dilated": ["dilated, causal, mixture", "dilated, xPos"],
    "2, graph, dilated layer": ["dilated layer"],
    "2, pynative, all": list(CASES) + list(OTHERS),
    "4, graph, collectives": ["collectives"],
    "4, graph, zig-zag": ["ring, causal, ALiBi, dropout"],
    "4, graph, hops both ways": ["ring, window across borders"],
    "4, graph, gathered kv heads": ["ulysses, gathered kv heads"],
    "4, graph, members of a segment": ["dilated, causal, mixture"],
    "4, pynative, collectives and dilated": list(OTHERS),
    "4, pynative, ring and Ulysses": list(CASES),
    "4, pynative, ring": [name for name in SLOW_CASES if name.startswith("ring")],
    "4, pynative, Ulysses": [name for name in SLOW_CASES if name.startswith("ulysses")],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_processes_equal_one(name, tmp_path):
    processes, how, _ = name.split(", ", 2)
    assert_equal(run(int(processes), how, RUNS[name], tmp_path), RUNS[name])


def test_every_case_is_run_on_two_and_four():
    everything = set(CASES) | set(OTHERS)
    for processes, how, wanted in (
        ("2", "graph", everything),
        ("2", "pynative", everything),
        ("4", "pynative", everything | set(SLOW_CASES)),
    ):
        found = [set(names) for name, names in RUNS.items() if name.split(", ")[:2] == [processes, how]]
        assert set().union(*found) == wanted


# --- one process ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ring", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_one_process_is_flash_attention(name):
    options = {"causal": True, "alibi": True, "dropout_rate": 0.3, "return_lse": True}
    x = Tensor(np.random.default_rng(0).standard_normal((2, 4, 20, D)).astype(np.float32))
    mask = Tensor((np.random.default_rng(1).random((2, 1, 20, 20)) < 0.3).astype(np.uint8))
    found = CELLS[name](D, **options).set_train()(x, x, x, mask, 5)
    want = FlashAttention(D, **options).set_train()(x, x, x, mask, dropout_seed=5)
    for got, wanted in zip(found, want):
        np.testing.assert_array_equal(got.asnumpy(), wanted.asnumpy())


BAD = {
    "For 'RingAttention', 'query' must be of head_dim 8, but got 4": lambda x: RingAttention(8)(x, x, x),
    "For 'UlyssesAttention', 'dropout_rate' must be a float in": lambda x: UlyssesAttention(4, 1.5),
    "For 'RingAttention', 'mask' must be of rank 4": lambda x: RingAttention(4)(x, x, x, x[0, 0]),
    "For 'RingAttention', 'query' must be a Tensor, but got int": lambda x: RingAttention(4)(1, x, x),
    "For 'RingAttention', 'attention_mask' must be a Tensor": lambda x: RingAttention(4)(x, x, x, 1),
    "For 'collectives', 'group' must be None before communication is": lambda x: RingAttention(4, group="a")(x, x, x),
    "must be None or one of device, gathered": lambda x: choose("nccl"),
    "For 'DilatedAttention', 'group' must be None with Distributed=False": lambda x: DilatedAttention(8, 2, group="a"),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message](Tensor(np.ones((1, 2, 6, 4), np.float32)))


def test_an_engine_that_refuses_says_why():
    x = Tensor(np.ones((1, 2, 6, 4), np.float32))
    with pytest.raises(UnsupportedError, match="For 'RingAttention' .engine 'tik'."):
        RingAttention(4, engine="tik")(x, x, x)


@pytest.mark.slow
def test_dilated_layer_alone_ignores_the_flag():
    x = Tensor(np.random.default_rng(0).standard_normal((2, 20, 8)).astype(np.float32))
    np.random.seed(0)
    one = DilatedAttention(8, 2, (1, 2), (4, 8), Distributed=True)(x)
    np.random.seed(0)
    np.testing.assert_array_equal(one.asnumpy(), DilatedAttention(8, 2, (1, 2), (4, 8))(x).asnumpy())


# --- messages ---------------------------------------------------------------------------------------
def test_back_ends_are_alike():
    assert choose() is gathered and choose("device") is device and current_group() is ALONE
    for name in ("Permute", "AllToAll", "AllGather", "ReduceScatter"):
        ours, theirs = (inspect.signature(getattr(each, name)) for each in (gathered, device))
        assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_no_permutation_blocks(size):
    """Every permutation ends when a Send lasts until its peer receives, in the order that ``device`` chooses."""
    for targets in itertools.permutations(range(size)):
        moving = [rank for rank in range(size) if targets[rank] != rank]
        steps = {rank: ["send", "receive"] for rank in moving}
        for rank in moving:
            if device.receives_first(targets, rank):
                steps[rank].reverse()
        while any(steps.values()):
            ready = [r for r in moving if steps[r][:1] == ["send"] and steps[targets[r]][:1] == ["receive"]]
            assert ready, "all wait for each other: {}".format(targets)
            for rank in ready:
                steps[rank].pop(0)
                steps[targets[rank]].pop(0)


def test_device_operators_are_built_as_the_plan_says(monkeypatch):
    """What the 'device' back end gives to MindSpore; the operators themselves are not run on device."""
    built = []

    class Operator:
        def __init__(self, *arguments, **keywords):
            built.append(arguments + tuple(keywords.values()))

    for name in ("Send", "Receive", "AlltoAll", "AllGather", "ReduceScatter"):
        monkeypatch.setattr(device.ops, name, Operator)
    group = ALONE._replace(rank=1, size=4, name="g")
    device.Permute(group, (1, 2, 3, 0), (2, 4), ms.float16)
    (tag, target, name), (same, source, shape, dtype, other) = built[:2]
    assert (target, source, shape, dtype) == (2, 0, [2, 4], ms.float16) and tag == same and name == other == "g"
    assert [x[1] for x in built[2:]] == [0, 2], "the gradient travels back"
    device.AllToAll(group, 1, 2)
    assert built[4:] == [(4, 1, 2, "g"), (4, 2, 1, "g")]
