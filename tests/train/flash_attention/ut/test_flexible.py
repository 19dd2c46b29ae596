"""Every mechanism of the registry x every argument: it agrees with the formula, gradients too, or it refuses."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jax_engines import compiled_fast
from support.mechanisms import D, K, Mechanism, N, T, draws, examples, one_device

from conformance import judge, tagged
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.mechanisms.landmark import regular
from flash_attention.jax import (
    AttentionImpl,
    AttentionOutput,
    AttentionRegistry,
    dilated_attention,
    flash_attention,
    fused_landmark_attention,
)
from flash_attention.jax.flexible.registry import ARGUMENTS, output_of

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
NAMES = AttentionRegistry.list_implementations()
EXACT = [name for name in NAMES if AttentionRegistry.get(name).exact]
EXAMPLES = examples()


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    """Hundreds of small programs, each run once."""
    with compiled_fast():
        yield
    jax.clear_caches()


# What a mechanism must be given beside the argument under test, and what it refuses: {argument: start of the message}.
ALWAYS = {
    "triangle": {"is_causal": True},
    "local": {"local_window_size": (9, 9)},
    "landmark": {"is_causal": True, "block_size": 8},
}
PATTERN = {"segment_size": 8, "dilation_rate": 2}  # of 'dilated'
NO_EFFECT = {("triangle", "next_block_num")}  # causality hides later blocks already
FAST = ("bias", "sinks", "dropout_rate", "q_segment_ids")  # gradients checked in the fast suite
ELSEWHERE = ("cudnn", "splash")
REFUSES = {name: dict.fromkeys(ARGUMENTS, "For '{}', 'backend".format(name)) for name in ELSEWHERE}
for _name, _takes in (("dilated", ("scale", "is_causal")), ("landmark", ("scale", "is_causal", "block_size"))):
    REFUSES[_name] = {  # block_size too: its example moves a window
        argument: "For '{}', '{}' must be left out".format(
            _name, next(key for key in EXAMPLES[argument] if key not in _takes)
        )
        for argument in set(ARGUMENTS) - {"scale", "is_causal"}
    }


def dilated(query, key, value, **arguments):
    """What 'dilated' must give."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    return dilated_attention(query, key, value, *PATTERN.values(), **arguments)


