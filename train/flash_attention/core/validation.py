"""From what a user passed to a checked :class:`AttentionSpec`. Every message about a bad argument is made here.

It sees shapes and dtypes only (:class:`TensorInfo`), so both frameworks run it eagerly or while tracing, before any
engine is selected.
"""

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple, Optional, Tuple

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.spec import NO_LIMIT, AttentionSpec

FLOATS = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("BSND", "BNSD")
_MASK_DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64") + FLOATS
_INTEGERS = tuple(name for name in _MASK_DTYPES if "int" in name)


class TensorInfo(NamedTuple):
    """What validation knows of a tensor: its shape (-1 = only known at run time) and its dtype by numpy's name."""

    shape: Tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Options:
    """The scalar options of the functional call, under its public names."""

    scale: Optional[float] = None
    is_causal: bool = False
    local_window_size: object = None
    prev_block_num: int = NO_LIMIT
    next_block_num: int = NO_LIMIT
    block_size: int = 128
    dropout_rate: float = 0.0
    logits_soft_cap: Optional[float] = None
    q_offset: Optional[int] = None
    layout: str = "BSND"
    tiling: str = "auto"
    tile: Optional[Tuple[int, int]] = None


def is_int(value):
    """True for Python and numpy integers, not for bools."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_int(layer, name, value, low, high=None, remedy=""):
    """Raise unless ``value`` is an int in [low, high]; returns it as a Python int."""
    need = "an int >= {}".format(low) if high is None else "an int in [{}, {}]".format(low, high)
    if not is_int(value):
        raise invalid_type(layer, name, need, "{!r} ({})".format(value, type(value).__name__), remedy)
    if value < low or (high is not None and value > high):
        raise invalid_value(layer, name, need, value, remedy)
    return int(value)


def check_bool(layer, name, value):
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise invalid_type(layer, name, "a bool", "{!r} ({})".format(value, type(value).__name__))
    return value


def check_rate(layer, name, value):
    """Raise unless ``value`` is a probability in [0, 1); returns a float."""
    if not _is_real(value):
        raise invalid_type(layer, name, "a float in [0, 1)", "{!r} ({})".format(value, type(value).__name__))
    if not 0 <= value < 1:
        raise invalid_value(layer, name, "a float in [0, 1)", value)
    return float(value)


def check_positive(layer, name, value):
    """Raise unless ``value`` is None or a finite number > 0; returns it as a float."""
    if value is None:
        return None
    if not _is_real(value):
        raise invalid_type(layer, name, "None or a float > 0", "{!r} ({})".format(value, type(value).__name__))
    if not (value > 0 and math.isfinite(value)):
        raise invalid_value(layer, name, "None or a float > 0", value)
    return float(value)


def check_scale(layer, value, name="scale"):
    """Raise unless ``value`` is None or a finite number (any sign, 0 included); returns it as a float."""
    if value is None:
        return None
    if not _is_real(value):
        raise invalid_type(layer, name, "None or a finite float", "{!r} ({})".format(value, type(value).__name__))
    if not math.isfinite(value):
        raise invalid_value(layer, name, "None or a finite float", value)
    return float(value)


def scale_or_default(layer, name, value, head_dim):
    """``value`` as :func:`check_scale` returns it, or ``1 / sqrt(head_dim)`` for None."""
    return float(head_dim) ** -0.5 if value is None else check_scale(layer, value, name)


def check_length(layer, name, value):
    """Raise unless ``value`` is an int >= 0: one length for the whole batch. Returns it as a Python int."""
    if not is_int(value):
        raise invalid_type(layer, name, "None, an int or an int tensor", repr(value))
    if value < 0:
        raise invalid_value(layer, name, "at least 0", value)
    return int(value)


def check_seed(layer, value):
    """Raise unless ``value`` is an int that fits uint32, rather than wrap it silently. Returns it as a Python int."""
    if not is_int(value):
        raise invalid_type(layer, "dropout_seed", "None, an int or an int tensor", repr(value))
    if not 0 <= value < 2**32:
        raise invalid_value(layer, "dropout_seed", "in [0, 2**32)", value)
    return int(value)


def check_window(layer, value):
    """Normalise ``local_window_size``: None, an int w (both sides) or (left, right), each None or an int >= 0."""
    if value is None:
        return None
    pair = (value, value) if is_int(value) else value
    need = "None, an int >= 0 or a pair (left, right) of those"
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise invalid_type(layer, "local_window_size", need, "{!r} ({})".format(value, type(value).__name__))
    for side in pair:
        if side is not None and (not is_int(side) or side < 0):
            raise invalid_value(layer, "local_window_size", need, repr(value))
    return tuple(None if side is None else int(side) for side in pair)


def check_layout(layer, layout):
    """Raise unless ``layout`` is one the functional call takes."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise invalid_value(layer, "layout", "one of {}".format(", ".join(map(repr, LAYOUTS))), repr(layout))


