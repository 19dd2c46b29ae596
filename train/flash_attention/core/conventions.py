"""The conventions of every public attention call, as data: docs tables and a test are generated from here.

Common to all of them: query ``i`` has position ``p = i + offset``; every restriction (mask, causal, windows, segments,
lengths) is ANDed; a row that sees no key gives output 0, LSE -inf and gradient 0; query head ``h`` uses key/value head
``h // group``; LSE is float32, natural logarithm.
"""

from dataclasses import dataclass

DISCARD = "non-zero = discard"
KEEP = "keep where True or > 0"
BOTTOM_RIGHT = "bottom-right (offset = Sk - Sq)"
TOP_LEFT = "top-left (offset = 0)"
LAST = BOTTOM_RIGHT + ", Sq <= Sk"


@dataclass(frozen=True)
class Call:
    """One public call.

    Attributes:
        path: where it is imported from.
        layout: axes of query, key, value and output; the first is the default.
        mask_argument, polarity: the name of its mask and what an entry means.
        mask_shapes: accepted shapes.
        alignment: where the diagonal lies when the lengths differ, and how to move it.
    """

    path: str
    layout: str
    mask_argument: str
    polarity: str
    mask_shapes: str
    alignment: str


_CELL_MASKS = "(Sq,Sk), (1|B,Sq,Sk), (1|B,1|N,Sq,Sk), compact (T,T) or (1,T,T)"
_CROSS_MASKS = "(Sq,Sk), (1|B,Sq,Sk), (1|B,1|N,Sq,Sk), key_padding_mask (B,Sk)"
_BLOCK_MASKS = "(B,Sk), (1|B,1,1,Sk), (1|B,1|N,Sq,Sk)"
_RANK_MASKS = "(1|B,1|N,Sq,Sk), (1|B,1|N,1,Sk): rows of this rank, keys of all"
_FLEXIBLE_MASKS = "(B,Sk), (1|B,1|Sq,Sk), rank 4 broadcastable to (B,N,Sq,Sk)"
_SAME = "Sq = Sk"
_STACK_ARGUMENTS = "mask, context_mask, attn_mask"
_STACK_MASKS = "mask (B,Sq), context_mask (B,Sk); attn_mask (Sq,Sk), (1|N,Sq,Sk), (1|B,1|N,Sq,Sk)"
_FLAGS = "(B,Sq,N), (B,Sk,N)"
_BY_POSITION = "by position in the sequence"
_FULL_MASKS = "broadcastable to (B,N,Sq,Sk)"
_FUNCTION_MASKS = "broadcastable to (B,N,Sq,Sk), compact (T,T)"

