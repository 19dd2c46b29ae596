"""Scheduler without a framework: a numpy cache whose model answers with a hash of all tokens it finds in the blocks.

A token in a wrong place, lost or overwritten changes every later answer, so each request is compared with the same one
run alone; blocks are counted after each test.
"""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attention.core import sampling
from flash_attention.core.sampling import Sampling
from flash_attention_infer.core import OutOfBlocksError, Scheduler
from flash_attention_infer.core.cache import KVCache
from flash_attention_infer.core.generation import generate

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
VOCABULARY, BLOCKS, BLOCK = 11, 12, 4


class TokenCache(KVCache):
    """Keeps the token ids themselves."""

    def __init__(self, config, on_shortage=None):
        super().__init__(config, on_shortage)
        self.tokens = np.full(config.num_blocks * config.block_size, -1)

    def copy_blocks(self, pairs):
        blocks = self.tokens.reshape(-1, self.config.block_size)
        blocks[pairs[:, 1]] = blocks[pairs[:, 0]]

    def sample(self, logits, seeds, positions, **options):
        return sampling.sample(np, logits, seeds, positions, Sampling(**options))

    def forward(self, tokens, positions, step):
        """Logits of a hash of each sequence, read back through its block table."""
        self.tokens[step.slots[step.slots >= 0]] = tokens[step.slots >= 0]
        logits = np.zeros((step.batch, VOCABULARY), np.float32)
        for row, (table, length) in enumerate(zip(step.tables, step.lengths)):
            held = self.tokens.reshape(-1, self.config.block_size)[table].reshape(-1)[:length]
            logits[row] = logits_of(held)
        return logits


def logits_of(tokens):
    """float32 (V,): a function of every token and its place."""
    key = np.uint64(7)
    for token in tokens:
        key = np.uint64((int(key) * 1000003 + int(token) + 1) % 2**61)
    return np.random.default_rng(int(key)).standard_normal(VOCABULARY).astype(np.float32)


def alone(prompt, count, seed=0, eos=None, **options):
    """The tokens of a request without any cache."""
    tokens, found = list(prompt), []
    while len(found) < count and (eos is None or eos not in found):
        number = np.full(1, len(found), np.uint32)
        chosen = sampling.sample(np, logits_of(tokens)[None], np.full(1, seed, np.uint32), number, Sampling(**options))
        found.append(int(chosen[0]))
        tokens.append(found[-1])
    return found


@pytest.fixture
def cache():
    made = TokenCache.paged(1, BLOCKS, 1, 1, block_size=BLOCK)
    yield made
    assert made.free_blocks == BLOCKS and made.table.live == ()


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def test_requests_join_and_leave(cache):
    """A request submitted later runs beside the others, each with its own sampling and end."""
    with Scheduler(cache.forward, cache, chunk=3) as scheduler:
        first = scheduler.submit(prompt_of(8), 9, seed=5, temperature=0.7, top_k=4)
        scheduler.step()
        late = scheduler.submit(prompt_of(5, 1), 3, temperature=0.0)
        together = 0
        while not late.finished:
            together += len(scheduler.step()) == 2
        assert late.result() == alone(prompt_of(5, 1), 3, temperature=0.0) and late.finished == "length"
        assert together and first.finished is None
        list(scheduler.run())
    assert first.result() == alone(prompt_of(8), 9, seed=5, temperature=0.7, top_k=4)


def test_a_long_prompt_delays_others_by_a_chunk(cache):
    """While 24 tokens are prefilled in chunks of 4, the running request gets a token a step."""
    with Scheduler(cache.forward, cache, chunk=4) as scheduler:
        running = scheduler.submit([1], 12)
        scheduler.step()
        scheduler.submit(prompt_of(24), 1)
        for count in range(2, 7):
            scheduler.step()
            assert len(running.tokens) == count


def test_steps_have_few_shapes(cache):
    """Rows and tokens are powers of two, or the most there can be; what is asked for does not change."""
    shapes = set()

    def forward(tokens, positions, step):
        assert tokens.shape == positions.shape == step.slots.shape and step.batch >= len(step.sequences)
        shapes.add(tokens.shape)
        return cache.forward(tokens, positions, step)

    with Scheduler(forward, cache, chunk=6) as scheduler:
        requests = [scheduler.submit(prompt_of(size, size), new) for size, new in ((9, 2), (1, 7), (2, 4), (3, 5))]
        list(scheduler.run())
        for request, (size, new) in zip(requests, ((9, 2), (1, 7), (2, 4), (3, 5))):
            assert request.result() == alone(prompt_of(size, size), new)
    assert {rows for rows, _ in shapes} <= {1, 2, 4} and {tokens for _, tokens in shapes} <= {1, 2, 4, 6}


