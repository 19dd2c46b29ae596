"""Whole Cells: `FlashAttention` against the numpy judge, forward and gradients, both modes, every engine found here.

`--engine NAME` runs the same cases on another engine, such as those of Ascend hardware.
"""

import inspect

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support.cells import ENGINES_HERE, assert_right, dtype_for, for_engine, run_cell, tensor

from conformance import Case
from flash_attention.core import dropout
from flash_attention.nn.layer.flash_attention import FlashAttention
from flash_attention.ops import flash_attention

pytestmark = [
    pytest.mark.platform_x86_cpu,
    pytest.mark.platform_arm_ascend_training,
    pytest.mark.platform_x86_ascend_training,
    pytest.mark.platform_arm_ascend910b_training,
    pytest.mark.env_onecard,
]
SHAPE = (2, 4, 40, 16)


@pytest.fixture(params=ENGINES_HERE)
def engine(request):
    return request.param


def _case(name, **fields):
    return Case(name=name, **dict({"lengths": (70, 70), "head_dim": 16, "heads": (2, 4, 2)}, **fields))


CASES = [
    _case("plain, fp16", dtype="float16"),
    _case("plain, bf16", dtype="bfloat16"),
    _case("causal, gradient through the LSE", band="causal", cotangent=True),
    _case("block window, ALiBi, mask a batch", band="blocks16-causal", slopes="alibi", mask="dense"),
    _case("token window, alibi_mask, mask a head", band="window", bias="full", mask="heads", logits="scale"),
    _case("alibi_mask for all batches, compact mask", bias="heads", mask="compact", cotangent=True),
    _case("compact mask in small blocks, dropout", band="blocks16-causal", mask="compact", dropout=0.3),
    _case("dead rows, one kv head", mask="rows", lengths=(40, 70), heads=(1, 4, 1), cotangent=True),
    _case("ALiBi, dropout, Sq > Sk", band="causal", slopes="alibi", dropout=0.5, lengths=(70, 40), head_dim=40),
]
PLAIN = [_case("plain", cotangent=True)]
BOTH = [("pynative", case) for case in CASES] + [("graph", case) for case in CASES[1::3]]


@pytest.mark.level0
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_plain(case, engine, mode):
    case = for_engine(case, engine)
    assert_right(run_cell(case, engine), case, engine)


@pytest.mark.level1
@pytest.mark.parametrize("mode, case", BOTH, ids=str, indirect=["mode"])
def test_cell(mode, case, engine):
    case = for_engine(case, engine)
    assert_right(run_cell(case, engine), case, engine)


@pytest.mark.level0
def test_constructor_and_call_as_published():
    constructor = list(inspect.signature(FlashAttention.__init__).parameters.values())[1:]
    positional = [(p.name, p.default) for p in constructor if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        ("head_dim", inspect.Parameter.empty),
        ("dropout_rate", 0.0),
        ("prev_block_num", 65536),
        ("next_block_num", 65536),
        ("tiling_stgy_name", "sparse"),
        ("dp", 1),
        ("mp", 1),
        ("have_attention_mask_batch", True),
        ("alibi", False),
    ]
    call = list(inspect.signature(FlashAttention.construct).parameters.values())[1:6]
    assert [p.name for p in call] == ["query", "key", "value", "attention_mask", "alibi_mask"]
    assert [p.default for p in call[3:]] == [None, None]


@pytest.mark.level0
def test_every_form_of_a_mask_is_the_same_mask(engine):
    """non-zero = discard, whatever the dtype and the rank."""
    dtype = dtype_for(engine)
    query, key, value = (tensor(SHAPE, dtype, seed) for seed in range(3))
    discard = np.random.RandomState(3).rand(40, 40) < 0.4
    cell = FlashAttention(16, engine=engine, have_attention_mask_batch=False)
    want = cell(query, key, value, Tensor(discard)).asnumpy()
    unmasked = cell(query, key, value).asnumpy()
    assert not np.allclose(want, unmasked, atol=1e-2)
    for kind in (np.uint8, np.int32, np.float16, np.float32):
        assert np.array_equal(cell(query, key, value, Tensor(discard.astype(kind))).asnumpy(), want)
    negative = Tensor(np.where(discard, -10000.0, 0.0).astype(np.float32))
    assert np.array_equal(cell(query, key, value, negative).asnumpy(), want)
    for shape in ((1, 40, 40), (1, 1, 40, 40)):
        assert np.array_equal(cell(query, key, value, Tensor(discard.reshape(shape))).asnumpy(), want)
    cell = FlashAttention(16, engine=engine)
    for shape in ((2, 40, 40), (2, 1, 40, 40), (1, 4, 40, 40), (2, 4, 40, 40)):
        full = np.ascontiguousarray(np.broadcast_to(discard, shape))
        result = cell(query, key, value, Tensor(full)).asnumpy()
        assert np.allclose(result, want, atol=2e-3 if dtype == ms.float16 else 1e-6)


