"""The `FlashAttention` Cell for the tests in st: a conformance case as a Cell's call, its judgement, naive attention.

It needs MindSpore alone: the judge is numpy's (`core.reference`), so the same cases run on Ascend hardware.
"""

from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from support.mindspore_engines import engines_here, naive_functions

from conformance import assert_matches, make_inputs
from flash_attention.nn.layer.flash_attention import FlashAttention

ENGINES_HERE = engines_here()
ON_ASCEND = ("tik", "aclnn")  # these take no float32
NAMES = ("query", "key", "value", "attention_mask", "alibi_mask", "dropout_seed")  # the Cell's inputs


def for_engine(case, engine):
    """The case in a dtype that the engine takes."""
    return replace(case, dtype="float16") if engine in ON_ASCEND and case.dtype == "float32" else case


def dtype_for(engine):
    """The MindSpore dtype of plain tests."""
    return ms.float16 if engine in ON_ASCEND else ms.float32


def tensor(shape, dtype=ms.float32, seed=0):
    """Normal numbers; another seed, other numbers."""
    return Tensor(np.random.RandomState(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def make_cell(case, engine):
    """The Cell whose call is `case`; in training mode when the case drops."""
    options = dict(case.options)
    options.pop("layout")
    cell = FlashAttention(
        case.head_dim,
        options.pop("dropout_rate"),
        options.pop("prev_block_num", 65536),
        options.pop("next_block_num", 65536),
        alibi=case.slopes != "none" or case.bias != "none",
        causal=options.pop("is_causal", False),
        engine=engine,
        return_lse=True,
        **options
    )  # fmt: skip
    return cell.set_train(case.dropout > 0)


def cell_inputs(case):
    """The six inputs of the Cell's call, None where absent. The mask is turned: non-zero = discard."""
    inputs = make_inputs(case)
    found = {name: Tensor(x).astype(getattr(ms, case.dtype)) for name, x in zip(NAMES, inputs[1:4])}
    if "mask" in inputs.tensors:
        keep = inputs.tensors["mask"]
        found["attention_mask"] = Tensor((keep <= 0).astype(keep.dtype))
    if "bias" in inputs.tensors:
        found["alibi_mask"] = Tensor(inputs.tensors["bias"])
    if "dropout_seed" in inputs.tensors:
        found["dropout_seed"] = Tensor(np.uint32(inputs.tensors["dropout_seed"]))
    return [found.get(name) for name in NAMES]


class OutAndGradients(nn.Cell):
    """``((out, lse), gradients)`` of a Cell for given cotangents."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, query, key, value, attention_mask, alibi_mask, dropout_seed, cotangents):
        results = self.cell(query, key, value, attention_mask, alibi_mask, dropout_seed)
        grads = self.gradient(self.cell)(query, key, value, attention_mask, alibi_mask, dropout_seed, cotangents)
        return results, grads


def run_cell(case, engine):
    """numpy results of the case by name, as `conformance.run_reference` names them."""
    inputs, arguments = make_inputs(case), cell_inputs(case)
    cotangents = (Tensor(inputs.d_out).astype(arguments[0].dtype), Tensor(inputs.d_lse))
    (out, lse), grads = OutAndGradients(make_cell(case, engine))(*arguments, cotangents)
    assert out.dtype == arguments[0].dtype and lse.dtype == ms.float32
    results = {"out": out, "lse": lse}
    present = [name for name, x in zip(NAMES, arguments) if x is not None]
    for name, grad in zip(present, grads):
        if name in ("query", "key", "value"):
            assert grad.dtype == arguments[0].dtype
            results[name] = grad
        elif name == "alibi_mask":
            results["bias"] = grad
    return {name: x.astype(ms.float32).asnumpy() for name, x in results.items()}


def assert_right(got, case, engine):
    """As `conformance.assert_matches`; the slopes of alibi=True are constants and have no gradient."""
    assert_matches({case: got}, naive_functions(engine), without=["slopes"])


class NaiveAttention(nn.Cell):
    """Causal attention in a framework's plain operators: what users had before. Call as FlashAttention's."""

    def __init__(self, head_dim):
        super().__init__()
        self.scale = head_dim**-0.5

    def construct(self, query, key, value):
        group = query.shape[1] // key.shape[1]
        length = query.shape[2]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = ops.matmul(query.astype(ms.float32), key.astype(ms.float32).swapaxes(2, 3)) * self.scale
        future = ops.arange(length).reshape(1, -1) > ops.arange(length).reshape(-1, 1)
        scores = ops.masked_fill(scores, future, -1e30)
        return ops.matmul(ops.softmax(scores, -1), value.astype(ms.float32)).astype(query.dtype)
