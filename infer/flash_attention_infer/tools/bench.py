"""Benchmarks of prefill and decode over a contiguous cache: tokens a second and memory by batch and cache length.

One layer of 32 query and 8 key/value heads of 128 in float32. Every pair is measured in a process of its own; caches
above 8 GB are not made, their size is printed instead.
"""

import tracemalloc

from flash_attention.tools.bench.cases import Case
from flash_attention.tools.bench.registry import Benchmark, Entry, Job, quotient, register, said
from flash_attention_infer.core.config import CacheConfig
from flash_attention_infer.core.sequences import SequenceTable

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = tuple(1024 * 2**power for power in range(8))  # 1K .. 128K
LARGEST_BYTES = 8e9
CHUNK = 128
"""Tokens of a prefill step: the last ones of one sequence. Batches of prompts take proportionally longer."""
_SIZES = {"heads": 32, "kv_heads": 8, "head_dim": 128}


def cache_bytes(batch, length):
    """Bytes of the cache of a pair."""
    return CacheConfig(1, batch, length, _SIZES["kv_heads"], _SIZES["head_dim"]).bytes


def pairs(fitting):
    """(batch, length) of the table: those that fit, or the others."""
    found = [(batch, length) for length in LENGTHS for batch in BATCHES]
    return [pair for pair in found if (cache_bytes(*pair) <= LARGEST_BYTES) == fitting]


def _name(batch, length):
    return "batch {}, cache {}K".format(batch, length // 1024)


def _entry(framework, what, tokens, batch, length):
    candidate = "flash_attention_infer.tools.cached_in_{}:{}".format(framework, what)
    return Entry(what, framework, candidate, Case(batch, q_len=tokens, kv_len=length, causal=True, **_SIZES))


def _jobs(framework):
    """A job a pair; its rows show time and memory beside the cache."""
    steps = (("prefill", CHUNK), ("decode", 1))
    return [
        Job(_name(*pair), "fwd", tuple(_entry(framework, *step, *pair) for step in steps), "memory")
        for pair in pairs(fitting=True)
    ]


def _figures(framework, results):
    """Tokens a second of each pair, or the size of the cache that was not made."""
    figures = []
    for batch, length in pairs(fitting=True):
        for what, tokens in (("prefill", CHUNK), ("decode", batch)):
            seconds = results.value(_name(batch, length), "fwd", what, "seconds", "memory")
            name = "{} {}, {}".format(framework, what, _name(batch, length))
            figures.append(said(name, quotient(tokens, seconds), "tokens/s"))
    known = bool(results.finished)  # nothing is known of a run that has measured nothing
    for pair in pairs(fitting=False):
        name = "{} {}: too large, a cache of".format(framework, _name(*pair))
        figures.append(said(name, cache_bytes(*pair) / 1e9 if known else None, "GB"))
    name = "{} allocator and block tables, blocks of 16".format(framework)
    figures.append(said(name, allocator_bytes(2**20, 64) if known else None, "bytes/token"))
    return figures


def allocator_bytes(tokens, sequences, block_size=16):
    """Bytes that the bookkeeping of a paged cache takes for each of ``tokens`` tokens, all in use; measured."""
    tracemalloc.start()
    try:
        table = SequenceTable(tokens // block_size, block_size)
        for _ in range(sequences):
            table.reserve([table.add()], [tokens // sequences])
        return tracemalloc.get_traced_memory()[0] / tokens
    finally:
        tracemalloc.stop()


for _framework, _prefix in (("jax", "jax"), ("mindspore", "ms")):
    register(
        Benchmark(
            "{}-cache".format(_prefix),
            "prefill and decode over a cache, batch 1-64, cache 1K-128K",
            lambda framework=_framework: _jobs(framework),
            lambda results, machine, framework=_framework: _figures(framework, results),
            (_framework,),
            package="flash_attention_infer",
        )
    )
