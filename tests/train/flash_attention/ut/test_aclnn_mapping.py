"""Engine 'aclnn': its decisions, its refusals, and its passes run on the numpy model against ``core.reference``."""

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

import tolerances  # noqa: E402
from flash_attention.core.alibi import alibi_slopes  # noqa: E402
from flash_attention.core.reference import attention, attention_grad  # noqa: E402
from flash_attention.core.spec import AttentionSpec, Operands  # noqa: E402
from flash_attention.ops.aclnn import ENGINE, constraints, device, mapping, model, passes  # noqa: E402
from flash_attention.ops.autograd import cell_operands  # noqa: E402

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

NO = mapping.NO_TOKENS


def make(q_len=24, kv_len=24, batch=2, heads=4, kv_heads=2, head_dim=16, **more):
    return AttentionSpec(batch, heads, kv_heads, q_len, kv_len, head_dim, "float16", **more)


# --- decisions -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "spec,want",
    [
        (make(), (0, NO, NO, None)),
        (make(q_lengths=True), (0, NO, NO, None)),
        (make(causal=True), (2, NO, 0, "compact")),
        (make(16, causal=True), (3, NO, 0, "compact")),
        (make(32, causal=True), (3, NO, 0, "compact")),
        (make(16, causal=True, q_offset=0), (2, NO, 0, "compact")),
        (make(16, causal=True, q_offset=3), (4, NO, -5, "compact")),
        (make(local_window_size=(5, 2)), (4, 5, 2, "compact")),
        (make(16, local_window_size=(5, 2)), (4, 5, 2, "compact")),
        (make(16, local_window_size=(5, 2), q_offset=0), (4, 13, -6, "compact")),
        (make(local_window_size=(5, None)), (4, 5, NO, "compact")),
        (make(local_window_size=(5, None), causal=True), (4, 5, 0, "compact")),
        (make(32, 16, local_window_size=(3, 0), q_offset=0), (4, -13, 16, "compact")),  # allowed: |-13| < S2, 16 >= 13
        (make(prev_block_num=1, block_size=8), (1, NO, NO, "explicit")),
        (make(next_block_num=0, causal=True), (1, NO, NO, "explicit")),
        (make(causal=True, segments=True), (1, NO, NO, "explicit")),
        (make(causal=True, dynamic_offset=True), (1, NO, NO, "explicit")),
        (make(dynamic_offset=True), (0, NO, NO, None)),
    ],
)
def test_sparse_mode_and_tokens(spec, want):
    got = mapping.map_spec(spec)
    assert (got.sparse_mode, got.pre_tokens, got.next_tokens, got.mask) == want


def test_forbidden_tokens_fall_back_to_an_explicit_mask():
    spec = make(16, 24, local_window_size=(2, 1), q_offset=-30)  # nothing visible: next_tokens would be -37
    assert mapping.map_spec(spec).mask == "explicit"


@pytest.mark.parametrize(
    "more,shape",
    [
        (dict(mask_shape=(1, 1, 24, 24)), (24, 24)),
        (dict(mask_shape=(2, 1, 1, 24)), (2, 1, 24, 24)),
        (dict(mask_shape=(1, 4, 24, 24)), (2, 4, 24, 24)),
        (dict(kv_lengths=True), (2, 1, 24, 24)),
        (dict(mask_shape=(8, 8), compact_mask=True, block_size=8), (24, 24)),
    ],
)
def test_explicit_masks_have_documented_shapes(more, shape):
    spec = make(**more)
    assert mapping.map_spec(spec).mask_shape == shape
    assert mapping.extra_bytes(spec)["attn_mask"] == np.prod(shape)


def test_alibi_of_a_long_triangle_is_given_by_its_last_1024_rows():
    spec = make(1536, 1536, causal=True, alibi_shape=(4,))
    assert mapping.map_spec(spec).shift_rows == (512, 1024)
    assert mapping.extra_bytes(spec)["real_shift"] == 2 * 4 * 1024 * 1536
    whole = make(1536, 1536, causal=True, alibi_shape=(4,), bias_shape=(1, 1, 1536, 1536))
    assert mapping.map_spec(whole).shift_rows == (0, 1536)
    assert mapping.map_spec(make(1536, 1536, alibi_shape=(4,))).shift_rows == (0, 1536)


