"""Options of the wrappers of tokens, of vectors and of generation, and the checks of their calls."""

import math
from dataclasses import dataclass
from typing import Optional

import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.transformer.rules import Excludes, check_bools, check_rules
from flash_attention.core.validation import check_bool, check_int, check_rate, is_int

TOKENS, CONTINUOUS, AUTOREGRESSIVE = "TransformerWrapper", "ContinuousTransformerWrapper", "AutoregressiveWrapper"
IGNORE = -100

RULES = (Excludes("tie_embedding", ("logits_dim",), "logits are products with the token embedding"),)


@dataclass(frozen=True)
class TokenOptions:
    """Arguments of ``TransformerWrapper`` beside ``attn_layers``, all by keyword.

    Attributes:
        num_tokens: size of the vocabulary.
        max_seq_len: rows of the learned absolute embedding; sequences may be longer where there is none.
        emb_dim: width of the token embedding; None = that of the stack; else it is projected.
        emb_dropout: of the embedded tokens, in training.
        num_memory_tokens: learned vectors in front of the sequence, seen by all, removed from the output.
        tie_embedding: logits are products with the token embedding.
        use_abs_pos_emb: a learned absolute embedding times ``dim ** -0.5``; left out where the stack has rotary or T5.
        scaled_sinu_pos_emb: a sinusoidal one with a learned factor instead.
        post_emb_norm: normalise the embedded tokens.
        logits_dim: width of the output; None = ``num_tokens``.
        max_mem_len: hidden states that ``return_mems`` keeps of each layer.
    """

    num_tokens: int
    max_seq_len: int
    emb_dim: Optional[int] = None
    emb_dropout: float = 0.0
    num_memory_tokens: Optional[int] = None
    tie_embedding: bool = False
    use_abs_pos_emb: bool = True
    scaled_sinu_pos_emb: bool = False
    post_emb_norm: bool = False
    logits_dim: Optional[int] = None
    max_mem_len: int = 0

    def __post_init__(self):
        for name in ("num_tokens", "max_seq_len"):
            check_int(TOKENS, name, getattr(self, name), 1)
        for name in ("emb_dim", "logits_dim"):
            if getattr(self, name) is not None:
                check_int(TOKENS, name, getattr(self, name), 1)
        if self.num_memory_tokens is not None:
            check_int(TOKENS, "num_memory_tokens", self.num_memory_tokens, 0)
        check_int(TOKENS, "max_mem_len", self.max_mem_len, 0)
        check_bools(TOKENS, self)
        check_rate(TOKENS, "emb_dropout", self.emb_dropout)
        check_rules(TOKENS, self, RULES)

    def check_stack(self, layers):
        """Raise unless the wrapper fits its stack, a ``LayersOptions``."""
        if self.tie_embedding and self.width(layers) != layers.dim:
            raise invalid_value(TOKENS, "emb_dim", "the stack's dim with tie_embedding=", self.emb_dim)
        check_sinusoidal(TOKENS, self, layers)

    def width(self, layers):
        """Width of the token embedding."""
        return layers.dim if self.emb_dim is None else self.emb_dim

    @property
    def outputs(self):
        """Width of the logits."""
        return self.num_tokens if self.logits_dim is None else self.logits_dim

    @property
    def memory_tokens(self):
        """Learned vectors in front of the sequence."""
        return self.num_memory_tokens or 0


@dataclass(frozen=True)
class ContinuousOptions:
    """Arguments of ``ContinuousTransformerWrapper`` beside ``attn_layers``, all by keyword.

    Attributes:
        max_seq_len: rows of the learned absolute embedding.
        dim_in, dim_out: widths of the input and of the output; None = that of the stack, without a projection.
        emb_dropout, use_abs_pos_emb, scaled_sinu_pos_emb, post_emb_norm: as in :class:`TokenOptions`.
    """

    max_seq_len: int
    dim_in: Optional[int] = None
    dim_out: Optional[int] = None
    emb_dropout: float = 0.0
    use_abs_pos_emb: bool = True
    scaled_sinu_pos_emb: bool = False
    post_emb_norm: bool = False

    def __post_init__(self):
        check_int(CONTINUOUS, "max_seq_len", self.max_seq_len, 1)
        for name in ("dim_in", "dim_out"):
            if getattr(self, name) is not None:
                check_int(CONTINUOUS, name, getattr(self, name), 1)
        check_bools(CONTINUOUS, self)
        check_rate(CONTINUOUS, "emb_dropout", self.emb_dropout)

    def check_stack(self, layers):
        """Raise unless the wrapper fits its stack, a ``LayersOptions``."""
        check_sinusoidal(CONTINUOUS, self, layers)

    def width(self, layers):
        """Width that the absolute embedding is added to."""
        return layers.dim


