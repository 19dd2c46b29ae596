"""int8 keys and values with one scale a token: ``x ~ scale * q``, ``scale = max|x| / 127`` over its heads.

A token is written once and never rescaled. One scale for all heads is what the operators of Atlas take ("per-token").
"""

DTYPE = "int8"
LARGEST = 127.0


def quantize(xp, x):
    """(..., K, D) float -> ``(int8 (..., K, D), float32 scales (...))``. A token of zeros has scale 0.

    Args:
        xp: numpy or jax.numpy.
    """
    x = x.astype(xp.float32)
    scale = xp.max(xp.abs(x), axis=(-2, -1)) / LARGEST
    q = xp.round(x / xp.where(scale > 0, scale, xp.ones_like(scale))[..., None, None])
    return q.astype(xp.int8), scale


def dequantize(xp, q, scale):
    """The inverse of :func:`quantize`: float32 (..., K, D)."""
    return q.astype(xp.float32) * scale[..., None, None]
