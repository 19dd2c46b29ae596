"""From logits to a token: temperature, top-k, top-p, min-p, then a draw by a hash of (seed, position, row, token).

numpy and jax.numpy run the same lines; MindSpore's are in ``ops/sampling.py``, tested equal. The filters act in the
order of Hugging Face's generation (temperature, top-k, top-p, min-p), each on what the one before left.
"""

import math
from dataclasses import dataclass
from typing import Optional

import numpy as np

from flash_attention.core import dropout
from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import check_int

LAYER = "sample"


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; checked on construction.

    Attributes:
        temperature: the logits are divided by it; 0 = greedy, the largest logit.
        top_k: keep so many of the largest logits; None = all.
        top_p: keep the fewest largest tokens whose probabilities reach it, in (0, 1] (Holtzman et al., 2020); None = 1.
        min_p: keep tokens at least so probable relative to the likeliest, in [0, 1] (Nguyen et al., 2024); None = 0.

    Equal logits at a limit are all kept.
    """

    temperature: float = 1.0
    top_k: Optional[int] = None
    top_p: Optional[float] = None
    min_p: Optional[float] = None

    def __post_init__(self):
        _check_range("temperature", self.temperature, 0.0, math.inf, True, False)
        if self.top_k is not None:
            check_int(LAYER, "top_k", self.top_k, 1)
        if self.top_p is not None:
            _check_range("top_p", self.top_p, 0.0, 1.0, False, True)
        if self.min_p is not None:
            _check_range("min_p", self.min_p, 0.0, 1.0, True, True)

    @property
    def greedy(self):
        """True when nothing is drawn."""
        return self.temperature == 0

    def sorts(self, vocabulary):
        """True when the filters need the logits in order."""
        return (self.top_k is not None and self.top_k < vocabulary) or self.nucleus

    @property
    def nucleus(self):
        """True when top_p removes anything; rounded sums must not cut the tail at 1."""
        return self.top_p is not None and self.top_p < 1


def _check_range(name, value, low, high, with_low, with_high):
    left = "[" if with_low else "("
    need = "a float in {}{}, {}{}".format(left, low, high, "]" if with_high else ")")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid_type(LAYER, name, need, repr(value))
    inside = (low <= value if with_low else low < value) and (value <= high if with_high else value < high)
    if not inside:
        raise invalid_value(LAYER, name, need, value)


def check_logits(shape):
    """Raise unless the logits are (B, V)."""
    if len(shape) != 2 or shape[1] == 0:
        raise invalid_value(LAYER, "logits", "of shape (B, V)", "shape {}".format(tuple(shape)))


def filter_logits(xp, logits, sampling):
    """float32 (B, V): logits over the temperature, -inf where the filters remove a token."""
    x = xp.asarray(logits).astype(xp.float32) / xp.float32(sampling.temperature)
    vocabulary = x.shape[-1]
    if sampling.sorts(vocabulary):
        ordered = xp.flip(xp.sort(x, axis=-1), -1)
        if sampling.top_k is not None:
            ordered = ordered[..., : sampling.top_k]
        least = ordered[..., -1:]
        if sampling.nucleus:
            weights = xp.exp(ordered - ordered[..., :1])
            share = weights / xp.sum(weights, axis=-1, keepdims=True)
            before = xp.cumsum(share, axis=-1) - share  # of the likelier ones: 0 for the first, which always stays
            least = xp.min(xp.where(before < sampling.top_p, ordered, xp.inf), axis=-1, keepdims=True)
        x = xp.where(x >= least, x, -xp.inf)
    if sampling.min_p:
        least = xp.max(x, axis=-1, keepdims=True) + xp.float32(math.log(sampling.min_p))
        x = xp.where(x >= least, x, -xp.inf)
    return x


def gumbel(xp, seed, position, rows, vocabulary):
    """float32 (B, V) Gumbel noise: adding it to logits makes the largest one a draw from their softmax.

    The hash is that of dropout. A scalar seed serves all rows, told apart by their number; one seed a row, (B,), makes
    a row's draws independent of the batch it is in.
    """
    seed = xp.asarray(seed)
    row = xp.arange(rows, dtype=xp.uint32) * xp.uint32(seed.ndim == 0)
    key = dropout.row_key(xp, seed, xp.asarray(position), row, 0)
    hashed = dropout.element_hash(xp, key[:, None], dropout.col_key(xp, xp.arange(vocabulary))[None, :])
    uniform = ((hashed >> xp.uint32(9)).astype(xp.float32) + xp.float32(0.5)) * xp.float32(2.0**-23)  # never 0 or 1
    return -xp.log(-xp.log(uniform))


def sample(xp, logits, seed, position, sampling):
    """int32 (B,) tokens from logits (B, V); numpy is the judge of both frameworks' ``sample``."""
    if sampling.greedy:
        return xp.argmax(xp.asarray(logits), axis=-1).astype(xp.int32)
    x = filter_logits(xp, logits, sampling)
    return xp.argmax(x + gumbel(xp, seed, position, *x.shape), axis=-1).astype(xp.int32)


def probabilities(logits, sampling):
    """float64 (B, V): what ``sample`` draws from."""
    logits = np.asarray(logits)
    if sampling.greedy:
        return np.eye(logits.shape[-1])[logits.argmax(-1)]
    x = filter_logits(np, logits, sampling).astype(np.float64)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
