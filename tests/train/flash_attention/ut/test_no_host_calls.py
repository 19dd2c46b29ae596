"""Mechanisms in a graph are MindSpore's operators alone: no call back into Python, forward and backward."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.graphs import operators

from flash_attention.nn import (
    BlockwiseAttention,
    BlockwiseParallel,
    ConditionalRoutedTransformerBlock,
    CrossModalBlock,
    DilatedAttention,
    DynamicSparseAttention,
    FusedLandmarkAttention,
    MultiQueryAttention,
    Rotary,
    TriangleAttention,
    XPos,
)
from flash_attention.ops.host import HostFunction

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
HOST = {"Custom", "PyFunc", "PyExecute", "PyInterpret"}  # operators that run Python
PORTABLE = {"engine": "portable"}
rng = np.random.default_rng(0)
X = rng.standard_normal((1, 24, 16)).astype(np.float32)
QKV = tuple(rng.standard_normal((3, 1, 24, 2, 8)).astype(np.float32))
IDS = tuple(rng.integers(0, 2, (2, 1, 24, 2)).astype(np.int32))
BLOCK = {
    "num_heavy_attn_tokens_q": 5, "num_heavy_attn_tokens_kv": 6, "num_heavy_ff_tokens": 6, "light_dim_head": 4,
    "light_heads": 2, "light_window_size": 6, "heavy_dim_head": 4, "heavy_heads": 2,
}  # fmt: skip
CALLS = {  # a Cell and its inputs
    "hash": lambda: (DynamicSparseAttention(max_keys=16, **PORTABLE), QKV + IDS),
    "qk": lambda: (
        DynamicSparseAttention(sparsity_mode="qk", buffer_size=20, **PORTABLE),
        QKV + tuple(x > 0 for x in IDS),
    ),
    "landmark": lambda: (FusedLandmarkAttention(block_size=4), QKV),
    "landmark, best blocks": lambda: (FusedLandmarkAttention(block_size=4, top_k_blocks=1), QKV),
    "blockwise": lambda: (BlockwiseAttention(query_chunk_size=8, key_chunk_size=8, **PORTABLE), QKV),
    "blockwise block": lambda: (BlockwiseParallel(8, 8, 16, 2, 4, 32, **PORTABLE), (X,)),
    "dilated": lambda: (
        DilatedAttention(16, 2, (1, 2), (8, 16), causal=True, use_xpos=True, use_rel_pos_bias=True, **PORTABLE),
        (X,),
    ),
    "colt5": lambda: (ConditionalRoutedTransformerBlock(16, **BLOCK, **PORTABLE), (X,)),
    "multi query": lambda: (MultiQueryAttention(16, 2, causal=True, **PORTABLE), (X,)),
    "cross modal": lambda: (CrossModalBlock(16, 2, **PORTABLE), (X,)),
    "triangle": lambda: (TriangleAttention(**PORTABLE), QKV),
    "rotary": lambda: (Rotary(), (X,)),
    "xpos": lambda: (XPos(), (X,)),
}


class _Step(nn.Cell):
    """Output and gradients of a Cell."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.gradient = ops.GradOperation(get_all=True)(cell)

    def construct(self, *tensors):
        return self.cell(*tensors), self.gradient(*tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_no_host_calls(name, tmp_path):
    cell, arrays = CALLS[name]()
    found = operators(str(tmp_path), lambda: _Step(cell)(*map(Tensor, arrays)))
    assert found - {"Return", "MakeTuple"} and not found & HOST


def test_a_host_call_is_seen(tmp_path):
    cell = HostFunction(lambda x: x + 1, 1, lambda x: x, lambda x: x)
    assert operators(str(tmp_path), lambda: cell(Tensor(X))) & HOST
