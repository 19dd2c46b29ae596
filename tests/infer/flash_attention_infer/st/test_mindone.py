"""mindone's language models generating over our caches, against the library's own attention without a cache.

bash build.sh test integration -k mindone
"""

import functools

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
from support.libraries import VOCABULARY, assert_chosen, set_weights, tokens

from flash_attention.core.errors import UnsupportedError
from flash_attention.integrations import mindone
from flash_attention_infer.integrations.mindone import CachedModel
from flash_attention_infer.nn import KVCache, Scheduler, generate

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
LAYERS, KV_HEADS, HEAD_DIM, NEW = 2, 2, 8, 6
_SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV_HEADS,
    max_position_embeddings=64,
)  # fmt: skip
_FALCON = dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4)
MODELS = {
    "llama": (LlamaForCausalLM, transformers.LlamaConfig, _SIZES),
    "mistral": (MistralForCausalLM, transformers.MistralConfig, _SIZES),
    "qwen2": (Qwen2ForCausalLM, transformers.Qwen2Config, _SIZES),
    "gpt2": (GPT2LMHeadModel, transformers.GPT2Config, dict(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64)),
    "falcon": (FalconForCausalLM, transformers.FalconConfig, dict(_FALCON, multi_query=True)),
    "falcon alibi": (FalconForCausalLM, transformers.FalconConfig, dict(_FALCON, alibi=True, multi_query=False)),
    "mpt": (MptForCausalLM, transformers.MptConfig, dict(d_model=32, n_heads=4, n_layers=LAYERS, max_seq_len=64)),
    "bloom": (BloomForCausalLM, transformers.BloomConfig, dict(hidden_size=32, n_layer=LAYERS, n_head=4)),
    "bloom, 6 heads": (BloomForCausalLM, transformers.BloomConfig, dict(hidden_size=48, n_layer=LAYERS, n_head=6)),
}
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (11, 3, 6)]
CACHES = {
    "paged": lambda: KVCache.paged(LAYERS, 24, KV_HEADS, HEAD_DIM, block_size=4),
    "contiguous": lambda: KVCache.contiguous(LAYERS, len(PROMPTS), 24, KV_HEADS, HEAD_DIM),
}


def build(which, attention="eager"):
    """The model with fixed weights, by default with the library's own attention."""
    model_class, config_class, sizes = MODELS[which]
    config = config_class(**sizes, vocab_size=VOCABULARY, use_cache=False)
    config._attn_implementation = attention
    model = model_class(config)
    set_weights(model)
    return model.set_train(False)


def whole(model, rows):
    """The library's logits of rows of tokens, one forward without any cache: float32 (B, longest, V)."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)  # causal: what stands behind a row changes nothing in it
    for place, row in zip(ids, rows):
        place[: len(row)] = row
    return model(input_ids=Tensor(ids), use_cache=False, return_dict=False)[0].asnumpy()


def assert_the_librarys(model, got, **options):
    """The new tokens are chosen from the library's logits: those logits."""
    assert [len(new) for new in got] == [NEW] * len(PROMPTS)
    return assert_chosen(functools.partial(whole, model), PROMPTS, got, **options)


@pytest.mark.parametrize("which, kind", [
    ("llama", "paged"), ("llama", "contiguous"), ("mistral", "paged"), ("qwen2", "paged")
])  # fmt: skip
def test_greedy_tokens_are_the_librarys(which, kind):
    """Prompts of different lengths in chunks; afterwards the model has its own attention again."""
    model, cache = build(which), CACHES[kind]()
    with CachedModel(model, cache) as forward:
        got = generate(forward, cache, PROMPTS, NEW, chunk=8, temperature=0.0)
    assert_the_librarys(model, got, temperature=0.0)
    assert len({tuple(row) for row in got}) == len(PROMPTS) and cache.table.live == ()


