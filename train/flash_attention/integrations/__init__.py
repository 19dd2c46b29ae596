"""The Cell inside model libraries: one file a library, which imports it only when it is enabled.

``from flash_attention.integrations import mindformers`` or ``mindone``, then ``mindformers.enable()`` before the model
is built, and the model computes its attention with :class:`flash_attention.nn.FlashAttention`.
"""
