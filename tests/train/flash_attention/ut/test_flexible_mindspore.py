"""FlexibleAttention in MindSpore: every name x every argument agrees with the formula, gradients too, or refuses."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.in_mindspore import mode
from support.mechanism_arguments import B, D, K, N, T, draws, examples

from flash_attention.core import reference
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.registry import ARGUMENTS
from flash_attention.core.spec import KEYWORDS, Operands
from flash_attention.core.validation import Options, TensorInfo, make_spec
from flash_attention.nn import (
    FlexibleAttention,
    FusedLandmarkAttention,
    Mechanism,
    MechanismRegistry,
    dilated_attention,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
NAMES = MechanismRegistry.list_implementations()
EXAMPLES = examples()
CALLED = {  # keyword of a mechanism -> keyword of the Cell, where they differ
    "scale": "sm_scale",
    "is_causal": "causal",
    "mask": "attention_mask",
    "query_seq_lengths": "query_sequence_length",
    "key_value_seq_lengths": "key_value_sequence_length",
    "dropout_rate": "attention_dropout",
    "q_segment_ids": "segment_ids",
}
STATIC = set(Options.__dataclass_fields__) - {"q_offset"}
ALWAYS = {"triangle": {"is_causal": True}, "landmark": {"is_causal": True}, "local": {"local_window_size": (9, 9)}}
NO_EFFECT = {("triangle", "next_block_num")}  # causality hides later blocks already
OVER_RANKS = (
    "bias", "sinks", "q_segment_ids", "kv_segment_ids", "query_seq_lengths", "key_value_seq_lengths", "q_offset",
)  # fmt: skip
REFUSES = {
    "vanilla": ("q_offset",),
    "ring": OVER_RANKS,
    "ulysses": OVER_RANKS,
    "dilated": tuple(set(ARGUMENTS) - {"scale", "is_causal"}),
    "landmark": tuple(set(ARGUMENTS) - {"scale", "is_causal"}),  # block_size too: its example moves a window
}


def dilated(query, key, value, **arguments):
    """What 'dilated' with the sizes of :func:`build` must give."""
    key, value = (x.repeat_interleave(N // K, 2) for x in (key, value))
    return dilated_attention(query, key, value, 8, 2, **arguments)


def landmark(query, key, value, is_causal=True, scale=None):
    """What 'landmark' with the block size of :func:`build` must give."""
    key, value = (x.repeat_interleave(N // K, 2) for x in (key, value))
    tensors = (x.swapaxes(1, 2) for x in (query, key, value))
    return FusedLandmarkAttention(sm_scale=scale, block_size=8)(*tensors).swapaxes(1, 2)


OTHERS = {"dilated": dilated, "landmark": landmark}  # they see other keys than the formula does


def build(name, arguments, **more):
    """(Cell in training mode, keywords of its call) that set `arguments`."""
    arguments = {"is_causal": False, **ALWAYS.get(name, {}), **arguments}
    static = {CALLED.get(key, key): x for key, x in arguments.items() if key in STATIC}
    tensors = {CALLED.get(key, key): Tensor(x) for key, x in arguments.items() if key not in STATIC}
    if name == "dilated":
        static.update(segment_size=8, dilation_rate=2)
    if name == "landmark":
        static.setdefault("block_size", 8)
    return FlexibleAttention(name, N, D, K, **static, **more).set_train(), tensors


def formula(name, arguments):
    """Float64 output and gradients of query, key, value, by the plain formula; BSND."""
    arguments = dict(ALWAYS.get(name, {}), **arguments)
    static = {key: x for key, x in arguments.items() if key in STATIC}
    operands = {KEYWORDS[key]: x for key, x in arguments.items() if key not in STATIC}
    tensors = [x.swapaxes(1, 2).astype(np.float64) for x in draws()]
    infos = [TensorInfo(x.shape, "float64") for x in tensors]
    given = Operands(**{key: TensorInfo(np.shape(x), str(np.asarray(x).dtype)) for key, x in operands.items()})
    spec = make_spec("test", *infos, given, Options(**dict(static, layout="BNSD")))
    out, _ = reference.attention(np, spec, *tensors, Operands(**operands))
    grads = reference.attention_grad(spec, *tensors, Operands(**operands), weights().swapaxes(1, 2))
    return [x.swapaxes(1, 2) for x in (out, grads["query"], grads["key"], grads["value"])]


def weights():
    return np.random.default_rng(0).standard_normal((B, T, N, D))


class _Loss(nn.Cell):
    def __init__(self, cell, keywords):
        super().__init__()
        self.cell, self.keywords = cell, keywords
        self.weights = Tensor(weights().astype(np.float32))

    def construct(self, query, key, value):
        return (self.cell(query, key, value, **self.keywords) * self.weights).sum()


FAST = {("flash_attn2", "is_causal"), ("flash_attn2", "sinks"), ("vanilla", "alibi_slopes"), ("ring", "mask")}
PAIRS = [
    pytest.param(
        name,
        argument,
        marks=[] if (name, argument) in FAST or argument in REFUSES.get(name, ()) else pytest.mark.slow,
    )
    for name in NAMES
    for argument in sorted(ARGUMENTS)
]


@pytest.mark.parametrize("name, argument", PAIRS)
def test_honoured_or_refused(name, argument):
    cell, keywords = build(name, EXAMPLES[argument])
    tensors = [Tensor(x) for x in draws()]
    if argument in REFUSES.get(name, ()):
        with pytest.raises(UnsupportedError) as caught:
            cell(*tensors, **keywords)
        assert str(caught.value).startswith("For '{}', '".format(name)) and "left out" in str(caught.value)
        return
    if name in OTHERS:
        want = [OTHERS[name](*tensors, **EXAMPLES[argument]).asnumpy()]
    else:
        want = formula(name, EXAMPLES[argument])
    out = cell(*tensors, **keywords).asnumpy()
    assert np.abs(out - want[0]).max() < 5e-6
    if argument not in ALWAYS.get(name, {}) and (name, argument) not in NO_EFFECT and name not in OTHERS:
        without = EXAMPLES["dropout_rate"] if argument == "dropout_seed" else {}
        assert np.abs(out - formula(name, without)[0]).max() > 1e-2, "the example of {} changes nothing".format(
            argument
        )


class _Function(nn.Cell):
    """A function as a Cell."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def construct(self, query, key, value, **arguments):
        return self.function(query, key, value, **arguments)


