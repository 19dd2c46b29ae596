"""Text from the trained model with a paged KV cache, and what the cache is worth: tokens a second with and without it.

Knows no framework: a Trainer gives a cache with the model over it (`cached`), and the model without one (`logits`).
"""

import time

import numpy as np

from flash_attention_infer.core.generation import generate

WHOLE_CALLS = 3


def with_cache(trainer, settings, prompt, temperature=0.7):
    """Generate `settings.sample_bytes` bytes after the prompt.

    Returns:
        ``(tokens (n,), logits (n, vocabulary) that they were drawn from, (prefill, decode) in tokens a second)``.
    """
    cache, model = trainer.cached(len(prompt) + settings.sample_bytes)
    logits, times = [], []

    def forward(tokens, positions, step):
        logits.append(model(tokens, positions, step))
        return logits[-1]

    def run(count):
        del logits[:], times[:]
        begin = time.perf_counter()
        return generate(
            forward, cache, [prompt], count, seed=settings.seed, temperature=temperature,
            on_token=lambda row, token: times.append(time.perf_counter() - begin),
        )[0]  # fmt: skip

    tokens = run(settings.sample_bytes)
    found, decode = np.concatenate([np.array(x) for x in logits]), 1 / np.median(np.diff(times))
    run(1)  # a second prefill: the first one compiles
    return np.asarray(tokens), found, (len(prompt) / times[0], float(decode))


def compare(trainer, settings, prompt):
    """Generate with the cache, then give the model the whole text at once.

    Returns:
        dict: 'tokens'; 'difference', the largest between the logits of the two ways; 'with cache' and 'without', each
        (prefill, decode) in tokens a second.
    """
    tokens, logits, rates = with_cache(trainer, settings, prompt)
    text = np.concatenate([prompt, tokens]).astype(np.int32)[None]
    want = trainer.logits(text)[0, len(prompt) - 1 : -1]
    seconds = []
    for _ in range(WHOLE_CALLS):
        begin = time.perf_counter()
        trainer.logits(text)
        seconds.append(time.perf_counter() - begin)
    whole = float(np.median(seconds))
    return {
        "framework": trainer.framework,
        "tokens": tokens.tolist(),
        "difference": float(np.abs(logits - want).max()),
        "with cache": rates,
        "without": (text.shape[1] / whole, 1 / whole),  # there a token costs a whole forward
    }
