"""Transformers over the core call in JAX: attention, feed-forward, stacks, wrappers. Imported when first used.

wrapper (tokens or vectors) -> stack of layers -> attention (projections) -> attend (fused, formed or a mechanism).
``TRANSFORMER`` is the registration: ``{module: public names}``; ``flash_attention.jax`` exports them.
"""

TRANSFORMER = {
    "attention": ("Attention",),
    "autoregressive": ("AutoregressiveWrapper",),
    "feed_forward": ("FeedForward",),
    "layers": ("AttentionLayers", "CrossAttender", "Decoder", "Encoder"),
    "wrappers": ("ContinuousTransformerWrapper", "TransformerWrapper"),
}
