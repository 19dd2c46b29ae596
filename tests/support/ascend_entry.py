"""Specs and tensors for the kernels' entry functions, and kernels built by them on the simulator."""

import os
from dataclasses import replace

import numpy as np

from flash_attention.ascend.entry import flash_attention_tik
from flash_attention.ascend.simulator import installed_as_tbe
from flash_attention.core.spec import AttentionSpec, Operands

ENTRY = os.path.abspath(flash_attention_tik.__file__)

PLAIN = AttentionSpec(1, 2, 1, 40, 50, 24, "float16")
SPECS = {
    "plain": PLAIN,
    "everything": replace(
        PLAIN, batch=2, causal=True, mask_shape=(2, 1, 40, 50), bias_shape=(1, 2, 40, 50), alibi_shape=(2,),
        dropout_rate=0.2,
    ),
    "compact mask": replace(PLAIN, kv_len=40, q_offset=0, block_size=16, mask_shape=(16, 16), compact_mask=True),
    "key bias": replace(
        PLAIN, kv_len=150, q_offset=110, bias_shape=(1, 1, 1, 150), alibi_shape=(1, 2), local_window_size=(90, 0)
    ),
    "one key of a mask": replace(PLAIN, mask_shape=(1, 2, 40, 1)),
}  # fmt: skip


def make_tensors(spec, seed=0):
    """``(query, key, value), operands, (d_out, d_lse)`` in numpy; with a mask, query 3 sees no key."""
    rng = np.random.default_rng(seed)
    q_shape = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
    kv_shape = (spec.batch, spec.kv_heads, spec.kv_len, spec.head_dim)
    query, key, value, d_out = (
        rng.standard_normal(shape).astype(np.float16) for shape in (q_shape, kv_shape, kv_shape, q_shape)
    )
    operands = {}
    if spec.bias_shape is not None:
        operands["bias"] = rng.standard_normal(spec.bias_shape).astype(np.float16)
    if spec.mask_shape is not None:
        operands["mask"] = rng.random(spec.mask_shape) > 0.3
        operands["mask"][..., 3, :] = False
    if spec.alibi_shape is not None:
        operands["slopes"] = rng.random(spec.alibi_shape).astype(np.float32)
    if spec.dropout_rate:
        operands["dropout_seed"] = np.uint32(7)
    d_lse = rng.standard_normal(q_shape[:3]).astype(np.float32)
    return (query, key, value), Operands(**operands), (d_out, d_lse)


def describe(argument):
    """What a TBE compile process is told of a tensor."""
    shape = argument.shape if argument.nd_shape is None else argument.nd_shape
    return {
        "shape": argument.shape, "ori_shape": shape, "dtype": argument.dtype,
        "format": argument.format, "ori_format": "ND", "param_name": argument.name,
    }  # fmt: skip


def build_by_entry(request, module=flash_attention_tik):
    """The kernel's TIK instance, through the entry function of ``module``, called as MindSpore's processes call it."""
    inputs, outputs = request.signature()
    entry = getattr(module, request.operator)
    arguments = [describe(argument) for argument in inputs + outputs] + [request.to_json()]
    with installed_as_tbe():
        return entry(*arguments, kernel_name="kernel_1_2", disable_debug=False)
