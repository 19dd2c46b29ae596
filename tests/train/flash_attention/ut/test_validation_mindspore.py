"""Bad arguments of the MindSpore function and Cell: the exact type and the whole message (support/bad_calls.py).

PyNative mode, graph mode, `ms.jit`, and the Cell nested in another one: `str(exception)` is our message in all of
them.
"""

import importlib.util

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support.bad_calls import CELL, CONSTRUCTOR, FUNCTION, PLAIN, cell_tensors, function_tensors, refused

from flash_attention.core.spec import AttentionSpec
from flash_attention.nn.layer.flash_attention import FlashAttention
from flash_attention.ops import ENGINES, flash_attention, tik
from flash_attention.ops.aclnn import device

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
WAYS = ["pynative", "graph", "jit", "nested"]


class Outer(nn.Cell):
    """A Cell around a Cell."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def construct(self, *inputs):
        return self.inner(*inputs)


class Function(nn.Cell):
    """The functional call as a Cell: keywords and tensors by name, in the order of `names`."""

    def __init__(self, names, options):
        super().__init__()
        self.names, self.options = names, options

    def construct(self, query, key, value, *rest):
        tensors = {}
        for index in range(len(self.names)):
            tensors[self.names[index]] = rest[index]
        return flash_attention(query, key, value, **tensors, **self.options)


def same(cell):
    return cell


def jitted(cell):
    """A compiled function that calls `cell`, for PyNative mode."""

    @ms.jit
    def call(*inputs):
        return cell(*inputs)

    return call


@pytest.fixture(params=WAYS)
def way(request):
    """Sets the mode; gives the function that wraps a Cell for it."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE if request.param in ("graph", "nested") else ms.PYNATIVE_MODE)
    yield {"nested": Outer, "jit": jitted}.get(request.param, same)
    ms.set_context(mode=before)


def expect_error(error, message, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value) == message


def tensor(entry):
    shape, dtype = entry
    return Tensor(np.ones(shape, dtype))


@pytest.mark.parametrize("bad", CONSTRUCTOR, ids=lambda bad: bad.name)
def test_constructor(bad):
    expect_error(bad.error, bad.message, FlashAttention, **dict({"head_dim": 64}, **bad.options))


@pytest.mark.parametrize("bad", CELL, ids=lambda bad: bad.name)
def test_cell(bad, way):
    tensors = cell_tensors(bad)
    inputs = [tensor(tensors[name]) for name in ("query", "key", "value")]
    for name in ("attention_mask", "alibi_mask"):
        inputs.append(tensor(tensors[name]) if name in tensors else None)
    expect_error(bad.error, bad.message, way(FlashAttention(16, **bad.options)), *inputs)


@pytest.mark.parametrize("bad", FUNCTION, ids=lambda bad: bad.name)
def test_function(bad):
    tensors = {name: tensor(entry) for name, entry in function_tensors(bad).items()}
    expect_error(bad.error, bad.message, flash_attention, **dict(tensors, **bad.options))


@pytest.mark.parametrize("bad", FUNCTION, ids=lambda bad: bad.name)
def test_function_in_a_graph(bad):
    tensors = {name: tensor(entry) for name, entry in function_tensors(bad).items()}
    query, key, value = (tensors.pop(name) for name in ("query", "key", "value"))
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        expect_error(
            bad.error, bad.message, Function(tuple(tensors), bad.options), query, key, value, *tensors.values()
        )
    finally:
        ms.set_context(mode=before)


def test_unknown_engine(way):
    names = ", ".join(repr(name) for name in ["auto"] + ENGINES.names())
    message = "For 'FlashAttention', 'engine' must be one of {}, but got 'cuda'.".format(names)
    expect_error(ValueError, message, FlashAttention, 64, engine="cuda")
    x = Tensor(np.ones((1, 8, 1, 4), np.float32))
    message = "For 'flash_attention', 'engine' must be one of {}, but got 'cuda'.".format(names)
    expect_error(ValueError, message, way(Function((), {"engine": "cuda"})), x, x, x)


OTHER = "Use engine='portable', or leave the choice to 'auto'."


@pytest.mark.skipif(importlib.util.find_spec("tbe") is not None, reason="CANN is installed: the engine may run")
def test_engine_that_cannot_run_here(way):
    x = Tensor(np.ones((1, 1, 8, 16), np.float32))
    need, got = "used where CANN is installed (engine 'tik')", "no Python package 'tbe'"
    reason = ENGINES["tik"].supports(AttentionSpec(1, 1, 1, 8, 8, 16, "float32"))
    for cell, layer in ((FlashAttention(16, engine="tik"), "FlashAttention"), (Function((), {"engine": "tik"}), None)):
        layer = layer or "flash_attention"
        error, message = refused("tik", "engine", need, got, OTHER, layer=layer)
        assert message == reason.message(layer, "tik")  # what `info` prints
        expect_error(error, message, way(cell), x, x, x)


