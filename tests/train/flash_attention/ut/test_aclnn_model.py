"""Engine 'aclnn', the numpy model: one test for each example and rule of the operator's documentation.

MS = MindSpore's docstrings, CANN = cann/ops-transformer, NPU = torch_npu.npu_fusion_attention (Ascend/op-plugin).
"""

import numpy as np
import pytest

pytest.importorskip("mindspore")

from flash_attention.ops.aclnn import model  # noqa: E402

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def draw(shape, seed=0):
    return np.random.RandomState(seed).randn(*shape).astype(np.float16)


def picture(shown):
    """A sparse mode's picture as text: '#' computed, '.' masked."""
    return ["".join(".#"[int(x)] for x in row) for row in shown]


def attend(query, key, value, shown, scale):
    """The formula in float64 over a boolean picture."""
    scores = np.matmul(query.astype(float), key.astype(float).swapaxes(-1, -2)) * scale
    weights = np.where(shown, np.exp(scores), 0.0)
    return np.matmul(weights / weights.sum(-1, keepdims=True), value.astype(float))


# --- whole examples ------------------------------------------------------------------------------
def test_example_of_the_mindspore_docstring():
    """MS: ones (2, 4, 64), BSH, head_num 4; the output keeps the shape, and means of ones are ones."""
    ones = np.ones((2, 4, 64), np.float16)
    peak, total, _, out = model.flash_attention_score(ones, ones, ones, 4)
    assert out.shape == (2, 4, 64) and (out == 1).all()
    assert peak.shape == total.shape == (2, 4, 4, 8) and (peak == 16).all() and (total == 4).all()


def test_example_of_the_cann_page():
    """CANN: SBH (256, 1, 128) of ones, mask of zeros, tokens 65536, scale 0.088388: statistics (1, 1, 256, 8)."""
    ones = np.ones((256, 1, 128), np.float16)
    peak, total, _, out = model.flash_attention_score(
        ones, ones, ones, 1, attn_mask=np.zeros((256, 256), np.uint8), scale_value=0.088388, pre_tokens=65536,
        next_tokens=65536, input_layout="SBH", sparse_mode=0,
    )  # fmt: skip
    assert out.shape == (256, 1, 128) and (out == 1).all()
    assert peak.shape == total.shape == (1, 1, 256, 8)
    np.testing.assert_allclose(peak, 0.088388 * 128, rtol=1e-6)
    np.testing.assert_allclose(total, 256.0)


@pytest.mark.parametrize(
    "mode,pre,after", [(0, 128, 128), (1, 65536, 65536), (2, 65536, 0), (3, 65536, 0), (4, 128, 128)]
)
def test_example_of_the_torch_npu_page(mode, pre, after):
    """NPU: (1, 8, 256, 256), scale 0.08838, masks as the page's custom_op_exec and get_atten_mask build them."""
    q, k, v = [draw((1, 8, 256, 256), seed) for seed in range(3)]
    outside = np.triu(np.ones((256, 256)), after + 1) + np.tril(np.ones((256, 256)), -pre - 1)
    mask = {0: outside.astype(bool), 1: None}.get(mode, np.triu(np.ones((2048, 2048)), 1).astype(bool))
    hidden = {0: outside, 1: 0 * outside, 4: outside}.get(mode, np.triu(np.ones((256, 256)), 1))
    out = model.flash_attention_score(
        q, k, v, 8, attn_mask=mask if mask is None or mode else np.broadcast_to(mask, (1, 8, 256, 256)),
        scale_value=0.08838, pre_tokens=pre, next_tokens=after, input_layout="BNSD", sparse_mode=mode,
    )[3]  # fmt: skip
    np.testing.assert_allclose(out, attend(q, k, v, hidden == 0, 0.08838), atol=2e-3)


# --- sparse modes ----------------------------------------------------------------------------------
def shown(q_len, kv_len, **arguments):
    return model.seen(q_len, kv_len, 1, 1, **arguments)[0, 0]


