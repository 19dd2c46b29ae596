"""How a spec becomes the operator's arguments: sparse mode, tokens, kind of mask and real_shift. Decisions only, numpy.

spec -> constraints -> **mapping** -> tensors (MindSpore) -> operator. From documentation only, not run on a device.

| spec | sparse_mode | attn_mask |
|---|---|---|
| every query sees every key | 0 | none |
| causal, top-left (q_offset 0; square sizes too) | 2 leftUpCausal | the constant 2048 x 2048 upper triangle |
| causal, bottom-right | 3 rightDownCausal | the same |
| another band in tokens | 4 band, origin bottom-right | the same |
| block windows, masks, segments, key lengths, run-time offsets, bands of forbidden tokens | 1 allMask | explicit |

An explicit mask has q_len * kv_len bytes, times the batch and heads along which it varies. Query lengths never need
one: their rows are set to zero afterwards, as are all rows that see no key.
"""

from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

from flash_attention.core.ranges import visible

COMPACT = 2048
"""Rows and columns of the compressed mask of sparse modes 2, 3 and 4."""

ALIBI_ROWS = 1024
"""Rows of real_shift in its compressed form: the last ones of a lower triangle longer than this."""

NO_TOKENS = 2147483647

SCALE_MULTIPLIES_REAL_SHIFT = True
"""Whether the operator computes ``scale * (q k^T + real_shift)``.

The documents contradict each other: the docstring of ``ops.flash_attention_score`` says ``scale * q k^T + pse``; those
of the primitive and of CANN say ``scale * (pse + q k^T)``, and mindformers divides by scale before it calls the
primitive. We follow the latter three. Set this to False if a device shows otherwise; nothing else changes.
"""

ALIGN = 16
"""head_dim is padded with zeros to a multiple of this."""


@dataclass(frozen=True)
class Mapping:
    """The static arguments of one spec.

    Attributes:
        sparse_mode, pre_tokens, next_tokens: as the operator takes them.
        mask: None, 'compact' (the constant triangle) or 'explicit'.
        mask_shape: shape of the explicit mask: (Sq, Sk), (B, 1, Sq, Sk) or (B, N, Sq, Sk); None otherwise.
        shift_rows: first and number of query rows given in real_shift; None without one.
    """

    sparse_mode: int
    pre_tokens: int = NO_TOKENS
    next_tokens: int = NO_TOKENS
    mask: Optional[str] = None
    mask_shape: Optional[Tuple[int, ...]] = None
    shift_rows: Optional[Tuple[int, int]] = None


def forbidden_tokens(pre, after, q_len, kv_len):
    """Why the documentation forbids these tokens, or None. ``after`` is next_tokens. Source: MS, ``next_tokens``."""
    if pre < 0 and after < 0:
        return "pre_tokens and next_tokens are both negative"
    if pre < 0 and (after < -pre or -pre >= kv_len):
        return "pre_tokens is negative and next_tokens < |pre_tokens| or |pre_tokens| >= S2"
    if after < 0 and (-after > pre or -after >= q_len):
        return "next_tokens is negative and |next_tokens| > pre_tokens or |next_tokens| >= S1"
    return None


def _triangle(spec):
    """(sparse_mode, pre_tokens, next_tokens) of a band in tokens, or None where no compressed mode expresses it."""
    band, bottom_right = spec.band, spec.kv_len - spec.q_len
    if band.prev is not None or band.next is not None:
        return None
    if band.right == 0 and band.left is None and spec.offset in (0, bottom_right):
        return (2 if spec.offset == 0 else 3), NO_TOKENS, 0
    # The operator counts tokens from the bottom-right diagonal; ours start at p = i + offset.
    shift = spec.offset - bottom_right
    pre = NO_TOKENS if band.left is None else band.left - shift
    after = NO_TOKENS if band.right is None else band.right + shift
    if forbidden_tokens(pre, after, spec.q_len, spec.kv_len):
        return None
    return 4, min(pre, NO_TOKENS), min(after, NO_TOKENS)


def _explicit_shape(spec):
    batch = heads = 1
    if spec.mask_shape is not None and not spec.compact_mask:
        batch, heads = spec.mask_shape[:2]
    if spec.segments or spec.kv_lengths or spec.dynamic_offset or heads > 1:
        batch = spec.batch  # (1, N, Sq, Sk) is no documented shape
    if batch == 1 and heads == 1:
        return (spec.q_len, spec.kv_len)
    return (spec.batch, heads, spec.q_len, spec.kv_len)


def _shift_rows(spec, sparse_mode):
    if spec.bias_shape is None and spec.alibi_shape is None:
        return None
    triangle = sparse_mode in (2, 3) and spec.q_len == spec.kv_len and spec.q_len > ALIBI_ROWS
    if triangle and spec.bias_shape is None and spec.offset == 0:
        return spec.q_len - ALIBI_ROWS, ALIBI_ROWS
    return 0, spec.q_len


def map_spec(spec):
    """The :class:`Mapping` of a spec that no constraint refuses."""
    free = spec.band.is_dense
    mode = None
    if spec.mask_shape is None and not (spec.segments or spec.kv_lengths):
        if free:
            return Mapping(0, shift_rows=_shift_rows(spec, 0))
        if not spec.dynamic_offset:
            mode = _triangle(spec)
    if mode is not None:
        return Mapping(mode[0], mode[1], mode[2], "compact", None, _shift_rows(spec, mode[0]))
    return Mapping(1, mask="explicit", mask_shape=_explicit_shape(spec), shift_rows=_shift_rows(spec, 1))


def band_mask(spec, first=0, rows=None):
    """Boolean (rows, kv_len): what the band alone shows to the queries ``first ..``; static offsets only."""
    rows = spec.q_len if rows is None else rows
    p = np.arange(first, first + rows)[:, None] + spec.offset
    return np.asarray(visible(spec.band, p, np.arange(spec.kv_len)[None, :]))


def live_rows(spec):
    """Boolean (q_len,): queries that the band alone leaves a key; None when all of them, or the offset is dynamic."""
    if spec.dynamic_offset:
        return None
    p = np.arange(spec.q_len) + spec.offset
    live = np.asarray(spec.band.first_key(p) <= spec.band.last_key(p))
    return None if live.all() else live


def padded(head_dim):
    """``head_dim`` rounded up to the operator's alignment."""
    return -(-head_dim // ALIGN) * ALIGN


def extra_bytes(spec):
    """Bytes of the O(Sq * Sk) tensors that the mapping adds, as a dict: attn_mask, real_shift, drop_mask."""
    mapped = map_spec(spec)
    if mapped.mask == "explicit":
        mask = int(np.prod(mapped.mask_shape, dtype=np.int64))
    else:
        mask = COMPACT * COMPACT if mapped.mask else 0
    shift = 0
    if mapped.shift_rows is not None:
        batch = spec.batch if shift_varies(spec) else 1
        shift = 2 * batch * spec.heads * mapped.shift_rows[1] * spec.kv_len
    drop = spec.batch * spec.heads * spec.q_len * spec.kv_len // 8 if spec.dropout_rate else 0
    return {"attn_mask": mask, "real_shift": shift, "drop_mask": drop}


def shift_varies(spec):
    """Whether real_shift differs between the entries of the batch."""
    by_bias = spec.bias_shape is not None and spec.bias_shape[0] > 1
    by_alibi = spec.alibi_shape is not None and (len(spec.alibi_shape) == 2 or spec.dynamic_offset)
    return by_bias or by_alibi
