"""Atlas A2/A3: numpy models against the documentation's examples, the choice of operators, the Cells on the models."""

import inspect

import numpy as np
import pytest
from mindspore import Tensor, ops
from support.cached import Case
from support.cached_mindspore import InMindSpore

from flash_attention.core.errors import UnsupportedError
from flash_attention_infer.atlas import mapping, model
from flash_attention_infer.atlas.attention import AtlasAttention
from flash_attention_infer.nn import KVCache
from flash_attention_infer.nn.cache import tensors

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
OPERATORS = ("prompt_flash_attention", "incre_flash_attention", "fused_infer_attention_score")


def softmax_attention(q, k, v, scale=1.0):
    """The documents' formula on (B, N, S, D), float32."""
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


# --- the models -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPERATORS)
def test_models_take_the_operators_arguments(name):
    """Same names and defaults, so that a call which the model takes is one that the operator takes."""
    if not hasattr(ops, name):
        pytest.skip("this MindSpore has no ops.{}".format(name))
    want = inspect.signature(getattr(ops, name)).parameters
    for argument in inspect.signature(getattr(model, name)).parameters.values():
        assert argument.name in want and argument.default == want[argument.name].default, argument


def test_the_documents_examples():
    ones = np.ones((1, 16, 256, 16), np.float16)
    out = model.prompt_flash_attention(ones, ones, ones, num_heads=16, input_layout="BNSD")
    assert out.shape == (1, 16, 256, 16) and (out == 1).all()

    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, s, h)).astype(np.float16) for s, h in ((1, 512), (10, 128), (10, 128)))
    out = model.incre_flash_attention(query, [key], [value], num_heads=4, num_key_value_heads=1)
    want = softmax_attention(query.reshape(1, 4, 1, 128), *(x[:, None] for x in (key, value)))  # scale_value is 1.0
    assert out.shape == (1, 1, 512)
    np.testing.assert_allclose(out.reshape(want.shape), want, atol=2e-3)

    query, key, value = rng.random((3, 1, 8, 64, 128)).astype(np.float16)
    out, lse = model.fused_infer_attention_score(query, key, value, num_heads=8, input_layout="BNSD")
    np.testing.assert_allclose(out, softmax_attention(query, key, value), atol=2e-3)
    assert out.shape == query.shape and lse.shape == (1,)


