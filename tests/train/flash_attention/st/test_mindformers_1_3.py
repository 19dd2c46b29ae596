"""BLOOM (ALiBi) of mindformers 1.3.2 with our adapter against its own attention; run in the library's environment.

bash build.sh test integration mindformers-1.3
"""

import functools

import numpy as np
import pytest
import support.mindformers_on_new_mindspore  # noqa: F401  (modules that newer versions of MindSpore have removed)
from mindformers.models.bloom import BloomConfig, BloomLMHeadModel
from support.libraries import (
    PAD,
    STEPS,
    VOCABULARY,
    assert_differs,
    assert_equal,
    every_engine,
    halve_scale,
    mindformers_results,
    once_a_mode,
    set_weights,
)

from flash_attention.integrations import mindformers

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
BATCH, LENGTH = 2, 16
SHOWN = np.arange(LENGTH + 1) < np.array([[LENGTH + 1], [LENGTH - 4]])
"""What is not padding."""
EPS = 2.0**-10
"""float16: the library gives attention queries, keys and ALiBi in half precision, whatever compute_dtype says."""
HALF = dict(bound=4 * EPS, tracking=4 * EPS)  # of the table of tolerances


def build(flash):
    """The model with fixed weights."""
    config = BloomConfig(
        batch_size=BATCH, seq_length=LENGTH, vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
        hidden_dropout_rate=0.0, attention_dropout_rate=0.0, use_past=False, use_flash_attention=flash,
        param_init_type="float32", embedding_init_type="float32", layernorm_compute_type="float32",
        softmax_compute_type="float32", compute_dtype="float32", pad_token_id=PAD, eos_token_id=PAD,
    )  # fmt: skip
    model = BloomLMHeadModel(config)
    set_weights(model, gain=1.0)
    return model


def run(flash, padded=True, steps=STEPS):
    """`libraries.results` of the model; with padding, of what is not padding."""
    return mindformers_results(build(flash), SHOWN if padded else np.ones_like(SHOWN), steps)


own = once_a_mode(functools.partial(run, False))  # with the library's own attention


@every_engine
def test_equals_the_librarys_own(engine, mode):
    """ALiBi, padding; logits, loss, gradients, and 20 training steps."""
    with mindformers.enable(engine):
        assert_equal(run(True), own(), **HALF)


def test_equals_the_librarys_own_without_padding():
    with mindformers.enable():
        assert_equal(run(True, padded=False, steps=1), own(padded=False, steps=1), **HALF)


def test_the_comparison_sees_the_scale(mode, monkeypatch):
    halve_scale(monkeypatch, mindformers.FlashAttention)
    with mindformers.enable():
        assert_differs(run(True), own(), times=10, **HALF)


def test_the_comparison_sees_alibi(monkeypatch):
    call = mindformers.FlashAttention.construct

    def without(self, query, key, value, attn_mask=None, alibi_mask=None):
        return call(self, query, key, value, attn_mask, alibi_mask * 0)

    monkeypatch.setattr(mindformers.FlashAttention, "construct", without)
    with mindformers.enable():
        assert_differs(run(True), own(), times=10, **HALF)
