"""What the mindone integration does without the library: forms of a mask, the registered function, every refusal."""

import types

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from flash_attention.core.errors import UnsupportedError
from flash_attention.integrations import mindone
from flash_attention.ops import flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
B, N, NKV, S, D = 2, 4, 2, 24, 8
MODULE = types.SimpleNamespace(is_causal=True)


def numbers(*shape, seed):
    return Tensor(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


QUERY, KEY, VALUE = numbers(B, N, S, D, seed=0), numbers(B, NKV, S, D, seed=1), numbers(B, NKV, S, D, seed=2)
ROWS, COLUMNS = np.ogrid[:S, :S]
CAUSAL = np.broadcast_to(ROWS >= COLUMNS, (B, 1, S, S))
PADDING = COLUMNS < np.array([[S], [S - 7]])
ADDED = np.where(CAUSAL & PADDING[:, None, None], 0, np.finfo(np.float32).min).astype(np.float32)
SLOPES = np.random.RandomState(4).rand(B, N, 1, S).astype(np.float32)


def want(keep=None, **options):
    keep = None if keep is None else Tensor(np.ascontiguousarray(keep))
    out = flash_attention(QUERY, KEY, VALUE, mask=keep, layout="BNSD", **options)
    return out.asnumpy().swapaxes(1, 2)


def call(mask=None, engine=None, module=MODULE, **options):
    mask = None if mask is None else Tensor(np.ascontiguousarray(mask))
    out, weights = mindone.registered(engine)(module, QUERY, KEY, VALUE, mask, **options)
    assert weights is None
    return out.asnumpy()


FORMS = [
    ("none", None, {"is_causal": True}),
    ("padding", PADDING.astype(np.int32), {"keep": CAUSAL & PADDING[:, None, None]}),
    ("bool", CAUSAL & PADDING[:, None, None], {"keep": CAUSAL & PADDING[:, None, None]}),
    ("added", ADDED, {"keep": CAUSAL & PADDING[:, None, None]}),
    (
        "added, one key longer",
        np.pad(ADDED, ((0, 0), (0, 0), (0, 0), (0, 1))),
        {"keep": CAUSAL & PADDING[:, None, None]},
    ),
]


@pytest.mark.parametrize("mask, expected", [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_every_form_of_a_mask(mask, expected):
    assert np.allclose(call(mask), want(**expected), atol=1e-6)


class Layer(nn.Cell):
    """Calls the registered function as a model's layer does."""

    def __init__(self):
        super().__init__()
        self.is_causal = True
        self.attention = mindone.registered("portable")

    def construct(self, query, key, value, mask):
        return self.attention(self, query, key, value, mask, dropout=0.0, use_cache=False)[0]


def test_in_a_graph():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        out = Layer()(QUERY, KEY, VALUE, Tensor(PADDING.astype(np.int32))).asnumpy()
    finally:
        ms.set_context(mode=before)
    assert np.allclose(out, call(PADDING.astype(np.int32)), atol=1e-6)


def test_a_soft_mask_is_added_as_it_is():
    soft = np.random.RandomState(5).standard_normal((B, 1, S, S)).astype(np.float32)
    assert np.allclose(call(soft), want(bias=Tensor(soft)), atol=1e-6)


def test_options_of_the_call():
    plain = types.SimpleNamespace(is_causal=False)
    assert np.allclose(call(module=plain), want(), atol=1e-6)
    assert np.allclose(call(is_causal=False), want(), atol=1e-6)
    assert np.allclose(call(scaling=0.2), want(is_causal=True, scale=0.2), atol=1e-6)
    assert np.allclose(call(sliding_window=3), want(is_causal=True, local_window_size=(2, 0)), atol=1e-6)
    assert np.allclose(call(softcap=2.0), want(is_causal=True, logits_soft_cap=2.0), atol=1e-6)
    sinks = numbers(N, seed=6)
    assert np.allclose(call(s_aux=sinks), want(is_causal=True, sinks=sinks), atol=1e-6)
    harmless = {"position_ids": QUERY, "use_cache": True, "cache_position": QUERY, "output_attentions": False}
    assert np.array_equal(call(**harmless), call())


def test_mask_and_bias_together():
    """MPT and Falcon: ALiBi along the keys beside the mask."""
    args = (QUERY, KEY, VALUE, Tensor(ADDED), Tensor(SLOPES))
    out = mindone.attend(*args, scale=None, causal=False).asnumpy()
    assert np.allclose(out, want(CAUSAL & PADDING[:, None, None], bias=Tensor(SLOPES)), atol=1e-6)


def test_dropout_follows_the_query():
    first, again = call(dropout=0.5), call(dropout=0.5)
    assert np.array_equal(first, again)
    assert not np.allclose(first, call(), atol=1e-2)
    other = mindone.registered(None)(MODULE, QUERY * 1.001, KEY, VALUE, None, dropout=0.5)[0].asnumpy()
    assert np.mean(np.abs(other - first) > 1e-2) > 0.2  # other places


@pytest.mark.parametrize(
    "options, text",
    [
        (
            {"output_attentions": True},
            "'output_attentions' must be None or False, but got True. The softmax weights are",
        ),
        ({"head_mask": QUERY}, "'head_mask' must be None or False, but got True. The softmax weights are never formed"),
        ({"cu_seq_lens_q": QUERY}, "'cu_seq_lens_q' must be None or False, but got True. Give the whole mask instead."),
        ({"position_bias": QUERY}, "'position_bias' must be absent, but got a value. This attention function does not"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(UnsupportedError, match=text) as caught:
        call(**options)
    assert str(caught.value).startswith("For 'flash_attention.integrations.mindone', ")


# --- masks ----------------------------------------------------------------------------------------
def causal(batch, head, row, column):
    return column <= row


def packed(batch, head, row, column):
    return (column <= row) & (row // 10 == column // 10)


def test_masks_without_tokens_by_tokens():
    make = mindone.mask_for_causal(causal)
    place = Tensor(np.arange(S), ms.int32)
    padding = Tensor(PADDING)
    options = {"batch_size": B, "cache_position": place, "kv_length": S, "dtype": ms.float32}
    assert make(mask_function=causal, **options) is None
    assert make(mask_function=causal, attention_mask=padding, **options) is padding
    keep = make(mask_function=packed, attention_mask=padding, **options).asnumpy()
    expected = CAUSAL & (ROWS // 10 == COLUMNS // 10) & PADDING[:, None, None]
    assert np.array_equal(np.broadcast_to(keep, expected.shape), expected)


def test_a_models_mask_stays_short_only_where_that_says_everything():
    class Dynamic:
        pass

    class Static:
        pass

    def model(name):
        return types.SimpleNamespace(config=types.SimpleNamespace(_attn_implementation=name))

    def original(self, attention_mask, input_tensor, cache_position, past_key_values, output_attentions=False, *more):
        return "whole"

    short = mindone.short_mask(original, "flash_910", Dynamic)
    padding, whole = Tensor(PADDING), Tensor(ADDED)
    mine = model("flash_910")
    assert short(mine, None, None, None, None) is None
    assert short(mine, padding, None, None, None, False) is padding
    assert short(mine, padding, None, None, Dynamic()) is padding
    for arguments in (
        (whole, None, None, None),
        (padding, None, None, Static()),
        (None, None, None, None, False, None, 1),
    ):
        assert short(mine, *arguments) == "whole"
    assert short(model("eager"), padding, None, None, None) == "whole"
