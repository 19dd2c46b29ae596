"""Which operator of Atlas A2/A3 serves a call over a cache, and with which arguments. Decisions only, no framework.

| call | operator | keys | mask |
|---|---|---|---|
| prefill of new sequences | prompt_flash_attention | new tokens | triangle: sparse_mode 2, with a window 4 |
| one token a sequence | incre_flash_attention | pool, by block_table | lengths; with a window (B, S) |
| one token, int8 cache or sinks | fused_infer_attention_score | pool, by block_table | the same |
| one token, float16, MindSpore Lite | PagedAttention | pool, by block_tables | context_lens |
| several tokens over a cache, rings | fused_infer_attention_score | gathered view | sparse_mode 1, (B, 1, T, S) |

Sources: the docstrings of mindspore 2.10 ("MS"). Where they are silent the choice is marked "ours".
"""

from dataclasses import dataclass
from typing import Optional

from flash_attention.core.errors import Reason

NO_TOKENS = 2147483647
COMPACT = 2048
"""Rows and columns of the compressed mask of sparse modes 2, 3 and 4."""

SCALE_MULTIPLIES_PSE_SHIFT = False
"""Whether the operators compute ``scale * (q k^T + pse_shift)``. MS does not say; ours: added after the scale. Set it
if a device shows otherwise."""

PROMPT, INCRE, FUSED, PAGED = (
    "prompt_flash_attention",
    "incre_flash_attention",
    "fused_infer_attention_score",
    "paged_attention",
)


@dataclass(frozen=True)
class CacheCall:
    """One call, as far as the choice depends on it.

    Attributes:
        tokens: T, new tokens (the most of a sequence); fresh: no sequence has earlier ones.
        heads, kv_heads, head_dim, dtype: of query and output.
        held: dtype of the pool; block_size: its tokens a block.
        window: tokens before its own that a query sees, or None; ring: the keys come from a ring.
        alibi, sinks: whether given; soft_cap: as given; scale: factor on the scores.
        lite: the graph is exported for MindSpore Lite.
    """

    tokens: int
    fresh: bool
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    held: str
    block_size: int
    scale: float
    window: Optional[int] = None
    ring: bool = False
    alibi: bool = False
    sinks: bool = False
    soft_cap: Optional[float] = None
    lite: bool = False


@dataclass(frozen=True)
class Mapping:
    """The operator and what it is given.

    Attributes:
        operator: its name in ``mindspore.ops``.
        keys: 'new' (the step's own tokens), 'pool' (with block_table) or 'view' (gathered in order).
        mask: None, 'triangle' (the constant one), 'keys' (B, S) or 'full' (B, 1, T, S); 1 = discard.
        scales: the pool's scales are given (antiquant_scale, float32 (2, B, S)).
    """

    operator: str
    keys: str
    mask: Optional[str] = None
    scales: bool = False


def _aligned(call):
    """Multiple that block_size must have. MS, incre_flash_attention, "Page attention"."""
    return 32 if call.held == "int8" else 16


_PORTABLE = "Use engine='portable'."
LIMITS = (
    # argument, need, source, value when broken (else None), remedy
    ("dtype", "float16 or bfloat16", "MS",
     lambda c: None if c.dtype in ("float16", "bfloat16") else c.dtype, _PORTABLE),
    ("head_dim", "a multiple of 16, at most 512", "MS",
     lambda c: None if c.head_dim % 16 == 0 and c.head_dim <= 512 else c.head_dim, _PORTABLE),
    ("heads", "at most 256, and at most 64 to a key/value head", "MS",
     lambda c: None if c.heads <= 256 and c.heads // c.kv_heads <= 64 else c.heads, _PORTABLE),
    ("logits_soft_cap", "None (no operator has a soft cap)", "MS", lambda c: c.soft_cap, _PORTABLE),
    ("block_size", "a multiple of 16, with an int8 cache of 32", "MS",
     lambda c: None if c.ring or c.fresh or c.tokens > 1 or c.block_size % _aligned(c) == 0 else c.block_size,
     "Make the cache with another block_size."),
    ("cache dtype", "that of the query, or int8", "MS", lambda c: None if c.held in (c.dtype, "int8") else c.held,
     "Make the cache in the query's dtype."),
)  # fmt: skip


def refused(call):
    """The :class:`Reason` of the first limit that ``call`` breaks, or None. Says nothing about the device."""
    for argument, need, _, broken, remedy in LIMITS:
        value = broken(call)
        if value is not None:
            return Reason(argument, value, need, remedy)
    return None


def table():
    """The limits as the lines of a Markdown table, for the documentation."""
    rows = [("argument", "must be", "source"), ("---",) * 3] + [limit[:3] for limit in LIMITS]
    return ["| {} |".format(" | ".join(row)) for row in rows]


def map_call(call):
    """The :class:`Mapping` of a call that no limit refuses."""
    if call.fresh and not (call.ring or call.sinks or call.held == "int8"):
        return Mapping(PROMPT, "new", "triangle")
    if call.fresh or call.ring or call.tokens > 1:
        return Mapping(FUSED, "view", "full")
    lengths_only = not (call.alibi or call.sinks or call.window is not None)
    if call.lite and call.dtype == call.held == "float16" and lengths_only:
        return Mapping(PAGED, "pool")
    mask = None if call.window is None else "keys"
    if call.held == "int8" or call.sinks:  # scales a token, and the LSE that sinks need, are the fused operator's alone
        return Mapping(FUSED, "pool", mask, call.held == "int8")
    return Mapping(INCRE, "pool", mask)
