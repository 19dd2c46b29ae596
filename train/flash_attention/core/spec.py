"""AttentionSpec: the frozen, hashable, static half of one attention call; Operands: its run-time tensors.

User call -> AttentionSpec -> dispatch -> ranges -> plan -> engine. Front ends build a spec only through
``core.validation``; engines read it, and may use it as a compile-time constant and cache key.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional, Tuple

from flash_attention.core.ranges import Band

NO_LIMIT = 65536
"""``prev_block_num`` / ``next_block_num`` at or above this mean "no limit", as in the published interface."""


@dataclass(frozen=True)
class AttentionSpec:
    """One attention call after normalisation to BNSD. Query ``i`` has position ``p = i + offset``.

    Attributes:
        batch, heads, kv_heads, q_len, kv_len, head_dim: sizes; ``batch`` is -1 where it is only known at run time.
        dtype: 'float16', 'bfloat16', 'float32' or 'float64'.
        scale: factor on the scores; None becomes ``1 / sqrt(head_dim)``.
        causal: key ``j`` visible only when ``j <= p``.
        prev_block_num, next_block_num, block_size: block window, see :mod:`flash_attention.core.conventions`.
        local_window_size: None or (left, right) tokens, inclusive, each None = no limit.
        q_offset: position of query 0; None becomes ``kv_len - q_len`` (bottom-right alignment).
        dynamic_offset: the offset is a run-time tensor in ``Operands.q_offset``; ``q_offset`` is then meaningless.
        mask_shape: None, or the keep mask's 4-D shape (1|B, 1|N, 1|Sq, 1|Sk), or (T, T) when ``compact_mask``.
        compact_mask: the mask applies inside each query's own block of ``block_size``; later blocks are discarded.
        bias_shape: None or (1|B, 1|N, 1|Sq, 1|Sk).
        alibi_shape: None, (N,) or (B, N): the slopes' shape.
        segments, q_lengths, kv_lengths, sinks: whether that operand is present.
        soft_cap: None or the cap: scores become ``cap * tanh(score / cap)`` before bias and ALiBi.
        dropout_rate: probability of dropping, in [0, 1).
        tiling: name of the tiling strategy, for engines whose tiles it decides; never changes a result.
        tile: (queries, keys) of a compute tile, for engines that take one; None = their choice; never changes a result.
        layout: 'BNSD', or 'BSND' for an engine that reads it as it is (``Engine.layouts``).
        origin: where the call is a part of a larger one, the index there of its first batch row, head, query and key;
            dropout counts from it. ``Operands.origin`` overrides it at run time.
        wide: output and gradients stay float32 whatever the dtype: parts that are to be merged or summed.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str = "float32"
    scale: Optional[float] = None
    causal: bool = False
    prev_block_num: int = NO_LIMIT
    next_block_num: int = NO_LIMIT
    block_size: int = 128
    local_window_size: Optional[Tuple[Optional[int], Optional[int]]] = None
    q_offset: Optional[int] = None
    dynamic_offset: bool = False
    mask_shape: Optional[Tuple[int, ...]] = None
    compact_mask: bool = False
    bias_shape: Optional[Tuple[int, ...]] = None
    alibi_shape: Optional[Tuple[int, ...]] = None
    segments: bool = False
    q_lengths: bool = False
    kv_lengths: bool = False
    soft_cap: Optional[float] = None
    sinks: bool = False
    dropout_rate: float = 0.0
    tiling: str = "auto"
    tile: Optional[Tuple[int, int]] = None
    layout: str = "BNSD"
    origin: Tuple[int, int, int, int] = (0, 0, 0, 0)
    wide: bool = False

    def __post_init__(self):
        if self.scale is None:
            object.__setattr__(self, "scale", 1.0 / math.sqrt(self.head_dim))
        if self.q_offset is None and not self.dynamic_offset:
            object.__setattr__(self, "q_offset", self.kv_len - self.q_len)

    @property
    def offset(self):
        """Static position of query 0; None when it is only known at run time."""
        return None if self.dynamic_offset else self.q_offset

    @property
    def group(self):
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def band(self):
        """Causality, windows and the compact mask's "no later block" as one :class:`Band`."""
        left, right = self.local_window_size or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        next_blocks = None if self.next_block_num >= NO_LIMIT else self.next_block_num
        if self.compact_mask:
            next_blocks = 0
        return Band(
            q_len=self.q_len,
            kv_len=self.kv_len,
            left=left,
            right=right,
            prev=None if self.prev_block_num >= NO_LIMIT else self.prev_block_num,
            next=next_blocks,
            block_size=self.block_size,
        )

    @property
    def has_data_mask(self):
        """True when visibility also depends on run-time tensors, so that no tile is free of a predicate."""
        return self.mask_shape is not None or self.segments or self.q_lengths or self.kv_lengths


class Operands(NamedTuple):
    """Run-time tensors of a call beside query, key and value; every entry may be None.

    Attributes:
        bias: (1|B, 1|N, 1|Sq, 1|Sk), added to the scaled scores.
        mask: keep mask, True (or > 0) = visible; (1|B, 1|N, 1|Sq, 1|Sk), or (T, T) when compact.
        slopes: ALiBi slopes, float32 (N,) or (B, N).
        sinks: float32 (N,) logits that join the softmax's denominator.
        q_segment_ids, kv_segment_ids: int32 (B, Sq) and (B, Sk); a query sees keys of its own segment.
        q_lengths, kv_lengths: int32 (B,); queries and keys from there on do not exist.
        q_offset: int32 scalar or (B,): run-time position of query 0.
        dropout_seed: uint32 scalar.
        origin: int32 (4,), ``AttentionSpec.origin`` where it is only known at run time.
    """

    bias: object = None
    mask: object = None
    slopes: object = None
    sinks: object = None
    q_segment_ids: object = None
    kv_segment_ids: object = None
    q_lengths: object = None
    kv_lengths: object = None
    q_offset: object = None
    dropout_seed: object = None
    origin: object = None


KEYWORDS = {
    "bias": "bias",
    "mask": "mask",
    "alibi_slopes": "slopes",
    "sinks": "sinks",
    "q_segment_ids": "q_segment_ids",
    "kv_segment_ids": "kv_segment_ids",
    "query_seq_lengths": "q_lengths",
    "key_value_seq_lengths": "kv_lengths",
    "q_offset": "q_offset",
    "dropout_seed": "dropout_seed",
}
"""Keyword of the functional call -> field of :class:`Operands`."""
