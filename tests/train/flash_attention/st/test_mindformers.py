"""LLaMA of mindformers 1.9.0 with our adapter against its own attention; run in the library's environment.

bash build.sh test integration mindformers
"""

import functools

import numpy as np
import pytest
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
from mindspore import Tensor
from support import libraries
from support.libraries import (
    PAD,
    STEPS,
    VOCABULARY,
    assert_close_in_half,
    assert_differs,
    assert_equal,
    every_engine,
    halve_scale,
    mindformers_results,
    once_a_mode,
    set_weights,
    tokens,
)

from flash_attention.integrations import mindformers

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
BATCH, LENGTH = 2, 24
SHOWN = np.arange(LENGTH + 1) < np.array([[LENGTH + 1], [LENGTH - 6]])
"""What is not padding."""
_DTYPES = ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type")


def build(flash, half=False, **changes):
    """The model with fixed weights; the options are those it needs on a CPU."""
    dtypes = dict(dict.fromkeys(_DTYPES, "float32"), compute_dtype="float16" if half else "float32")
    sizes = dict(
        batch_size=BATCH, seq_length=LENGTH, vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
        n_kv_heads=2, intermediate_size=64, max_position_embedding=64, pad_token_id=PAD,
    )  # fmt: skip
    on_cpu = dict(use_past=False, use_rope_slice=True, fused_rms_norm=False)
    model = LlamaForCausalLM(LlamaConfig(use_flash_attention=flash, **dict(sizes, **changes), **dtypes, **on_cpu))
    set_weights(model)
    return model


def run(flash, padded=True, steps=STEPS, **changes):
    """`libraries.results` of the model; with padding, of what is not padding."""
    return mindformers_results(build(flash, **changes), SHOWN if padded else np.ones_like(SHOWN), steps)


own = once_a_mode(functools.partial(run, False))  # with the library's own attention


@pytest.fixture
def half_scale(monkeypatch):
    """Our adapter with half the scale."""
    halve_scale(monkeypatch, mindformers.FlashAttention)


@every_engine
def test_equals_the_librarys_own(engine, mode):
    """Grouped heads, padding: logits, loss, gradients, and 20 training steps."""
    with mindformers.enable(engine):
        assert_equal(run(True), own())


@pytest.mark.parametrize("padded, kv_heads", [(False, 2), (False, 4), (True, 1)])
def test_equals_the_librarys_own_with_other_heads(padded, kv_heads):
    options = dict(padded=padded, n_kv_heads=kv_heads, steps=1)
    with mindformers.enable():
        assert_equal(run(True, **options), own(**options))


def test_the_comparison_sees_the_scale(mode, half_scale):
    with mindformers.enable():
        assert_differs(run(True), own())


@every_engine
def test_half_precision(engine, mode):
    """float16, by the table of tolerances, 20 training steps too."""
    with mindformers.enable(engine):
        assert_close_in_half(run(True, half=True), own(half=True), own())


def test_the_half_precision_comparison_sees_the_scale(half_scale):
    with mindformers.enable():
        found = run(True, half=True)
    with pytest.raises(AssertionError, match="allowed"):
        assert_close_in_half(found, own(half=True), own())


def test_compressed_mask():
    """use_attn_mask_compression, from 2,048 tokens on: sparse mode 2 with the operator's 2048 x 2048 triangle."""
    ids = Tensor(tokens(1, 2048))
    sizes = dict(batch_size=1, seq_length=2048, max_position_embedding=2048, num_layers=1)
    want = build(False, **sizes).set_train(False)(ids)[0].asnumpy()
    with mindformers.enable():
        model = build(True, use_attn_mask_compression=True, **sizes)
    assert model.model.layers[0].attention.flash_attention.rules[2] == 2  # the sparse mode
    found = model.set_train(False)(ids)[0].asnumpy()
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


def test_models_built_before_or_after_keep_theirs():
    ids = Tensor(tokens(BATCH, LENGTH + 1))
    with mindformers.enable():
        inside = build(True)
    assert isinstance(inside.model.layers[0].attention.flash_attention, mindformers.FlashAttention)
    outside = build(True)
    assert not isinstance(outside.model.layers[0].attention.flash_attention, mindformers.FlashAttention)
    with pytest.raises(RuntimeError, match="FlashAttentionScore"):
        outside.set_train()(ids).asnumpy()  # the library's operator has no CPU kernel
    assert np.isfinite(inside.set_train()(ids).asnumpy()).all()


def test_the_page_of_the_documentation():
    """The blocks of docs/en/model-libraries.md that need this library print what stands below them."""
    # Imported first, as the library's log goes to the stdout of that moment: not to what a block prints.
    libraries.assert_page_prints("mindformers", prepare="import mindformers")