def check_sinusoidal(layer, options, layers):
    """Raise where ``scaled_sinu_pos_emb`` would be ignored or cannot be formed."""
    if not options.scaled_sinu_pos_emb:
        return
    if not options.use_abs_pos_emb or layers.has_position:
        need = "False where no absolute embedding is used (use_abs_pos_emb=False, rotary or T5's bias)"
        raise invalid_value(layer, "scaled_sinu_pos_emb", need, True)
    if options.width(layers) % 2:
        raise invalid_value(layer, "scaled_sinu_pos_emb", "False with an odd width", True)


def embedding_kind(options, layers):
    """'learned', 'sinusoidal' or None: the absolute embedding of a wrapper."""
    if not options.use_abs_pos_emb or layers.has_position:
        return None
    return "sinusoidal" if options.scaled_sinu_pos_emb else "learned"


def sinusoidal_frequencies(dim):
    """``10000 ** (-m / (dim / 2))`` for the ``dim / 2`` sines and as many cosines, float64."""
    half = dim // 2
    return 10000.0 ** (-np.arange(half, dtype=np.float64) / half)


def check_length(layer, kind, length, most):
    """Raise where a sequence is longer than its learned embedding."""
    if kind == "learned" and length > most:
        remedy = "Use rotary_pos_emb=, alibi_pos_bias= with use_abs_pos_emb=False, or a larger max_seq_len."
        raise invalid_value(layer, "x", "at most max_seq_len = {} tokens long".format(most), length, remedy)


def check_flags(layer, flags):
    """Raise unless the flags of a call are bools and only one of them changes what is returned beside the output."""
    for name, flag in flags.items():
        check_bool(layer, name, flag)
    chosen = [name for name, flag in flags.items() if flag]
    if len(chosen) > 1:
        raise invalid_value(layer, chosen[1], "False with {}=True".format(chosen[0]), True)


def check_cache(layer, refusal, tokens, places, given):
    """Raise where a call can have no cache.

    Args:
        refusal: why the stack allows none, or None. tokens: of the call. places: of a cache that begins, else None.
        given: ``{name: whether it was given}`` of the arguments that a call with a cache would ignore.
    """
    if refusal is not None:
        raise invalid_value(layer, "cache", "left out ({})".format(refusal), "a cache")
    if places is not None:
        check_int(layer, "cache", places, tokens)
    for name, present in given.items():
        if present:
            raise invalid_value(layer, name, "left out with a cache", "given")


def check_mems(layer, mems, count, batch, dim):
    """Raise unless ``mems`` (shapes) are one (B, M, dim) for each self-attention layer, of one length M."""
    fits = len(mems) == count and all(len(s) == 3 and s[0] == batch and s[2] == dim for s in mems)
    if not fits or len({tuple(shape) for shape in mems}) > 1:
        need = "{} arrays of shape ({}, M, {})".format(count, batch, dim)
        raise invalid_value(layer, "mems", need, [tuple(shape) for shape in mems])


def check_generation(start, seq_len, eos_token, total, kind, most):
    """Raise unless ``generate`` can run; ``start`` is a shape, ``total`` the length at the end."""
    if len(start) not in (1, 2) or start[-1] < 1:
        raise invalid_value(AUTOREGRESSIVE, "start", "of shape (T,) or (B, T), T >= 1", "shape {}".format(start))
    check_int(AUTOREGRESSIVE, "seq_len", seq_len, 1)
    if eos_token is not None and not is_int(eos_token):
        raise invalid_type(AUTOREGRESSIVE, "eos_token", "None or an int", repr(eos_token))
    check_length(AUTOREGRESSIVE, kind, total, most)


def check_autoregressive(causal, ignore_index, pad_value):
    """Raise unless the wrapped net is causal and the two values are ints."""
    if not causal:
        raise invalid_value(AUTOREGRESSIVE, "net", "causal (a Decoder)", "a stack that sees the future")
    for name, value in (("ignore_index", ignore_index), ("pad_value", pad_value)):
        if not is_int(value):
            raise invalid_type(AUTOREGRESSIVE, name, "an int", repr(value))


def token_std(width):
    """Standard deviation of the first token embedding: He et al.'s for ``width`` inputs."""
    return math.sqrt(2.0 / width)
