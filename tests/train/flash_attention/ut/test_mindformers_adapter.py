"""The mindformers adapter without the library: its arguments in terms of our Cell's, layouts, and every refusal."""

import types

import numpy as np
import pytest
from mindspore import Tensor

from flash_attention.core.errors import UnsupportedError
from flash_attention.integrations import mindformers
from flash_attention.integrations.mindformers import FlashAttention
from flash_attention.nn.layer.flash_attention import FlashAttention as Cell

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
B, N, NKV, S, D = 2, 4, 2, 24, 8
SCALE = 0.3


def numbers(heads, seed):
    return np.random.RandomState(seed).standard_normal((B, heads, S, D)).astype(np.float32)


QUERY, KEY, VALUE = numbers(N, 0), numbers(NKV, 1), numbers(NKV, 2)
LAID_OUT = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.swapaxes(1, 2),
    "BSH": lambda x: x.swapaxes(1, 2).reshape(B, S, -1),
    "SBH": lambda x: x.swapaxes(1, 2).reshape(B, S, -1).swapaxes(0, 1),
}
DISCARD = (np.random.RandomState(3).rand(B, 1, S, S) < 0.3).astype(np.uint8)
TRIANGLE = Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))


def run(arguments, *masks, layout="BNSD"):
    """The adapter's output, in BNSD."""
    tensors = [Tensor(np.ascontiguousarray(LAID_OUT[layout](x))) for x in (QUERY, KEY, VALUE)]
    cell = FlashAttention(N, scale_value=SCALE, input_layout=layout, **arguments)
    out = cell(*tensors, *[Tensor(x) if isinstance(x, np.ndarray) else x for x in masks]).asnumpy()
    assert out.shape == tensors[0].shape
    if layout == "SBH":
        out = out.swapaxes(0, 1)
    return out if layout == "BNSD" else out.reshape(B, S, N, D).swapaxes(1, 2)


def want(mask=None, alibi_mask=None, **options):
    cell = Cell(D, scale=SCALE, alibi=alibi_mask is not None, **options)
    tensors = [None if x is None else Tensor(x) for x in (QUERY, KEY, VALUE, mask, alibi_mask)]
    return cell(*tensors).asnumpy()


@pytest.mark.parametrize("layout", sorted(LAID_OUT))
def test_layouts(layout, mode):
    assert np.allclose(run({}, DISCARD, layout=layout), want(DISCARD), atol=1e-6)


TOKENS = {"pre_tokens": 5, "next_tokens": 0}
MODES = [
    ("tokens are void without a mask", dict(TOKENS, use_attention_mask=False), None, lambda: want()),
    ("mask and tokens", TOKENS, DISCARD, lambda: want(DISCARD, local_window_size=(5, 0))),
    ("65536 tokens", {"pre_tokens": 65536, "next_tokens": 0}, DISCARD, lambda: want(DISCARD, causal=True)),
    ("allMask", dict(TOKENS, sparse_mode=1), DISCARD, lambda: want(DISCARD)),
    ("leftUpCausal", {"sparse_mode": 2}, TRIANGLE, lambda: want(causal=True)),
    ("rightDownCausal", {"sparse_mode": 3}, None, lambda: want(causal=True)),
    ("band", dict(pre_tokens=3, next_tokens=2, sparse_mode=4), TRIANGLE, lambda: want(local_window_size=(3, 2))),
]


@pytest.mark.parametrize("arguments, mask, expected", [case[1:] for case in MODES], ids=[case[0] for case in MODES])
def test_sparse_modes(arguments, mask, expected):
    assert np.allclose(run(arguments, mask), expected(), atol=1e-6)


def test_alibi_mask_is_added_to_the_scaled_scores():
    alibi = np.random.RandomState(4).standard_normal((B, N, S, S)).astype(np.float32)
    arguments = {"use_alibi_mask": True, "next_tokens": 0}
    result = run(arguments, DISCARD, alibi)
    assert np.allclose(result, want(DISCARD, alibi, causal=True), atol=1e-6)
    assert not np.allclose(result, want(DISCARD, alibi / SCALE, causal=True), atol=1e-2)


def test_dropout_acts_in_training():
    cell = FlashAttention(N, keep_prob=0.5, input_layout="BNSD", use_attention_mask=False)
    tensors = [Tensor(x) for x in (QUERY, KEY, VALUE)]
    still, again = (cell.set_train(False)(*tensors).asnumpy() for _ in range(2))
    assert np.array_equal(still, again)
    assert not np.allclose(cell.set_train(True)(*tensors).asnumpy(), still, atol=1e-2)
    assert cell.attention.dropout_rate == 0.5


