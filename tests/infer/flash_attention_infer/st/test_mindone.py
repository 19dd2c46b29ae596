"""mindone's language models generating over our caches, against the library's own attention without a cache.

bash build.sh test integration -k mindone
"""

import numpy as np
import pytest
import support.mindone_on_cpu  # noqa: F401  (gives the CPU the operators that the library asks for)
import transformers
from mindone.transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from mindone.transformers.models.llama.modeling_llama import LlamaForCausalLM
from mindone.transformers.models.mistral.modeling_mistral import MistralForCausalLM
from mindone.transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from mindspore import Tensor
from support.libraries import VOCABULARY, set_weights, tokens

from flash_attention.core.errors import UnsupportedError
from flash_attention.core.sampling import Sampling, sample
from flash_attention_infer.integrations.mindone import CachedModel
from flash_attention_infer.nn import KVCache, Scheduler, generate

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
LAYERS, KV_HEADS, HEAD_DIM, NEW = 2, 2, 8, 6
_SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV_HEADS,
    max_position_embeddings=64, vocab_size=VOCABULARY, use_cache=False,
)  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, transformers.LlamaConfig),
    "mistral": (MistralForCausalLM, transformers.MistralConfig),
    "qwen2": (Qwen2ForCausalLM, transformers.Qwen2Config),
}
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (11, 3, 6)]
CACHES = {
    "paged": lambda: KVCache.paged(LAYERS, 24, KV_HEADS, HEAD_DIM, block_size=4),
    "contiguous": lambda: KVCache.contiguous(LAYERS, len(PROMPTS), 24, KV_HEADS, HEAD_DIM),
}


def build(which):
    """The model with fixed weights and the library's own attention."""
    model_class, config_class = MODELS[which]
    config = config_class(**_SIZES)
    config._attn_implementation = "eager"
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
    """Every new token is what numpy chooses from the library's logits after all tokens before it: those logits."""
    logits = whole(model, [prompt + new for prompt, new in zip(PROMPTS, got)])
    for row, (prompt, new) in enumerate(zip(PROMPTS, got)):
        assert len(new) == NEW
        before = logits[row, len(prompt) - 1 : len(prompt) - 1 + NEW]
        seeds, numbers = np.full(NEW, row, np.uint32), np.arange(NEW, dtype=np.uint32)
        assert sample(np, before, seeds, numbers, Sampling(**options)).tolist() == new
    return logits


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
    ids = model.generate(Tensor(np.array(PROMPTS[:1], np.int32)), max_new_tokens=NEW, do_sample=False, use_cache=True)
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
    gpt2 = GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY))
    cache = KVCache.paged(LAYERS, 24, 4, HEAD_DIM, block_size=4)
    with CachedModel(gpt2, cache) as forward:
        with pytest.raises(UnsupportedError, match="'attention' must be taken from the library's registry by each"):
            generate(forward, cache, PROMPTS[:1], 2)