@pytest.mark.parametrize(
    "which, kv_heads", [("gpt2", 4), ("falcon", 1), ("mpt", 4), ("bloom", 4), ("bloom, 6 heads", 6)]
)
def test_models_with_attention_classes(which, kv_heads):
    """GPT-2, Falcon, MPT and BLOOM (ALiBi), built with our attention: the tokens of the library's own."""
    cache = KVCache.paged(LAYERS, 24, kv_heads, HEAD_DIM, block_size=4)
    with mindone.enable("flash_910"):
        model = build(which, "flash_910")
        with CachedModel(model, cache) as forward:
            got = generate(forward, cache, PROMPTS, NEW, chunk=8, temperature=0.0)
    assert_the_librarys(build(which), got, temperature=0.0)
    assert len({tuple(row) for row in got}) == len(PROMPTS) and cache.table.live == ()


def test_logits_and_draws():
    """Logits of the last step to rounding; drawn tokens; requests that join later."""
    model, cache = build("llama"), CACHES["paged"]()
    seen = []

    def watched(ids, positions, step):
        seen.append(forward(ids, positions, step))
        return seen[-1]

    options = dict(temperature=0.8, top_k=20)
    with CachedModel(model, cache) as forward, Scheduler(watched, cache) as scheduler:
        requests = [scheduler.submit(PROMPTS[0], NEW, seed=0, **options)]
        scheduler.step()
        requests += [scheduler.submit(PROMPTS[seed], NEW, seed=seed, **options) for seed in (1, 2)]
        list(scheduler.run())
    logits = assert_the_librarys(model, [request.result() for request in requests], **options)
    last = logits[1:, [len(prompt) + NEW - 2 for prompt in PROMPTS[1:]]][[0, 1], [0, 1]]  # of the two later requests
    assert np.abs(seen[-1].asnumpy() - last).max() < 1e-5 * np.abs(last).max()


def test_the_librarys_own_generation():
    """Greedy, with the library's own cache, one prompt."""
    model, cache = build("llama"), CACHES["paged"]()
    model.config.use_cache = True
    ids = Tensor(np.array(PROMPTS[:1], np.int64))
    ids = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=True)
    with CachedModel(model, cache) as forward:
        got = generate(forward, cache, PROMPTS[:1], NEW, temperature=0.0)
    assert got[0] == np.asarray(ids)[0].tolist()[-NEW:]


def test_a_failing_generation_gives_everything_back():
    model, cache = build("llama"), CACHES["paged"]()
    before, free = whole(model, PROMPTS), cache.free_blocks

    def stop(row, token):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        with CachedModel(model, cache) as forward:
            generate(forward, cache, PROMPTS, NEW, on_token=stop)
    assert cache.free_blocks == free and model.config._attn_implementation == "eager"
    assert np.array_equal(whole(model, PROMPTS), before)


def test_refuses():
    model = build("llama")
    with pytest.raises(ValueError, match="'cache' must be a cache of the model's 2 layers, but got one of 3"):
        CachedModel(model, KVCache.paged(3, 4, KV_HEADS, HEAD_DIM))
    with CachedModel(model, CACHES["paged"]()):
        with pytest.raises(UnsupportedError, match="Leave the 'with' block of the first"):
            CachedModel(model, CACHES["paged"]()).__enter__()
    cache = KVCache.paged(LAYERS, 24, 4, HEAD_DIM, block_size=4)
    with CachedModel(build("gpt2"), cache) as forward:
        with pytest.raises(UnsupportedError, match="but got another one in 2 of 2. Build the model after its enable"):
            generate(forward, cache, PROMPTS[:1], 2)
    with mindone.enable("flash_910"), CachedModel(build("falcon alibi", "flash_910"), cache) as forward:
        with pytest.raises(
            UnsupportedError, match="'model' must be one with rotary positions, but got a Falcon with AL"
        ):
            generate(forward, cache, PROMPTS[:1], 2)