def discard(rows):
    """A mask (uint8, 1 = discard) from its picture."""
    return np.array([[int(x == ".") for x in row] for row in rows], np.uint8)


def test_mode_0_without_a_mask_ignores_the_tokens():
    assert shown(3, 4, sparse_mode=0, pre=0, after=0).all()


def test_any_mode_without_a_mask_computes_everything():
    """CANN: with attenMask None, sparseMode and the tokens do not take effect."""
    for mode in range(6):
        assert shown(3, 4, sparse_mode=mode, pre=0, after=0).all()


def test_mode_0_causal():
    """CANN: nextTokens 0, preTokens >= Sq, lower triangular mask."""
    rows = ["#....", "##...", "###..", "####."]
    assert picture(shown(4, 5, mask=discard(rows), pre=4, after=0)) == rows


def test_mode_0_band():
    """CANN: preTokens < Sq and nextTokens < Skv, both >= 0, band-shaped mask."""
    rows = ["##...", "###..", "####.", ".####"]
    assert picture(shown(4, 5, mask=discard(rows), pre=2, after=1)) == rows


def test_mode_0_negative_next_tokens():
    """CANN's picture: preTokens 9, nextTokens -3: keys 9 to 3 before the query."""
    i, j = np.arange(12)[:, None], np.arange(12)[None, :]
    inside = (i - 9 <= j) & (j <= i - 3)
    assert np.array_equal(shown(12, 12, mask=(~inside).astype(np.uint8), pre=9, after=-3), inside)


def test_mode_0_negative_pre_tokens():
    """CANN's picture: nextTokens 7, preTokens -3: keys 3 to 7 behind the query."""
    i, j = np.arange(12)[:, None], np.arange(12)[None, :]
    inside = (i + 3 <= j) & (j <= i + 7)
    assert np.array_equal(shown(12, 12, mask=(~inside).astype(np.uint8), pre=-3, after=7), inside)


def test_mode_0_needs_mask_and_tokens_to_agree():
    with pytest.raises(ValueError, match="'attn_mask' must agree with 'pre_tokens' and 'next_tokens'"):
        shown(4, 4, mask=np.zeros((4, 4), np.uint8), pre=4, after=0)


def test_mode_1_takes_the_mask_and_ignores_the_tokens():
    rows = ["#.#.#", ".#.#.", "#####", "#...."]
    assert picture(shown(4, 5, mask=discard(rows), sparse_mode=1, pre=0, after=0)) == rows


def test_mode_2_starts_top_left():
    assert picture(shown(3, 5, mask=model.triangle(), sparse_mode=2, pre=0)) == ["#....", "##...", "###.."]


def test_mode_3_ends_bottom_right():
    assert picture(shown(3, 5, mask=model.triangle(), sparse_mode=3, pre=0)) == ["###..", "####.", "#####"]
    assert picture(shown(5, 3, mask=model.triangle(), sparse_mode=3)) == ["...", "...", "#..", "##.", "###"]


def test_mode_4_counts_from_the_bottom_right():
    rows = [".###..", "..###.", "...###", "....##"]
    assert picture(shown(4, 6, mask=model.triangle(), sparse_mode=4, pre=1, after=1)) == rows


@pytest.mark.parametrize("mode", [2, 3, 4])
def test_modes_2_to_4_need_the_2048_triangle(mode):
    for mask in (np.zeros((2048, 2048), np.uint8), np.triu(np.ones((64, 64), np.uint8), 1)):
        with pytest.raises(ValueError, match=r"'attn_mask' must be the \(2048, 2048\) upper triangle"):
            shown(64, 64, mask=mask, sparse_mode=mode)


def test_mode_5_prefix():
    """CANN's picture: batch 2, prefix [4, 5]: the bottom-right triangle plus the N leftmost columns of each batch."""
    first = ["####..", "####..", "#####.", "######"]
    second = ["#####.", "#####.", "#####.", "######"]
    mask = np.stack([discard(first), discard(second)])[:, None]
    got = model.seen(4, 6, 2, 1, mask=mask, sparse_mode=5, prefix=[4, 5])
    assert picture(got[0, 0]) == first and picture(got[1, 0]) == second