def _broadcasts(shape, full):
    return len(shape) == len(full) and all(size in (1, want) or want == -1 for size, want in zip(shape, full))


def _describe(sizes):
    return "({})".format(", ".join(str(size) for size in sizes))


def _check_qkv(layer, layout, query, key, value):
    """Shapes and dtypes of the three tensors; returns (batch, q_len, heads, kv_len, kv_heads, head_dim)."""
    for name, info in (("query", query), ("key", key), ("value", value)):
        if len(info.shape) != 4:
            raise invalid_value(layer, name, "of rank 4 with layout {}".format(layout), "shape {}".format(info.shape))
        if info.dtype not in FLOATS:
            raise invalid_type(layer, name, "of dtype {}".format(", ".join(FLOATS)), info.dtype)
    for name, info in (("key", key), ("value", value)):
        if info.dtype != query.dtype:
            raise invalid_type(layer, name, "of the query's dtype {}".format(query.dtype), info.dtype)
    sequence, head = (1, 2) if layout == "BSND" else (2, 1)
    batch, head_dim = query.shape[0], query.shape[3]
    if tuple(key.shape) != tuple(value.shape):
        raise invalid_value(layer, "value", "of the key's shape {}".format(_describe(key.shape)), value.shape)
    if key.shape[0] != batch or key.shape[3] != head_dim:
        want = list(key.shape)
        want[0], want[3] = batch, head_dim
        raise invalid_value(
            layer, "key", "of shape {} (batch and head_dim of the query)".format(_describe(want)), key.shape
        )
    sizes = batch, query.shape[sequence], query.shape[head], key.shape[sequence], key.shape[head], head_dim
    for name, size in zip(("batch", "q_len", "heads", "kv_len", "kv_heads", "head_dim"), sizes):
        if size == 0:
            raise invalid_value(layer, name, "at least 1", 0)
    heads, kv_heads = sizes[2], sizes[4]
    if heads % kv_heads:
        raise invalid_value(layer, "key", "of a number of heads that divides the query's {}".format(heads), kv_heads)
    return sizes


def _check_mask(layer, mask, full, block_size):
    """Shape of the functional ``mask``: returns (4-D or compact shape, is_compact)."""
    if mask.dtype not in _MASK_DTYPES:
        raise invalid_type(layer, "mask", "a bool, int or float tensor (keep where True or > 0)", mask.dtype)
    shape = tuple(mask.shape)
    if len(shape) == 2 and not _broadcasts(shape, full[2:]) and shape == (block_size, block_size):
        if full[2] != full[3]:
            raise invalid_value(
                layer,
                "mask",
                "of shape {} when the query and key lengths differ".format(_describe(full)),
                "the compact shape {}".format(shape),
                "Give the whole mask.",
            )
        return shape, True
    padded = (1,) * (4 - len(shape)) + shape
    if not _broadcasts(padded, full):
        raise invalid_value(
            layer,
            "mask",
            "broadcastable to {} or compact ({}, {})".format(_describe(full), block_size, block_size),
            "shape {}".format(shape),
        )
    return padded, False


def _check_bias(layer, bias, full):
    if bias.dtype not in FLOATS:
        raise invalid_type(layer, "bias", "a float tensor", bias.dtype, "A boolean or integer mask belongs to mask=.")
    padded = (1,) * (4 - len(bias.shape)) + tuple(bias.shape)
    if not _broadcasts(padded, full):
        raise invalid_value(
            layer, "bias", "broadcastable to {}".format(_describe(full)), "shape {}".format(tuple(bias.shape))
        )
    return padded


