"""Generation in MindSpore: the loop of core/generation.py with this framework's sampling."""

from mindspore import Tensor

from flash_attention.ops.sampling import sample
from flash_attention_infer.core import generation


def stream(forward, cache, prompts, max_new_tokens, *, eos_token=None, seed=0, chunk=512, **sampling):
    """Yields ``(row, token)`` as they are chosen; arguments: :func:`generate`."""
    options = dict(eos_token=eos_token, seed=seed, chunk=chunk)
    return generation.stream(forward, _choose(sampling), cache, prompts, max_new_tokens, **options)


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
    **sampling,
):
    """Generate tokens for prompts of any lengths, in one ragged batch.

    Args:
        forward: ``forward(tokens, positions, step)``: numpy int32 (B, T) token ids and positions (padding 0) and the
            Step; runs the model over the cache and returns the logits (B, V) of each sequence's last new token.
        cache: :class:`KVCache`; its sequences are freed at the end, whatever happens.
        prompts: token ids, one non-empty sequence a row.
        max_new_tokens: most tokens of a row; eos_token: a row ends with it.
        seed: of the draws; row r uses ``seed + r``, whatever else is in the batch.
        chunk: most prompt tokens of a row in one step.
        on_token: called with ``(row, token)``; what it raises ends the generation.
        timeout: seconds after which TimeoutError ends it.
        sampling: temperature, top_k, top_p, min_p of ``sample``; none of them: draws from the whole softmax.

    Returns:
        list of lists of tokens.
    """
    options = dict(eos_token=eos_token, seed=seed, chunk=chunk, on_token=on_token, timeout=timeout)
    return generation.generate(forward, _choose(sampling), cache, prompts, max_new_tokens, **options)


def _choose(sampling):
    return lambda logits, seeds, positions: sample(logits, Tensor(seeds), Tensor(positions), **sampling).asnumpy()
