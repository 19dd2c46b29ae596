"""LLaMA of mindformers 1.9.0 with our adapter against its own attention; run in the library's environment.

bash build.sh test integration -k mindformers
"""

import numpy as np
import pytest
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
from mindspore import Tensor
from support import libraries
from support.libraries import VOCABULARY, assert_differs, assert_equal, results, set_weights, tokens, train

from flash_attention.integrations import mindformers

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
BATCH, LENGTH, PAD = 2, 24, 0
IDS = tokens(BATCH, LENGTH + 1)
PADDED = np.where(np.arange(LENGTH + 1) < np.array([[LENGTH + 1], [LENGTH - 6]]), IDS, PAD).astype(np.int32)
_DTYPES = ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type")


def build(flash, dtype="float32", **changes):
    """The model with fixed weights; the options are those it needs on a CPU."""
    dtypes = dict(dict.fromkeys(_DTYPES, "float32"), compute_dtype=dtype)
    sizes = dict(
        batch_size=BATCH, seq_length=LENGTH, vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
        n_kv_heads=2, intermediate_size=64, max_position_embedding=64, pad_token_id=PAD,
    )  # fmt: skip
    on_cpu = dict(use_past=False, use_rope_slice=True, fused_rms_norm=False)
    model = LlamaForCausalLM(LlamaConfig(use_flash_attention=flash, **dict(sizes, **changes), **dtypes, **on_cpu))
    set_weights(model)
    return model


def run(flash, ids=IDS, **changes):
    model = build(flash, **changes)
    found = results(model, lambda whole: model(whole[:, :-1])[0], model, Tensor(ids))
    found["logits"] = found["logits"].reshape(BATCH, LENGTH, -1)[ids[:, :-1] != PAD]
    return found


@pytest.mark.parametrize("ids", [IDS, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_librarys_own(ids, kv_heads, mode):
    want = run(False, ids, n_kv_heads=kv_heads)
    with mindformers.enable():
        assert_equal(run(True, ids, n_kv_heads=kv_heads), want)


def test_the_comparison_sees_the_scale(mode, monkeypatch):
    init = mindformers.FlashAttention.__init__

    def halved(self, head_num, **arguments):
        init(self, head_num, **dict(arguments, scale_value=0.5 * arguments["scale_value"]))

    want = run(False)
    monkeypatch.setattr(mindformers.FlashAttention, "__init__", halved)
    with mindformers.enable():
        assert_differs(run(True), want)


def test_jax_engine(mode):
    pytest.importorskip("jax")
    want = run(False, PADDED)
    with mindformers.enable("jax"):
        assert_equal(run(True, PADDED), want)


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


def test_twenty_steps_track_each_other(mode):
    batches = [Tensor(tokens(BATCH, LENGTH + 1, seed)) for seed in range(20)]
    with mindformers.enable():
        models = [build(False), build(True)]
    losses = [train(model, model, batches) for model in models]
    assert losses[0][-1] < losses[0][0] - 0.1
    assert np.abs(losses[1] - losses[0]).max() < 1e-4 * losses[0][0], losses


def test_half_precision():
    """float16, by the table of tolerances: no further from float32 than twice the library's own attention."""
    want = run(False)["logits"]
    naive = np.abs(run(False, dtype="float16")["logits"] - want).max()
    with mindformers.enable():
        found = np.abs(run(True, dtype="float16")["logits"] - want).max()
    largest = np.abs(want).max()
    assert 1e-5 * largest < naive < 0.05 * largest  # it is half precision
    assert found <= max(2 * naive, 4 * 2.0**-10 * largest)


def test_models_built_before_or_after_keep_theirs():
    with mindformers.enable():
        inside = build(True)
    assert isinstance(inside.model.layers[0].attention.flash_attention, mindformers.FlashAttention)
    outside = build(True)
    assert not isinstance(outside.model.layers[0].attention.flash_attention, mindformers.FlashAttention)
    with pytest.raises(RuntimeError, match="FlashAttentionScore"):
        outside.set_train()(Tensor(IDS)).asnumpy()  # the library's operator has no CPU kernel
    assert np.isfinite(inside.set_train()(Tensor(IDS)).asnumpy()).all()


def test_the_page_of_the_documentation():
    """The blocks of docs/en/model-libraries.md that need this library print what stands below them."""
    libraries.assert_page_prints("mindformers")