TOGETHER = {  # every feature of which a mechanism can have gradients; each takes what it does not refuse
    "causal, mask, ALiBi, dropout": ("is_causal", "mask", "alibi_slopes", "dropout_rate", "scale"),
    "window, bias, sinks, soft cap, segments": (
        "local_window_size", "bias", "sinks", "logits_soft_cap", "q_segment_ids",
    ),
}  # fmt: skip


def gradient_cases():
    """(mechanism, features, mode): one set of them compiled."""
    for name in NAMES:
        for title, features in TOGETHER.items():
            if set(features) - set(REFUSES.get(name, ())):
                yield name, title, "pynative"
        if name not in OTHERS:
            yield name, next(iter(TOGETHER)), "graph"


@pytest.mark.slow
@pytest.mark.parametrize("name, title, how", list(gradient_cases()))
def test_gradients(name, title, how):
    taken = [each for each in TOGETHER[title] if each not in REFUSES.get(name, ())]
    arguments = {key: x for each in taken for key, x in EXAMPLES[each].items()}
    cell, keywords = build(name, arguments)
    tensors = [Tensor(x) for x in draws()]
    with mode(how):
        grads = ops.grad(_Loss(cell, keywords), (0, 1, 2))(*tensors)
    if name in OTHERS:
        given = dict(ALWAYS.get(name, {}), **arguments)
        wanted = [x.asnumpy() for x in ops.grad(_Loss(_Function(OTHERS[name]), given), (0, 1, 2))(*tensors)]
    else:
        wanted = formula(name, arguments)[1:]
    for got, want in zip(grads, wanted):
        assert np.abs(got.asnumpy() - want).max() < 2e-5 * max(1.0, np.abs(want).max())


def test_every_argument_with_a_gradient_is_in_a_set():
    """Those left out change what is seen by numbers alone, as others in the sets do."""
    numbers = {"query_seq_lengths", "key_value_seq_lengths", "prev_block_num", "next_block_num", "block_size"}
    covered = {key for features in TOGETHER.values() for each in features for key in EXAMPLES[each]}
    assert covered | numbers | {"q_offset"} == set(ARGUMENTS)


