"""The position-wise network of the MindSpore transformer: GELU, SiLU or ReLU squared, gated or not."""

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn, ops

from flash_attention.core.transformer.layers import FEED_FORWARD, FeedForwardOptions
from flash_attention.core.transformer.rules import make, signature
from flash_attention.nn.layer.position_dropout import PositionDropout
from flash_attention.nn.layer.projection import Projection
from flash_attention.nn.transformer.parts import StackNorm, learned
from flash_attention.ops.functional import computable


class FeedForward(nn.Cell):
    r"""``proj_out(dropout(norm(act(proj_in(x)))))``; gated: ``value * act(gate)`` of two projections.

    Args:
        args, options: see ``flash_attention.core.transformer.layers.FeedForwardOptions``: ``dim``, ``mult=4``,
            ``glu``, ``swish``, ``relu_squared``, ``post_act_ln``, ``no_bias``, ``dropout``, ``zero_init_output``.
        dtype: keyword only; of the computation and the output; parameters are float32. Default: float32.

    Inputs:
        - **x** (Tensor) - (B, N, dim).

    Outputs:
        Tensor (B, N, dim) in ``dtype``.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, *args, dtype=mstype.float32, **options):
        super().__init__()
        self.options = make(FeedForwardOptions, FEED_FORWARD, args, options)
        inner, bias = self.options.inner, not self.options.no_bias
        self.inner, self.gated, self.activation = inner, self.options.glu, self.options.activation
        self.proj_in = Projection(self.options.dim, 2 * inner if self.gated else inner, bias, dtype)
        self.normalises = self.options.post_act_ln
        if self.normalises:
            self.post_act_norm = StackNorm("layernorm", inner)
        self.dropout = PositionDropout(self.options.dropout)
        self.proj_out = Projection(inner, self.options.dim, bias, dtype)
        if self.options.zero_init_output:
            for parameter in self.proj_out.get_parameters():
                parameter.set_data(learned(np.zeros(parameter.shape)))
        self.gelu = nn.GELU(approximate=False)

    def construct(self, x):
        """Run; shapes and meaning of the inputs are in the class's documentation."""
        projected = self.proj_in(x)
        hidden = computable(projected)
        if self.gated:
            hidden = hidden[..., : self.inner] * self.act(hidden[..., self.inner :])
        else:
            hidden = self.act(hidden)
        hidden = hidden.astype(projected.dtype)
        if self.normalises:
            hidden = self.post_act_norm(hidden)
        return self.proj_out(self.dropout(hidden, 0))

    def act(self, x):
        """The activation."""
        if self.activation == "gelu":
            return self.gelu(x)
        if self.activation == "silu":
            return x * ops.sigmoid(x)
        positive = ops.relu(x)
        return positive * positive

    def extend_repr(self):
        """The options, for ``print``."""
        return signature(self.options)
