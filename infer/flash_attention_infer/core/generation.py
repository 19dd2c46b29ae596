"""Generation over a cache: a list of prompts, run to its end by a :class:`Scheduler`. The same for both frameworks.

The model is any ``forward(tokens, positions, step) -> logits``; tokens are chosen by the cache's framework.
"""

import contextlib

from flash_attention.tools.table import progress as progress_bar
from flash_attention_infer.core.scheduler import Scheduler


def stream(forward, cache, prompts, max_new_tokens, *, eos_token=None, seed=0, chunk=512, timeout=None, **sampling):
    """Yields ``(row, token)`` as tokens are chosen; arguments: :func:`generate`.

    The cache is given back as rows end, and for all of them when the iterator is closed or anything raises.
    """
    with Scheduler(forward, cache, chunk=chunk) as scheduler:
        options = dict(sampling, eos_token=eos_token, timeout=timeout)
        rows = {
            scheduler.submit(prompt, max_new_tokens, seed=(seed + row) % 2**32, **options): row
            for row, prompt in enumerate(prompts)
        }
        for request, token in scheduler.run():
            if token is None:
                raise request.error
            yield rows[request], token


def generate(
    forward,
    cache,
    prompts,
    max_new_tokens,
    *,
    eos_token=None,
    seed=0,
    chunk=512,
    on_token=None,
    timeout=None,
    progress=False,
    **sampling,
):
    """Generate tokens for prompts of any lengths, in one ragged batch.

    Rows that the cache has no room for wait, or give up their place and start anew (see :class:`Scheduler`).

    Args:
        forward: ``forward(tokens, positions, step)``: numpy int32 (B, T) token ids and positions (padding 0) and the
            Step; runs the model over the cache and returns the logits (B, V) of each sequence's last new token; see
            :class:`Scheduler`.
        cache: :class:`KVCache`; its sequences are freed at the end, whatever happens.
        prompts: token ids, one non-empty sequence a row.
        max_new_tokens: most tokens of a row; eos_token: a row ends with it.
        seed: of the draws; row r uses ``seed + r``, whatever else is in the batch.
        chunk: most prompt tokens of a row in one step.
        on_token: called with ``(row, token)``; what it raises ends the generation.
        timeout: seconds after which TimeoutError ends it.
        progress: show a bar over the tokens (tqdm's where it is installed and stderr is a terminal).
        sampling: temperature, top_k, top_p, min_p of ``sample``; none of them: draws from the whole softmax.

    Returns:
        list of lists of tokens.
    """
    prompts = list(prompts)
    found = [[] for _ in prompts]
    options = dict(sampling, eos_token=eos_token, seed=seed, chunk=chunk, timeout=timeout)
    tokens = stream(forward, cache, prompts, max_new_tokens, **options)
    if progress:
        tokens = _with_bar(tokens, len(prompts), max_new_tokens, eos_token)
    with contextlib.closing(tokens):
        for row, token in tokens:
            found[row].append(token)
            if on_token is not None:
                on_token(row, token)
    return found


def _with_bar(tokens, rows, most, eos_token):
    """The same ``(row, token)`` pairs, counted by a bar; a row that ends early has nothing left to do."""
    made = [0] * rows
    with contextlib.closing(tokens), contextlib.closing(progress_bar(rows * most, "generate", every=1.0)) as bar:
        for row, token in tokens:
            made[row] += 1
            bar.update(1 + (most - made[row] if token == eos_token else 0))
            yield row, token