def _check_vector(layer, name, info, shapes, dtypes, kind):
    if info is None:
        return
    if info.dtype not in dtypes:
        raise invalid_type(layer, name, "of {} dtype".format(kind), info.dtype)
    if not any(_broadcasts(info.shape, shape) and tuple(info.shape) == _filled(info.shape, shape) for shape in shapes):
        need = " or ".join("()" if not shape else _describe(shape) for shape in shapes)
        raise invalid_value(layer, name, "of shape {}".format(need), "shape {}".format(tuple(info.shape)))


def _filled(shape, want):
    return tuple(size if full == -1 else full for size, full in zip(shape, want))


def make_spec(layer, query, key, value, operands, options):
    """Validate one functional call.

    Args:
        layer: name used in the messages.
        query, key, value: :class:`TensorInfo` in ``options.layout``.
        operands: ``Operands`` whose entries are :class:`TensorInfo` or None.
        options: :class:`Options`; its entries are checked here.

    Returns:
        :class:`~flash_attention.core.spec.AttentionSpec`.

    Raises:
        ValueError, TypeError: in MindSpore's wording, naming argument, requirement, value and remedy.
    """
    check_layout(layer, options.layout)
    batch, q_len, heads, kv_len, kv_heads, head_dim = _check_qkv(layer, options.layout, query, key, value)
    full = (batch, heads, q_len, kv_len)
    prev = check_int(layer, "prev_block_num", options.prev_block_num, 0)
    following = check_int(layer, "next_block_num", options.next_block_num, 0)
    block_size = check_int(layer, "block_size", options.block_size, 1)
    mask_shape, compact = (
        (None, False) if operands.mask is None else _check_mask(layer, operands.mask, full, block_size)
    )
    rate = check_rate(layer, "dropout_rate", options.dropout_rate)
    if rate and operands.dropout_seed is None:
        raise invalid_value(layer, "dropout_seed", "given when dropout_rate > 0", None)
    if (operands.q_segment_ids is None) != (operands.kv_segment_ids is None):
        missing = "q_segment_ids" if operands.q_segment_ids is None else "kv_segment_ids"
        raise invalid_value(layer, missing, "given together with the other side's segment ids", None)
    _check_vector(layer, "alibi_slopes", operands.slopes, ((heads,), (batch, heads)), FLOATS, "float")
    _check_vector(layer, "sinks", operands.sinks, ((heads,),), FLOATS, "float")
    _check_vector(layer, "q_segment_ids", operands.q_segment_ids, ((batch, q_len),), _INTEGERS, "integer")
    _check_vector(layer, "kv_segment_ids", operands.kv_segment_ids, ((batch, kv_len),), _INTEGERS, "integer")
    _check_vector(layer, "query_seq_lengths", operands.q_lengths, ((batch,),), _INTEGERS, "integer")
    _check_vector(layer, "key_value_seq_lengths", operands.kv_lengths, ((batch,),), _INTEGERS, "integer")
    _check_vector(layer, "q_offset", operands.q_offset, ((), (batch,)), _INTEGERS, "integer")
    _check_vector(layer, "dropout_seed", operands.dropout_seed, ((),), _INTEGERS, "integer")
    if options.q_offset is not None and not is_int(options.q_offset):
        raise invalid_type(layer, "q_offset", "None, an int or an integer tensor", repr(options.q_offset))
    return AttentionSpec(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        dtype=query.dtype,
        scale=check_scale(layer, options.scale),
        causal=check_bool(layer, "is_causal", options.is_causal),
        prev_block_num=prev,
        next_block_num=following,
        block_size=block_size,
        local_window_size=check_window(layer, options.local_window_size),
        q_offset=options.q_offset,
        dynamic_offset=operands.q_offset is not None,
        mask_shape=mask_shape,
        compact_mask=compact,
        bias_shape=None if operands.bias is None else _check_bias(layer, operands.bias, full),
        alibi_shape=None if operands.slopes is None else tuple(operands.slopes.shape),
        segments=operands.q_segment_ids is not None,
        q_lengths=operands.q_lengths is not None,
        kv_lengths=operands.kv_lengths is not None,
        soft_cap=check_positive(layer, "logits_soft_cap", options.logits_soft_cap),
        sinks=operands.sinks is not None,
        dropout_rate=rate,
        tiling=options.tiling,
        tile=options.tile,
    )
