"""KV caches in MindSpore: the properties of support/cached.py in both modes."""

import pytest
from support.cached import ALL, FAST, Case, cases, fast
from support.cached_mindspore import InMindSpore

from flash_attention.ops import flash_attention
from flash_attention_infer.nn import KVCache

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


class TestPynative(InMindSpore):
    pass


class InGraph(InMindSpore):
    mode = "graph"


@fast(1)
def test_graph(case):
    InGraph().check_plan(case, 15, InGraph.one_by_one(15, first=13))


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST + cases(), ids=lambda case: case.name)
def test_256_tokens(case):
    here = InMindSpore()
    here.check_plan(case, 256, here.one_by_one(256))
    here.check_plan(case, 256, here.ragged(256))


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_256_tokens_in_graph_mode(case):
    InGraph().check_plan(case, 256, InGraph.one_by_one(256, first=128))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_half_precision(kind, dtype):
    case = Case("", kind, dtype=dtype, sink_tokens=3 * (kind == "sliding"), **ALL)
    InMindSpore().check_plan(case, 40, InMindSpore.ragged(40))
    InMindSpore().check_plan(case, 25, InMindSpore.speculative(25), lookahead=4)


def test_pools_that_mindspore_cannot_write_to():
    """Refused before anything is allocated: its own error comes at the first write and names no remedy."""
    with pytest.raises(ValueError, match="'num_blocks' must be small enough for pools of 2 GiB, .* Take fewer blocks"):
        KVCache.paged(1, num_blocks=2**17, kv_heads=8, head_dim=128, block_size=16)


@pytest.mark.slow
def test_64_tokens_after_32k(figure):
    cache = KVCache.paged(1, num_blocks=2052, kv_heads=1, head_dim=64)
    error = InMindSpore().error_after(
        cache, lambda q, k, v: flash_attention(q, k, v, is_causal=True, engine="portable"), chunk=512, engine="portable"
    )
    figure("MindSpore: 64 tokens decoded after 32K prefilled in chunks, error", error, 1e-6)
