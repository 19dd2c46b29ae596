"""dp and mp of engine 'tik': devices' shares, put together, are the whole call; and what MindSpore is told of them."""

import itertools
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.ascend_entry import SPECS, make_tensors
from support.tik_route import SimulatedKernel

from flash_attention.ascend import simulated
from flash_attention.ascend.entry.request import FORWARD, KernelRequest
from flash_attention.core.sharding import share
from flash_attention.nn.layer.flash_attention import FlashAttention
from flash_attention.ops import autograd
from flash_attention.ops.host import HostFunction
from flash_attention.ops.tik import custom, sharding
from flash_attention.ops.tik import engine as tik_engine
from flash_attention.ops.tik.engine import Backward, Forward, TikEngine, requests

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
SPEC = replace(SPECS["everything"], kv_heads=2)  # batch 2, two heads
SHARDS = (2, 2)


class Devices:
    """A kernel on dp x mp devices: each gets the slices of its inputs that the strategy says, one after the other."""

    def __init__(self, part, whole):
        self.kernel = SimulatedKernel(part)
        self.inputs, self.outputs = whole.signature()

    def __call__(self, *arrays):
        results = [np.zeros(custom.framework_shape(x), x.dtype) for x in self.outputs]
        for device in itertools.product(*map(range, SHARDS)):
            given = [x[self.slices(argument, device)] for argument, x in zip(self.inputs, arrays)]
            for argument, result, x in zip(self.outputs, results, self.kernel(*map(np.ascontiguousarray, given))):
                result[self.slices(argument, device)] = x
        return tuple(results)

    @staticmethod
    def slices(argument, device):
        """The part of an argument that ``device`` (number along dp, number along mp) has."""
        shape, parts = custom.framework_shape(argument), sharding.strategy(argument, *SHARDS)
        numbers = tuple(device) + (0,) * len(shape)
        return tuple(
            slice(number * (size // count), (number + 1) * (size // count)) if count > 1 else slice(None)
            for size, count, number in zip(shape, parts, numbers)
        )


def on_devices(part, whole):
    shapes, dtypes = custom.infer_functions(part, whole)
    return HostFunction(Devices(part, whole), len(whole.signature()[0]), shapes, dtypes)


def test_shares_make_the_whole_call():
    (query, key, value), operands, (d_out, d_lse) = make_tensors(SPEC)
    inputs = [None if x is None else Tensor(x) for x in (query, key, value) + operands[:10]]
    out, lse = Forward(SPEC, on_devices, SHARDS)(*inputs)
    want = simulated.forward(SPEC, query, key, value, operands)
    np.testing.assert_array_equal(out.asnumpy(), want[0])
    np.testing.assert_array_equal(lse.asnumpy(), want[1])
    grads = Backward(SPEC, on_devices, SHARDS)(*inputs, *map(Tensor, want + (d_out, d_lse)))
    wanted = simulated.backward(SPEC, (query, key, value, operands) + want, (d_out, d_lse))
    for got, grad in zip(grads[:5], wanted):
        np.testing.assert_allclose(got.asnumpy(), grad, rtol=4e-3, atol=2e-3 * np.abs(grad).max())


def test_operator_is_described_as_split():
    part, whole = requests(FORWARD, SPEC, SHARDS)
    operator = sharding.split(custom.custom_operator(part, whole), whole, *SHARDS)
    attributes = operator.get_attr_dict()
    assert KernelRequest.from_json(attributes["request"]).geometry.spec == share(SPEC, *SHARDS)
    assert attributes["dev_matrix_shape"] == [2, 2]
    maps = dict(zip(attributes["input_names"], attributes["inputs_tensor_map"]))
    assert maps["query"] == maps["key"] == [1, 0, -1, -1]
    assert maps["mask"][:2] == [1, -1] and maps["bias"][:2] == [-1, 0] and maps["slopes"][:2] == [1, 0]
    assert maps["tasks"] == maps["cores"] == maps["bounds"] == [-1, -1]
    assert attributes["outputs_tensor_map"] == [[1, 0, -1, -1], [1, 0, -1]]
    assert attributes["in_strategy"][0] == (2, 2, 1, 1)
    shapes, _ = custom.infer_functions(part, whole)
    assert shapes((2, 2, 40, 24))[1] == (2, 2, 48) and shapes((1, 1, 40, 24))[1] == (1, 1, 48)


def test_split_only_where_mindspore_heeds_it(monkeypatch):
    """Stand-alone runs compute the same whatever dp and mp are."""
    built = []
    monkeypatch.setattr(tik_engine, "Forward", lambda spec, operator, shards=(1, 1): built.append(shards))
    monkeypatch.setattr(tik_engine, "Backward", lambda spec, operator, shards=(1, 1): None)
    monkeypatch.setattr(tik_engine, "AttentionCell", lambda forward, backward: "split")
    monkeypatch.setattr(autograd, "AttentionCell", lambda forward, backward: "whole")
    engine = TikEngine(on_devices)
    assert engine.cell(SPEC, SHARDS) == engine.cell(SPEC) == "whole" and built == [(1, 1)]
    monkeypatch.setattr(ms, "get_auto_parallel_context", lambda name: "semi_auto_parallel")
    assert engine.cell(SPEC, SHARDS) == engine.cell(SPEC, SHARDS) == "split" and built == [(1, 1), SHARDS]
    assert engine.cell(SPEC) == "whole"


def test_the_cell_hands_dp_and_mp_on(monkeypatch):
    seen = []
    original = autograd.DifferentiableEngine.cell

    def cell(self, spec, shards=(1, 1)):
        seen.append(shards)
        return original(self, spec, shards)

    monkeypatch.setattr(autograd.DifferentiableEngine, "cell", cell)
    x = Tensor(np.ones((2, 2, 8, 16), np.float32))
    FlashAttention(16, dp=2, mp=1, engine="portable")(x, x, x)
    FlashAttention(16, engine="portable").shard(((1, 2, 1, 1),) * 3)(x, x, x)
    assert seen == [(2, 1), (1, 2)]
