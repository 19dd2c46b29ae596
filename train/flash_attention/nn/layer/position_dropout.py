"""Dropout of a layer's activations as a function of position: the same mask however many devices hold the sequence."""

import functools

from mindspore import ops
from mindspore.ops.primitive import constexpr

from flash_attention.core.spec import AttentionSpec
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.portable.dropout import KeepFactors


class PositionDropout(SeededCell):
    """Inverted dropout of x (B, N, E) by batch row, token and feature; acts in training mode.

    Args:
        rate (float): probability of dropping, in [0, 1).
    """

    def __init__(self, rate):
        super().__init__(float(rate))

    def construct(self, x, first):
        """``first``: number of x's token 0 in the whole sequence, a Python int."""
        if not self.training or self.dropout_rate == 0:
            return x
        rows = ops.expand_dims(x, 1)
        factors = _factors(x.shape, self.dropout_rate, first)(rows, self.next_seed(rows))
        return (rows * ops.stop_gradient(factors).astype(x.dtype))[:, 0]


@constexpr
def _factors(shape, rate, first):
    return _build(shape, rate, first)


@functools.lru_cache(maxsize=64)
def _build(shape, rate, first):
    """The Cell that makes the factors: tokens are its rows, features its columns."""
    batch, tokens, features = shape
    return KeepFactors(AttentionSpec(batch, 1, 1, tokens, features, 1, dropout_rate=rate, origin=(0, 0, first, 0)))
