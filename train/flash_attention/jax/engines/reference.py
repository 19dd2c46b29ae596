"""The judge as an engine: the plain formula of ``core.reference`` under jax.numpy, differentiated by JAX itself."""

import jax.numpy as jnp
from jax import lax

from flash_attention.core import reference
from flash_attention.core.engine import Engine


class _Namespace:
    """jax.numpy for ``core.reference``, with exact products, and the row maximum as a constant of differentiation.

    The maximum cancels from the gradient. JAX would find it again by comparing, and XLA may compute the compared scores
    with other roundings: then no element equals the maximum, and its gradient is 0 / 0 (seen with jax 0.10).
    """

    def __getattr__(self, name):
        return getattr(jnp, name)

    def max(self, x, **options):
        return lax.stop_gradient(jnp.max(x, **options))

    def matmul(self, a, b):
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # GPUs and TPUs would round float32


NAMESPACE = _Namespace()


def run(spec, query, key, value, operands):
    """Dense attention in float32 (float64 for float64 inputs), O(Sq * Sk) memory.

    Args and returns as every engine: BNSD tensors in, ``(out in the query's dtype, lse (B, N, Sq))`` out.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    out, lse = reference.attention(NAMESPACE, spec, *(x.astype(wide) for x in (query, key, value)), operands)
    return out.astype(wide if spec.wide else query.dtype), lse.astype(wide)


def supports(spec):
    """Anything."""
    del spec


ENGINE = Engine("reference", run, supports, note="plain formula, the judge; never chosen by itself")
