"""Small parts of the MindSpore transformer: norms, residuals, shifted tokens, skipped layers."""

import functools
import math

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.spec import AttentionSpec
from flash_attention.core.transformer.layers import LENGTH_EPSILON, NORM_EPSILON
from flash_attention.nn.layer.projection import Projection
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.functional import computable
from flash_attention.ops.portable.dropout import KeepFactors

_rsqrt, _maximum, _sum = P.Rsqrt(), P.Maximum(), P.ReduceSum(True)


def learned(array):
    """A float32 Tensor for a Parameter."""
    return Tensor(np.asarray(array, np.float32))


def l2_normalised(x):
    """float32 ``x / max(|x|, 1e-12)`` over the last axis."""
    wide = x.astype(mstype.float32)
    return wide * _rsqrt(_maximum(_sum(wide * wide, -1), LENGTH_EPSILON**2))


@constexpr
def numbers(count):
    """int32 0, 1, ... below ``count``."""
    return Tensor(np.arange(count, dtype=np.int32))


class StackNorm(nn.Cell):
    """'layernorm' (no bias), 'rmsnorm' or 'scalenorm' over the last axis in float32; output in x's dtype."""

    def __init__(self, kind, width):
        super().__init__()
        self.weight = Parameter(learned(np.ones(1 if kind == "scalenorm" else width)), name="weight")
        self.centred, self.factor = kind == "layernorm", math.sqrt(width)
        self.norm, self.zero = P.LayerNorm(-1, -1, NORM_EPSILON), learned(np.zeros(width))

    def construct(self, x):
        """Normalise."""
        if self.centred:
            return self.norm(x.astype(mstype.float32), self.weight, self.zero)[0].astype(x.dtype)
        return (l2_normalised(x) * self.factor * self.weight).astype(x.dtype)


class Residual(nn.Cell):
    """(branch, residual) -> their sum, or a GRU cell whose input is the branch and whose state is the residual."""

    def __init__(self, options, dtype):
        super().__init__()
        dim = options.dim
        self.scaled, self.gated, self.factor = options.scale_residual, options.gate_residual, options.residual_factor
        self.scale = Parameter(learned(np.ones(dim)), name="scale") if self.scaled else None
        if self.gated:
            self.input, self.hidden = Projection(dim, 3 * dim, dtype=dtype), Projection(dim, 3 * dim, dtype=dtype)
        self.dim = dim

    def construct(self, branch, residual):
        """Join."""
        if self.scaled:
            residual = residual * self.scale.astype(residual.dtype)
        if not self.gated:
            return branch + residual * self.factor
        dim, dtype = self.dim, branch.dtype
        new, old = computable(self.input(branch)), computable(self.hidden(residual))
        reset = ops.sigmoid(new[..., :dim] + old[..., :dim])
        update = ops.sigmoid(new[..., dim : 2 * dim] + old[..., dim : 2 * dim])
        state = ops.tanh(new[..., 2 * dim :] + reset * old[..., 2 * dim :])
        return ((1.0 - update) * state + update * computable(residual)).astype(dtype)


def shifted(x, shifts, mask):
    """Equal shares of the features moved along the tokens, zeros moving in; the rest stays. Masked tokens are 0."""
    if not shifts:
        return x
    wide = computable(x)
    if mask is not None:
        wide = wide * ops.expand_dims((mask > 0).astype(wide.dtype), -1)
    length, share = x.shape[1], x.shape[2] // len(shifts)
    parts = ()
    for n in range(len(shifts)):
        by = max(-length, min(shifts[n], length))
        part = wide[:, :, n * share : (n + 1) * share]
        if abs(by) == length:
            part = part * 0.0
        elif by > 0:
            part = ops.concat((part[:, :by] * 0.0, part[:, : length - by]), 1)
        elif by < 0:
            part = ops.concat((part[:, -by:], part[:, :-by] * 0.0), 1)
        parts = parts + (part,)
    if len(shifts) * share < x.shape[2]:
        parts = parts + (wide[:, :, len(shifts) * share :],)
    return ops.concat(parts, 2).astype(x.dtype)


class SkipLayer(SeededCell):
    """Whether a layer is skipped, with the given probability in training; of x only a seed may be made."""

    def __init__(self, rate):
        super().__init__(float(rate))

    def construct(self, x):
        """1.0 where the layer counts, 0.0 where it is skipped, (1, 1, 1) of x's dtype; None outside training."""
        if not self.training or self.dropout_rate == 0:
            return None
        rows = ops.expand_dims(x, 1)
        kept = _one_draw(self.dropout_rate)(rows[:1], self.next_seed(rows))[:, 0]
        return (ops.stop_gradient(kept) > 0).astype(x.dtype)


@constexpr
def _one_draw(rate):
    return _keep_one(rate)


@functools.lru_cache(maxsize=16)
def _keep_one(rate):
    return KeepFactors(AttentionSpec(1, 1, 1, 1, 1, 1, dropout_rate=rate))