# --- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "spec,text",
    [
        (AttentionSpec(1, 1, 1, 8, 8, 16, "float32"),
         "'dtype' must be float16 or bfloat16, but got float32. Cast the inputs, or use engine='portable'."),
        (make(head_dim=513), "'head_dim' must be in [1, 512], but got 513. Use engine='portable'."),
        (make(heads=257, kv_heads=257), "'heads' must be in [1, 256], but got 257. Use engine='portable'."),
        (make(batch=-1), "'batch' must be known when the graph is compiled, but got a dynamic size. "
         "Use engine='portable'."),
        (make(soft_cap=30.0), "'logits_soft_cap' must be None (the operator has no soft cap), but got 30.0. "
         "Use engine='portable'."),
        (make(kv_len=20, dropout_rate=0.5), "'key length' must be a multiple of 8 with dropout (drop_mask packs 8 keys "
         "in a byte), but got 20. Pad the keys and give key_value_seq_lengths, or use engine='portable'."),
        (make(scale=0.0, alibi_shape=(4,)), "'scale' must be non-zero with a bias or ALiBi (the operator multiplies "
         "real_shift by it), but got 0.0. Use engine='portable'."),
        (make(65536, 65536, prev_block_num=1), "'mask' must be at most 2 GiB as an explicit uint8 mask, but got "
         "4.0 GiB. Use local_window_size (tokens, no explicit mask) or engine='portable'."),
        (make(mask_shape=(128, 128), compact_mask=True, dynamic_offset=True),
         "'q_offset' must be an int or None with a compact mask, but got a tensor. Give the full mask instead."),
    ],
)  # fmt: skip
def test_refusals(spec, text):
    assert str(constraints.refused(spec)) == text


def test_long_token_windows_are_not_refused():
    assert constraints.refused(make(65536, 65536, local_window_size=(1024, 0))) is None


def test_table_prints_every_rule():
    assert len(constraints.table()) == len(constraints.CONSTRAINTS) + 2


@pytest.mark.parametrize("name", ["CPU", "GPU", "Ascend", "Ascend910", "Ascend910A", "Ascend310P3"])
def test_other_devices_are_refused(name):
    reason = device.refused(name)
    assert reason.message("FlashAttention", "aclnn") == (
        "For 'FlashAttention' (engine 'aclnn'), 'engine' must be used on Atlas A2 or A3 (Ascend910B, Ascend910_93), "
        "but got {}. Use engine='portable', or leave the choice to 'auto'.".format(name)
    )


@pytest.mark.parametrize("name", ["Ascend910B1", "Ascend910B4", "ascend910b", "Ascend910_9391", "ascend910_93"])
def test_atlas_a2_and_a3_are_accepted(name):
    assert device.refused(name) is None


def test_engine_refuses_where_there_is_no_npu():
    if ms.get_context("device_target") == "Ascend":
        pytest.skip("this is about other devices")
    assert ENGINE.supports(make()).value == ms.get_context("device_target")


# --- the passes on the model -----------------------------------------------------------------------
def on_model(function):
    """An operator factory for the passes: MindSpore tensors -> numpy model -> MindSpore tensors."""

    def factory(spec, mapped):
        names = ("head_num", "keep_prob", "scale_value", "pre_tokens", "next_tokens", "inner_precise", "input_layout",
                 "sparse_mode")  # fmt: skip
        attributes = dict(zip(names, passes._attributes(spec, mapped)))

        def call(*tensors):
            arrays = [None if x is None else x.asnumpy() for x in tensors]
            if function is model.flash_attention_score:
                results = function(*arrays[:3], head_num=attributes["head_num"],
                                   **dict(zip(("real_shift", "drop_mask", "padding_mask", "attn_mask"), arrays[3:7])),
                                   **{k: v for k, v in attributes.items() if k != "head_num"})  # fmt: skip
            else:
                results = function(*arrays, **attributes)
            return tuple(None if x is None else ms.Tensor(x) for x in results)

        return call

    return factory


