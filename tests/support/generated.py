"""Properties of generation, once for both frameworks: a one-layer model over a cache, against forwards without one."""

import time

import numpy as np
import pytest

from flash_attention.core import reference, sampling
from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.sampling import Sampling
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention_infer.core import Scheduler
from flash_attention_infer.core.generation import generate, stream

VOCABULARY, HEADS, D = 13, 2, 16
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8])


class Model:
    """Embedding, one attention with ALiBi, output projection; float32 weights drawn once."""

    def __init__(self):
        rng = np.random.default_rng(2)
        size = HEADS * D
        shapes = [(VOCABULARY, size)] + [(size, size)] * 3 + [(size, VOCABULARY)]
        self.embed, self.q, self.k, self.v, self.out = [
            (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32) * 2 for shape in shapes
        ]

    def project(self, tokens):
        x = self.embed[np.asarray(tokens)]
        return [(x @ w).reshape(x.shape[:-1] + (HEADS, D)) for w in (self.q, self.k, self.v)]

    def whole(self, tokens):
        """Logits of the last token, float64, without a cache."""
        spec = AttentionSpec(1, HEADS, HEADS, len(tokens), len(tokens), D, causal=True, alibi_shape=(HEADS,))
        q, k, v = (x.swapaxes(0, 1)[None].astype(np.float64) for x in self.project(tokens))
        out = reference.attention(np, spec, q, k, v, Operands(slopes=alibi_slopes(HEADS)))[0]
        return out[0, :, -1].reshape(-1) @ self.out

    def want(self, prompt, count, seed=0, eos=None, **options):
        """Tokens by whole forwards alone."""
        tokens, found = list(prompt), []
        while len(found) < count and (eos is None or not found or found[-1] != eos):
            logits, number = self.whole(tokens)[None].astype(np.float32), np.full(1, len(found), np.uint32)
            chosen = sampling.sample(np, logits, np.full(1, seed, np.uint32), number, Sampling(**options))
            found.append(int(chosen[0]))
            tokens.append(found[-1])
        return found


MODEL = Model()


class Generated:
    """A framework gives `KVCache`, `array`, `numpy`, and `engine` (options of prefill)."""

    engine = {}

    def cache(self, num_blocks=24):
        return self.KVCache.paged(1, num_blocks=num_blocks, kv_heads=HEADS, head_dim=D, block_size=4)

    def forward(self, cache):
        slopes = self.array(alibi_slopes(HEADS), "float32")

        def run(tokens, positions, step):
            for row, (start, count) in enumerate(zip(step.starts, step.counts)):
                assert positions[row, :count].tolist() == list(range(start, start + count))
            arrays = (self.array(x, "float32") for x in MODEL.project(tokens))
            out = self.numpy(cache.prefill(0, step, *arrays, alibi_slopes=slopes, **self.engine))
            last = out[np.arange(len(out)), step.counts - 1]
            return self.array(last.reshape(len(out), -1) @ MODEL.out, "float32")

        return run

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5, "temperature": 0.8}], ids=str)
    def test_equals_forwards_without_a_cache(self, options):
        """Greedy and drawn, prompts of different lengths in chunks; a row does not depend on the others."""
        cache, heard = self.cache(), []
        got = generate(self.forward(cache), cache, PROMPTS, 5, seed=3, chunk=4,
                            on_token=lambda row, token: heard.append((row, token)), **options)  # fmt: skip
        assert got == [MODEL.want(prompt, 5, 3 + row, **options) for row, prompt in enumerate(PROMPTS)]
        assert [[token for row, token in heard if row == n] for n in range(3)] == got
        assert cache.free_blocks == 24

    def test_ends_with_eos(self):
        free = MODEL.want(PROMPTS[0], 6, temperature=0.0)
        cache = self.cache()
        got = generate(self.forward(cache), cache, PROMPTS[:1], 6, eos_token=free[2], temperature=0.0)
        assert got == [free[: free.index(free[2]) + 1]]

    def test_what_ends_early_gives_the_cache_back(self):
        cache = self.cache()
        forward = self.forward(cache)

        def stop(row, token):
            raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            generate(forward, cache, PROMPTS, 5, on_token=stop)
        assert cache.free_blocks == 24
        with pytest.raises(TimeoutError, match="'timeout' of 0.001 s has passed"):
            generate(forward, cache, PROMPTS, 5, timeout=0.001, on_token=lambda row, token: time.sleep(0.01))
        assert cache.free_blocks == 24
        tokens = stream(forward, cache, PROMPTS, 5, temperature=0.0)
        first = next(tokens)
        assert cache.free_blocks < 24
        tokens.close()
        assert cache.free_blocks == 24 and cache.table.live == ()
        got = generate(forward, cache, PROMPTS[1:2], 3, temperature=0.0)
        assert got == [MODEL.want(PROMPTS[1], 3, temperature=0.0)] and first[0] in range(3)

    def test_a_failing_model_gives_the_cache_back(self):
        cache = self.cache()

        def fail(tokens, positions, step):
            raise ZeroDivisionError("model")

        with pytest.raises(ZeroDivisionError, match="model"):
            generate(fail, cache, PROMPTS, 2)
        assert cache.free_blocks == 24

    def test_scheduler_with_preemption(self):
        """Six blocks for three rows that need nine at their end; two samplings in one batch; a late request."""
        cache = self.cache(6)
        options = [{"temperature": 0.0}, {"top_k": 5, "temperature": 0.8}, {"temperature": 0.0}]
        with Scheduler(self.forward(cache), cache, chunk=4) as scheduler:
            requests = [scheduler.submit(PROMPTS[n], 6, seed=n, **options[n]) for n in range(2)]
            scheduler.step()
            requests.append(scheduler.submit(PROMPTS[2], 6, seed=2, **options[2]))
            events = list(scheduler.run())
        assert len(events) + 1 == sum(len(request.result()) for request in requests)
        for n, request in enumerate(requests):
            assert request.result() == MODEL.want(PROMPTS[n], 6, n, **options[n])
        assert cache.free_blocks == 6

    @pytest.mark.parametrize("prompts, options, match", [
        ([[1], []], {}, "'prompts' must be non-empty sequences"),
        ([[0.5]], {}, "'prompts' must be sequences of token ids"),
        ([[1]], {"chunk": 0}, "'chunk' must be an int >= 1"),
        ([[1]], {"top_p": 2.0}, "'top_p' must be"),
    ])  # fmt: skip
    def test_refuses(self, prompts, options, match):
        cache = self.cache()
        with pytest.raises((ValueError, TypeError), match=match):
            generate(self.forward(cache), cache, prompts, 2, **options)
        assert cache.free_blocks == 24 and cache.table.live == ()
