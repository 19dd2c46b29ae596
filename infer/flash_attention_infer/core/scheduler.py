"""Continuous batching: requests join and leave the batch between steps (Yu et al., "Orca", OSDI 2022).

submit -> **waiting** -> **running** (a chunk of the prompt a step, then a token a step) -> finished. When blocks run
out, the youngest running request gives up its blocks and waits again; its tokens are computed anew when there is room
(recomputation, Kwon et al., 2023), and the draws are the same, for they depend on seed and position alone.
"""

import time
from collections import deque
from dataclasses import asdict

import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.sampling import Sampling
from flash_attention.core.validation import check_int
from flash_attention_infer.core.errors import OutOfBlocksError

LAYER = "Scheduler"


class Request:
    """What was asked for and what has come of it; made by :meth:`Scheduler.submit`.

    Attributes:
        prompt: int32 (P,).
        tokens: list of the new tokens so far.
        finished: None while it waits or runs, then 'eos', 'length', 'cancelled' or 'failed'.
        error: what ended a failed one: TimeoutError, OutOfBlocksError, or what its ``on_token`` raised.
        sequence: id in the cache while it runs, else None.
    """

    def __init__(self, prompt, max_new_tokens, eos_token, seed, on_token, timeout, sampling):
        self.prompt, self.max_new_tokens, self.eos_token, self.seed = prompt, max_new_tokens, eos_token, seed
        self.on_token, self.timeout, self.sampling = on_token, timeout, sampling
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.tokens, self.finished, self.error, self.sequence = [], None, None, None

    @property
    def length(self):
        """Tokens that are known: of the prompt, and new ones."""
        return len(self.prompt) + len(self.tokens)

    def known(self, start, stop):
        """int32: the known tokens at positions ``start`` .. ``stop - 1``."""
        new = self.tokens[max(start - len(self.prompt), 0) : max(stop - len(self.prompt), 0)]
        return np.concatenate([self.prompt[start:stop], np.asarray(new, np.int32)])

    def result(self):
        """The new tokens; raises what ended a failed request, RuntimeError for an unfinished one."""
        if self.error is not None:
            raise self.error
        if self.finished is None:
            raise RuntimeError("For 'Request', 'result' must be asked for at the end, but got an unfinished request.")
        return self.tokens