def test_weights():
    cell, keywords = build("vanilla", EXAMPLES["is_causal"], return_weights=True)
    query, key, value = draws()
    out, found = cell(*map(Tensor, (query, key, value)), **keywords)
    assert found.shape == (B, N, T, T)
    np.testing.assert_allclose(found.asnumpy().sum(-1), 1.0, atol=1e-5)
    again = np.einsum("bnts,bsnd->btnd", found.asnumpy(), np.repeat(value, N // K, axis=2))
    np.testing.assert_allclose(again, out.asnumpy(), atol=1e-5)
    with pytest.raises(ValueError, match="'return_weights' must be False with attn_mechanism 'ring'.* Use 'vanilla'"):
        FlexibleAttention("ring", N, D, return_weights=True)


@pytest.mark.slow
def test_dropout_acts_in_training_only():
    cell, keywords = build("flash_attn2", {"dropout_rate": 0.5})
    tensors = [Tensor(x) for x in draws()]
    one, two = cell(*tensors).asnumpy(), cell(*tensors).asnumpy()
    assert np.abs(one - two).max() > 0.1
    np.testing.assert_allclose(cell.set_train(False)(*tensors).asnumpy(), formula("flash_attn2", {})[0], atol=5e-6)


REASONS = {
    "For 'triangle', 'causal' must be True \\(it computes the lower triangle\\), but got False": (
        "triangle",
        {"causal": False},
    ),
    "For 'local', 'local_window_size' must be given, or prev_block_num or next_block_num": ("local", {}),
    "For 'dilated', 'segment_size' must be given, but got None. Use 'flash_attn2'": ("dilated", {}),
    "For 'landmark', 'causal' must be True .landmarks stand for past blocks.": ("landmark", {"causal": False}),
    "For 'vanilla', 'engine' must be left out": ("vanilla", {"engine": "portable"}),
    "For 'flash_attn2', 'group' must be left out": ("flash_attn2", {"group": "some"}),
    "For 'flash_attn2', 'segment_size' must be left out": ("flash_attn2", {"segment_size": 4}),
}


@pytest.mark.parametrize("message", REASONS)
def test_reasons(message):
    name, options = REASONS[message]
    query, key, value = map(Tensor, draws())
    with pytest.raises(UnsupportedError, match=message):
        FlexibleAttention(name, N, D, K, **options)(query, key, value)


BAD = {
    "one of 'autoregressive', 'blockwise', .* but got 'cudnn'. It belongs to the JAX twin": {"attn_mechanism": "cudnn"},
    "but got 'splash'. It is a TPU kernel of JAX": {"attn_mechanism": "splash"},
    "'num_kv_heads' must be a divisor of num_attention_heads = 4": {"num_kv_heads": 3},
    "'attention_dropout' must be a float in": {"attention_dropout": 1.0},
    "'causal' must be a bool": {"causal": 1},
    "'head_dims' must be an int >= 1": {"head_dims": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_constructor_refuses(message):
    with pytest.raises((ValueError, TypeError), match=message):
        FlexibleAttention(**dict({"num_attention_heads": N, "head_dims": D}, **BAD[message]))


def test_shapes_are_checked():
    query, key, value = map(Tensor, draws())
    with pytest.raises(ValueError, match="'key_states' must be of shape \\(B, T, 4, 8\\)"):
        FlexibleAttention("flash_attn2", N, D)(query, key, value)
    with pytest.raises(ValueError, match="'attention_mask' must be of rank 2, 3 or 4"):
        FlexibleAttention("flash_attn2", N, D, K)(query, key, value, Tensor(np.ones(T, np.float32)))


@pytest.mark.slow
def test_decoding_at_the_end_of_the_filled_cache():
    query, key, value = draws()
    cell = FlexibleAttention("autoregressive", N, D, K)
    filled = Tensor(np.array([9, 17], np.int32))
    out = cell(Tensor(query[:, :1]), Tensor(key), Tensor(value), key_value_sequence_length=filled).asnumpy()
    for b, length in enumerate((9, 17)):
        plain = FlexibleAttention("flash_attn2", N, D, K)
        part = [Tensor(np.ascontiguousarray(x[b : b + 1, :n])) for x, n in ((query, 1), (key, length), (value, length))]
        np.testing.assert_allclose(out[b : b + 1], plain(*part).asnumpy(), atol=1e-6)


class Mean(Mechanism):
    """A user's own: the mean of the values, of the causal ones if asked for."""

    names = "mean of values"
    takes = ("is_causal",)

    def construct(self, query, key, value, *rest):
        value = ops.repeat_interleave(value, query.shape[2] // value.shape[2], 2)
        if self.is_causal:
            count = Tensor(np.arange(1, T + 1, dtype=np.float32).reshape(1, T, 1, 1))
            return ops.cumsum(value, 1) / count
        return ops.broadcast_to(value.mean(1, True), query.shape)


def test_the_registry_is_open():
    MechanismRegistry.register(Mean)
    try:
        query, key, value = draws()
        tensors = [Tensor(x) for x in (query, key, value)]
        want = np.repeat(value, N // K, axis=2).mean(1, keepdims=True)
        out = FlexibleAttention("mean of values", N, D, K, causal=False)(*tensors)
        np.testing.assert_allclose(out.asnumpy(), np.broadcast_to(want, out.shape), atol=1e-6)
        with pytest.raises(UnsupportedError, match="For 'mean of values', 'scale' must be left out .this mechanism"):
            FlexibleAttention("mean of values", N, D, K, sm_scale=0.3)(*tensors)
        with pytest.raises(ValueError, match="'names' must be free, but got mean of values"):
            MechanismRegistry.register(Mean)
    finally:
        MechanismRegistry.unregister("mean of values")
    assert "mean of values" not in MechanismRegistry.list_implementations()


def test_names_mean_what_they_mean_in_jax():
    registry = pytest.importorskip("flash_attention.jax").AttentionRegistry
    for name in registry.list_implementations():
        assert name in NAMES or name in MechanismRegistry.absent
    assert MechanismRegistry.aliases() == registry.aliases()
