"""KV caches in JAX: the properties of support/cached.py, pure functions under jit, memory, long sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cached import ALL, FAST, Case, cases, tensors
from support.cached_jax import InJax

from flash_attention.jax import flash_attention
from flash_attention_infer.jax import KVCache, decode

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


class TestJax(InJax):
    pass


HERE = InJax()
HALVES = [Case("{}, {}".format(kind, dtype), kind, dtype=dtype, sink_tokens=3 * (kind == "sliding"), **ALL)
          for kind in ("contiguous", "paged", "sliding") for dtype in ("float16", "bfloat16")]  # fmt: skip
INT8 = [Case("{}, int8, {}".format(kind, dtype), kind, window=9, dtype=dtype, held="int8")
        for kind in ("contiguous", "paged", "sliding") for dtype in ("float32", "bfloat16")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", cases() + HALVES + INT8, ids=lambda case: case.name)
def test_256_tokens(case):
    HERE.check_plan(case, 256, HERE.one_by_one(256))
    HERE.check_plan(case, 257, HERE.speculative(257), lookahead=4)
    HERE.check_plan(case, 256, HERE.ragged(256))


def test_pure_functions_under_jit():
    """A step's ids are not compiled in: two steps of one shape are one program, with the cache's own results."""
    case, HERE.length = FAST[1], 12
    cache, traced = HERE.make(case, 12), []

    @jax.jit
    def run(layer, step, *arrays):
        traced.append(step.slots.shape)
        return decode(layer, step, *arrays, **case.options(HERE.array))

    ids = cache.add(2)
    HERE.attend(cache, case, ids, [0, 0], [9, 9])
    for start in (9, 10):
        arrays = [HERE.array(x[:, start : start + 1], "float32") for x in tensors(case, 12)]
        with cache.step(ids, [1, 1]) as step:
            pure, layer = run(cache.layers[1], step, *arrays)
            np.testing.assert_allclose(pure, cache.decode(1, step, *arrays, **case.options(HERE.array)), atol=1e-6)
        np.testing.assert_allclose(layer.key, cache.layers[1].key)
    assert traced == [(2, 1)]


@pytest.mark.parametrize("dtype, share", [("float32", 0.2), ("bfloat16", 1.1)])
def test_extra_memory_of_decoding_over_all_rows(dtype, share):
    """Neither the write nor the attention copies a float32 cache; of 16 bits XLA's CPU backend makes one copy."""
    cache = KVCache.contiguous(1, batch=2, max_length=16384, kv_heads=2, head_dim=64, dtype=dtype)
    ids, x = cache.add(2), jnp.ones((2, 1, 2, 64), dtype)
    with cache.step(ids, [1, 1]) as step:
        compiled = jax.jit(decode, donate_argnums=0).lower(cache.layers[0], step, x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < share * cache.config.bytes


@pytest.mark.slow
def test_64_tokens_after_32k(figure):
    cache = KVCache.paged(1, num_blocks=2052, kv_heads=1, head_dim=64)
    whole = jax.jit(lambda q, k, v: flash_attention(q, k, v, is_causal=True))
    figure("JAX: 64 tokens decoded after 32K prefilled in chunks, error", HERE.error_after(cache, whole), 1e-6)
