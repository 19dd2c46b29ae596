"""BLOOM (ALiBi) of mindformers 1.3.2 with our adapter against its own attention; run in the library's environment.

bash build.sh test integration -k mindformers_1_3
"""

import numpy as np
import pytest
import support.mindformers_on_new_mindspore  # noqa: F401  (modules that newer versions of MindSpore have removed)
from mindformers.models.bloom import BloomConfig, BloomLMHeadModel
from mindspore import Tensor
from support.libraries import VOCABULARY, assert_differs, errors, results, set_weights, tokens, train

from flash_attention.integrations import mindformers

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
BATCH, LENGTH = 2, 16
IDS = tokens(BATCH, LENGTH + 1)
EPS = 2.0**-10
"""float16: the library gives attention queries, keys and ALiBi in half precision, whatever compute_dtype says."""


def build(flash):
    """The model with fixed weights."""
    config = BloomConfig(
        batch_size=BATCH, seq_length=LENGTH, vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
        hidden_dropout_rate=0.0, attention_dropout_rate=0.0, use_past=False, use_flash_attention=flash,
        param_init_type="float32", embedding_init_type="float32", layernorm_compute_type="float32",
        softmax_compute_type="float32", compute_dtype="float32",
    )  # fmt: skip
    model = BloomLMHeadModel(config)
    set_weights(model, gain=1.0)
    return model


def run(flash):
    model = build(flash)
    return results(model, lambda whole: model(whole[:, :-1])[0], model, Tensor(IDS))


@pytest.fixture(scope="module")
def own():
    return run(False)


def test_equals_the_librarys_own(own):
    """Both compute in half precision: 4 units of it between them."""
    with mindformers.enable():
        worst = errors(run(True), own)
    assert max(worst.values()) <= 4 * EPS, worst
    assert worst["loss"] <= EPS


def test_the_comparison_sees_the_scale(own, monkeypatch):
    init = mindformers.FlashAttention.__init__

    def halved(self, head_num, **arguments):
        init(self, head_num, **dict(arguments, scale_value=0.5 * arguments["scale_value"]))

    monkeypatch.setattr(mindformers.FlashAttention, "__init__", halved)
    with mindformers.enable():
        assert_differs(run(True), own, 4 * EPS, times=10)


def test_the_comparison_sees_alibi(own, monkeypatch):
    call = mindformers.FlashAttention.construct

    def without(self, query, key, value, attn_mask=None, alibi_mask=None):
        return call(self, query, key, value, attn_mask, alibi_mask * 0)

    monkeypatch.setattr(mindformers.FlashAttention, "construct", without)
    with mindformers.enable():
        assert_differs(run(True), own, 4 * EPS, times=10)


def test_jax_engine(own):
    pytest.importorskip("jax")
    with mindformers.enable("jax"):
        assert max(errors(run(True), own).values()) <= 4 * EPS


def test_twenty_steps_track_each_other():
    batches = [Tensor(tokens(BATCH, LENGTH + 1, seed)) for seed in range(20)]
    with mindformers.enable():
        models = [build(False), build(True)]
    losses = [train(model, model, batches) for model in models]
    assert losses[0][-1] < losses[0][0] - 0.05
    assert np.abs(losses[1] - losses[0]).max() < 8 * EPS, losses
