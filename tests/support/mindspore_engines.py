"""Conformance adapter of the MindSpore engines: a case through `flash_attention.ops.flash_attention`, in both modes."""

import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from conformance import DIFFERENTIABLE, Case, make_inputs
from flash_attention.ops import ENGINES, flash_attention

# Tensors after query, key and value, in the order of `Call.construct`.
OPERANDS = (
    "bias", "alibi_slopes", "sinks", "mask", "q_segment_ids", "kv_segment_ids", "query_seq_lengths",
    "key_value_seq_lengths", "q_offset",
)  # fmt: skip


def engines_here():
    """Names of the engines to test: the one of --engine, else every one that takes a plain call on this computer."""
    if os.environ.get("FLASH_TEST_ENGINE"):
        return [os.environ["FLASH_TEST_ENGINE"]]
    return [name for name in ENGINES.names() if ENGINES[name].supports(Case().spec) is None]


class Call(nn.Cell):
    """The functional call with its plain options bound: what a graph is compiled from."""

    def __init__(self, engine, options, constants):
        super().__init__()
        self.engine = engine
        self.options = dict(options)
        self.q_length, self.kv_length = constants.get("query_seq_lengths"), constants.get("key_value_seq_lengths")
        self.offset = self.options.pop("q_offset", None)
        self.seed = constants.get("dropout_seed")

    def construct(self, query, key, value, bias, slopes, sinks, mask, q_ids, kv_ids, q_lengths, kv_lengths, offset):
        return flash_attention(
            query, key, value, bias, mask,
            alibi_slopes=slopes, sinks=sinks, q_segment_ids=q_ids, kv_segment_ids=kv_ids,
            query_seq_lengths=self.q_length if q_lengths is None else q_lengths,
            key_value_seq_lengths=self.kv_length if kv_lengths is None else kv_lengths,
            q_offset=self.offset if offset is None else offset,
            dropout_seed=self.seed, engine=self.engine, return_lse=True, **self.options
        )  # fmt: skip


class WithGradients(nn.Cell):
    """``((out, lse), gradients)`` of a :class:`Call`: one for each tensor among its arguments, in order."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, query, key, value, bias, slopes, sinks, mask, q_ids, kv_ids, q_lengths, kv_lengths, offset,
                  cotangents):  # fmt: skip
        results = self.call(
            query, key, value, bias, slopes, sinks, mask, q_ids, kv_ids, q_lengths, kv_lengths, offset
        )  # fmt: skip
        return results, self.gradient(self.call)(
            query, key, value, bias, slopes, sinks, mask, q_ids, kv_ids, q_lengths, kv_lengths, offset, cotangents
        )


class Functions:
    """MindSpore's own exp and log on numpy arrays, for the naive implementation."""

    @staticmethod
    def exp(x):
        return ops.exp(Tensor(np.asarray(x, np.float32))).asnumpy()

    @staticmethod
    def log(x):
        return ops.log(Tensor(np.asarray(x, np.float32))).asnumpy()


def naive_functions(engine):
    """Functions of the naive implementation beside `engine`: those of the framework that computes."""
    if engine != "jax":
        return Functions
    from support import jax_engines

    return jax_engines.Functions


class MindSporeEngine:
    """An engine of the MindSpore front end in one mode; `run(case)` gives numpy results by name, BNSD."""

    def __init__(self, name, mode=ms.PYNATIVE_MODE):
        self.name, self.mode = name, mode
        self.functions = naive_functions(name)

    def __str__(self):
        return self.name + ("-graph" if self.mode == ms.GRAPH_MODE else "")

    def supports(self, spec):
        return ENGINES[self.name].supports(spec)

    def run(self, case):
        before = ms.get_context("mode")
        ms.set_context(mode=self.mode)
        try:
            return self._run(case)
        finally:
            ms.set_context(mode=before)

    def _run(self, case):
        inputs = make_inputs(case)
        dtype = getattr(ms, case.dtype)
        q, k, v, d_out = (Tensor(_laid_out(x, case.layout)).astype(dtype) for x in inputs[1:5])
        tensors = {name: Tensor(x) for name, x in inputs.tensors.items() if not isinstance(x, int)}
        constants = {name: x for name, x in inputs.tensors.items() if isinstance(x, int)}
        arguments = [q, k, v] + [tensors.get(name) for name in OPERANDS]
        call = Call(self.name, case.options, constants)
        if case.gradients:
            (out, lse), grads = WithGradients(call)(*arguments, (d_out, Tensor(inputs.d_lse)))
        else:
            (out, lse), grads = call(*arguments), ()
        assert out.dtype == dtype and lse.dtype == ms.float32
        results = {"out": _numpy(out, case.layout), "lse": lse.asnumpy()}
        present = ["query", "key", "value"] + [name for name in OPERANDS if name in tensors]
        for name, grad in zip(present, grads):
            if name in ("query", "key", "value"):
                assert grad.dtype == dtype
                results[name] = _numpy(grad, case.layout)
            elif name in DIFFERENTIABLE:
                field = DIFFERENTIABLE[name]
                results[field] = grad.asnumpy().reshape(np.shape(getattr(inputs.operands, field)))
        return results


def _laid_out(x, layout):
    return np.ascontiguousarray(x if layout == "BNSD" else x.swapaxes(1, 2))


def _numpy(x, layout):
    return _laid_out(x.astype(ms.float32).asnumpy(), layout)