@pytest.mark.parametrize("q_len,kv_len,bad", [(4, 6, 1), (4, 6, 7), (6, 4, -1), (6, 4, 5)])
def test_mode_5_range_of_prefix(q_len, kv_len, bad):
    """MS: S1 > S2: 0 .. S2, else S2 - S1 .. S2."""
    with pytest.raises(ValueError, match="'prefix' must be in"):
        model.seen(q_len, kv_len, 1, 1, np.zeros((1, 1, q_len, kv_len), np.uint8), 5, prefix=[bad])


@pytest.mark.parametrize("mode", [6, 7, 8])
def test_modes_6_to_8_are_not_implemented_in_mindspore(mode):
    with pytest.raises(ValueError, match="'sparse_mode' 6, 7 and 8 are not implemented"):
        shown(4, 4, mask=model.triangle(), sparse_mode=mode)


@pytest.mark.parametrize(
    "pre,after,text",
    [
        (-1, -1, "pre_tokens and next_tokens are both negative"),
        (-3, 2, "pre_tokens is negative"),  # next_tokens < |pre_tokens|
        (-6, 9, "pre_tokens is negative"),  # |pre_tokens| >= S2
        (2, -3, "next_tokens is negative"),  # |next_tokens| > pre_tokens
        (9, -4, "next_tokens is negative"),  # |next_tokens| >= S1
    ],
)
def test_forbidden_tokens(pre, after, text):
    """MS, next_tokens: the combinations that are not allowed, here for S1 = 4, S2 = 6."""
    with pytest.raises(ValueError, match=text):
        shown(4, 6, mask=model.triangle(), sparse_mode=4, pre=pre, after=after)
    assert shown(4, 6, mask=model.triangle(), sparse_mode=1 + 1, pre=pre, after=after).any()  # mode 2 ignores them


# --- the other arguments ---------------------------------------------------------------------------
def test_drop_mask_is_packed_and_scaled_by_keep_prob():
    """MS: uint8 (B, N1, S1, S2 // 8); NPU: keep_prob is the share of ones."""
    q, k, v = [draw((1, 2, 4, 16), seed) for seed in range(3)]
    k, v = np.repeat(k, 4, axis=2), np.repeat(v, 4, axis=2)
    drop = np.full((1, 2, 4, 2), 0b00000001, np.uint8)  # the first key of each eight is kept
    out = model.flash_attention_score(q, k, v, 2, drop_mask=drop, keep_prob=0.5, input_layout="BNSD")[3]
    scores = np.matmul(q.astype(float), k.astype(float).swapaxes(-1, -2))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True) * (np.arange(16) % 8 == 0) / 0.5
    np.testing.assert_allclose(out, np.matmul(weights, v.astype(float)), atol=5e-3)
    with pytest.raises(ValueError, match="'drop_mask' must be given exactly when 'keep_prob' < 1"):
        model.flash_attention_score(q, k, v, 2, drop_mask=drop, input_layout="BNSD")
    with pytest.raises(ValueError, match="'S2' must be a multiple of 8 with 'drop_mask'"):
        model.flash_attention_score(
            q, k[:, :, :12], v[:, :, :12], 2, drop_mask=drop, keep_prob=0.5, input_layout="BNSD"
        )


def test_scale_multiplies_real_shift():
    """CANN and the primitive: Softmax(scale * (pse + q k^T)); the choice is one constant of mapping.py."""
    zeros, value = np.zeros((1, 1, 2, 16), np.float16), draw((1, 1, 2, 16))
    shift = np.array([[[[0, 8], [4, 0]]]], np.float16)
    out = model.flash_attention_score(zeros, zeros, value, 1, shift, scale_value=0.25, input_layout="BNSD")[3]
    weights = np.exp(0.25 * shift.astype(float))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.matmul(weights, value.astype(float)), atol=1e-3)


