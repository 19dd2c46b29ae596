"""One file a Cell, or a mechanism. Mechanisms are imported when they are first used.

``MECHANISMS`` is the registration: ``{module: public names}``; ``flash_attention.nn`` exports them.
"""

from flash_attention.core.lazy import lazy_names
from flash_attention.nn.layer.flash_attention import FlashAttention

MECHANISMS = {
    "blockwise": ("BlockwiseAttention", "BlockwiseFFN"),
    "blockwise_block": ("BlockwiseParallel",),
    "blockwise_loss": ("Blockwise_LM_Head", "blockwise_cross_entropy", "blockwise_fused_cross_entropy"),
    "colt5": (
        "ConditionalRoutedAttention",
        "ConditionalRoutedCrossAttention",
        "ConditionalRoutedFeedForward",
        "ConditionalRoutedTransformerBlock",
    ),
    "colt5_routing": ("CoordinateDescentRouter", "coor_descent"),
    "context_parallel": ("RingAttention", "UlyssesAttention"),
    "cross_modal": ("CrossModalAttention", "CrossModalBlock", "info_nce", "l2_normalize", "logit_scale"),
    "dilated": ("DilatedAttention", "dilated_attention"),
    "flexible": ("FlexibleAttention", "Mechanism", "MechanismRegistry"),
    "landmark": ("FusedLandmarkAttention", "fused_landmark_attention"),
    "multi_query": ("MultiQueryAttention", "grouped_query_attention"),
    "positions": ("Rotary", "T5Bias", "XPos", "alibi_bias"),
    "sparse": ("DynamicSparseAttention", "dynamic_sparse_attention", "hash_sparse_attention", "qk_sparse_attention"),
    "sparse_steps": (
        "compact",
        "hash_sparse_attention_kernel",
        "pad_index",
        "qk_sparse_attention_kernel",
        "sort_bucketed_attention",
    ),
    "projection": ("load_weights", "weights_of"),
    "triangle_attention": ("TriangleAttention",),
}

__all__ = ["FlashAttention"]
__getattr__, __dir__ = lazy_names("flash_attention.nn.layer", MECHANISMS, globals())