def landmark(query, key, value, is_causal, block_size, scale=None):
    """What 'landmark' must give."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    tensors = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(fused_landmark_attention(*tensors, regular(T, block_size), scale, block_size), 1, 2)


OTHERS = {"dilated": dilated, "landmark": landmark}  # they see other keys than the formula does


def create(name):
    """The mechanism on one device."""
    return AttentionRegistry.create(name, one_device().replace(**(PATTERN if name == "dilated" else {})))


def judge_of(name):
    """The function whose results a mechanism must give."""
    return OTHERS.get(name) or functools.partial(flash_attention, implementation="reference")


def call(name, arguments):
    """Keywords of one call of mechanism `name` that sets `arguments`."""
    return dict(ALWAYS.get(name, {}), **arguments)


def formula(name, argument):
    """Output of what judges `name`; `argument` None = nothing but what `name` always needs."""
    arguments = call(name, EXAMPLES[argument] if argument else {})
    return np.asarray(judge_of(name)(*draws(), **arguments))


def test_every_name_has_a_judge():
    assert set(NAMES) == set(EXACT) | set(OTHERS) and set(ELSEWHERE) < set(EXACT)


def test_an_example_of_every_argument():
    assert set(EXAMPLES) == set(ARGUMENTS)
    # The keywords are those of the functional call, less its choices of engine, layout and results.
    others = {"query", "key", "value", "implementation", "return_residual", "return_lse", "layout"}
    assert set(inspect.signature(flash_attention).parameters) - others == set(ARGUMENTS)


@pytest.mark.parametrize("argument", sorted(ARGUMENTS))
@pytest.mark.parametrize("name", NAMES)
def test_honoured_or_refused(name, argument):
    impl, arguments = create(name), call(name, EXAMPLES[argument])
    if argument in REFUSES.get(name, {}):
        with pytest.raises(UnsupportedError) as caught:
            impl(*draws(), **arguments)
        assert str(caught.value).startswith(REFUSES[name][argument])
        return
    want = formula(name, argument)
    out = impl(*draws(), **arguments).attention_outputs
    assert np.abs(out - want).max() < 2e-6
    if argument not in ALWAYS.get(name, {}) and (name, argument) not in NO_EFFECT:
        without = formula(name, None) if argument != "dropout_seed" else formula(name, "dropout_rate")
        assert np.abs(out - without).max() > 1e-2, "the example of {} changes nothing".format(argument)


GRADIENTS = [
    pytest.param(name, argument, marks=[] if name == "flash_attn2" and argument in FAST else pytest.mark.slow)
    for name in NAMES
    for argument in sorted(ARGUMENTS)
    if argument not in REFUSES.get(name, {})
]


@pytest.mark.parametrize("name, argument", GRADIENTS)
def test_gradients(name, argument):
    impl, arguments = create(name), call(name, EXAMPLES[argument])
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(draws()[0].shape), jnp.float32)
    differentiable = {key: x for key, x in arguments.items() if key in ("bias", "alibi_slopes", "sinks")}
    constant = {key: x for key, x in arguments.items() if key not in differentiable}

    def grads(attend):
        def loss(tensors, given):
            return (attend(*tensors, **given, **constant) * weights).sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(draws(), differentiable))

    found = grads(lambda *tensors, **given: impl(*tensors, **given).attention_outputs)
    wanted = grads(judge_of(name))
    assert len(found) == 3 + len(differentiable)
    for got, want in zip(found, wanted):
        assert np.abs(got - want).max() < 2e-5 * max(1.0, np.abs(want).max())


REASONS = {
    ("cudnn", "'backend' must be an NVIDIA GPU, but got cpu. Use 'flash_attn2'."): {},
    ("splash", "'backend' must be a TPU, but got cpu. Use 'flash_attn2'."): {},
    ("triangle", "'causal' must be True (it computes the lower triangle), but got False."): {},
    ("local", "'local_window_size' must be given, or prev_block_num or next_block_num, but got None."): {},
    ("dilated", "'segment_size' must be given, but got None. Use 'flash_attn2'"): {},
    ("landmark", "'causal' must be True (landmarks stand for past blocks), but got "): {},
}


@pytest.mark.parametrize("name, reason", REASONS)
def test_reasons(name, reason):
    with pytest.raises(
        UnsupportedError, match="^" + "For '{}', {}".format(name, reason).replace("(", r"\(").replace(")", r"\)")
    ):
        AttentionRegistry.create(name, one_device())(*draws())


def test_triangle_is_square():
    with pytest.raises(
        UnsupportedError, match="'sequence length' must be equal for queries and keys, but got 24 and 30"
    ):
        AttentionRegistry.create("triangle", one_device())(*draws(30)[:1], *draws(30)[1:], is_causal=True)


def conformance():
    """(mechanism, case) of the suite: what a mechanism takes among the single features, one of them fast."""
    for name in EXACT:
        fast = {"local": "two-sided token window", "blockwise": "mask"}.get(name, "causal")
        for case in tagged("ci"):
            banded = {"local": {"local_window_size", "prev_block_num"}, "triangle": {"is_causal"}}.get(name, set())
            square = name != "triangle" or case.lengths[0] == case.lengths[1]
            if name not in ELSEWHERE and not case.cotangent and square and (not banded or banded & set(case.options)):
                mark = [] if case.name == fast and name != "sdpa" else pytest.mark.slow
                yield pytest.param(name, case, marks=mark, id="{}-{}".format(name, case))


@pytest.mark.parametrize("name, case", list(conformance()))
def test_conformance(name, case):
    judge(Mechanism(name).run, case, Mechanism.functions, without=("lse",))


def test_decoding_at_the_end_of_the_filled_cache():
    query, key, value = draws()
    filled = jnp.array([9, 17], jnp.int32)
    impl = AttentionRegistry.create("autoregressive", one_device())
    out = impl(query[:, :1], key, value, is_causal=True, key_value_seq_lengths=filled).attention_outputs
    for b, length in enumerate((9, 17)):
        want = flash_attention(query[b : b + 1, :1], key[b : b + 1, :length], value[b : b + 1, :length])
        np.testing.assert_allclose(out[b : b + 1], want, atol=1e-6)


def test_weights_of_the_mechanisms_that_form_them():
    query, key, value = draws()
    for name in NAMES:
        if name in ELSEWHERE:
            continue
        result = create(name)(query, key, value, **call(name, {"is_causal": True}))
        if name in ("vanilla", "sharded_vanilla"):
            rebuilt = jnp.einsum("bnts,bsnd->btnd", result.attention_weights, jnp.repeat(value, N // K, axis=2))
            np.testing.assert_allclose(rebuilt, result.attention_outputs, atol=1e-6)
        else:
            assert result.attention_weights is None


def test_dropout_masks_differ_by_head_and_follow_the_key():
    impl = AttentionRegistry.create("vanilla", one_device().replace(dropout_prob=0.5))
    run = functools.partial(impl, *draws(), deterministic=False)
    weights = run(dropout_rng=jax.random.key(1)).attention_weights
    dropped = np.asarray(weights == 0)
    assert (dropped[:, 0] != dropped[:, 1]).any() and 0.4 < dropped.mean() < 0.6
    assert (run(dropout_rng=jax.random.key(1)).attention_weights == weights).all()
    assert (run(dropout_rng=jax.random.key(2)).attention_weights != weights).any()
    with pytest.raises(ValueError, match="'dropout_rng' must be given when deterministic=False"):
        run()
    assert (impl(*draws()).attention_weights > 0).all()


# --- the registry ---------------------------------------------------------------------------------
@pytest.fixture
def mine():
    @AttentionRegistry.register
    class Mine(AttentionImpl):
        names = ("mine", "also_mine")

        def forward_native(self, query, key, value, *, is_causal=False):
            return output_of(flash_attention(query, key, value, is_causal=is_causal))

    yield Mine
    AttentionRegistry.unregister("mine")


def test_a_mechanism_is_one_class(mine):
    assert "mine" in AttentionRegistry.list_implementations()
    assert AttentionRegistry.aliases() == {"flash": "flash_attn2", "also_mine": "mine"}
    impl = AttentionRegistry.create("also_mine", one_device())
    assert isinstance(impl, mine) and impl.get_impl_name() == "mine" and impl.get_impl_metadata() is one_device()
    case = next(case for case in tagged("ci") if case.name == "causal")
    judge(Mechanism("mine").run, case, Mechanism.functions, without=("lse",))
    for argument in set(ARGUMENTS) - {"is_causal", "q_offset"}:
        with pytest.raises(UnsupportedError, match="left out .this mechanism does not take it."):
            impl(*draws(), **EXAMPLES[argument])
    with pytest.raises(TypeError, match="'attn_mask' is no argument of a mechanism"):
        impl(*draws(), attn_mask=None)


def test_a_function_is_a_mechanism_too():
    def mean(query, key, value, *, key_value_seq_lengths=None):
        """The mean of the values."""
        return jnp.broadcast_to(value.mean(1, keepdims=True), value.shape)

    AttentionRegistry.register_function(("mean", "average"), mean)
    try:
        impl = AttentionRegistry.create("average", one_device())
        assert not impl.exact and impl.__doc__ == "The mean of the values."
        assert impl(*draws()).attention_outputs.shape == draws()[2].shape
        assert impl(*draws(), **EXAMPLES["key_value_seq_lengths"]).attention_weights is None
        with pytest.raises(UnsupportedError, match="For 'mean', 'is_causal' must be left out"):
            impl(*draws(), is_causal=True)
    finally:
        AttentionRegistry.unregister("mean")
    assert "average" not in AttentionRegistry.aliases()


def test_names(mine):
    with pytest.raises(ValueError, match="'names' must be free, but got mine"):
        AttentionRegistry.register(mine)
    AttentionRegistry.register(override=True)(mine)
    assert AttentionRegistry.get("mine") is mine
    with pytest.raises(ValueError, match="must be one of 'autoregressive', 'blockwise'.*but got 'nobody'"):
        AttentionRegistry.get("nobody")
    with pytest.raises(ValueError, match="It is called 'cudnn' here"):
        AttentionRegistry.get("cudnn_flash_attn")
    with pytest.raises(ValueError, match="'names' must be a str or a tuple of str"):
        AttentionRegistry.register(type("Nameless", (AttentionImpl,), {}))


@pytest.mark.parametrize(
    "backend, method",
    [
        ("cpu", "cpu"),
        ("gpu", "gpu"),
        ("cuda", "cuda"),
        ("rocm", "gpu"),
        ("tpu", "native"),
        ("tt", "native"),
        (None, "cpu"),
    ],
)
def test_dispatch(backend, method):
    def returning(name):
        return lambda self, query, key, value: name

    methods = {"forward_" + name: returning(name) for name in ("native", "cpu", "gpu", "cuda")}
    impl = type("Platforms", (AttentionImpl,), dict(methods, names="platforms"))(one_device().replace(backend=backend))
    assert impl(*draws()) == method


def test_modes():
    impl = AttentionRegistry.create("vanilla", one_device())
    query = draws()[0]
    assert impl.get_mode(query) == "__train__" and impl.get_mode(query[:, :1]) == "__autoregressive__"
    assert impl.get_mode(query.swapaxes(1, 2), BTHD=False) == "__train__"
    whole = impl(*draws(), mode="__prefill__")
    assert isinstance(whole, AttentionOutput)
    for name in ("sharded_vanilla", "flash_attn2"):
        for mode in ("__insert__", "__train__"):
            again = AttentionRegistry.create(name, one_device())(*draws(), mode=mode).attention_outputs
            np.testing.assert_allclose(again, whole.attention_outputs, atol=1e-6)
    with pytest.raises(ValueError, match="'mode' must be one of '__train__'"):
        impl(*draws(), mode="training")


def test_repeat_kv_heads():
    key = jnp.arange(2.0)[None, None, :, None] * jnp.ones((1, 3, 2, D))
    repeated, _ = AttentionImpl.repeat_kv_heads(key, key, 2)
    assert repeated[0, 0, :, 0].tolist() == [0, 0, 1, 1] and repeated.shape == (1, 3, 4, D)


def test_mask_helpers():
    causal = AttentionImpl.causal_mask(2, 3)
    assert causal.tolist() == [[[[True, True, False], [True, True, True]]]]
    assert AttentionImpl.causal_mask(2, 3, q_offset=0).sum() == 3
    keys = jnp.array([[[[1, 0, 1]]]])
    both = AttentionImpl.combine_masks(None, causal, keys)
    assert both.tolist() == [[[[True, False, False], [True, False, True]]]] and AttentionImpl.combine_masks() is None
    bias = AttentionImpl.mask_to_bias(both, jnp.bfloat16)
    assert bias.dtype == jnp.bfloat16 and (jnp.isneginf(bias) == ~both).all() and (bias[both] == 0).all()


def test_blockwise_computes_the_tiles_asked_for():
    def loops(tile):
        impl = AttentionRegistry.create("blockwise", one_device().replace(blocksize_q=tile, blocksize_k=tile))
        return jax.jit(lambda *qkv: impl(*qkv).attention_outputs).lower(*draws()).as_text()

    assert "x{}x{}xf32".format(8, 8) in loops(8).replace("tensor<", "x") and T == 24
    assert loops(8) != loops(24)