def test_shard():
    cell = FlashAttention(N)
    config = types.SimpleNamespace(data_parallel=2, model_parallel=4, context_parallel=1)
    assert cell.shard(config) is cell and (cell.attention.dp, cell.attention.mp) == (2, 4)
    assert cell.shard(None) is cell and (cell.attention.dp, cell.attention.mp) == (1, 1)
    config.context_parallel = 2
    with pytest.raises(UnsupportedError, match="'context_parallel' must be 1 .a sequence is not split., but got 2."):
        cell.shard(config)
    with pytest.raises(ValueError, match="'use_mqa' must be False when mp > 1"):
        FlashAttention(N, use_mqa=True).shard(types.SimpleNamespace(data_parallel=1, model_parallel=2))


CONSTRUCTOR = [
    ({"use_ring_attention": True}, UnsupportedError, "'use_ring_attention' must be False, but got True. Key and value"),
    ({"use_3d_tensor_parallel": True}, UnsupportedError, "'use_3d_tensor_parallel' must be False, but got True. Key"),
    ({"tp_y": 2}, UnsupportedError, "'tp_y' must be 1, but got 2. Key and value stay whole"),
    ({"use_actual_seqlen": True}, UnsupportedError, "'use_actual_seqlen' must be False, but got True. Packed"),
    (
        {"input_layout": "TND"},
        UnsupportedError,
        "'input_layout' must be one of BSH, BNSD, SBH, BSND, but got TND. Pack",
    ),
    ({"input_layout": "NSBD"}, ValueError, "'input_layout' must be one of BSH, BNSD, SBH, BSND, but got 'NSBD'."),
    (
        {"sparse_mode": 5},
        UnsupportedError,
        "'sparse_mode' must be one of 0 .defaultMask., 1 .allMask., 2 .leftUpCausal",
    ),
    ({"sparse_mode": 8}, UnsupportedError, "4 .band., but got 8. Give the whole mask in mode 1"),
    ({"sparse_mode": 1, "use_attention_mask": False}, ValueError, "must be True in sparse mode 1"),
    ({"next_tokens": -3}, ValueError, "'next_tokens' must be an int >= 0, but got -3. A band that leaves out"),
    ({"pre_tokens": 2.0}, TypeError, "'pre_tokens' must be an int >= 0, but got 2.0 .float."),
    ({"keep_prob": 0}, ValueError, "'keep_prob' must be a float in .0, 1], but got 0."),
    ({"keep_prob": "1"}, TypeError, "'keep_prob' must be a float in .0, 1], but got '1'."),
    ({"use_alibi_mask": 1}, TypeError, "'use_alibi_mask' must be a bool, but got 1 .int."),
    ({"head_num": 0}, ValueError, "'head_num' must be an int >= 1, but got 0."),
]


@pytest.mark.parametrize("arguments, error, text", CONSTRUCTOR, ids=[str(case[0]) for case in CONSTRUCTOR])
def test_constructor_refuses(arguments, error, text):
    with pytest.raises(error, match=text) as caught:
        FlashAttention(**dict({"head_num": N}, **arguments))
    assert type(caught.value) is error
    assert str(caught.value).startswith("For 'mindformers.FlashAttention', '")


X = Tensor(QUERY)
SHORT = Tensor(QUERY[:, :, :8])
INT8 = Tensor(QUERY.astype(np.int8))
LENGTHS = {"actual_seq_qlen": Tensor(np.array([24, 48])), "actual_seq_kvlen": Tensor(np.array([24, 48]))}
CALLS = [
    ({}, (X, X, X), {}, "'attn_mask' must be a tensor in sparse mode 0, but got None. Build it with"),
    ({"use_attention_mask": False}, (X, X, X, Tensor(DISCARD)), {}, "'attn_mask' must be None when use_attention_mask"),
    ({}, (X, X, X, TRIANGLE), {}, r"'attn_mask' must be of shape \(..., 24, 24\), but got shape \(2048, 2048\)."),
    (
        {"sparse_mode": 2},
        (X, X, X, Tensor(DISCARD)),
        {},
        r"must be None or the \(2048, 2048\) triangle in sparse mode 2",
    ),
    ({}, (X, X, X, Tensor(DISCARD), X), {}, "'alibi_mask' must be None when use_alibi_mask=False, but got a tensor."),
    (
        {"use_alibi_mask": True},
        (X, X, X, Tensor(DISCARD)),
        {},
        "must be a tensor when use_alibi_mask=True, but got None.",
    ),
    (
        {},
        (X, X, X, Tensor(DISCARD)),
        LENGTHS,
        "'actual_seq_qlen' must be None, but got a tensor. Express it in attn_mask",
    ),
    ({}, (X, X, X, Tensor(DISCARD)), {"prefix": Tensor(np.array([1, 2]))}, "'prefix' must be None, but got a tensor."),
    ({"sparse_mode": 2}, (SHORT, X, X), {}, "lengths 8 and 24. Modes 3 and 4 count from the bottom-right one"),
    ({"head_num": 3}, (X, X, X, Tensor(DISCARD)), {}, "'query' must be of 3 heads, as head_num says, but got 4."),
    ({"input_layout": "BSH"}, (X, X, X), {}, "'query' must be of rank 3 with layout BSH, like key and value, but got"),
    ({}, (INT8, INT8, INT8, Tensor(DISCARD)), {}, "'query' must be of dtype .*float16.*, but got int8"),
    ({}, (X, INT8, INT8, Tensor(DISCARD)), {}, "'key' must be of .*float.*, but got int8"),
]


