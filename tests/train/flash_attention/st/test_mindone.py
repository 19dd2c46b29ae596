"""mindone's language models with our attention against the same with their own; run in the library's environment.

bash build.sh test integration mindone
"""

import functools

import mindone
import mindspore as ms
import numpy as np
import pytest
import support.mindone_on_cpu  # noqa: F401  (gives the CPU the operators that the library asks for)
import transformers
from mindone.transformers.models.bloom.modeling_bloom import BloomForCausalLM
from mindone.transformers.models.falcon.modeling_falcon import FalconForCausalLM
from mindone.transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from mindone.transformers.models.llama.modeling_llama import LlamaForCausalLM
from mindone.transformers.models.mistral.modeling_mistral import MistralForCausalLM
from mindone.transformers.models.mpt.modeling_mpt import MptForCausalLM
from mindone.transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from mindspore import Tensor
from support import libraries
from support.libraries import (
    STEPS,
    VOCABULARY,
    assert_close_in_half,
    assert_differs,
    assert_equal,
    errors,
    every_engine,
    first_steps,
    once_a_mode,
    results,
    set_weights,
    tokens,
)

from flash_attention.core.errors import UnsupportedError
from flash_attention.integrations import mindone as integration

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
NAME = "flash_910"
BATCH, LENGTH = 2, 24
_GQA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
_GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
_FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "llama": (LlamaForCausalLM, transformers.LlamaConfig, _GQA),
    "mistral": (MistralForCausalLM, transformers.MistralConfig, dict(_GQA, sliding_window=64)),
    "qwen2": (Qwen2ForCausalLM, transformers.Qwen2Config, _GQA),
    "gpt2": (GPT2LMHeadModel, transformers.GPT2Config, _GPT2),
    "gpt2 by layer": (GPT2LMHeadModel, transformers.GPT2Config, dict(_GPT2, scale_attn_by_inverse_layer_idx=True)),
    "mpt": (MptForCausalLM, transformers.MptConfig, dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64)),
    "falcon alibi": (FalconForCausalLM, transformers.FalconConfig, dict(_FALCON, alibi=True, multi_query=False)),
    "falcon multi-query": (FalconForCausalLM, transformers.FalconConfig, dict(_FALCON, multi_query=True)),
    "bloom": (BloomForCausalLM, transformers.BloomConfig, dict(hidden_size=32, n_layer=2, n_head=4)),
    "bloom, 6 heads": (BloomForCausalLM, transformers.BloomConfig, dict(hidden_size=48, n_layer=2, n_head=6)),
}
GRAPH = ["llama", "gpt2"]
"""The models that the library itself can compile for a CPU, without a padding mask (MindSpore 2.10)."""
every_model = pytest.mark.parametrize("which", list(MODELS))
IDS = tokens(BATCH, LENGTH)
RIGHT = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 7]])
"""A padding mask, non-zero = keep. (Left padding makes queries without keys.)"""


def build(which, attention, **changes):
    """The model with fixed weights."""
    model_class, config_class, sizes = MODELS[which]
    config = config_class(**dict(sizes, vocab_size=VOCABULARY, use_cache=False, **changes))
    config._attn_implementation = attention
    model = model_class(config)
    set_weights(model)
    return model


def run(which, attention, padded=True, half=False, steps=STEPS, mask=None, **changes):
    """`libraries.results` of a model, which shifts its labels itself; with padding, of what is not padding."""
    model = build(which, attention, **changes)
    if half:
        model.to_float(ms.float16)
    options = {"return_dict": False}
    if padded:
        mask = Tensor(RIGHT.astype(np.int32))
    if mask is not None:
        options["attention_mask"] = mask

    def logits_of(ids, labels):
        return model(input_ids=ids, **options)[0]

    def loss_of(ids, labels):
        return model(input_ids=ids, labels=labels, **options)[0]

    batches = [tokens(BATCH, LENGTH, seed) for seed in range(steps)]
    batches = [(ids, np.where(RIGHT, ids, -100).astype(np.int32) if padded else ids) for ids in batches]
    found = results(model, logits_of, loss_of, batches)
    if padded:
        found["logits"] = found["logits"][RIGHT]
    return found