def operands_of(spec, seed=5):
    """Random operands of a spec, as numpy."""
    r = np.random.RandomState(seed)
    shapes = {"bias": spec.bias_shape, "mask": spec.mask_shape, "slopes": spec.alibi_shape}
    made = {}
    if shapes["bias"]:
        made["bias"] = r.randn(*shapes["bias"]).astype(np.float32)
    if shapes["mask"]:
        made["mask"] = r.rand(*shapes["mask"]) > 0.3
    if shapes["slopes"]:
        made["slopes"] = (np.zeros(shapes["slopes"], np.float32) + alibi_slopes(spec.heads)).astype(np.float32)
    if spec.sinks:
        made["sinks"] = r.randn(spec.heads).astype(np.float32)
    if spec.segments:
        made["q_segment_ids"] = np.sort(r.randint(0, 3, (spec.batch, spec.q_len)).astype(np.int32))
        made["kv_segment_ids"] = np.sort(r.randint(0, 3, (spec.batch, spec.kv_len)).astype(np.int32))
    if spec.q_lengths:
        made["q_lengths"] = np.array([spec.q_len - 3, 0][: spec.batch], np.int32)
    if spec.kv_lengths:
        made["kv_lengths"] = np.array([spec.kv_len - 5, 1][: spec.batch], np.int32)
    if spec.dynamic_offset:
        made["q_offset"] = np.array([2, -4][: spec.batch], np.int32)
    if spec.dropout_rate:
        made["dropout_seed"] = np.array(3000000019, np.uint32)
    return Operands(**made)


def label(spec):
    """The fields of a spec that are not defaults, as a short test id."""
    plain = make(spec.q_len, spec.kv_len)
    fields = [
        "{}={}".format(name, getattr(spec, name)).replace(" ", "")
        for name in spec.__dataclass_fields__
        if getattr(spec, name) != getattr(plain, name) and name not in ("scale", "q_offset")
    ]
    return "-".join(["{}x{}".format(spec.q_len, spec.kv_len)] + fields)


CASES = [
    make(),
    make(causal=True),
    make(16, 24, causal=True),
    make(24, 16, causal=True),  # dead rows on top
    make(17, 23, causal=True, q_offset=0, kv_heads=1),
    make(local_window_size=(5, 2)),
    make(16, 24, local_window_size=(5, 2), q_offset=0),
    make(24, 24, local_window_size=(5, None), causal=True, head_dim=40),
    make(32, 16, local_window_size=(3, 0), q_offset=0),  # dead rows at the bottom
    make(40, 40, prev_block_num=1, next_block_num=0, block_size=8, head_dim=7),
    make(24, 40, prev_block_num=1, next_block_num=1, block_size=16, causal=True),
    make(mask_shape=(2, 1, 1, 24)),
    make(mask_shape=(1, 4, 24, 24), causal=True),
    make(20, 20, mask_shape=(8, 8), compact_mask=True, block_size=8),
    make(mask_shape=(2, 4, 24, 24), alibi_shape=(4,)),
    make(alibi_shape=(4,), causal=True),
    make(16, 24, alibi_shape=(2, 4), head_dim=80),
    make(bias_shape=(1, 4, 24, 24), scale=0.7),
    make(bias_shape=(2, 1, 1, 24), causal=True, alibi_shape=(4,)),
    make(bias_shape=(1, 1, 24, 1), dropout_rate=0.4),
    make(dropout_rate=0.1),
    make(16, 24, dropout_rate=0.5, causal=True, alibi_shape=(4,), kv_heads=4),
    make(segments=True, causal=True),
    make(q_lengths=True, kv_lengths=True, causal=True),
    make(q_lengths=True),
    make(16, 24, dynamic_offset=True, causal=True, alibi_shape=(4,)),
    make(16, 24, dynamic_offset=True, local_window_size=(4, 1), prev_block_num=0, block_size=8),
    make(sinks=True),
    make(24, 16, sinks=True, causal=True, dropout_rate=0.3),
    make(heads=3, kv_heads=3, q_len=1, kv_len=9),
    make(batch=1, heads=2, kv_heads=1, q_len=1100, kv_len=1100, causal=True, alibi_shape=(2,)),  # compressed ALiBi
]


