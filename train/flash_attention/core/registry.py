"""Mechanisms by name, for both frameworks: the arguments that they may take, the register, and reasons to refuse."""

import numpy as np

from flash_attention.core.errors import Reason, invalid_value
from flash_attention.core.spec import NO_LIMIT

# Keyword of a mechanism -> the value that means "not given". They are those of the functional call ``flash_attention``.
ARGUMENTS = {
    "bias": None,
    "mask": None,
    "scale": None,
    "is_causal": False,
    "query_seq_lengths": None,
    "key_value_seq_lengths": None,
    "local_window_size": None,
    "prev_block_num": NO_LIMIT,
    "next_block_num": NO_LIMIT,
    "block_size": 128,
    "alibi_slopes": None,
    "dropout_rate": 0.0,
    "dropout_seed": None,
    "logits_soft_cap": None,
    "sinks": None,
    "q_segment_ids": None,
    "kv_segment_ids": None,
    "q_offset": None,
}


def is_default(name, value):
    """Whether an argument is as good as left out."""
    default = ARGUMENTS[name]
    return value is default or (np.isscalar(value) and np.isscalar(default) and value == default)


def not_taken(name, value):
    """The Reason of a mechanism that does not take an argument."""
    shape = getattr(value, "shape", None)
    got = repr(value) if shape is None else "an array of shape {}".format(tuple(shape))
    return Reason(name, got, "left out (this mechanism does not take it)", "'flash_attn2' takes every argument.")


def triangle_refusal(is_causal, q_len, kv_len):
    """Why a call is no lower triangle, or None."""
    if not is_causal:
        return Reason("causal", False, "True (it computes the lower triangle)", "Use 'flash_attn2'.")
    if q_len != kv_len:
        lengths = "{} and {}".format(q_len, kv_len)
        return Reason("sequence length", lengths, "equal for queries and keys", "Use 'flash_attn2'.")
    return None


def local_refusal(given):
    """Why a call, of which the arguments ``given`` are set, has no window, or None."""
    if {"local_window_size", "prev_block_num", "next_block_num"} & set(given):
        return None
    need = "given, or prev_block_num or next_block_num"
    return Reason("local_window_size", None, need, "Use 'flash_attn2' for attention without a window.")


def landmark_refusal(is_causal, q_len, kv_len, block_size):
    """Why landmark attention of the regular pattern cannot compute a call, or None."""
    if not is_causal:
        return Reason("causal", False, "True (landmarks stand for past blocks)", "Use 'flash_attn2'.")
    if q_len > kv_len:
        lengths = "{} and {}".format(q_len, kv_len)
        return Reason("sequence length", lengths, "no more queries than keys", "Use 'flash_attn2'.")
    if block_size < 2:
        return Reason("block_size", block_size, "at least 2", "A block of 1 is a landmark alone.")
    return None


def dilated_refusal(segment_size, dilation_rate, q_len, kv_len):
    """Why dilated attention cannot compute a call, or None."""
    for name, value in (("segment_size", segment_size), ("dilation_rate", dilation_rate)):
        if value is None:
            return Reason(name, None, "given", "Use 'flash_attn2' for attention to all tokens.")
    if q_len != kv_len:
        lengths = "{} and {}".format(q_len, kv_len)
        return Reason("sequence length", lengths, "equal for queries and keys", "Use 'flash_attn2'.")
    return None


class Registry:
    """Classes by their ``names``: a name, or a tuple of the name and its aliases. A framework derives its own from it.

    Attributes:
        absent: ``{name: what to use instead}`` of names that users know from elsewhere.
    """

    _classes = {}
    _aliases = {}
    absent = {}

    @classmethod
    def register(cls, impl=None, *, override=False):
        """Class decorator; ``@register(override=True)`` replaces an existing name.

        Raises:
            ValueError: the name or an alias is taken, or the class has no name.
        """
        if impl is None:
            return lambda impl: cls.register(impl, override=override)
        names = (impl.names,) if isinstance(impl.names, str) else tuple(impl.names)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise invalid_value(cls.__name__, "names", "a str or a tuple of str", repr(impl.names))
        taken = [name for name in names if name in cls._classes or name in cls._aliases]
        if taken and not override:
            remedy = "Choose another name, or register with override=True."
            raise invalid_value(cls.__name__, "names", "free", "{} (taken)".format(", ".join(taken)), remedy)
        for name in taken:
            cls.unregister(name)
        cls._classes[names[0]] = impl
        cls._aliases.update((alias, names[0]) for alias in names[1:])
        return impl

    @classmethod
    def unregister(cls, name):
        """Forget a mechanism with its aliases, or an alias."""
        if cls._classes.pop(name, None) is not None:
            for alias in [alias for alias, target in cls._aliases.items() if target == name]:
                del cls._aliases[alias]
        cls._aliases.pop(name, None)

    @classmethod
    def get(cls, name):
        """The class registered under a name or alias; ValueError with the known names otherwise."""
        name = cls._aliases.get(name, name) if isinstance(name, str) else name
        if not isinstance(name, str) or name not in cls._classes:
            need = "one of {}".format(", ".join(map(repr, cls.list_implementations())))
            raise invalid_value("attention", "attn_mechanism", need, repr(name), cls.absent.get(name, ""))
        return cls._classes[name]

    @classmethod
    def list_implementations(cls):
        """Names, sorted, without aliases."""
        return sorted(cls._classes)

    @classmethod
    def aliases(cls):
        """``{alias: name}``."""
        return dict(cls._aliases)
