"""dp and mp: strategies of every combination of inputs as data, and devices' shares that are the whole call."""

import itertools
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.sharding import check_strategy, own, share, strategies
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.ops.engines import ENGINES

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
B, N, K, SQ, SK, D = 4, 8, 4, 20, 20, 8
QUERY, KEY = (B, N, SQ, D), (B, K, SK, D)
ALL = (2, 4, 1, 1)

# mask's shape -> its strategy with dp = 2, mp = 4, and with have_attention_mask_batch=False
MASKS = {
    None: (None, None),
    (SQ, SK): ((1, 1), (1, 1)),
    (16, 16): ((1, 1), (1, 1)),  # compact
    (1, 16, 16): ((1, 1, 1), (1, 1, 1)),
    (1, SQ, SK): ((1, 1, 1), (1, 1, 1)),
    (B, SQ, SK): ((2, 1, 1), (1, 1, 1)),
    (1, 1, SQ, SK): ((1, 1, 1, 1), (1, 1, 1, 1)),
    (B, 1, SQ, SK): ((2, 1, 1, 1), (1, 1, 1, 1)),
    (1, N, SQ, SK): ((1, 4, 1, 1), (1, 4, 1, 1)),
    (B, N, SQ, SK): ((2, 4, 1, 1), (1, 4, 1, 1)),
}
ALIBI_MASKS = {
    None: None,
    (1, N, 1, SK): (1, 4, 1, 1),
    (B, N, 1, SK): (2, 4, 1, 1),
    (1, N, SQ, SK): (1, 4, 1, 1),
    (B, N, SQ, SK): (2, 4, 1, 1),
}


@pytest.mark.parametrize("mask_batch", [True, False])
def test_strategies_of_every_combination(mask_batch):
    for (mask, (split, kept)), (alibi_mask, of_alibi), alibi, dropout in itertools.product(
        MASKS.items(), ALIBI_MASKS.items(), (False, True), (False, True)
    ):
        found, out = strategies(QUERY, KEY, 2, 4, mask, alibi_mask, mask_batch, alibi, dropout)
        want = {"query": ALL, "key": ALL, "value": ALL, "attention_mask": split if mask_batch else kept}
        want["alibi_mask"] = of_alibi
        want["alibi_slopes"] = (4,) if alibi and alibi_mask is None else None
        want["dropout_seed"] = () if dropout else None
        assert found == {name: strategy for name, strategy in want.items() if strategy is not None}
        assert out == {"output": ALL, "lse": (2, 4, 1)}
        # what a user may then give to FlashAttention.shard
        given = [found[name] for name in ("query", "key", "value", "attention_mask", "alibi_mask") if name in found]
        if mask is not None or alibi_mask is None:
            assert check_strategy(tuple(given)) == (2, 4)


def test_refused():
    with pytest.raises(ValueError, match="'dp' must be a divisor of the 4 batch, but got 3"):
        strategies(QUERY, KEY, 3, 1)
    with pytest.raises(ValueError, match="'mp' must be a divisor of the 4 key/value heads, but got 8"):
        share(spec_of(), 1, 8)
    with pytest.raises(ValueError, match="one of .*\\(2, 1, 1\\).* for attention_mask .* but got \\(4, 1, 1\\)"):
        check_strategy((ALL, ALL, ALL, (4, 1, 1)))
    with pytest.raises(ValueError, match="for alibi_mask with query \\(2, 4, 1, 1\\), but got \\(2, 1, 1, 1\\)"):
        check_strategy((ALL, ALL, ALL, (1, 1), (2, 1, 1, 1)))


def spec_of(**fields):
    return AttentionSpec(B, N, K, SQ, SK, D, **fields)


def test_share_of_a_call():
    spec = spec_of(mask_shape=(B, 1, SQ, SK), bias_shape=(1, N, SQ, SK), alibi_shape=(B, N), dropout_rate=0.1)
    part = share(spec, 2, 4, (1, 3))
    assert (part.batch, part.heads, part.kv_heads) == (2, 2, 1)
    assert (part.mask_shape, part.bias_shape, part.alibi_shape) == ((2, 1, SQ, SK), (1, 2, SQ, SK), (2, 2))
    assert part.origin == (2, 6, 0, 0)
    assert share(spec, 1, 1) == spec
    assert share(spec_of(mask_shape=(16, 16), compact_mask=True, block_size=16), 2, 2).mask_shape == (16, 16)


@pytest.mark.parametrize("mask", [(B, 1, SQ, SK), pytest.param((1, N, SQ, SK), marks=pytest.mark.slow)])
def test_shares_make_the_whole_call(mask):
    """dp x mp emulated: each device gets slices of the inputs, its heads' slopes and places in the dropout mask."""
    spec = spec_of(causal=True, mask_shape=mask, alibi_shape=(N,), dropout_rate=0.3)
    rng = np.random.default_rng(0)
    shapes = (QUERY, KEY, KEY, QUERY, QUERY[:3])
    query, key, value, d_out, d_lse = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    operands = Operands(mask=rng.random(mask) < 0.7, slopes=alibi_slopes(N).astype(np.float32), dropout_seed=7)
    want = _passes(spec, query, key, value, operands, d_out, d_lse)
    found = [np.zeros_like(x) for x in want]
    for device in itertools.product(range(2), range(2)):
        mine = lambda x: x[own(x.shape, 2, 2, device)]  # noqa: B023, E731
        part = share(spec, 2, 2, device)
        heads = own(QUERY, 2, 2, device)[1]
        given = operands._replace(mask=mine(operands.mask), slopes=operands.slopes[heads])
        parts = _passes(part, *map(mine, (query, key, value)), given, mine(d_out), mine(d_lse))
        for whole, x in zip(found, parts):
            whole[own(whole.shape, 2, 2, device)] = x
    for x, wanted in zip(found, want):
        np.testing.assert_allclose(x, wanted, atol=2e-5)
    other = _passes(
        replace(part, origin=(0, 0, 0, 0)), *map(mine, (query, key, value)), given, mine(d_out), mine(d_lse)
    )
    assert np.abs(other[0] - parts[0]).max() > 0.1  # dropout that counts on the part is another one


def _passes(spec, query, key, value, operands, d_out, d_lse):
    """Output, LSE and gradients of query, key and value by engine 'portable'."""
    cell = ENGINES["portable"].run.cell(spec)
    tensors = [Tensor(np.ascontiguousarray(x)) for x in (query, key, value)]
    seed = Tensor(operands.dropout_seed, ms.uint32)
    mask, slopes = Tensor(np.ascontiguousarray(operands.mask)), Tensor(operands.slopes)
    inputs = tensors + [None, mask, slopes, None, None, None, None, None, None, seed]
    out, lse = cell.forward(*inputs)
    cotangents = [Tensor(np.ascontiguousarray(x)) for x in (d_out, d_lse)]
    grads = cell.backward(*inputs, out, lse, *cotangents)
    return [x.asnumpy() for x in (out, lse) + grads[:3]]
