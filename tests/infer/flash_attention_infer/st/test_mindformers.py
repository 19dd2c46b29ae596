"""mindformers' LLaMA generating over our caches, against the library's own attention without a cache.

bash build.sh test integration mindformers
"""

import functools

import mindspore as ms
import numpy as np
import pytest
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
from mindspore import Tensor
from support.libraries import VOCABULARY, assert_chosen, set_weights, tokens

from flash_attention.core.errors import UnsupportedError
from flash_attention.integrations import mindformers
from flash_attention_infer.integrations.mindformers import CachedModel
from flash_attention_infer.nn import KVCache, generate

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
LAYERS, KV_HEADS, HEAD_DIM, NEW, LONGEST = 2, 2, 8, 6, 32
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (11, 3, 6)]
CACHES = {
    "paged": lambda: KVCache.paged(LAYERS, 24, KV_HEADS, HEAD_DIM, block_size=4),
    "contiguous": lambda: KVCache.contiguous(LAYERS, len(PROMPTS), 24, KV_HEADS, HEAD_DIM),
}
_DTYPES = ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type")


def build(flash):
    """The model with fixed weights."""
    options = dict(
        batch_size=len(PROMPTS), seq_length=24, vocab_size=VOCABULARY, hidden_size=32, num_layers=LAYERS, num_heads=4,
        n_kv_heads=KV_HEADS, intermediate_size=64, max_position_embedding=LONGEST, use_past=False, use_rope_slice=True,
        pad_token_id=VOCABULARY,  # the library hides padding; here no token is
        fused_rms_norm=False, use_flash_attention=flash,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**options, **dict.fromkeys(_DTYPES, "float32")))
    set_weights(model)
    return model.set_train(False)


def whole(model, rows):
    """The library's logits of rows of tokens, one forward without any cache: float32 (B, 24, V)."""
    ids = np.zeros((len(rows), 24), np.int32)  # causal: what stands behind a row changes nothing in it
    for place, row in zip(ids, rows):
        place[: len(row)] = row
    return model(Tensor(ids))[0].asnumpy()


@pytest.mark.parametrize("kind", list(CACHES))
def test_greedy_tokens_are_the_librarys(kind):
    """Prompts of different lengths in chunks; afterwards the model computes what it did before."""
    with mindformers.enable():
        model = build(True)
    cache, before = CACHES[kind](), whole(model, PROMPTS)
    with CachedModel(model, cache) as forward:
        got = generate(forward, cache, PROMPTS, NEW, chunk=8, temperature=0.0)
    assert [len(row) for row in got] == [NEW] * len(PROMPTS)
    assert_chosen(functools.partial(whole, build(False)), PROMPTS, got, temperature=0.0)
    assert len({tuple(row) for row in got}) == len(PROMPTS) and cache.table.live == ()
    assert np.array_equal(whole(model, PROMPTS), before)


def test_a_failing_generation_gives_everything_back():
    def stop(row, token):
        raise KeyError("enough")

    with mindformers.enable():
        model = build(True)
    cache, before = CACHES["paged"](), whole(model, PROMPTS)
    free = cache.free_blocks
    with pytest.raises(KeyError, match="enough"):
        with CachedModel(model, cache) as forward:
            generate(forward, cache, PROMPTS, NEW, on_token=stop)
    assert cache.free_blocks == free
    assert np.array_equal(whole(model, PROMPTS), before)


def test_refuses():
    cache = CACHES["paged"]()
    with mindformers.enable():
        model = build(True)
    with pytest.raises(ValueError, match="'cache' must be a cache of the model's 2 layers, but got one of 3"):
        CachedModel(model, KVCache.paged(3, 4, KV_HEADS, HEAD_DIM))
    with pytest.raises(UnsupportedError, match="'model' must be a LlamaForCausalLM, but got a LlamaModel"):
        CachedModel(model.model, cache)
    with pytest.raises(UnsupportedError, match="'use_flash_attention' must be True, but got False. Build the model wi"):
        CachedModel(build(False), cache)
    with CachedModel(model, cache) as forward:
        with pytest.raises(ValueError, match="'positions' must be below the model's max_position_embedding, 32, but"):
            generate(forward, cache, [list(range(1, 40))], 1)
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        with pytest.raises(UnsupportedError, match="'mode' must be PyNative mode, but got graph mode"):
            CachedModel(model, cache).__enter__()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
