"""mindone's language models with our attention against the same with their own; run in the library's environment.

bash build.sh test integration -k mindone
"""

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
from support.libraries import VOCABULARY, assert_differs, assert_equal, results, set_weights, tokens, train

from flash_attention.core.errors import UnsupportedError
from flash_attention.integrations import mindone as integration

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
NAME = "flash_910"
BATCH, LENGTH = 2, 24
_GQA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
_FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_MPT = dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
MODELS = {
    "llama": (LlamaForCausalLM, transformers.LlamaConfig, _GQA),
    "mistral": (MistralForCausalLM, transformers.MistralConfig, dict(_GQA, sliding_window=64)),
    "qwen2": (Qwen2ForCausalLM, transformers.Qwen2Config, _GQA),
    "gpt2": (
        GPT2LMHeadModel,
        transformers.GPT2Config,
        dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    ),
    "gpt2 scaled by layer": (
        GPT2LMHeadModel,
        transformers.GPT2Config,
        dict(
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            scale_attn_by_inverse_layer_idx=True,
            reorder_and_upcast_attn=False,
        ),
    ),  # fmt: skip
    "mpt": (MptForCausalLM, transformers.MptConfig, _MPT),
    "falcon alibi": (FalconForCausalLM, transformers.FalconConfig, dict(_FALCON, alibi=True, multi_query=False)),
    "falcon multi-query": (FalconForCausalLM, transformers.FalconConfig, dict(_FALCON, multi_query=True)),
    "bloom": (BloomForCausalLM, transformers.BloomConfig, dict(hidden_size=32, n_layer=2, n_head=4)),
    "bloom, 6 heads": (BloomForCausalLM, transformers.BloomConfig, dict(hidden_size=48, n_layer=2, n_head=6)),
}
IDS = tokens(BATCH, LENGTH)
RIGHT = np.arange(LENGTH) < np.array(
    [[LENGTH], [LENGTH - 7]]
)  # a padding mask; left padding makes queries without keys


def build(which, attention, **changes):
    """The model with fixed weights."""
    model_class, config_class, sizes = MODELS[which]
    config = config_class(**dict(sizes, vocab_size=VOCABULARY, use_cache=False, **changes))
    config._attn_implementation = attention
    model = model_class(config)
    set_weights(model)
    return model


def language_model_results(model, ids, labels, **options):
    """`libraries.results` of a model that shifts its labels itself."""

    def logits_of(ids, labels):
        return model(input_ids=ids, **options)[0]

    def loss_of(ids, labels):
        return model(input_ids=ids, labels=labels, **options)[0]

    return results(model, logits_of, loss_of, ids, labels)


def run(which, attention, padded=False, ids=IDS, **changes):
    """`libraries.results` of a model; with padding, of what is not padding."""
    model = build(which, attention, **changes)
    options = {"return_dict": False}
    if which != "mpt" and not which.startswith("falcon"):
        options["use_cache"] = False
    labels = ids
    if padded:
        options["attention_mask"] = Tensor(RIGHT.astype(np.int32))
        labels = np.where(RIGHT, ids, -100).astype(np.int32)
    found = language_model_results(model, Tensor(ids), Tensor(labels), **options)
    if padded:
        found["logits"] = found["logits"][RIGHT]
    return found


@pytest.fixture(scope="module")
def own():
    """Results of the library's own attention, computed once each."""
    cache = {}

    def get(which, padded=False):
        if (which, padded) not in cache:
            cache[which, padded] = run(which, "eager", padded)
        return cache[which, padded]

    return get


@pytest.fixture
def half_scale(monkeypatch):
    """Our attention with half the scale."""
    whole = integration.flash_attention

    def halved(query, *operands, scale, **options):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return whole(query, *operands, scale=0.5 * scale, **options)

    monkeypatch.setattr(integration, "flash_attention", halved)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("which", sorted(MODELS))
def test_equals_the_librarys_own(which, padded, own):
    with integration.enable(NAME):
        assert_equal(run(which, NAME, padded), own(which, padded))


@pytest.mark.parametrize("which", sorted(MODELS))
def test_the_comparison_sees_the_scale(which, own, half_scale):
    with integration.enable(NAME):
        assert_differs(run(which, NAME), own(which))


@pytest.mark.parametrize("which", ["llama", "mpt", "bloom"])
def test_jax_engine(which, own):
    pytest.importorskip("jax")
    with integration.enable(NAME, "jax"):
        assert_equal(run(which, NAME), own(which))


@pytest.mark.parametrize("which", ["llama", "qwen2", "gpt2", "bloom", "falcon alibi"])
def test_twenty_steps_track_each_other(which):
    batches = [Tensor(tokens(BATCH, LENGTH, seed)) for seed in range(20)]
    losses = []
    with integration.enable(NAME):
        for attention in ("eager", NAME):
            model = build(which, attention)

            def loss_of(ids, model=model):
                return model(input_ids=ids, labels=ids, return_dict=False)[0]

            losses.append(train(model, loss_of, batches))
    assert losses[0][-1] < losses[0][0] - 0.1
    assert np.abs(losses[1] - losses[0]).max() < 1e-4 * losses[0][0], losses


def test_mistral_window(own):
    """The library's own attention leaves the window out (its mask has it commented out): it must be given as a mask."""
    window = 5
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    visible = (distance >= 0) & (distance < window)
    added = np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)
    mask = Tensor(np.broadcast_to(added, (BATCH, 1, LENGTH, LENGTH)).copy())
    ids = Tensor(IDS)

    def windowed(attention, **options):
        model = build("mistral", attention, sliding_window=window)
        return language_model_results(model, ids, ids, use_cache=False, return_dict=False, **options)

    want = windowed("eager", attention_mask=mask)
    with integration.enable(NAME):
        assert_equal(windowed(NAME), want)
        assert_equal(windowed(NAME, attention_mask=mask), want)
    assert_differs(own("mistral"), want)


def test_half_precision():
    """float16, by the table of tolerances: no further from float32 than twice the library's own attention."""
    want = run("llama", "eager")

    def halved(attention):
        model = build("llama", attention).to_float(ms.float16)
        model.set_train(False)
        return model(input_ids=Tensor(IDS), use_cache=False, return_dict=False)[0].astype(ms.float32).asnumpy()

    with integration.enable(NAME):
        ours, theirs = halved(NAME), halved("eager")
    largest = np.abs(want["logits"]).max()
    naive = np.abs(theirs - want["logits"]).max()
    assert 1e-5 * largest < naive < 0.05 * largest  # it is half precision
    assert np.abs(ours - want["logits"]).max() <= max(2 * naive, 4 * 2.0**-10 * largest)


def test_llama_in_graph_mode(own):
    """Library and ours as compiled graphs: logits, and the loss with its gradients."""
    ids = Tensor(IDS)

    def compiled(attention):
        model = build("llama", attention)
        ms.set_context(mode=ms.GRAPH_MODE)
        try:
            return language_model_results(model, ids, ids, use_cache=False, return_dict=False)
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)

    with integration.enable(NAME):
        found = compiled(NAME)
    assert_equal(found, compiled("eager"))
    assert_equal(found, own("llama"))


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
def test_other_names_keep_the_librarys_attention(own, half_scale):
    """half_scale spoils ours: a model of another name does not use it, enabled or not."""
    with integration.enable(NAME):
        for which in ("llama", "bloom", "falcon alibi"):
            assert_equal(run(which, "eager"), own(which), 0.0)


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
