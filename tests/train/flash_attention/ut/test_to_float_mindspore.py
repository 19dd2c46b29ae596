"""``model.to_float(float16)``, the usual way to half precision in MindSpore, around every Cell: close to float32."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore

import flash_attention.nn as fa
from flash_attention.nn import blockwise_cross_entropy
from flash_attention.nn.layer.seeded import seed_from
from flash_attention.ops import flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
MODES = ["pynative", pytest.param("graph", marks=pytest.mark.slow)]
B, N, T, D = 2, 4, 40, 16
DIM = N * D
RNG = np.random.default_rng(0)
MASK = RNG.random((B, N, T, T)) < 0.7
MASK[0, 0, 3] = False  # a query that sees nothing
KEPT = np.arange(T) < np.array([[T], [T - 7]])
BUCKETS = RNG.integers(0, 3, (B, T, N)).astype(np.int32)
TOKENS = RNG.integers(0, 11, (B, T)).astype(np.int32)


class _Called(nn.Cell):
    """A Cell in a model, called with constants beside its inputs."""

    def __init__(self, cell, *constants):
        super().__init__()
        self.cell = cell
        self.constants = tuple([None if x is None else Tensor(x) for x in constants])

    def construct(self, *inputs):
        out = self.cell(*inputs, *self.constants)
        return out[0] if isinstance(out, tuple) else out


SLOPES = Tensor(np.array([0.5, 0.25, 0.125, 0.0625], np.float32))
TENSORS = [RNG.standard_normal((B, N, T, D)).astype(np.float32) for _ in range(3)]  # query, key, value, BNSD
ACROSS = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in TENSORS]  # BSND
X = [RNG.standard_normal((B, T, DIM)).astype(np.float32)]
STACK = dict(dim=DIM, depth=1, heads=N, attn_dim_head=D, engine="portable")


class _Function(nn.Cell):
    def construct(self, query, key, value, mask):
        return flash_attention(query, key, value, mask=mask, engine="portable", layout="BNSD", alibi_slopes=SLOPES)


class _Loss(nn.Cell):
    def construct(self, logits, tokens):
        return blockwise_cross_entropy(logits, tokens, chunk_size=32)[0]


class _Router(nn.Cell):
    def __init__(self):
        super().__init__()
        self.router = fa.CoordinateDescentRouter(DIM, straight_through=False, eps=1.0)

    def construct(self, x, mask):
        return self.router(x, 8, mask)[2]


CASES = {
    "function, mask and ALiBi": (lambda: _Called(_Function(), MASK), TENSORS),
    "FlashAttention, mask": (lambda: _Called(fa.FlashAttention(D, engine="portable"), ~MASK), TENSORS),
    "FlashAttention, ALiBi": (lambda: fa.FlashAttention(D, alibi=True, causal=True, engine="portable"), TENSORS),
    "vanilla": (lambda: _Called(fa.FlexibleAttention("vanilla", N, D, causal=False), MASK), ACROSS),
    "flash_attn2": (lambda: _Called(fa.FlexibleAttention("flash_attn2", N, D, causal=False), MASK), ACROSS),
    "landmark": (lambda: fa.FusedLandmarkAttention(block_size=8), TENSORS),
    "landmark, top-k": (lambda: fa.FusedLandmarkAttention(block_size=8, top_k_blocks=2), TENSORS),
    "dilated": (lambda: fa.DilatedAttention(DIM, N, (1, 2), (8, 16), engine="portable"), X),
    "router": (lambda: _Called(_Router(), KEPT), X),
    "talking heads": (
        lambda: _Called(fa.AttentionLayers(causal=True, attn_talking_heads=True, **STACK), None, KEPT), X
    ),
    "top-k weights": (lambda: _Called(fa.AttentionLayers(causal=True, attn_sparse_topk=4, **STACK), None, KEPT), X),
    "fused stack": (lambda: _Called(fa.AttentionLayers(causal=True, **STACK), None, KEPT), X),
    "hash": (lambda: _Called(fa.DynamicSparseAttention(engine="portable"), BUCKETS, BUCKETS), ACROSS),
    "multi-query": (lambda: fa.MultiQueryAttention(DIM, N, engine="portable"), X),
    "cross-modal": (lambda: _Called(fa.CrossModalBlock(DIM, N, engine="portable"), None, KEPT), X * 2),
    "cross entropy": (lambda: _Called(_Loss(), TOKENS), [5.0 * X[0]]),
    "blockwise": (lambda: fa.BlockwiseAttention(engine="portable"), ACROSS),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(CASES))
def test_close_to_float32(name, mode):
    """Output and gradients of the inputs, with float16 inputs, beside the same Cell in float32."""
    build, arrays = CASES[name]
    np.random.seed(0)
    cell = build()
    d_out = np.random.default_rng(1).standard_normal(cell(*[Tensor(x) for x in arrays]).shape)
    with in_mindspore.mode(mode):
        want, d_want = in_mindspore.run(cell, arrays, d_out)
        cell.to_float(ms.float16)
        got, d_got = in_mindspore.run(cell, arrays, d_out, "float16")
    for found, expected in zip([got] + d_got, [want] + d_want):
        assert np.abs(found - expected).max() <= 1e-2 * max(1.0, np.abs(expected).max())


class _Seed(nn.Cell):
    def construct(self, query):
        return seed_from(query)


def test_seeds_of_large_queries():
    """In float16 what they are made from would be infinite: every step's seed the same."""
    cell = _Seed().to_float(ms.float16)
    seeds = {int(cell(Tensor(50.0 * (1.0 + 0.01 * n) * np.abs(TENSORS[0]))).asnumpy()) for n in range(8)}
    assert len(seeds) == 8