def test_compressed_alibi_is_the_last_1024_rows():
    """CANN: alibi_compress = ori_pse[:, :, -1024:, :] for a lower triangle with Sq = Skv > 1024."""
    size = 1100
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    full = (-0.5 * distance)[None, None]
    expanded = model.expand_shift(full[:, :, -1024:], 1, 1, size, size, True)
    lower = distance >= 0
    assert np.array_equal(expanded[0, 0][lower], full[0, 0][lower])
    with pytest.raises(ValueError, match="needs a lower triangle"):
        model.expand_shift(full[:, :, -1024:], 1, 1, size, size, False)
    with pytest.raises(ValueError, match="needs S1 == S2"):
        model.expand_shift(np.zeros((1, 1, 1024, 1200)), 1, 1, size, 1200, True)


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND"])
def test_layouts_agree_with_bnsd(layout):
    q, k, v = draw((2, 4, 5, 16)), draw((2, 2, 7, 16), 1), draw((2, 2, 7, 16), 2)
    want = model.flash_attention_score(q, k, v, 4, scale_value=0.25, input_layout="BNSD")
    laid = [model.from_bnsd(x, layout) for x in (q, k, v)]
    got = model.flash_attention_score(laid[0], laid[1], laid[2], 4, scale_value=0.25, input_layout=layout)
    assert np.array_equal(got[3], model.from_bnsd(want[3], layout)) and np.array_equal(got[0], want[0])


def test_tnd_example_of_the_docstring():
    """MS: list_seq_q [4, 2, 6], list_seq_k [10, 3, 9]: T1 12, T2 22, qk_pointer 100, drop_mask (100 * N1 // 8,)."""
    q, k, v = draw((12, 2, 16)), draw((22, 2, 16), 1), draw((22, 2, 16), 2)
    arguments = dict(
        attn_mask=model.triangle(), actual_seq_qlen=[4, 6, 12], actual_seq_kvlen=[10, 13, 22], next_tokens=0,
        pre_tokens=6, input_layout="TND", sparse_mode=3,
    )  # fmt: skip
    peak, total, _, out = model.flash_attention_score(q, k, v, 2, **arguments)
    assert out.shape == (12, 2, 16) and peak.shape == total.shape == (12, 2, 8)
    third = [x[None].swapaxes(1, 2) for x in (q[6:], k[13:], v[13:])]
    np.testing.assert_allclose(
        out[6:].swapaxes(0, 1)[None], attend(third[0], third[1], third[2], np.tri(6, 9, 3) > 0, 1.0), atol=5e-3
    )
    drop = np.full((100 * 2 // 8,), 255, np.uint8)
    doubled = model.flash_attention_score(q, k, v, 2, drop_mask=drop, keep_prob=0.5, **arguments)[3]
    np.testing.assert_allclose(doubled, 2.0 * out.astype(float), atol=5e-3)  # every bit kept, divided by 0.5
    with pytest.raises(ValueError, match=r"\(qk_pointer \* N1 // 8,\)"):
        model.flash_attention_score(q, k, v, 2, drop_mask=drop[1:], keep_prob=0.5, **arguments)


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(actual_seq_kvlen=None), "TND needs 'actual_seq_qlen' and 'actual_seq_kvlen'"),
        (dict(actual_seq_kvlen=[10, 13, 21]), "the last end must be T1"),
        (dict(actual_seq_kvlen=[10, 10, 22]), "no sequence of keys may be empty"),
        (dict(actual_seq_kvlen=[13, 10, 22]), "must not decrease"),
        (dict(sparse_mode=4), "TND needs sparse_mode 2 or 3"),
        (dict(next_tokens=1), "TND needs next_tokens 0"),
        (dict(pre_tokens=5), "pre_tokens >= the longest query"),
        (dict(prefix=[1]), "'prefix' must be None with TND"),
        (dict(actual_seq_kvlen=[3, 13, 22]), "needs S1 <= S2"),
    ],
)
def test_tnd_rules(change, text):
    arguments = dict(
        attn_mask=model.triangle(), actual_seq_qlen=[4, 6, 12], actual_seq_kvlen=[10, 13, 22], next_tokens=0,
        pre_tokens=6, input_layout="TND", sparse_mode=3,
    )  # fmt: skip
    arguments.update(change)
    with pytest.raises(ValueError, match=text):
        model.flash_attention_score(draw((12, 2, 16)), draw((22, 2, 16)), draw((22, 2, 16)), 2, **arguments)