def test_the_paged_examples():
    """ReshapeAndCache, then PagedAttention: four tokens, 40 heads, blocks of 16, as in the primitives' docstrings."""
    rng = np.random.default_rng(1)
    query, key, value = rng.standard_normal((3, 4, 40, 128)).astype(np.float16)
    caches = [np.zeros((8, 16, 40, 128), np.float16) for _ in range(2)]
    slots = np.array([16, 33, 90, 127], np.int32)
    assert model.reshape_and_cache(key, value, *caches, slots) is key
    np.testing.assert_array_equal(caches[1].reshape(128, 40, 128)[slots], value)
    assert np.count_nonzero(caches[0].any((2, 3))) == 4
    out = model.paged_attention(query, *caches, slots[:, None] // 16, np.full(4, 16), 40, 128**-0.5, 40)
    blocks = [x[slots // 16].swapaxes(1, 2) for x in caches]
    want = softmax_attention(query[:, :, None], *blocks, scale=128**-0.5)[:, :, 0]
    np.testing.assert_allclose(out, want, atol=2e-3)


@pytest.mark.parametrize("act, match", [
    (lambda x: model.prompt_flash_attention(x, x, x, num_heads=2, sparse_mode=5), "'sparse_mode' must be"),
    (lambda x: model.prompt_flash_attention(x, x, x, num_heads=2, sparse_mode=2), "sparse_mode 2 needs a mask"),
    (lambda x: model.prompt_flash_attention(x, x, x, num_heads=2, actual_seq_lengths=[0]), r"must be in \[1, S\]"),
    (lambda x: model.incre_flash_attention(x, [x], [x], num_heads=2), "Q_S must be 1"),
    (lambda x: model.incre_flash_attention(x[:, :1], [x], [x], num_heads=2, block_table=[[0]], block_size=4),
     "'block_size' must be a multiple of 16"),
    (lambda x: model.fused_infer_attention_score(x, x, x, num_heads=2, block_table=[[0]]), "invalid when Q_S > 1"),
])  # fmt: skip
def test_models_refuse_what_the_documents_forbid(act, match):
    with pytest.raises(ValueError, match=match):
        act(np.ones((1, 4, 32), np.float16))


# --- the choice -----------------------------------------------------------------------------------
def call(**fields):
    base = dict(tokens=1, fresh=False, heads=4, kv_heads=2, head_dim=16, dtype="float16", held="float16", block_size=16,
                scale=0.25)  # fmt: skip
    return mapping.CacheCall(**dict(base, **fields))


@pytest.mark.parametrize("fields, want", [
    (dict(tokens=9, fresh=True), ("prompt_flash_attention", "new", "triangle", False)),
    (dict(tokens=9, fresh=True, sinks=True), ("fused_infer_attention_score", "view", "full", False)),
    (dict(tokens=9, fresh=True, held="int8"), ("fused_infer_attention_score", "view", "full", False)),
    (dict(tokens=9), ("fused_infer_attention_score", "view", "full", False)),
    (dict(ring=True, window=8), ("fused_infer_attention_score", "view", "full", False)),
    (dict(), ("incre_flash_attention", "pool", None, False)),
    (dict(window=5), ("incre_flash_attention", "pool", "keys", False)),
    (dict(held="int8", block_size=32), ("fused_infer_attention_score", "pool", None, True)),
    (dict(sinks=True, window=5), ("fused_infer_attention_score", "pool", "keys", False)),
    (dict(lite=True), ("paged_attention", "pool", None, False)),
    (dict(lite=True, alibi=True), ("incre_flash_attention", "pool", None, False)),
    (dict(lite=True, dtype="bfloat16", held="bfloat16"), ("incre_flash_attention", "pool", None, False)),
])  # fmt: skip
def test_operator_of_a_call(fields, want):
    one = call(**fields)
    assert mapping.refused(one) is None
    got = mapping.map_call(one)
    assert (got.operator, got.keys, got.mask, got.scales) == want


@pytest.mark.parametrize("fields, text", [
    (dict(dtype="float32"), "'dtype' must be float16 or bfloat16, but got float32. Use engine='portable'."),
    (dict(head_dim=24), "'head_dim' must be a multiple of 16, at most 512, but got 24. Use engine='portable'."),
    (dict(heads=130), "'heads' must be at most 256, and at most 64 to a key/value head, but got 130. "
     "Use engine='portable'."),
    (dict(soft_cap=3.0), "'logits_soft_cap' must be None (no operator has a soft cap), but got 3.0. "
     "Use engine='portable'."),
    (dict(held="int8"), "'block_size' must be a multiple of 16, with an int8 cache of 32, but got 16. "
     "Make the cache with another block_size."),
    (dict(held="float32"), "'cache dtype' must be that of the query, or int8, but got float32. "
     "Make the cache in the query's dtype."),
])  # fmt: skip
def test_refusals(fields, text):
    assert str(mapping.refused(call(**fields))) == text
    assert len(mapping.table()) == len(mapping.LIMITS) + 2


# --- the Cells on the models ----------------------------------------------------------------------
def on_model(function):
    """A function of MindSpore tensors from one of numpy arrays."""

    def to_numpy(x):
        if isinstance(x, (list, tuple)):
            return [to_numpy(one) for one in x]
        return x.asnumpy() if isinstance(x, Tensor) else x

    def run(*args, **options):
        results = function(*to_numpy(args), **{name: to_numpy(x) for name, x in options.items()})
        return tuple(map(Tensor, results)) if isinstance(results, tuple) else Tensor(results)

    return run


def put_on_model(key, value, key_cache, value_cache, slots):
    """The primitive writes in place."""
    arrays = [x.asnumpy().copy() for x in (key_cache, value_cache)]
    model.reshape_and_cache(key.asnumpy(), value.asnumpy(), *arrays, slots.asnumpy())
    key_cache.set_data(Tensor(arrays[0]))
    value_cache.set_data(Tensor(arrays[1]))


class AtlasCache(KVCache):
    """A cache whose attention is AtlasAttention."""

    lite = False

    def prefill(self, layer, step, query, key, value, alibi_slopes=None, sinks=None, **options):
        cell = AtlasAttention(self.layers[layer], query.shape[2], lite=self.lite, **options)
        if self.lite:
            numbers = (query.shape[2], cell.scale, cell.kv_heads)
            cell.paged = on_model(lambda *arrays: model.paged_attention(*arrays, *numbers))
            cell.put = put_on_model
        return cell(query, key, value, *tensors(step), alibi_slopes, sinks, step.fresh)

    decode = prefill


class OnAtlas(InMindSpore):
    KVCache, engine = AtlasCache, {}


class LiteCache(AtlasCache):
    lite = True


HALF = dict(dtype="float16")
CASES = [
    (Case("plain", **HALF), 16),
    (Case("window", window=9, **HALF), 16),
    (Case("ALiBi and window", window=9, alibi=True, scale=0.3, **HALF), 16),
    (Case("sinks", sinks=True, **HALF), 16),
    (Case("int8", held="int8", **HALF), 32),
    (Case("ring", "sliding", window=7, sink_tokens=3, sinks=True, alibi=True, **HALF), 16),
]


@pytest.fixture
def operators(monkeypatch):
    """The three functions of mindspore.ops, on the models; gives the names of those that were called."""
    called = []

    def counted(name):
        run = on_model(getattr(model, name))

        def call(*args, **options):
            called.append(name)
            return run(*args, **options)

        return call

    for name in OPERATORS:
        monkeypatch.setattr(ops, name, counted(name), raising=False)
    return called


FAST = ("int8", "ring")


@pytest.mark.parametrize("case, block_size", [
    pytest.param(case, size, id=case.name, marks=() if case.name in FAST else pytest.mark.slow) for case, size in CASES
])  # fmt: skip
def test_cells_on_the_models(operators, case, block_size):
    """Chunks, single tokens, ragged batches and speculation against one forward over everything."""
    here = OnAtlas()
    here.block_size = block_size
    here.check_plan(case, 21, [([12, 9], False, None), ([1, 1], True, None), ([3, 3], True, 2), ([0, 4], False, None),
                               ([6, 1], False, None), ([0, 4], False, None)], lookahead=4)  # fmt: skip
    assert operators


def test_lite_writes_and_reads_by_the_primitives(operators):
    here = OnAtlas()
    here.KVCache, here.block_size = LiteCache, 16
    here.check_plan(Case("lite", **HALF), 14, here.one_by_one(14, first=12), poison=False)
    assert set(operators) == {"prompt_flash_attention"}, "single tokens are PagedAttention's"


def test_a_refused_call_says_why():
    cache = AtlasCache.paged(1, 4, 2, 16, block_size=16, dtype="float16")
    x = Tensor(np.zeros((1, 1, 2, 16), np.float16))
    with cache.step([cache.add()], [1]) as step:
        with pytest.raises(UnsupportedError, match="For 'AtlasAttention', 'logits_soft_cap' must be None"):
            cache.prefill(0, step, x, x, x, logits_soft_cap=2.0)
