"""Mechanisms in JAX, one file each: routing before the core call, an LSE merge after it. Imported when first used.

``MECHANISMS`` is the registration: ``{module: public names}``; ``flash_attention.jax`` exports them.
"""

MECHANISMS = {
    "blockwise": ("blockwise_compute_attn", "blockwise_compute_ffn"),
    "blockwise_block": ("BlockwiseParallelJax",),
    "blockwise_loss": ("Blockwise_LM_Head", "blockwise_cross_entropy", "blockwise_fused_cross_entropy"),
    "colt5": (
        "ConditionalRoutedAttention",
        "ConditionalRoutedCrossAttention",
        "ConditionalRoutedFeedForward",
        "ConditionalRoutedTransformerBlock",
    ),
    "colt5_routing": ("CoordinateDescentRouter", "coor_descent"),
    "cross_modal": ("CrossModalAttention", "CrossModalBlock", "info_nce", "l2_normalize", "logit_scale"),
    "dilated": ("DilatedAttention", "dilated_attention"),
    "landmark": ("FusedLandmarkAttention", "fused_landmark_attention"),
    "multi_query": ("MultiQueryAttention", "grouped_query_attention"),
    "positions": ("alibi_bias", "rotary", "t5_bias", "xpos"),
    "sparse": (
        "compact",
        "dynamic_sparse_attention",
        "hash_sparse_attention",
        "hash_sparse_attention_kernel",
        "pad_index",
        "qk_sparse_attention",
        "qk_sparse_attention_kernel",
        "sort_bucketed_attention",
    ),
}
