"""The position-wise network of the JAX transformer: GELU, SiLU or ReLU squared, gated or not."""

import jax
import jax.numpy as jnp

from flash_attention.core.transformer.layers import FEED_FORWARD, FeedForwardOptions
from flash_attention.core.transformer.rules import make, signature
from flash_attention.jax.mechanisms.layers import dense, dense_init, dropped
from flash_attention.jax.transformer.parts import Model, Seeds, norm, norm_init

_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


class FeedForward(Model):
    """``proj_out(dropout(norm(act(proj_in(x)))))``; gated: ``value * act(gate)`` of two projections.

    Args:
        args, options: see :class:`flash_attention.core.transformer.layers.FeedForwardOptions`: ``dim``, ``mult=4``,
            ``glu``, ``swish``, ``relu_squared``, ``post_act_ln``, ``no_bias``, ``dropout``, ``zero_init_output``.
        dtype: of the computation and the output; parameters are float32.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, *args, dtype=jnp.float32, **options):
        self.options, self.dtype = make(FeedForwardOptions, FEED_FORWARD, args, options), dtype

    def init(self, key):
        """New parameters: 'proj_in' (twice the inner width when gated), 'post_act_norm', 'proj_out'."""
        options = self.options
        in_key, out_key = jax.random.split(key)
        width = options.inner * (2 if options.glu else 1)
        params = {
            "proj_in": dense_init(in_key, options.dim, width, bias=not options.no_bias),
            "proj_out": dense_init(out_key, options.inner, options.dim, bias=not options.no_bias),
        }
        if options.zero_init_output:
            params["proj_out"] = jax.tree.map(jnp.zeros_like, params["proj_out"])
        if options.post_act_ln:
            params["post_act_norm"] = norm_init("layernorm", options.inner)
        return params

    def __call__(self, x, *, deterministic=True, dropout_rng=None, params=None):
        """(B, N, dim) -> (B, N, dim) in ``dtype``; ``deterministic=False`` drops and needs ``dropout_rng``."""
        params, options = self.params if params is None else params, self.options
        seeds = Seeds(FEED_FORWARD, not deterministic and options.dropout > 0, dropout_rng)
        act = _ACTIVATIONS[options.activation]
        hidden = dense(params["proj_in"], x, self.dtype)
        if options.glu:
            value, gate = jnp.split(hidden, 2, -1)
            hidden = value * act(gate)
        else:
            hidden = act(hidden)
        if options.post_act_ln:
            hidden = norm("layernorm", params["post_act_norm"], hidden, self.dtype)
        return dense(params["proj_out"], dropped(hidden, options.dropout, seeds.next()), self.dtype)

    def lines(self):
        """The layer and its options."""
        return ["FeedForward({})".format(signature(self.options))]
