"""Positions inside a JAX stack: rotation of queries and keys, and the bias by distance that its layers share."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core.mechanisms import positions as tables
from flash_attention.jax.mechanisms.layers import dense, dense_init


class Rotation:
    """Rotary encoding of the first ``dims`` features in half-split pairs, with xPos's decay if asked for.

    Args:
        dims: features that turn. scale_base: of xPos; None = rotary alone.
        length: positions that meet in this call; the middle one is xPos's centre.
    """

    def __init__(self, dims, scale_base, length):
        self.dims, self.scale_base, self.length = dims, scale_base, length

    def __call__(self, x, first, downscale=False):
        """x (B, N, H, D) whose token 0 stands at ``first``, an int or a traced integer; downscale: keys."""
        known = not isinstance(first, jax.core.Tracer)
        xp, wide = (np, np.float64) if known else (jnp, jnp.promote_types(x.dtype, jnp.float32))
        positions = (xp.arange(x.shape[1]) + first).astype(wide)
        if self.scale_base is None:
            cos, sin = tables.rotary_tables(xp, positions, self.dims)
        else:
            tables.check_xpos("AttentionLayers", self.dims, self.length, str(x.dtype), downscale, self.scale_base, None)
            centre = self.length // 2
            cos, sin = tables.xpos_tables(xp, positions, centre, self.dims, downscale, self.scale_base)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        cos, sin = (jnp.asarray(table, wide)[:, None] for table in (cos, sin))
        turned = tables.rotate(jnp.stack, x[..., : self.dims].astype(wide), cos, sin, False).astype(x.dtype)
        return turned if self.dims == x.shape[-1] else jnp.concatenate([turned, x[..., self.dims :]], -1)


def bias_init(options, key):
    """Parameters of :func:`distance_bias`: T5's 'weight' (buckets, heads), or the network's '0', '1', ... ."""
    if options.rel_pos_bias:
        return {"weight": jax.random.normal(key, (options.rel_pos_num_buckets, options.heads))}
    width = max(options.dim // 4, 1)
    sizes = [1] + [width] * options.dynamic_pos_bias_num_layers + [options.heads]
    keys = jax.random.split(key, len(sizes) - 1)
    return {str(n): dense_init(k, *size) for n, (k, size) in enumerate(zip(keys, zip(sizes, sizes[1:])))}


def distance_bias(stack, params, q_len, kv_len, first):
    """float32 (heads, q_len, kv_len): the bias of key j for the query at position ``first + i``, maybe traced."""
    options = stack.layers
    relative = np.arange(1 - kv_len, kv_len)  # key minus query
    if options.rel_pos_bias:
        buckets = tables.t5_buckets(
            relative, not options.causal, options.rel_pos_num_buckets, options.rel_pos_max_distance
        )
        values = params["weight"][buckets] * math.sqrt(stack.attention.dim_head)
    else:
        distance = -relative.astype(np.float64)
        if options.dynamic_pos_bias_log_distance:
            distance = np.sign(distance) * np.log1p(np.abs(distance))
        dtype = params["0"]["weight"].dtype
        values = jnp.asarray(distance, dtype)[:, None]
        for n in range(len(params)):
            values = dense(params[str(n)], values, dtype)
            values = jax.nn.silu(values) if n + 1 < len(params) else values
    index = jnp.arange(kv_len)[None, :] - (jnp.arange(q_len)[:, None] + first) + kv_len - 1
    return jnp.take(values.T, index, axis=1)
