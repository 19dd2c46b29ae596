"""Engine 'aclnn': the real operators' shape and type inference on the CPU for every kind of mapped call.

There is no CPU kernel: PyNative infers, then stops at the missing kernel. Exactly that message proves that inference
accepted the call; anything it rejects has another one (tested below).
"""

import re

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from mindspore.common.api import _pynative_executor  # noqa: E402

from flash_attention.core.spec import AttentionSpec  # noqa: E402
from flash_attention.ops.aclnn import engine, passes  # noqa: E402

pytestmark = [
    pytest.mark.level0,
    pytest.mark.platform_x86_cpu,
    pytest.mark.skipif(ms.get_context("device_target") != "CPU", reason="on the CPU the kernels are missing"),
]

NO_KERNEL = r"^The kernel {} unregistered\."


def make(dtype="float16", q_len=24, kv_len=24, head_dim=16, heads=4, kv_heads=2, **more):
    return AttentionSpec(2, heads, kv_heads, q_len, kv_len, head_dim, dtype, **more)


SPECS = {
    "dense": make(),
    "bfloat16": make("bfloat16"),
    "causal": make(causal=True),
    "causal bottom-right": make(q_len=16, causal=True),
    "band": make(local_window_size=(4, 2), q_len=16),
    "blocks": make(prev_block_num=1, block_size=8),
    "head mask": make(mask_shape=(1, 4, 24, 24), causal=True),
    "segments": make(segments=True),
    "lengths": make(q_lengths=True, kv_lengths=True),
    "offset": make(dynamic_offset=True, causal=True),
    "bias": make(bias_shape=(1, 1, 1, 24)),
    "alibi": make(alibi_shape=(2, 4), causal=True),
    "long alibi": make(q_len=1040, kv_len=1040, causal=True, alibi_shape=(4,)),
    "dropout": make(dropout_rate=0.1),
    "sinks": make(sinks=True),
    "head_dim 40": make(head_dim=40),
    "head_dim 512": make(head_dim=512),
    "one kv head": make(kv_heads=1),
}


def tensors(spec):
    """query, key, value and the ten operands of a spec."""
    dtype = getattr(ms, spec.dtype)
    b, n, q, k = spec.batch, spec.heads, spec.q_len, spec.kv_len

    def zeros(shape, kind):
        return None if shape is None else ms.Tensor(np.zeros(shape, np.float32)).astype(kind)

    return (
        zeros((b, n, q, spec.head_dim), dtype),
        zeros((b, spec.kv_heads, k, spec.head_dim), dtype),
        zeros((b, spec.kv_heads, k, spec.head_dim), dtype),
        zeros(spec.bias_shape, ms.float32),
        zeros(spec.mask_shape, ms.bool_),
        zeros(spec.alibi_shape, ms.float32),
        zeros((n,) if spec.sinks else None, ms.float32),
        zeros((b, q) if spec.segments else None, ms.int32),
        zeros((b, k) if spec.segments else None, ms.int32),
        zeros((b,) if spec.q_lengths else None, ms.int32),
        zeros((b,) if spec.kv_lengths else None, ms.int32),
        zeros((b,) if spec.dynamic_offset else None, ms.int32),
        zeros(() if spec.dropout_rate else None, ms.uint32),
    )


@pytest.fixture(autouse=True)
def drained():
    """PyNative's threads may hold a second error of the same call: it must not surface in the next test."""
    yield
    try:
        _pynative_executor.sync()
    except (RuntimeError, ValueError):
        pass


@pytest.mark.parametrize("name", SPECS)
def test_forward_is_inferred(name):
    spec = SPECS[name]
    with pytest.raises(RuntimeError, match=NO_KERNEL.format("FlashAttentionScore")):
        passes.Forward(spec)(*tensors(spec))


@pytest.mark.parametrize("name", [name for name in SPECS if name != "bfloat16"])  # no bf16 Concat on the CPU
def test_backward_is_inferred(name):
    spec = SPECS[name]
    given = tensors(spec)
    lse = ms.Tensor(np.zeros((spec.batch, spec.heads, spec.q_len), np.float32))
    with pytest.raises(RuntimeError, match=NO_KERNEL.format("FlashAttentionScoreGrad")):
        passes.Backward(spec)(*given, given[0], lse, given[0], lse)


@pytest.mark.parametrize("name", ["dense", "causal bottom-right", "blocks", "bias", "dropout", "sinks", "offset"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_graph_mode_compiles_up_to_the_missing_kernel(name, direction):
    """The engine's differentiable Cell in graph mode, its gradient with respect to query, key and value."""
    spec = SPECS[name]
    cell = engine.run.cell(spec)
    given = tensors(spec)

    def loss(query, key, value):
        out, lse = cell(query, key, value, *given[3:])
        return out.astype(ms.float32).sum() + lse.sum()

    function = loss if direction == "forward" else ms.grad(loss, grad_position=(0, 1, 2))
    with pytest.raises(RuntimeError, match=r"Unsupported op \[FlashAttentionScore(Grad)?\] on CPU"):
        ms.jit(function)(*given[:3])


@pytest.mark.parametrize(
    "attributes,text",
    [
        (dict(head_num=8), "head_num"),
        (dict(keep_prob=0.0), "keep_prob"),
        (dict(input_layout="XYZ"), "input_layout"),
    ],
)
def test_inference_does_reject(attributes, text):
    """The check above can fail: wrong calls stop in inference, with another message."""
    from mindspore.ops.operations.nn_ops import FlashAttentionScore

    arguments = dict(head_num=4, input_layout="BNSD")
    arguments.update(attributes)
    given = tensors(SPECS["dense"])
    with pytest.raises((RuntimeError, ValueError)) as caught:
        FlashAttentionScore(**arguments)(*given[:3])[3].asnumpy()  # PyNative infers in another thread
    assert text in str(caught.value) and not re.match(NO_KERNEL.format("FlashAttentionScore"), str(caught.value))
