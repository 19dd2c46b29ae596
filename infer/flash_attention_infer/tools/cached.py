"""What both frameworks measure: steps over a contiguous cache that is full but for the new tokens."""

import numpy as np

from flash_attention.tools.bench.cases import SEED


def steps(cache_class, case, candidate, array, finish):
    """``(call, results)`` of ``flash_attention.tools.bench``: ``call()`` is one step, whose tokens are taken back.

    'decode' takes a token of every sequence; 'prefill' the case's ``q_len`` tokens of the first one, the other rows of
    the cache lie idle.

    Args:
        cache_class: KVCache of the framework.
        case: sizes; ``kv_len`` tokens a sequence with the new ones.
        array: numpy float32 -> the framework's. finish: waits for a result.
    """
    cache = cache_class.contiguous(1, case.batch, case.kv_len, case.kv_heads, case.head_dim)
    ids = cache.add(case.batch)[: case.batch if candidate == "decode" else 1]
    old = case.kv_len - case.q_len
    if old:
        cache.reserve(ids, [old] * len(ids))  # present, with the zeros that the cache begins with
    rng = np.random.default_rng(SEED)
    query, key, value = (
        array(rng.standard_normal((len(ids), case.q_len, heads, case.head_dim), dtype=np.float32))
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )

    def call():
        with cache.step(ids, [case.q_len] * len(ids)) as step:
            finish(getattr(cache, candidate)(0, step, query, key, value))
        for one in ids:
            cache.truncate(one, old)

    return call, lambda: (None, None)  # judged by the tests