CALLS = (
    Call("flash_attention.nn.FlashAttention", "BNSD", "attention_mask", DISCARD, _CELL_MASKS, BOTTOM_RIGHT),
    Call("flash_attention.jax.FlashAttention", "BNSD", "attention_mask", DISCARD, _CELL_MASKS, BOTTOM_RIGHT),
    Call(
        "flash_attention.ops.flash_attention",
        "BSND, BNSD",
        "mask",
        KEEP,
        _FUNCTION_MASKS,
        BOTTOM_RIGHT + ", q_offset= overrides",
    ),
    Call(
        "flash_attention.jax.flash_attention",
        "BSND, BNSD",
        "mask",
        KEEP,
        _FUNCTION_MASKS,
        BOTTOM_RIGHT + ", q_offset= overrides",
    ),
    Call(
        "flash_attention.jax.distributed.attention",
        "BSND, BNSD",
        "mask",
        KEEP,
        _FUNCTION_MASKS,
        BOTTOM_RIGHT + ", q_offset= overrides",
    ),
    Call(
        "flash_attention.jax.FlexibleAttentionModule",
        "BSND",
        "attention_mask",
        KEEP,
        _FLEXIBLE_MASKS,
        BOTTOM_RIGHT + ", q_offset= overrides",
    ),
    Call(
        "flash_attention.nn.FlexibleAttention",
        "BSND",
        "attention_mask",
        KEEP,
        _FLEXIBLE_MASKS,
        BOTTOM_RIGHT + ", q_offset= overrides",
    ),
    Call("flash_attention.nn.RingAttention", "BNSD", "attention_mask", DISCARD, _RANK_MASKS, BOTTOM_RIGHT),
    Call("flash_attention.nn.UlyssesAttention", "BNSD", "attention_mask", DISCARD, _RANK_MASKS, BOTTOM_RIGHT),
    Call("flash_attention.nn.grouped_query_attention", "BSND", "mask", KEEP, _FULL_MASKS, BOTTOM_RIGHT),
    Call("flash_attention.jax.grouped_query_attention", "BSND", "mask", KEEP, _FULL_MASKS, BOTTOM_RIGHT),
    Call("flash_attention.nn.MultiQueryAttention", "x (B,Sq,E)", "mask", KEEP, _FULL_MASKS, BOTTOM_RIGHT),
    Call("flash_attention.jax.MultiQueryAttention", "x (B,Sq,E)", "mask", KEEP, _FULL_MASKS, BOTTOM_RIGHT),
    Call("flash_attention.nn.dilated_attention", "BSND", "none", "-", "-", _SAME),
    Call("flash_attention.jax.dilated_attention", "BSND", "none", "-", "-", _SAME),
    Call("flash_attention.nn.DilatedAttention", "x (B,S,E)", "none", "-", "-", _SAME),
    Call("flash_attention.jax.DilatedAttention", "x (B,S,E)", "none", "-", "-", _SAME),
    Call("flash_attention.nn.dynamic_sparse_attention", "BSND", "q_idx, k_idx ('qk')", KEEP, _FLAGS, TOP_LEFT),
    Call("flash_attention.jax.dynamic_sparse_attention", "BSND", "q_idx, k_idx ('qk')", KEEP, _FLAGS, TOP_LEFT),
    Call("flash_attention.nn.DynamicSparseAttention", "BSND", "q_idx, k_idx ('qk')", KEEP, _FLAGS, TOP_LEFT),
    Call("flash_attention.nn.fused_landmark_attention", "BNSD", "none", "-", "-", LAST),
    Call("flash_attention.jax.fused_landmark_attention", "BNSD", "none", "-", "-", LAST),
    Call("flash_attention.nn.FusedLandmarkAttention", "BNSD", "none", "-", "-", LAST),
    Call("flash_attention.nn.BlockwiseAttention", "BSND", "none (bias)", "-", "-", TOP_LEFT),
    Call("flash_attention.jax.blockwise_compute_attn", "BSND", "none (bias)", "-", "-", TOP_LEFT),
    Call(
        "flash_attention.nn.BlockwiseParallel",
        "x (B,S,E)",
        "attention_mask",
        KEEP,
        _BLOCK_MASKS,
        _SAME + ", or a cache",
    ),
    Call(
        "flash_attention.jax.BlockwiseParallelJax",
        "x (B,S,E)",
        "attention_mask",
        KEEP,
        _BLOCK_MASKS,
        _SAME + ", or a cache",
    ),
    Call("flash_attention.nn.ConditionalRoutedAttention", "x (B,S,E)", "mask", KEEP, "(B,S)", "none"),
    Call("flash_attention.jax.ConditionalRoutedAttention", "x (B,S,E)", "mask", KEEP, "(B,S)", "none"),
    Call("flash_attention.nn.CrossModalAttention", "x (B,Sq,E)", "attn_mask", KEEP, _CROSS_MASKS, "none"),
    Call("flash_attention.jax.CrossModalAttention", "x (B,Sq,E)", "attn_mask", KEEP, _CROSS_MASKS, "none"),
    Call("flash_attention_infer.nn.CachedAttention", "BSND", "none", "-", "-", _BY_POSITION),
    Call("flash_attention_infer.jax.prefill", "BSND", "none", "-", "-", _BY_POSITION),
    Call("flash_attention_infer.jax.decode", "BSND", "none", "-", "-", _BY_POSITION),
    Call("flash_attention.nn.TriangleAttention", "BNSD", "attention_mask", DISCARD, "(1|B,S,S)", _SAME),
) + tuple(
    Call("flash_attention.{}.{}".format(package, name), layout, _STACK_ARGUMENTS, KEEP, _STACK_MASKS, BOTTOM_RIGHT)
    for name, layout in (
        ("Attention", "x (B,Sq,E)"),
        ("AttentionLayers", "x (B,Sq,E)"),
        ("TransformerWrapper", "x (B,Sq)"),
        ("ContinuousTransformerWrapper", "x (B,Sq,E)"),
    )
    for package in ("nn", "jax")
)
"""The last are models; ``AttentionLayers`` stands for ``Encoder``, ``Decoder`` and ``CrossAttender`` too."""


def table():
    """The calls as the lines of a Markdown table."""
    head = ("call", "layout", "mask argument", "polarity", "mask shapes", "alignment")
    rows = [head, ("---",) * len(head)]
    for call in CALLS:
        shapes = call.mask_shapes.replace("|", "\\|")
        rows.append(("`{}`".format(call.path), call.layout, call.mask_argument, call.polarity, shapes, call.alignment))
    return ["| {} |".format(" | ".join(row)) for row in rows]