class Scheduler:
    """Runs any number of requests over one cache. Leaving a ``with`` block gives the cache back. Not thread-safe.

    Args:
        forward: ``forward(tokens, positions, step)``: numpy int32 (B, T) token ids and positions (padding 0) and the
            :class:`Step`; runs the model over the cache and returns the logits (B, V) of each sequence's last new
            token (``step.last``), in the cache's framework. B and T are padded to powers of two, so that a compiled
            model sees few shapes; the logits of rows without tokens do not matter.
        cache: a :class:`KVCache`. Others may hold blocks of it too; its ``on_shortage`` must not free our sequences.
        max_batch: most requests that run at once; None = as many as the cache has room for.
        chunk: most prompt tokens of a request in one step; running requests wait that long for a new one's prompt.
    """

    def __init__(self, forward, cache, max_batch=None, chunk=512):
        self.forward, self.cache = forward, cache
        self.max_batch = None if max_batch is None else check_int(LAYER, "max_batch", max_batch, 1)
        self.chunk = check_int(LAYER, "chunk", chunk, 1)
        self.waiting, self.running = deque(), []  # both oldest first
        self._events = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    # --- requests ---------------------------------------------------------------------------------
    def submit(self, prompt, max_new_tokens, eos_token=None, seed=0, on_token=None, timeout=None, **sampling):
        """A new :class:`Request`, which waits for its turn.

        Args:
            prompt: token ids, a non-empty sequence of ints.
            max_new_tokens: most new tokens; eos_token: it ends with this one.
            seed: uint32 of the draws. They do not depend on the other requests.
            on_token: called with ``(request, token)``; what it raises ends this request, not the others.
            timeout: seconds from now after which the request fails with TimeoutError.
            sampling: temperature, top_k, top_p, min_p of :class:`flash_attention.core.sampling.Sampling`.

        Raises:
            ValueError, TypeError: bad argument, or more tokens than a sequence of the cache can have.
        """
        prompt = _checked(prompt)
        check_int(LAYER, "max_new_tokens", max_new_tokens, 1)
        check_int(LAYER, "seed", seed, 0, 2**32 - 1)
        if timeout is not None and not timeout > 0:
            raise invalid_value(LAYER, "timeout", "None or a number of seconds > 0", timeout)
        most = self.cache.table.max_length
        if most is not None and len(prompt) + max_new_tokens - 1 > most:  # the last token is not written
            need = "small enough for the {} tokens of a sequence in this cache".format(most)
            got = "{} after a prompt of {} tokens".format(max_new_tokens, len(prompt))
            raise invalid_value(LAYER, "max_new_tokens", need, got)
        request = Request(prompt, max_new_tokens, eos_token, seed, on_token, timeout, Sampling(**sampling))
        self.waiting.append(request)
        return request

    def cancel(self, request):
        """End a request and free its blocks; one that has finished stays as it is."""
        if request.finished is None:
            self._end(request, "cancelled")

    def close(self):
        """Cancel all requests."""
        for request in list(self.waiting) + self.running:
            self.cancel(request)

    # --- steps ------------------------------------------------------------------------------------
    def run(self):
        """Steps until nothing is left to do; yields their events."""
        while self.waiting or self.running:
            yield from self.step()

    def step(self):
        """Admit who fits, compute a chunk of the prompts, then a token of everybody whose prompt is complete.

        What the model raises goes through; the running requests then give up their blocks and wait to start anew.

        Returns:
            list of ``(request, token)``; token None = the request has failed.
        """
        self._end_late_ones()
        self._admit()
        for prompts in (True, False):  # apart: beside a chunk, single tokens would be padded to its length
            batch = [request for request in self.running if (self._pending(request) > 1) == prompts]
            self._advance(batch)
        events, self._events = self._events, []
        return events

    def _end_late_ones(self):
        now = time.monotonic()
        for request in list(self.waiting) + self.running:
            if request.deadline is not None and now > request.deadline:
                text = "For '{}', the 'timeout' of {} s has passed.".format(LAYER, request.timeout)
                self._end(request, "failed", TimeoutError(text))

    def _admit(self):
        """Waiting requests, oldest first, while all known tokens of all requests have room."""
        room = self.cache.free_blocks - sum(self._missing(request) for request in self.running)
        while self.waiting and (self.max_batch is None or len(self.running) < self.max_batch):
            room -= self._missing(self.waiting[0])
            if room < 0 and self.running:  # alone it is tried: the cache's hook may find room
                break
            request = self.waiting.popleft()
            request.sequence = self.cache.add()
            self.running.append(request)

    def _advance(self, batch):
        """One step of the cache for ``batch``: the model, the new tokens, then the callbacks."""
        step, batch = self._reserve(batch)
        if step is None:
            return
        ready = [self._pending(request) == 0 for request in batch]
        try:
            logits = self.forward(*_padded(step, batch), step)
            chosen = self._choose(logits, batch) if any(ready) else [None] * len(batch)
        except BaseException:
            for request in reversed(self.running[:]):
                self._preempt(request)
            raise
        found = [(request, token) for request, token, last in zip(batch, chosen, ready) if last]
        for request, token in found:
            request.tokens.append(token)
            if token == request.eos_token or len(request.tokens) == request.max_new_tokens:
                self._end(request, "eos" if token == request.eos_token else "length")
        self._events += found
        for request, token in found:  # all tokens are kept by now, whatever the callbacks raise or cancel
            if request.on_token is not None and request.finished not in ("cancelled", "failed"):
                self._call(request, token)

    def _call(self, request, token):
        try:
            request.on_token(request, token)
        except Exception as error:  # kept: `result` raises it, and the others go on
            self._end(request, "failed", error)

    def _reserve(self, batch):
        """``(Step, batch)`` with room for the batch's next tokens, or ``(None, [])``; the youngest make way."""
        while batch:
            counts = [min(self._pending(request), self.chunk) for request in batch]
            shape = _bucket(len(batch), self.cache.config.num_blocks), _bucket(max(counts), self.chunk)
            try:
                return self.cache.reserve([request.sequence for request in batch], counts, *shape), batch
            except OutOfBlocksError as error:
                if len(self.running) == 1:
                    self._end(batch[0], "failed", error)
                else:
                    self._preempt(self.running[-1])
                batch = [request for request in batch if request.sequence is not None]
        return None, []

    def _choose(self, logits, batch):
        """A token a request, each by its own sampling; a list of ints."""
        seeds, numbers = np.zeros((2, logits.shape[0]), np.uint32)
        seeds[: len(batch)] = [request.seed for request in batch]
        numbers[: len(batch)] = [len(request.tokens) for request in batch]
        chosen = np.zeros(len(batch), np.int32)
        for sampling in dict.fromkeys(request.sampling for request in batch):
            mine = [request.sampling == sampling for request in batch]
            drawn = self.cache.sample(logits, seeds, numbers, **asdict(sampling))
            chosen = np.where(mine, drawn[: len(batch)], chosen)
        return chosen.tolist()

    # --- places in the cache ----------------------------------------------------------------------
    def _pending(self, request):
        """Known tokens that are not in the cache yet."""
        return request.length - self.cache.length(request.sequence)

    def _missing(self, request):
        """Blocks that the known tokens need beyond those the request holds."""
        held = 0 if request.sequence is None else len(self.cache.table.blocks(request.sequence))
        return self.cache.table.blocks_for(request.length) - held

    def _preempt(self, request):
        """Back to the head of the queue, without blocks."""
        self._release(request)
        self.waiting.appendleft(request)

    def _end(self, request, reason, error=None):
        if request.finished is None:
            if request.sequence is None:
                self.waiting.remove(request)
            else:
                self._release(request)
        request.finished, request.error = reason, error
        if error is not None:
            self._events.append((request, None))

    def _release(self, request):
        self.cache.free(request.sequence)
        self.running.remove(request)
        request.sequence = None


def _checked(prompt):
    """The prompt as int32 (P,); raises unless it is a non-empty sequence of ints."""
    prompt = np.asarray(prompt)
    if prompt.dtype.kind not in "iu" and prompt.size:
        raise invalid_type(LAYER, "prompts", "sequences of token ids (ints)", str(prompt.dtype))
    if prompt.ndim != 1 or not prompt.size:
        raise invalid_value(LAYER, "prompts", "non-empty sequences", "shape {}".format(prompt.shape))
    return prompt.astype(np.int32)


def _bucket(count, most):
    """The smallest power of two that holds ``count``; ``most`` where that is less and holds it too."""
    return max(count, min(1 << (count - 1).bit_length(), most))


def _padded(step, batch):
    """int32 (B, T) tokens and positions of a step, 0 where padded."""
    tokens, positions = np.zeros((2,) + step.slots.shape, np.int32)
    for row, (request, start, count) in enumerate(zip(batch, step.starts, step.counts)):
        tokens[row, :count] = request.known(start, start + count)
        positions[row, :count] = np.arange(start, start + count)
    return tokens, positions