@pytest.mark.skipif(ms.get_context("device_target") != "CPU", reason="the operator may run here")
def test_vendor_operator_off_the_device(way):
    x = Tensor(np.ones((1, 1, 8, 16), np.float16))
    need = "used on Atlas A2 or A3 (Ascend910B, Ascend910_93)"
    error, message = refused("aclnn", "engine", need, "CPU", OTHER)
    reason = ENGINES["aclnn"].supports(AttentionSpec(1, 1, 1, 8, 8, 16, "float16"))
    assert message == reason.message("FlashAttention", "aclnn")
    expect_error(error, message, way(FlashAttention(16, engine="aclnn")), x, x, x)


def test_float64(way):
    x = Tensor(np.ones((1, 1, 8, 16)))
    error, message = refused(
        "portable", "dtype", "float16, bfloat16 or float32", "float64", "Cast the inputs to float32."
    )
    for engine in ("portable", None):
        expect_error(error, message, way(FlashAttention(16, engine=engine)), x, x, x)


def test_head_dim_too_large_for_the_kernels(monkeypatch):
    """The limits of engines whose hardware is absent here, from their own `supports`."""
    monkeypatch.setattr(tik.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tik, "_kernels", [lambda *args: None])
    reason = tik.supports(AttentionSpec(1, 1, 1, 128, 128, 320, "float16"))
    assert reason.message("FlashAttention", "tik") == (
        "For 'FlashAttention' (engine 'tik'), 'head_dim' must be at most 256, but got 320. "
        "Use engine='portable', or leave the choice to 'auto'."
    )
    monkeypatch.setattr(device, "soc_name", lambda: "Ascend910B2")
    reason = ENGINES["aclnn"].supports(AttentionSpec(1, 1, 1, 128, 128, 513, "float16"))
    assert reason.message("FlashAttention", "aclnn") == (
        "For 'FlashAttention' (engine 'aclnn'), 'head_dim' must be in [1, 512], but got 513. Use engine='portable'."
    )


SEEDS = [
    (-1, ValueError, "in [0, 2**32), but got -1."),
    (1.5, TypeError, "None, an int or an int tensor, but got 1.5."),
    (Tensor(1.5, ms.float32), TypeError, "of integer dtype, but got float32."),
    (Tensor([1, 2], ms.int32), ValueError, "of shape (), but got shape (2,)."),
]


@pytest.mark.parametrize("seed, error, text", SEEDS, ids=["negative", "float", "float tensor", "vector"])
def test_seed_of_the_cell(seed, error, text, way):
    x = Tensor(np.ones((1, 1, 8, 16), np.float32))
    cell = way(FlashAttention(16, 0.1).set_train())
    if isinstance(cell, Outer):
        cell.set_train()
    expect_error(error, "For 'FlashAttention', 'dropout_seed' must be " + text, cell, x, x, x, None, None, seed)


@pytest.mark.parametrize("name, value, error, text", PLAIN)
def test_plain_arguments_that_may_be_tensors(name, value, error, text, way):
    x = Tensor(np.ones((1, 8, 1, 4), np.float32))
    call = way(Function((), {name: value}))
    expect_error(error, "For 'flash_attention', '{}' must be {}".format(name, text), call, x, x, x)


@pytest.mark.parametrize("place", ["query", "value", "attention_mask"])
@pytest.mark.parametrize("kind", [np.ndarray, list, int])
def test_what_is_no_tensor(place, kind, way):
    array = np.ones((1, 1, 8, 16), np.float32)
    given = {"query": Tensor(array), "key": Tensor(array), "value": Tensor(array), "attention_mask": None}
    given[place] = {np.ndarray: array, list: array.tolist(), int: 3}[kind]
    message = "For 'FlashAttention', '{}' must be a Tensor, but got {}.".format(place, kind.__name__)
    expect_error(TypeError, message, way(FlashAttention(16)), *given.values())


def test_negative_float_mask_is_a_bias():
    """As in JAX where values can be seen: in PyNative mode."""
    x = Tensor(np.ones((1, 8, 1, 4), np.float32))
    message = (
        "For 'flash_attention', 'mask' must be boolean or >= 0 (keep where True or > 0), but got a float mask with "
        "negative values. Pass an additive mask as bias=."
    )
    expect_error(ValueError, message, flash_attention, x, x, x, mask=Tensor(np.full((8, 8), -1e9, np.float32)))


@pytest.mark.parametrize(
    "strategy, message",
    [
        (((1, 1, 1, 1),), "((1, 1, 1, 1),)"),
        (((1, 1, 2, 1),) * 3, "((1, 1, 2, 1), (1, 1, 2, 1), (1, 1, 2, 1))"),
        (((1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1)), "((1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1))"),
    ],
    ids=["one", "sequence", "different"],
)
def test_strategy(strategy, message):
    need = "a tuple of tuples of ints for (query, key, value[, attention_mask[, alibi_mask]]), query (dp, mp, 1, 1)"
    message = "For 'FlashAttention', 'in_strategy' must be {}, but got {}.".format(need, message)
    expect_error(ValueError, message, FlashAttention(16).shard, strategy)