@pytest.mark.parametrize("arguments, tensors, more, text", CALLS, ids=[case[3][:60] for case in CALLS])
def test_call_refuses(arguments, tensors, more, text, mode):
    cell = FlashAttention(**dict({"head_num": N, "input_layout": "BNSD"}, **arguments))
    names = ("query", "key", "value", "attn_mask", "alibi_mask", "prefix", "padding_mask") + tuple(LENGTHS)
    inputs = dict(zip(names, tensors), **more)
    with pytest.raises((ValueError, TypeError), match=text):
        cell(*[inputs.get(name) for name in names])


def test_the_last_place_of_mode_3_sees_everything():
    """Modes 3 and 4 align bottom-right: a short query is the end of the sequence."""
    cell = FlashAttention(N, input_layout="BNSD", sparse_mode=3)
    whole = cell(X, Tensor(KEY), Tensor(VALUE)).asnumpy()
    part = cell(Tensor(QUERY[:, :, -5:]), Tensor(KEY), Tensor(VALUE)).asnumpy()
    assert np.allclose(part, whole[:, :, -5:], atol=1e-6)


# --- enable and disable, on a stand-in of the library ----------------------------------------------
@pytest.fixture
def library(monkeypatch):
    """Modules named as mindformers', with a FlashAttention that two of them hold."""

    def module(name, **contents):
        made = types.ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(__import__("sys").modules, name, made)
        return made

    class Theirs:
        pass

    module("mindformers", __version__="1.9.0")
    module("mindformers.modules")
    home = module("mindformers.modules.flash_attention", FlashAttention=Theirs)
    user = module("mindformers.models", Attention=Theirs, other=3)
    yield types.SimpleNamespace(Theirs=Theirs, home=home, user=user)
    mindformers.disable()


def test_enable_replaces_the_class_wherever_it_is_held(library):
    mindformers.enable("portable")
    for held in (library.home.FlashAttention, library.user.Attention):
        assert issubclass(held, FlashAttention) and held.engine == "portable"
    assert library.home.FlashAttention(4).attention.engine == "portable"
    assert FlashAttention.engine is None and library.user.other == 3
    mindformers.disable()
    assert library.home.FlashAttention is library.user.Attention is library.Theirs


def test_enable_is_a_context_manager_and_nests(library):
    with mindformers.enable("portable"):
        with mindformers.enable():
            assert library.user.Attention.engine is None
        assert library.user.Attention.engine == "portable"
    assert library.user.Attention is library.Theirs
    mindformers.disable()
    assert library.user.Attention is library.Theirs


def test_unknown_versions_and_engines(library, monkeypatch):
    monkeypatch.setattr(__import__("mindformers"), "__version__", "2.1.0")
    with pytest.raises(UnsupportedError) as caught:
        mindformers.enable()
    assert str(caught.value) == (
        "For 'flash_attention.integrations.mindformers', 'mindformers' must be one of the tested versions 1.3.2, "
        "1.9.0, but got 2.1.0. Install one of those, or try this one with any_version=True."
    )
    assert library.user.Attention is library.Theirs
    with mindformers.enable(any_version=True):
        assert library.user.Attention is not library.Theirs
    with pytest.raises(ValueError, match="'engine' must be"):
        mindformers.enable("fast", any_version=True)
    assert library.user.Attention is library.Theirs


def test_the_cell_takes_the_older_names():
    """MindSpore's older class: head_num checked at the call, high_precision, use_mqa."""
    query = Tensor(QUERY)
    plain = Cell(D, causal=True)(query, query, query).asnumpy()
    for options in ({"head_num": N}, {"high_precision": True}, {"use_mqa": True}):
        assert np.array_equal(Cell(D, causal=True, **options)(query, query, query).asnumpy(), plain)
    assert np.array_equal(Cell(None, causal=True)(query, query, query).asnumpy(), plain)
    with pytest.raises(ValueError) as caught:
        Cell(D, head_num=8)(query, query, query)
    assert str(caught.value) == "For 'FlashAttention', 'query' must be of 8 heads, as head_num says, but got 4."
    with pytest.raises(ValueError, match="'use_mqa' must be False when mp > 1"):
        Cell(D, mp=2, use_mqa=True)
    with pytest.raises(TypeError, match="'high_precision' must be a bool, but got None"):
        Cell(D, high_precision=None)