@pytest.mark.parametrize("spec", CASES, ids=label)
def test_passes_on_the_model_agree_with_the_reference(spec):
    """Forward, LSE and every gradient, with an LSE cotangent; the model gives NaN where a row sees nothing."""
    assert constraints.refused(spec) is None
    r = np.random.RandomState(1)
    q, d_out = [r.randn(spec.batch, spec.heads, spec.q_len, spec.head_dim).astype(np.float16) for _ in range(2)]
    k, v = [r.randn(spec.batch, spec.kv_heads, spec.kv_len, spec.head_dim).astype(np.float16) for _ in range(2)]
    d_lse = r.randn(spec.batch, spec.heads, spec.q_len).astype(np.float16).astype(np.float32)
    operands = operands_of(spec)
    given = [name for name in ("bias", "slopes", "sinks") if getattr(operands, name) is not None]
    wide = operands._replace(**{name: getattr(operands, name).astype(np.float64) for name in given})
    want_out, want_lse = attention(np, spec, *[x.astype(np.float64) for x in (q, k, v)], operands=wide)
    want = attention_grad(spec, q, k, v, operands, d_out, d_lse)

    tensors = [None if x is None else ms.Tensor(x) for x in (q, k, v) + cell_operands(operands)]
    out, lse = passes.Forward(spec, on_model(model.flash_attention_score))(*tensors)
    check("forward", {"out": out}, {"out": want_out})
    shift = spec.bias_shape is not None or spec.alibi_shape is not None
    finite = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(lse.asnumpy()), ~finite)
    # real_shift is rounded to the query's dtype: half an ulp of its largest value that matters (16 nats).
    np.testing.assert_allclose(lse.asnumpy()[finite], want_lse[finite], rtol=1e-5, atol=2e-2 if shift else 2e-5)

    got = passes.Backward(spec, on_model(model.flash_attention_score_grad))(
        *tensors, out, lse, ms.Tensor(d_out), ms.Tensor(d_lse)
    )
    got = {name: x for name, x in zip(("query", "key", "value", "bias", "slopes", "sinks"), got) if x is not None}
    assert set(got) == set(want)
    check("gradients", got, want)


def check(direction, got, want):
    """The suite's tolerance; as the naive result, the true one rounded to float16: stricter than a naive attention."""
    rounded = {name: x.astype(np.float16) for name, x in want.items()}
    got = {name: x.asnumpy() for name, x in got.items()}
    tolerances.assert_close(got, want, [rounded], "float16", direction)


def test_dropout_is_core_dropout_on_int32():
    from flash_attention.core.reference import keep_mask

    spec = make(q_len=9, kv_len=16, dropout_rate=0.37)
    operands = operands_of(spec)
    packed = passes.Forward(spec, on_model(model.flash_attention_score)).drop_mask(ms.Tensor(operands.dropout_seed))
    assert packed.shape == (2, 4, 9, 2) and packed.dtype == ms.uint8
    kept = model.unpack_drop_mask(packed.asnumpy(), 2, 4, 9, 16)
    assert np.array_equal(kept, keep_mask(np, spec, operands))


def test_asking_for_the_engine_elsewhere_says_why():
    from flash_attention.ops import flash_attention

    if ms.get_context("device_target") != "CPU":
        pytest.skip("worded for the CPU")
    x = ms.Tensor(np.zeros((1, 4, 1, 16), np.float16))
    with pytest.raises(ValueError) as caught:
        flash_attention(x, x, x, engine="aclnn")
    assert str(caught.value) == (
        "For 'flash_attention' (engine 'aclnn'), 'engine' must be used on Atlas A2 or A3 (Ascend910B, Ascend910_93), "
        "but got CPU. Use engine='portable', or leave the choice to 'auto'."
    )