def in_half(which):
    """Options of a float16 run; GPT-2 without a padding mask, with which the library's own attention gives NaN."""
    return {"half": True, "steps": 1, "padded": not which.startswith("gpt2")}


own = once_a_mode(functools.partial(run, attention="eager"))


@pytest.fixture
def half_scale(monkeypatch):
    """Our attention with half the scale: half the query."""
    whole = integration.flash_attention

    def halved(query, *rest, **more):
        return whole(0.5 * query, *rest, **more)

    monkeypatch.setattr(integration, "flash_attention", halved)


@every_engine
@every_model
def test_equals_the_librarys_own(which, engine):
    """With a padding mask: logits, loss, gradients, and 20 training steps (engine 'jax': 2, a step takes seconds)."""
    steps = STEPS if engine == "portable" else 2
    with integration.enable(NAME, engine):
        assert_equal(run(which, NAME, steps=steps), first_steps(own(which), steps))


@pytest.fixture
def graph_mode():
    """MindSpore's graph mode."""
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@every_engine
@pytest.mark.parametrize("which", GRAPH)
def test_equals_the_librarys_own_in_graph_mode(which, engine, graph_mode):
    with integration.enable(NAME, engine):
        assert_equal(run(which, NAME, padded=False), own(which, padded=False))


@pytest.mark.parametrize("which", GRAPH)
def test_the_comparison_in_graph_mode_sees_the_scale(which, graph_mode, half_scale):
    with integration.enable(NAME):
        assert_differs(run(which, NAME, padded=False), own(which, padded=False))


@every_engine
@pytest.mark.parametrize("which", GRAPH)
def test_half_precision_in_graph_mode(which, engine, graph_mode):
    with integration.enable(NAME, engine):
        found = run(which, NAME, padded=False, half=True)
    assert_close_in_half(found, own(which, padded=False, half=True), own(which, padded=False))


@every_model
def test_equals_the_librarys_own_without_padding(which):
    with integration.enable(NAME):
        assert_equal(run(which, NAME, padded=False, steps=1), own(which, padded=False, steps=1))


@every_model
def test_the_comparison_sees_the_scale(which, half_scale):
    with integration.enable(NAME):
        assert_differs(run(which, NAME, steps=1), own(which, steps=1))


@every_engine
@every_model
def test_half_precision(which, engine):
    """float16, by the table of tolerances."""
    with integration.enable(NAME, engine):
        found = run(which, NAME, **in_half(which))
    assert_close_in_half(found, own(which, **in_half(which)), own(which, **dict(in_half(which), half=False)))


@every_model
def test_the_half_precision_comparison_sees_the_scale(which, half_scale):
    with integration.enable(NAME):
        found = run(which, NAME, **in_half(which))
    with pytest.raises(AssertionError, match="allowed"):
        assert_close_in_half(found, own(which, **in_half(which)), own(which, **dict(in_half(which), half=False)))


@every_engine
def test_mistral_window(engine):
    """The library's own attention leaves the window out (its mask has it commented out): it must be given as a mask."""
    window = 5
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    visible = (distance >= 0) & (distance < window)
    added = np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)
    mask = Tensor(np.broadcast_to(added, (BATCH, 1, LENGTH, LENGTH)).copy())
    windowed = functools.partial(run, "mistral", padded=False, sliding_window=window)
    want = windowed("eager", mask=mask)
    with integration.enable(NAME, engine):
        assert_equal(windowed(NAME), want)
        assert_equal(windowed(NAME, mask=mask), want)
    assert_differs(own("mistral", padded=False), want)


