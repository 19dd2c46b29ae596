"""Position encodings in JAX: rotary, xPos, T5's relative bias, ALiBi's dense bias. Tables: `core.mechanisms`."""

import jax.numpy as jnp
import numpy as np

from flash_attention.core.mechanisms import positions as tables
from flash_attention.jax.functional import is_concrete


def rotary(x, positions=None, *, base=10000.0, interleaved=True, dims=None):
    """Rotary position encoding (Su et al., 2021): pair ``m`` turns by ``position * base ** (-2 m / d)``.

    Args:
        x: (..., n, d), any float dtype; the angles and the product are float32 at least.
        positions: (n,) or broadcastable to (..., n), also traced; None = 0 .. n - 1.
        base: of the frequencies.
        interleaved: pairs (2m, 2m + 1); False: half-split pairs (m, m + d / 2).
        dims: rotate the first so many features only (even); None = all.

    Returns:
        like x.
    """
    dims = tables.check_rotary("rotary", x.shape[-1], base, interleaved, dims)
    if positions is None:
        positions = np.arange(x.shape[-2])
    xp, positions = _exact(positions, x.dtype)
    turned = _apply(x[..., :dims], tables.rotary_tables(xp, positions, dims, base), interleaved)
    return turned if dims == x.shape[-1] else jnp.concatenate([turned, x[..., dims:]], -1)


def xpos(x, offset=0, downscale=False, scale_base=512, segment=None):
    """xPos (Sun et al., 2022): rotary, times ``zeta ** ((p - centre) / scale_base)``, or its inverse for keys.

    ``<xpos(q)_i, xpos(k, downscale=True)_j>`` depends on ``i - j`` alone and decays with it. The tensor holds the last
    n of n + offset positions; the centre is ``ceil((n + offset) / 2)``.

    Args:
        x: (..., n, d), d even, interleaved pairs.
        offset: positions before x, an int, or an integer array that may be traced (decoding under jit).
        downscale: False for queries; True for keys.
        scale_base: larger = slower decay; infinity would be rotary.
        segment: None, or the range of positions within which queries and keys meet: each range has a centre of its
            own. Needed where n + offset is above about 8,100 in float16 or 65,000 otherwise: factors would overflow.

    Returns:
        like x.

    Raises:
        ValueError: an odd d, or a length at which the factors overflow.
    """
    known = is_concrete(offset)
    length = x.shape[-2] + (int(offset) if known else offset)
    tables.check_xpos("xpos", x.shape[-1], length if known else None, str(x.dtype), downscale, scale_base, segment)
    xp, positions = _exact(np.arange(x.shape[-2]) + offset, x.dtype)
    centre = tables.xpos_centre(positions, length, segment)
    return _apply(x, tables.xpos_tables(xp, positions, centre, x.shape[-1], downscale, scale_base))


def t5_bias(table, q_len, kv_len, *, step=0, bidirectional=True, max_distance=128):
    """T5's relative position bias (Raffel et al., 2020), to be added to the scaled scores.

    Args:
        table: (num_buckets, heads), learned.
        q_len, kv_len: lengths, ints.
        step: position of query 0.
        bidirectional: half of the buckets for keys after the query; False: such keys share bucket 0.
        max_distance: from here on all distances share the last bucket.

    Returns:
        (heads, q_len, kv_len) in the table's dtype.
    """
    tables.check_t5("t5_bias", table.shape[0], max_distance, bidirectional)
    tables.check_lengths("t5_bias", q_len, kv_len, step)
    buckets = tables.t5_bucket_table(q_len, kv_len, step, bidirectional, table.shape[0], max_distance)
    return jnp.take(jnp.asarray(table).T, buckets, axis=1)


def alibi_bias(heads, q_len, kv_len, alibi_num_heads=None):
    """ALiBi's bias as an array, float32 (heads, q_len, kv_len); queries are the last of the positions.

    ``flash_attention(alibi_slopes=...)`` computes the same without an array of this size.
    """
    tables.check_lengths("alibi_bias", q_len, kv_len)
    return jnp.asarray(tables.alibi_bias_array(heads, q_len, kv_len, alibi_num_heads))


def _exact(positions, dtype):
    """``(namespace, float positions)``: known positions are numpy float64, traced ones at least float32."""
    if not is_concrete(positions):
        return jnp, positions.astype(jnp.promote_types(dtype, jnp.float32))
    return np, np.asarray(positions).astype(np.float64)


def _apply(x, cos_sin, interleaved=True):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (jnp.asarray(table, wide) for table in cos_sin)
    return tables.rotate(jnp.stack, x.astype(wide), cos, sin, interleaved).astype(x.dtype)