def test_preemption(cache):
    """Three requests that cannot all grow to their end: the youngest starts anew and still gets the same tokens."""
    sizes = [(9, 20), (8, 16), (9, 14)]
    waited = set()
    with Scheduler(cache.forward, cache, chunk=16) as scheduler:
        requests = [scheduler.submit(prompt_of(size, n), new, seed=n) for n, (size, new) in enumerate(sizes)]
        scheduler.step()
        assert len(scheduler.running) == 3
        for _ in scheduler.run():
            waited.update(request for request in scheduler.waiting if request.tokens)
        assert requests[0] not in waited and requests[-1] in waited
        for n, (request, (size, new)) in enumerate(zip(requests, sizes)):
            assert request.result() == alone(prompt_of(size, n), new, seed=n)


def test_admission_leaves_room_for_known_tokens(cache):
    with Scheduler(cache.forward, cache, max_batch=3, chunk=4) as scheduler:
        for size in (40, 9, 1):
            scheduler.submit(prompt_of(size), 2)
        scheduler.step()
        assert [len(request.prompt) for request in scheduler.running] == [40]  # 9 more need 3 blocks, 2 are left
    with Scheduler(cache.forward, cache, max_batch=2) as scheduler:
        for _ in range(3):
            scheduler.submit([1], 2)
        scheduler.step()
        assert (len(scheduler.running), len(scheduler.waiting)) == (2, 1)


def test_cancel_running_and_waiting(cache):
    with Scheduler(cache.forward, cache, max_batch=1) as scheduler:
        running, waiting, last = (scheduler.submit(prompt_of(6, n), 4, temperature=0.0) for n in range(3))
        scheduler.step()
        scheduler.cancel(waiting)
        scheduler.cancel(running)
        list(scheduler.run())
        scheduler.cancel(last)
        assert (running.finished, waiting.finished, last.finished) == ("cancelled", "cancelled", "length")
        assert running.result() == alone(prompt_of(6), 4, temperature=0.0)[: len(running.tokens)]
        assert last.result() == alone(prompt_of(6, 2), 4, temperature=0.0)


def test_time_out_running_and_waiting(cache):
    with Scheduler(cache.forward, cache, max_batch=1) as scheduler:
        running = scheduler.submit(prompt_of(3), 40, timeout=0.05)
        waiting = scheduler.submit(prompt_of(4), 2, timeout=0.05)
        other = scheduler.submit(prompt_of(5), 2)
        scheduler.step()
        time.sleep(0.06)
        assert scheduler.step()[:2] == [(waiting, None), (running, None)]
        list(scheduler.run())
        for request in (running, waiting):
            with pytest.raises(TimeoutError, match="'timeout' of 0.05 s has passed"):
                request.result()
        assert other.result() == alone(prompt_of(5), 2)


def test_a_callback_that_raises_ends_its_own_request(cache):
    """Also one that cancels another request of the same step."""

    def fail(request, token):
        scheduler.cancel(cancelled)
        raise KeyError("enough")

    with Scheduler(cache.forward, cache) as scheduler:
        failing = scheduler.submit(prompt_of(3), 5, on_token=fail)
        cancelled = scheduler.submit(prompt_of(3), 5, on_token=fail)
        other = scheduler.submit(prompt_of(7), 5)
        assert (failing, None) in scheduler.step()
        list(scheduler.run())
        with pytest.raises(KeyError, match="enough"):
            failing.result()
        assert (cancelled.finished, len(cancelled.tokens)) == ("cancelled", 1)
        assert other.result() == alone(prompt_of(7), 5)


def test_an_interrupt_in_a_callback_loses_nothing(cache):
    def interrupt(request, token):
        if len(request.tokens) == 2:
            raise KeyboardInterrupt

    with Scheduler(cache.forward, cache) as scheduler:
        requests = [scheduler.submit(prompt_of(4, n), 5, on_token=interrupt) for n in range(2)]
        with pytest.raises(KeyboardInterrupt):
            list(scheduler.run())
        list(scheduler.run())
        assert [request.result() for request in requests] == [alone(prompt_of(4, n), 5) for n in range(2)]


