"""How the `pallas` engine computes exponentials and tanh: the same formulas everywhere, the GPU's instructions there.

16-bit tensors: scores are kept in units of log2(e), so that the scale and the base of the exponential are one factor
and exp(s - m) is one instruction, ``ex2.approx`` (error below 2**-22, PTX ISA). float32 keeps natural units and libm.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flash_attention.core.spec import AttentionSpec
from flash_attention.jax.engines.xla_tiles import EXACT, Arithmetic

LOG2_E = 1.4426950408889634


class Units(NamedTuple):
    """How a kernel computes.

    Attributes:
        spec: the call, with ``scale`` and ``soft_cap`` in these units.
        factor: a natural logarithm times ``factor`` is in these units.
        arithmetic: :class:`Arithmetic`, whose ``exp`` takes scores in these units.
    """

    spec: AttentionSpec
    factor: float
    arithmetic: Arithmetic


def units(spec, platform):
    """:class:`Units` of a call; ``platform`` is what the kernel is compiled for, 'cpu' = interpreted."""
    if spec.dtype == "float32":
        return Units(spec, 1.0, EXACT)
    cap = None if spec.soft_cap is None else spec.soft_cap * LOG2_E
    exp2 = _exp2_approx if platform == "cuda" else jnp.exp2
    return Units(replace(spec, scale=spec.scale * LOG2_E, soft_cap=cap), LOG2_E, Arithmetic(exp2, _tanh(exp2)))


def _exp2_approx(x):
    """2**x by the special function unit; results below 2**-126 are 0."""
    from jax.experimental.pallas import triton  # `mosaic` computes in these units too, and needs none of it

    like = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (found,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[like]
    )
    return found


def _tanh(exp2):
    """tanh with an absolute error of 2**-22: what a capped score needs, not what a small argument could have."""
    return lambda x: 1.0 - 2.0 / (1.0 + exp2(x * (2.0 * LOG2_E)))
