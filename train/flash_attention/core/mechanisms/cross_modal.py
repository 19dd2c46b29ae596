"""Attention from one modality to another, in the manner of ImageBind (Girdhar et al., 2023): checks and constants."""

from flash_attention.core.errors import invalid_value
from flash_attention.core.validation import check_bool, check_int, check_positive, check_rate

LAYER = "CrossModalAttention"
LAYER_SCALES = (None, "per_channel", "scalar")
EPSILON = 1e-12  # of the L2 normalisation
LARGEST_SCALE = 100.0
LOGIT_SCALES = {"text": 1.0 / 0.07, "audio": 20.0, "depth": 10.0, "thermal": 5.0, "imu": 5.0}
"""Initial logit scale by modality; that of text is learned, the others are fixed."""


def check_layer(dim, num_heads, context_dim, flags, dropout):
    """Raise unless the sizes fit; returns the context's width. ``flags`` is ``{name: value}`` of bools."""
    check_int(LAYER, "dim", dim, 1)
    check_int(LAYER, "num_heads", num_heads, 1)
    for name, flag in flags.items():
        check_bool(LAYER, name, flag)
    check_rate(LAYER, "dropout", dropout)
    if dim % num_heads:
        raise invalid_value(LAYER, "dim", "a multiple of num_heads = {}".format(num_heads), dim)
    return dim if context_dim is None else check_int(LAYER, "context_dim", context_dim, 1)


def check_block(layer_scale, init):
    """Raise unless the layer scale is known."""
    if layer_scale not in LAYER_SCALES:
        need = "one of {}".format(", ".join(map(repr, LAYER_SCALES)))
        raise invalid_value("CrossModalBlock", "layer_scale", need, repr(layer_scale))
    check_positive("CrossModalBlock", "layer_scale_init", init)


def check_inputs(x, context, dim, context_dim):
    """Raise unless x is (B, Nq, dim) and the context (B, Nk, context_dim); arguments are shapes."""
    for name, shape, width in (("x", x, dim), ("context", context, context_dim)):
        if len(shape) != 3 or shape[2] != width or shape[0] != x[0]:
            need = "of shape ({}, N, {})".format(x[0], width)
            raise invalid_value(LAYER, name, need, "shape {}".format(tuple(shape)))


def mask_shape(shape, batch, heads, q_len, kv_len):
    """4-D shape of an ``attn_mask``: (Nq, Nk), (1|B, Nq, Nk) or (1|B, 1|H, Nq, Nk)."""
    full = {2: (1, 1), 3: shape[:1] + (1,), 4: shape[:2]}.get(len(shape))
    fits = full is not None and tuple(shape[-2:]) == (q_len, kv_len) and full[0] in (1, batch) and full[1] in (1, heads)
    if not fits:
        need = "of shape ({q}, {k}), (1|{b}, {q}, {k}) or (1|{b}, 1|{h}, {q}, {k})".format(
            b=batch, h=heads, q=q_len, k=kv_len
        )
        raise invalid_value(LAYER, "attn_mask", need, "shape {}".format(tuple(shape)))
    return tuple(full) + (q_len, kv_len)


def check_padding(shape, batch, kv_len):
    """Raise unless a ``key_padding_mask`` is (B, Nk)."""
    if tuple(shape) != (batch, kv_len):
        need = "of shape ({}, {})".format(batch, kv_len)
        raise invalid_value(LAYER, "key_padding_mask", need, "shape {}".format(tuple(shape)))
