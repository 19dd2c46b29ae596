"""mindformers' models generating over our caches, once for both of its versions: tests that a file's class inherits."""

import functools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.libraries import VOCABULARY, assert_chosen, tokens

from flash_attention.core.errors import UnsupportedError
from flash_attention.integrations import mindformers
from flash_attention_infer.integrations.mindformers import CachedModel
from flash_attention_infer.nn import KVCache, generate

LAYERS, HEADS, HEAD_DIM, NEW, LENGTH = 2, 4, 8, 6, 24
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (11, 3, 6)]
SIZES = dict(
    batch_size=len(PROMPTS), seq_length=LENGTH, vocab_size=VOCABULARY, hidden_size=HEADS * HEAD_DIM, num_layers=LAYERS,
    num_heads=HEADS, use_past=False,
)  # fmt: skip
FLOAT32 = dict.fromkeys(
    ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "param_init_type"), "float32"
)


def whole(model, rows):
    """The library's logits of rows of tokens, one forward without any cache: float32 (B, LENGTH, V)."""
    ids = np.zeros((len(rows), LENGTH), np.int32)  # causal: what stands behind a row changes nothing in it
    for place, row in zip(ids, rows):
        place[: len(row)] = row
    logits = model(Tensor(ids))[0].astype(ms.float32).asnumpy()
    return logits.reshape((len(rows), LENGTH, -1))


class Cached:
    """A file's class gives `build(flash)`, the model with fixed weights, and `kv_heads`.

    Attributes:
        inner: name of a part of the model, which is refused.
        bound: of the error of logits, as a share of the largest.
    """

    def paged(self):
        return KVCache.paged(LAYERS, 24, self.kv_heads, HEAD_DIM, block_size=4)

    def contiguous(self):
        return KVCache.contiguous(LAYERS, len(PROMPTS), LENGTH, self.kv_heads, HEAD_DIM)

    def ours(self):
        """The model that the cache serves."""
        with mindformers.enable():
            return self.build(True)

    @pytest.mark.parametrize("kind", ["paged", "contiguous"])
    def test_greedy_tokens_are_the_librarys(self, kind):
        """Logits of the last step too; prompts of different lengths in chunks; afterwards the model is as before."""
        model, cache, seen = self.ours(), getattr(self, kind)(), []
        before = whole(model, PROMPTS)

        def watched(*step):
            seen.append(forward(*step))
            return seen[-1]

        with CachedModel(model, cache) as forward:
            got = generate(watched, cache, PROMPTS, NEW, chunk=8, temperature=0.0)
        assert [len(row) for row in got] == [NEW] * len(PROMPTS)
        logits = assert_chosen(functools.partial(whole, self.build(False)), PROMPTS, got, temperature=0.0)
        last = logits[0, len(PROMPTS[0]) + NEW - 2]  # the longest prompt comes in chunks and ends alone
        assert np.abs(seen[-1].asnumpy()[0] - last).max() < self.bound * np.abs(last).max()
        assert len({tuple(row) for row in got}) == len(PROMPTS) and cache.table.live == ()
        assert np.array_equal(whole(model, PROMPTS), before)

    def test_a_failing_generation_gives_everything_back(self):
        def stop(row, token):
            raise KeyError("enough")

        model, cache = self.ours(), self.paged()
        before, free = whole(model, PROMPTS), cache.free_blocks
        with pytest.raises(KeyError, match="enough"):
            with CachedModel(model, cache) as forward:
                generate(forward, cache, PROMPTS, NEW, on_token=stop)
        assert cache.free_blocks == free
        assert np.array_equal(whole(model, PROMPTS), before)

    def test_refuses(self):
        model, cache = self.ours(), self.paged()
        with pytest.raises(ValueError, match="'cache' must be a cache of the model's 2 layers, but got one of 3"):
            CachedModel(model, KVCache.paged(3, 4, self.kv_heads, HEAD_DIM))
        inner = getattr(model, self.inner)
        with pytest.raises(UnsupportedError, match="'model' must be one of LlamaForCausalLM, BloomLMHeadModel, but go"):
            CachedModel(inner, cache)
        with pytest.raises(UnsupportedError, match="'use_flash_attention' must be True, but got False. Build the mode"):
            CachedModel(self.build(False), cache)
        ms.set_context(mode=ms.GRAPH_MODE)
        try:
            with pytest.raises(UnsupportedError, match="'mode' must be PyNative mode, but got graph mode"):
                CachedModel(model, cache).__enter__()
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
