"""KV caches in MindSpore: the properties of support/cached.py in both modes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops
from support.cached import ALL, FAST, Case, cases, fast, full
from support.cached_mindspore import InMindSpore

from flash_attention.ops import flash_attention
from flash_attention.ops.functional import on_cpu
from flash_attention_infer.nn import KVCache, host_memory, storage

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
of_the_cpu = pytest.mark.skipif(not on_cpu(), reason="pools lie in host memory on the CPU alone")


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


@fast(1)
def test_scattered(case, monkeypatch):
    """PyNative with MindSpore's own operators, as on devices and where `asnumpy` copies."""
    monkeypatch.setattr(storage, "in_host_memory", lambda: False)
    InMindSpore().check_plan(case, 15, InMindSpore.one_by_one(15, first=13))


def test_a_sequence_that_changes_modes():
    """A graph sees what numpy wrote to the pools, and numpy what a graph wrote, copied blocks too."""
    case, eager, graph = FAST[1], InMindSpore(), InGraph()
    eager.length = graph.length = 12
    cache = eager.make(case, 12)
    parent = cache.add()
    want = full(np, case, 12)["out"][:1]
    for n, here in enumerate((eager, graph, graph, eager)):
        out = here.attend(cache, case, [parent], [3 * n], [3])
        np.testing.assert_allclose(out, want[:, 3 * n : 3 * n + 3], atol=2e-5)
        parent = cache.fork(parent)  # the next tokens go to a copy of the shared block


@pytest.fixture
def queued():
    before = ms.get_context("pynative_synchronize")
    ms.set_context(pynative_synchronize=False)
    yield
    ms.set_context(pynative_synchronize=before)


@of_the_cpu
def test_queued_readers_see_the_pool_as_it_was(queued):
    pool = Parameter(Tensor(np.zeros((64, 64, 64), np.float32)), requires_grad=False)
    busy = x = Tensor(np.full((512, 512), 1 / 512, np.float32))
    for _ in range(8):
        busy = ops.matmul(busy, x)
    read = ops.gather(host_memory.view(pool, (-1, 64)), Tensor(np.arange(4096, dtype=np.int32)), 0)
    slots, tokens = np.arange(4096, dtype=np.int32)[None], np.ones((1, 4096, 64), np.float32)
    host_memory.write([pool], Tensor(slots), [Tensor(tokens)])
    assert not read.asnumpy().any() and pool.asnumpy().all()


@of_the_cpu
def test_pools_that_a_graph_cannot_write_to(monkeypatch):
    monkeypatch.setattr(storage, "LARGEST_SCATTERED", 2**10)
    case, graph = FAST[0], InGraph()
    graph.length = 12
    cache = graph.make(case, 12)
    with pytest.raises(ValueError, match="'num_blocks' must be small enough for pools of 2 GiB.*, or PyNative mode"):
        graph.attend(cache, case, cache.add(2), [0, 0], [3, 3])


@pytest.mark.slow
def test_64_tokens_after_32k(figure):
    cache = KVCache.paged(1, num_blocks=2052, kv_heads=1, head_dim=64)
    error = InMindSpore().error_after(
        cache, lambda q, k, v: flash_attention(q, k, v, is_causal=True, engine="portable"), chunk=512, engine="portable"
    )
    figure("MindSpore: 64 tokens decoded after 32K prefilled in chunks, error", error, 1e-6)