def test_a_failing_model_releases_the_cache_and_may_go_on(cache):
    calls = []

    def forward(tokens, positions, step):
        calls.append(step.tokens)
        if len(calls) == 4:
            raise ZeroDivisionError("model")
        return cache.forward(tokens, positions, step)

    with Scheduler(forward, cache, chunk=4) as scheduler:
        requests = [scheduler.submit(prompt_of(5, n), 4) for n in range(2)]
        with pytest.raises(ZeroDivisionError, match="model"):
            list(scheduler.run())
        assert cache.free_blocks == BLOCKS and list(scheduler.waiting) == requests
        list(scheduler.run())
        assert [request.result() for request in requests] == [alone(prompt_of(5, n), 4) for n in range(2)]


def test_out_of_blocks_that_others_hold(cache):
    """Alone and still without room: the request fails, unless the cache's hook finds some."""
    held = cache.add()
    cache.reserve([held], [40])
    with Scheduler(cache.forward, cache) as scheduler:
        failing = scheduler.submit(prompt_of(9), 2)
        assert scheduler.step() == [(failing, None)]
        with pytest.raises(OutOfBlocksError):
            failing.result()
        cache.table.on_shortage = lambda table, missing, keep: table.free([held])
        helped = scheduler.submit(prompt_of(9), 2)
        list(scheduler.run())
        assert helped.result() == alone(prompt_of(9), 2)


def test_eos_and_unfinished(cache):
    eos = alone(prompt_of(4), 6)[2]
    with Scheduler(cache.forward, cache) as scheduler:
        request = scheduler.submit(prompt_of(4), 6, eos_token=eos)
        with pytest.raises(RuntimeError, match="an unfinished request"):
            request.result()
        list(scheduler.run())
        assert request.result() == alone(prompt_of(4), 6, eos=eos) and request.finished == "eos"


@pytest.mark.parametrize("arguments, match", [
    (([], 2), "'prompts' must be non-empty sequences"),
    (([1], 0), "'max_new_tokens' must be an int >= 1"),
    (([1] * 8, 42), "'max_new_tokens' must be small enough for the 48 tokens of a sequence in this cache, but got 42"),
    (([1], 2, None, -1), "'seed' must be an int in"),
    (([1], 2, None, 0, None, 0), "'timeout' must be None or a number of seconds > 0"),
])  # fmt: skip
def test_refuses(cache, arguments, match):
    scheduler = Scheduler(cache.forward, cache)
    with pytest.raises(ValueError, match=match):
        scheduler.submit(*arguments)
    assert not scheduler.waiting
    scheduler.submit([1] * 8, 41)  # fits: the last token is not written
    scheduler.close()


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_schedule(data):
    """Random requests, cancellations and failures of the model over a small cache: survivors equal lone runs."""
    cache = TokenCache.paged(1, BLOCKS, 1, 1, block_size=BLOCK)
    state = {"fail": False}

    def forward(tokens, positions, step):
        if state["fail"]:
            raise ZeroDivisionError
        return cache.forward(tokens, positions, step)

    with Scheduler(forward, cache, chunk=data.draw(st.integers(1, 9))) as scheduler:
        requests = []
        for seed in range(data.draw(st.integers(1, 25))):
            act = data.draw(st.sampled_from(["submit", "submit", "step", "step", "cancel", "fail"]))
            if act == "submit":
                sizes = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 25))
                requests.append((scheduler.submit(prompt_of(sizes[0], seed), sizes[1], seed=seed), seed) + sizes)
            elif act == "cancel" and requests:
                scheduler.cancel(data.draw(st.sampled_from(requests))[0])
            elif act == "step":
                scheduler.step()
            elif act == "fail" and (scheduler.running or scheduler.waiting):
                state["fail"] = True
                with pytest.raises(ZeroDivisionError):
                    scheduler.step()
                state["fail"] = False
        list(scheduler.run())
        for request, seed, size, new in requests:
            want = alone(prompt_of(size, seed), new, seed=seed)
            assert request.result() == want[: len(request.tokens)]
            assert request.finished == "cancelled" or len(request.tokens) == new
    assert cache.free_blocks == BLOCKS and cache.table.live == ()


def test_progress(cache, capsys):
    """One line at the end at least; a row that ends early counts as done."""
    prompts = [prompt_of(4, n) for n in range(2)]
    eos = alone(prompts[0], 6)[1]
    got = generate(cache.forward, cache, prompts, 6, eos_token=eos, progress=True)
    assert got[0] == alone(prompts[0], 6, eos=eos)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("generate: 12/12") and len(lines) < 12
