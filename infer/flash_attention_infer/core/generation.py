"""Generation over a cache: prompts in chunks, then token by token, all sequences in one ragged batch.

A framework's ``generation.py`` gives the sampling; the model is any ``forward(tokens, positions, step) -> logits``.
"""

import contextlib
import time

import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import check_int

LAYER = "generate"


def stream(forward, choose, cache, prompts, max_new_tokens, eos_token=None, seed=0, chunk=512):
    """Yields ``(row, token)`` as tokens are chosen; a row ends with ``eos_token`` or after ``max_new_tokens``.

    The cache is given back as rows end, and for all of them when the iterator is closed or anything raises.

    Args:
        forward: ``forward(tokens, positions, step)``: int32 (B, T) token ids and positions (padding 0) and the Step;
            runs the model over the cache and returns the logits (B, V) of each sequence's last new token.
        choose: ``choose(logits, seeds, positions)`` -> int32 (B,) numpy.
        prompts: token ids, one non-empty sequence a row.
        seed: of the draws; row r uses ``seed + r``, whatever else is in the batch.
        chunk: most prompt tokens of a row in one step.
    """
    pending = [_checked(prompt) for prompt in prompts]
    check_int(LAYER, "max_new_tokens", max_new_tokens, 1)
    check_int(LAYER, "chunk", chunk, 1)
    rows, made = list(range(len(pending))), [0] * len(pending)
    ids = cache.add(len(pending))
    try:
        while rows:
            counts = [min(len(pending[row]), chunk) for row in rows]
            with cache.step([ids[row] for row in rows], counts) as step:
                logits = forward(*_padded(step, [pending[row] for row in rows]), step)
            seeds = np.asarray([(seed + row) % 2**32 for row in rows], np.uint32)
            tokens = choose(logits, seeds, np.asarray([made[row] for row in rows], np.uint32))
            for row, count, token in zip(tuple(rows), counts, tokens.tolist()):
                pending[row] = pending[row][count:]
                if len(pending[row]):
                    continue  # the prompt goes on
                made[row] += 1
                pending[row] = np.asarray([token], np.int32)
                if token == eos_token or made[row] == max_new_tokens:
                    rows.remove(row)
                    cache.free(ids[row])
                yield row, token
    finally:
        cache.free([ids[row] for row in rows])


def generate(forward, choose, cache, prompts, max_new_tokens, on_token=None, timeout=None, **options):
    """All of :func:`stream`: a list of new tokens a row.

    Args:
        on_token: called with ``(row, token)``; what it raises ends the generation.
        timeout: seconds after which TimeoutError ends it.
    """
    found, deadline = [[] for _ in prompts], None if timeout is None else time.monotonic() + timeout
    with contextlib.closing(stream(forward, choose, cache, prompts, max_new_tokens, **options)) as tokens:
        for row, token in tokens:
            found[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError("For '{}', the 'timeout' of {} s has passed.".format(LAYER, timeout))
    return found


def _checked(prompt):
    prompt = np.asarray(prompt)
    if prompt.dtype.kind not in "iu" and prompt.size:
        raise invalid_type(LAYER, "prompts", "sequences of token ids (ints)", str(prompt.dtype))
    if prompt.ndim != 1 or not prompt.size:
        raise invalid_value(LAYER, "prompts", "non-empty sequences", "shape {}".format(prompt.shape))
    return prompt.astype(np.int32)


def _padded(step, pending):
    """int32 (B, T) tokens and positions of a step, 0 where padded."""
    tokens, positions = np.zeros((2,) + step.slots.shape, np.int32)
    for row, (new, start, count) in enumerate(zip(pending, step.starts, step.counts)):
        tokens[row, :count] = new[:count]
        positions[row, :count] = np.arange(start, start + count)
    return tokens, positions
