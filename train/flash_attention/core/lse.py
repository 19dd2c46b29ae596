"""Algebra of (output, LSE) pairs: attention over a union of key sets from attention over each of them.

Ring, dilated, split-KV decode and prefix caches are all "route, call the core, merge".
"""


def merge(xp, outs, lses):
    """Merge attention results over disjoint key sets into the result over their union.

    Args:
        xp: numpy or jax.numpy.
        outs: sequence of arrays (..., S, D); a row over an empty key set is 0.
        lses: sequence of arrays (..., S), natural log; a row over an empty key set is -inf.

    Returns:
        ``(out, lse)``; rows empty in every part stay 0 and -inf, and nothing becomes NaN.
    """
    lses = xp.stack([xp.asarray(lse) for lse in lses])
    peak = xp.max(lses, axis=0)
    safe = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    weights = xp.exp(lses - safe)
    total = xp.sum(weights, axis=0)
    dead = total == 0
    total = xp.where(dead, xp.ones_like(total), total)
    out = sum(weight[..., None] * part for weight, part in zip(weights / total, outs))
    return out, xp.where(dead, xp.full_like(safe, -xp.inf), safe + xp.log(total))