def test_left_padding_and_generation():
    """Padded on the left, with the library's cache, two tokens at a time: as the whole sequence at once."""
    keep = np.arange(LENGTH) >= np.array([[0], [5]])
    options = {"attention_mask": Tensor(keep.astype(np.int32)), "return_dict": False}
    with integration.enable(NAME):
        for attention in ("eager", NAME):
            model = build("llama", attention).set_train(False)
            logits = model(input_ids=Tensor(IDS), use_cache=False, **options)[0].asnumpy()
            cache = None
            parts = []
            for start in range(0, LENGTH, 8):
                stop = start + 8
                out = model(
                    input_ids=Tensor(IDS[:, start:stop]), use_cache=True, past_key_values=cache, return_dict=False,
                    attention_mask=Tensor(keep[:, :stop].astype(np.int32)),
                )  # fmt: skip
                cache = out[1]
                parts.append(out[0].asnumpy())
            assert np.allclose(np.concatenate(parts, 1)[keep], logits[keep], atol=1e-4)
            if attention == "eager":
                want = logits
    assert np.abs(logits - want)[keep].max() <= 1e-5 * np.abs(want).max()


# --- enable and disable -------------------------------------------------------------------------------
def test_other_names_keep_the_librarys_attention(half_scale):
    """half_scale spoils ours: a model of another name does not use it, enabled or not."""
    with integration.enable(NAME):
        for which in ("llama", "bloom", "falcon alibi"):
            found = errors(run(which, "eager", steps=1), own(which, steps=1))
            assert max(found.values()) == 0.0, found


def test_disable_takes_everything_back():
    from mindone.transformers.models.bloom import modeling_bloom
    from mindone.transformers.models.falcon.modeling_falcon import FALCON_ATTENTION_CLASSES

    before = modeling_bloom.BloomAttention, modeling_bloom.BloomModel._update_causal_mask, set(FALCON_ATTENTION_CLASSES)
    integration.enable("one")
    integration.enable("two", "portable")
    assert {"one", "two"} <= set(FALCON_ATTENTION_CLASSES)
    integration.disable()
    after = modeling_bloom.BloomAttention, modeling_bloom.BloomModel._update_causal_mask, set(FALCON_ATTENTION_CLASSES)
    assert after == before
    with pytest.raises(ValueError, match="one"):
        build("llama", "one")


def test_names_that_are_taken():
    for name in ("eager", "flash_attention_2"):
        with pytest.raises(ValueError, match="'name' must be a name that the library does not know yet, but got"):
            integration.enable(name)


def test_unknown_versions(monkeypatch):
    monkeypatch.setattr(mindone, "__version__", "0.2.0")
    with pytest.raises(UnsupportedError) as caught:
        integration.enable(NAME)
    assert str(caught.value) == (
        "For 'flash_attention.integrations.mindone', 'mindone' must be one of the tested versions 0.5.0, but got "
        "0.2.0. Install one of those, or try this one with any_version=True."
    )


@pytest.mark.parametrize("which", ["llama", "gpt2", "falcon multi-query", "bloom"])
def test_weights_cannot_be_asked_for(which):
    with integration.enable(NAME):
        model = build(which, NAME).set_train(False)
        with pytest.raises(
            UnsupportedError, match="'output_attentions' must be None or False, but got True. The softmax"
        ):
            model(input_ids=Tensor(IDS), output_attentions=True, return_dict=False)


def test_dropout_draws_anew_and_repeats():
    """GPT-2's dropout: another query, another draw; the same query, the same."""
    with integration.enable(NAME):
        model = build("gpt2", NAME, attn_pdrop=0.4)
        plain = build("gpt2", NAME)
    ids = Tensor(IDS)
    first, again = (model.set_train(True)(input_ids=ids, return_dict=False)[0].asnumpy() for _ in range(2))
    assert np.array_equal(first, again)
    still = model.set_train(False)(input_ids=ids, return_dict=False)[0].asnumpy()
    assert np.array_equal(still, plain.set_train(False)(input_ids=ids, return_dict=False)[0].asnumpy())
    assert np.abs(first - still).max() > 1e-2 * np.abs(still).max()


def test_the_page_of_the_documentation():
    """The blocks of docs/en/model-libraries.md that need this library print what stands below them."""
    libraries.assert_page_prints("mindone", prepare="import support.mindone_on_cpu")