@pytest.mark.level0
@pytest.mark.parametrize("strategy, block", [("sparse", 128), ("wukong", 64), ("auto", 128)])
def test_strategies_and_the_compact_causal_mask(strategy, block, engine):
    """triu(k=1) of the strategy's block size means causal; the block window has the same unit."""
    dtype = dtype_for(engine)
    query, key, value = (tensor((1, 2, 150, 16), dtype, seed) for seed in range(3))
    compact = np.triu(np.ones((block, block), np.uint8), 1)
    i, j = np.ogrid[:150, :150]
    for options, discard in (({}, j > i), ({"prev_block_num": 0}, (j > i) | (j // block < i // block))):
        want = FlashAttention(16, engine=engine)(query, key, value, Tensor(discard)).asnumpy()
        for mask in (compact, compact[None]):
            cell = FlashAttention(16, tiling_stgy_name=strategy, engine=engine, **options)
            result = cell(query, key, value, Tensor(mask)).asnumpy()
            assert np.allclose(result, want, atol=4e-3 if dtype == ms.float16 else 2e-6)


@pytest.mark.level0
def test_lse_is_returned_on_request(engine):
    query = tensor(SHAPE, dtype_for(engine))
    out, lse = FlashAttention(16, engine=engine, return_lse=True)(query, query, query)
    assert out.shape == SHAPE and out.dtype == query.dtype
    assert lse.shape == SHAPE[:3] and lse.dtype == ms.float32
    alone = FlashAttention(16, engine=engine)(query, query, query)
    assert isinstance(alone, Tensor) and np.array_equal(alone.asnumpy(), out.asnumpy())


class Squares(nn.Cell):
    """The sum of squares of the attention's output."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def construct(self, query, key, value):
        out = self.attention(query, key, value).astype(ms.float32)
        return (out * out).sum()


@pytest.mark.level0
def test_jit_and_value_and_grad(engine, mode):
    dtype = dtype_for(engine)
    query, key, value = (tensor((1, 2, 40, 16), dtype, seed) for seed in range(3))
    net = Squares(FlashAttention(16, causal=True, engine=engine))
    function = ms.value_and_grad(net, (0, 1, 2))

    @ms.jit
    def compiled(query, key, value):
        return net(query, key, value)

    @ms.jit
    def compiled_gradients(query, key, value):
        return function(query, key, value)

    loss, grads = function(query, key, value)
    loss_jit, grads_jit = compiled_gradients(query, key, value)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == ms.float16 else {"rtol": 1e-5, "atol": 1e-5}
    assert np.allclose(compiled(query, key, value).asnumpy(), loss.asnumpy(), **tolerance)
    assert np.allclose(loss_jit.asnumpy(), loss.asnumpy(), **tolerance)
    q64, k64, v64 = (x.astype(ms.float32).asnumpy().astype(np.float64) for x in (query, key, value))
    weights = np.exp(np.where(np.tri(40, dtype=bool), q64 @ k64.swapaxes(2, 3) / 4, -np.inf))
    probs = weights / weights.sum(-1, keepdims=True)
    out = probs @ v64
    assert np.allclose(loss.asnumpy(), (out**2).sum(), **tolerance)
    assert np.allclose(grads[2].astype(ms.float32).asnumpy(), probs.swapaxes(2, 3) @ (2 * out), **tolerance)
    for one, other in zip(grads, grads_jit):
        assert one.dtype == other.dtype == dtype
        assert np.allclose(one.astype(ms.float32).asnumpy(), other.astype(ms.float32).asnumpy(), **tolerance)


@pytest.mark.level1
def test_dynamic_batch(engine, mode):
    """One Cell for every batch size; in graph mode also compiled once, for a batch that is known only at run time."""
    dtype = dtype_for(engine)
    cell = FlashAttention(16, prev_block_num=1, block_size=16, alibi=True, engine=engine)
    whole = [tensor((3, 2, 40, 16), dtype, seed) for seed in range(3)]
    want = cell(*whole).asnumpy()
    atol = 2e-3 if dtype == ms.float16 else 1e-6
    part = [Tensor(x.asnumpy()[:2]) for x in whole]
    assert np.allclose(cell(*part).asnumpy(), want[:2], atol=atol)
    if mode == "pynative":
        return
    dynamic = [Tensor(shape=[None] + list(x.shape[1:]), dtype=dtype) for x in whole]
    if engine == "jax":  # it compiles for sizes, and says so
        cell.set_inputs(*dynamic)
        with pytest.raises(ValueError) as caught:
            cell(*whole)
        assert str(caught.value) == (
            "For 'FlashAttention' (engine 'jax'), 'batch' must be known when the graph is compiled, but got a dynamic "
            "size. Use engine='portable'."
        )
        cell = FlashAttention(16, prev_block_num=1, block_size=16, alibi=True)  # auto takes another engine
    cell.set_inputs(*dynamic)
    for batch in (3, 1, 2):
        part = [Tensor(x.asnumpy()[:batch]) for x in whole]
        assert np.allclose(cell(*part).asnumpy(), want[:batch], atol=atol)


# --- dropout ------------------------------------------------------------------------------------------
RATE = 0.4


def _dropper(engine):
    return FlashAttention(40, RATE, engine=engine)


def _dropped_weights(cell, *seed):
    """The dropped softmax weights (1, 2, 40, 40) themselves: the values are the unit vectors."""
    x = tensor((1, 2, 40, 40), dtype_for(cell.engine)) * 0.1
    eye = Tensor(np.broadcast_to(np.eye(40, dtype=np.float32), (1, 2, 40, 40)).copy()).astype(x.dtype)
    return cell(x, x, eye, None, None, *seed).astype(ms.float32).asnumpy()


def _kept(seed):
    b, h, i, j = np.ogrid[:1, :2, :40, :40]
    return dropout.keep(np, np.uint32(seed), b, h, i, j, RATE)


@pytest.mark.level0
def test_dropout_with_a_seed(engine, mode):
    """A given seed repeats, and drops exactly what `core.dropout.keep` says; kept weights grow by 1 / (1 - rate)."""
    cell = _dropper(engine)
    full = _dropped_weights(cell.set_train(False), 7)
    assert (full > 0).all()  # evaluation mode: no dropout, seed or not
    cell.set_train(True)
    dropped = _dropped_weights(cell, 7)
    assert np.array_equal(dropped > 0, _kept(7))
    assert np.allclose(dropped, np.where(_kept(7), full / (1 - RATE), 0), rtol=2e-3, atol=1e-6)
    for seed in (7, 2**32 - 5):
        assert np.array_equal(_dropped_weights(cell, Tensor(np.uint32(seed))) > 0, _kept(seed))
    assert int(cell.dropout_step.asnumpy()) == 0  # a given seed moves nothing


@pytest.mark.level1
def test_dropout_equals_the_twin(engine):
    jax = pytest.importorskip("jax")
    from flash_attention.jax import FlashAttention as Twin

    dtype = dtype_for(engine)
    x = tensor(SHAPE, dtype, seed=1)
    cell = FlashAttention(16, RATE, causal=True, alibi=True, engine=engine).set_train()
    twin = Twin(16, RATE, causal=True, alibi=True)
    ours = cell(x, x, x, None, None, 11).asnumpy()
    y = jax.numpy.asarray(x.asnumpy())
    theirs = np.asarray(twin(y, y, y, deterministic=False, dropout_seed=11))
    assert np.allclose(ours, theirs, rtol=1e-4, atol=4e-3 if dtype == ms.float16 else 1e-5)
    assert not np.allclose(ours, np.asarray(twin(y, y, y)), atol=1e-2)


@pytest.mark.level0
def test_dropout_without_a_seed(engine, mode):
    """Other places at each training call and in each Cell; evaluation leaves the counter alone."""
    one, two = _dropper(engine), _dropper(engine)
    full = _dropped_weights(one.set_train(False))
    assert (full > 0).all() and int(one.dropout_step.asnumpy()) == 0
    one.set_train(True), two.set_train(True)
    patterns = [_dropped_weights(cell) > 0 for cell in (one, one, one, two)]
    assert int(one.dropout_step.asnumpy()) == 3
    for index, pattern in enumerate(patterns):
        assert abs(pattern.mean() - (1 - RATE)) < 0.05  # 3,200 weights: 6 standard deviations
        for other in patterns[:index]:
            agreement = RATE**2 + (1 - RATE) ** 2
            assert abs((pattern == other).mean() - agreement) < 0.06  # as independent draws agree


@pytest.mark.level0
def test_the_global_seed_decides(engine):
    """`mindspore.set_seed` before construction moves every draw."""
    before = ms.get_seed()
    x = tensor((1, 1, 40, 40), dtype_for(engine))
    outs = []
    try:
        for seed in (1, 2):
            ms.set_seed(seed)
            outs.append(_dropper(engine).set_train()(x, x, x).asnumpy())
    finally:
        ms.set_seed(before or 0)
    assert not np.allclose(outs[0], outs[1], atol=1e-2)


# --- the rest of the contract -------------------------------------------------------------------------
@pytest.mark.level0
@pytest.mark.parametrize(
    "strategy, out_strategy",
    [
        (((2, 4, 1, 1),) * 3, None),
        (((2, 1, 1, 1),) * 4, ((2, 1, 1, 1),)),
        (((1, 2, 1, 1),) * 5, None),
    ],
    ids=["three inputs", "mask and output", "alibi_mask"],
)
def test_shard_stores_the_strategy(strategy, out_strategy):
    cell = FlashAttention(16)
    assert cell.shard(strategy, out_strategy) is cell
    assert cell.strategy == (strategy, out_strategy)
    assert (cell.dp, cell.mp) == strategy[0][:2]


@pytest.mark.level0
def test_a_sharded_cell_computes_the_same_alone(engine):
    cell = FlashAttention(16, dp=2, mp=4, engine=engine)
    assert cell.shard() is cell and (cell.dp, cell.mp) == (2, 4)
    cell.shard(((1, 2, 1, 1),) * 3)
    x = tensor(SHAPE, dtype_for(engine))
    assert np.array_equal(cell(x, x, x).asnumpy(), FlashAttention(16, engine=engine)(x, x, x).asnumpy())


class Functional(nn.Cell):
    """A user's Cell around the functional call."""

    def __init__(self, engine):
        super().__init__()
        self.engine = engine

    def construct(self, query, key, value, keep):
        return flash_attention(query, key, value, mask=keep, is_causal=True, engine=self.engine)


@pytest.mark.level0
def test_functional_call_in_a_cell(engine, mode):
    """BSND and keep where True: the Cell's results with everything turned around."""
    dtype = dtype_for(engine)
    query, key, value = (tensor((2, 40, 2, 16), dtype, seed) for seed in range(3))
    keep = np.random.RandomState(3).rand(40, 40) < 0.7
    out = Functional(engine)(query, key, value, Tensor(keep)).asnumpy()
    turned = [Tensor(np.ascontiguousarray(x.asnumpy().swapaxes(1, 2))) for x in (query, key, value)]
    want = FlashAttention(16, causal=True, engine=engine)(*turned, Tensor(~keep)).asnumpy()
    assert np.allclose(out.swapaxes(1, 2), want, atol=2e-3 if dtype == ms.float16 else 1e-6)


@pytest.mark.level0
def test_every_import_path_gives_the_same_cell():
    import flash_attention.nn
    import flash_attention.nn.layer

    assert flash_attention.nn.FlashAttention is FlashAttention
    assert flash_attention.nn.layer.FlashAttention is FlashAttention