def test_tnd_ends_are_cumulative():
    """NPU: lengths 2 2 2 2 2 are passed as 2 4 6 8 10; each sequence attends to itself only."""
    q = draw((10, 1, 16))
    arguments = dict(attn_mask=model.triangle(), next_tokens=0, input_layout="TND", sparse_mode=2)
    ends = [2, 4, 6, 8, 10]
    out = model.flash_attention_score(q, q, q, 1, actual_seq_qlen=ends, actual_seq_kvlen=ends, **arguments)[3]
    assert np.array_equal(out[0::2], q[0::2])  # the first token of a causal sequence sees itself alone
    one = model.flash_attention_score(q[:2], q[:2], q[:2], 1, actual_seq_qlen=[2], actual_seq_kvlen=[2], **arguments)
    assert np.array_equal(one[3], out[:2])


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(input_layout="XYZ"), "'input_layout' must be one of"),
        (dict(keep_prob=0.0), "'keep_prob' must be in"),
        (dict(head_num=3), "'head_num' must be the heads of 'query'"),
        (dict(padding_mask=1), "'padding_mask' is not implemented"),
        (dict(actual_seq_qlen=[4]), "must be None unless TND"),
        (dict(query=np.zeros((1, 4, 4, 16), np.float32)), "must have the same dtype"),
        (dict(key=np.zeros((1, 3, 4, 16), np.float16)), "must have the same shape"),
        (dict(attn_mask=np.zeros((4, 4), np.float16)), "'attn_mask' must be bool or uint8"),
        (dict(attn_mask=np.zeros((1, 4), np.uint8)), "'attn_mask' must be"),
        (dict(real_shift=np.zeros((1, 1, 4, 4), np.float16)), "'real_shift' must be"),
        (dict(real_shift=np.zeros((1, 4, 4, 4), np.float32)), "'real_shift' must have the dtype of 'query'"),
    ],
)
def test_wrong_arguments(change, text):
    x = np.zeros((1, 4, 4, 16), np.float16)
    arguments = dict(query=x, key=x, value=x, head_num=4, input_layout="BNSD")
    arguments.update(change)
    with pytest.raises(ValueError, match=text):
        model.flash_attention_score(**arguments)


def test_gradient_agrees_with_the_explicit_backward():
    """CANN's design document, steps 1 to 6, against ``core.reference``."""
    from flash_attention.core.reference import attention_grad
    from flash_attention.core.spec import AttentionSpec, Operands

    spec = AttentionSpec(2, 4, 2, 6, 8, 16, "float16", causal=True)
    q, d_out = draw((2, 4, 6, 16)), draw((2, 4, 6, 16), 3)
    k, v = draw((2, 2, 8, 16), 1), draw((2, 2, 8, 16), 2)
    arguments = dict(scale_value=0.25, input_layout="BNSD", sparse_mode=3)
    peak, total, _, out = model.flash_attention_score(q, k, v, 4, attn_mask=model.triangle(), **arguments)
    got = model.flash_attention_score_grad(
        q, k, v, d_out, atten_mask=model.triangle(), softmax_max=peak, softmax_sum=total, attention_in=out, head_num=4,
        **arguments,
    )  # fmt: skip
    want = attention_grad(spec, q, k, v, Operands(), d_out)
    for name, x in zip(("query", "key", "value"), got):
        np.testing.assert_allclose(x, want[name], atol=1e-2)
