"""The model that the `wrappers` benchmark trains, a decoder of characters, and its candidates by name.

A candidate is the same model with another attention; the two modules beside this one build and train it.
"""

import numpy as np

from flash_attention.tools.bench.cases import SEED

DEPTH, VOCABULARY, RATE = 6, 256, 1e-4
STEP = "fwd+bwd"
"""A step is forward, backward and Adam."""
NAIVE = "naive"
"""All scores at once, in the plain formula: passed to the stack as ``attn_attention=``."""
CANDIDATES = {"fused": {}, "talking heads": {"attn_talking_heads": True}}
"""Options of the stack, by candidate; the second needs whole rows of weights."""


def stack_options(case, candidate, naive):
    """Keywords of ``Decoder``: ``DEPTH`` layers of the case's heads, and those of the candidate.

    Args:
        naive: the framework's ``attention=`` object for the candidate ``NAIVE``.
    """
    if candidate != NAIVE and candidate not in CANDIDATES:
        known = ", ".join((NAIVE,) + tuple(CANDIDATES))
        raise ValueError("a candidate is one of {}, but got '{}'".format(known, candidate))
    if not case.plain() or not case.causal or case.window or case.blocks:
        raise ValueError("the model is a plain causal one, but the case asks for more")
    sizes = {"dim": case.heads * case.head_dim, "depth": DEPTH, "heads": case.heads, "attn_dim_head": case.head_dim}
    return dict(sizes, **({"attn_attention": naive} if candidate == NAIVE else CANDIDATES[candidate]))


def check_direction(direction):
    """Raise unless a whole step is asked for."""
    if direction != STEP:
        raise ValueError("a training step is '{}', but got '{}'".format(STEP, direction))


def tokens_of(case):
    """int32 (B, S + 1): the model reads all but the last and predicts all but the first."""
    shape = (case.batch, case.q_len + 1)
    return np.random.default_rng(SEED).integers(0, VOCABULARY, shape).astype(np.int32)
