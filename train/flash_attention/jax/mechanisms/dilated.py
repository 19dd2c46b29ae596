"""LongNet's dilated attention in JAX: sparsify, one core call a pattern, densify, mix by LSE. Plans: `core`."""

import functools

import jax
import jax.numpy as jnp

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms import dilated as shared
from flash_attention.core.mechanisms.positions import rotate
from flash_attention.jax.functional import flash_attention
from flash_attention.jax.mechanisms.layers import Layer, dense, dense_init, dropped, seed_of

LAYER = "dilated_attention"


def dilated_attention(
    query,
    key,
    value,
    segment_size,
    dilation_rate,
    *,
    is_causal=False,
    scale=None,
    rel_pos_table=None,
    use_xpos=False,
    head_offset="mod",
    stop_weight_grad=False,
    return_lse=False,
    implementation=None,
    axis_name=None,
):
    """Dilated attention (Ding et al., "LongNet", 2023), linear in N at fixed patterns.

    In a pattern (w, r), tokens ``i`` with ``(i % w) % r == offset(head)`` attend to one another within their segment
    ``i // w``. Several patterns are mixed in proportion to their softmax denominators; the result is one softmax over
    all pairs, each counted as often as patterns hold it. Ragged N and w are fine.

    Args:
        query, key, value: (B, N, H, D).
        segment_size, dilation_rate: w before sparsifying and r; ints, or sequences of equal length for a mixture.
        is_causal: key j visible only when ``j <= i``.
        scale: default ``1 / sqrt(D)``.
        rel_pos_table: (32, H) table of a T5 bias on the original distances (max distance 128, bidirectional unless
            causal); differentiable.
        use_xpos: apply xPos to queries and keys at their original positions, computed in float32.
        head_offset: 'mod': head h keeps from token ``h % r`` (the paper); 'block': ``h // ceil(H / r)`` (torchscale).
        stop_weight_grad: no gradient through the mixture's weights (Microsoft's release); default exact.
        return_lse: also return the LSE over all patterns, float32 (B, H, N).
        implementation: as in :func:`flash_attention.jax.flash_attention`.
        axis_name: mesh axis over which ``jax.shard_map`` splits N: the tensors are this device's tokens, the result is
            that of all. Keys and values of a segment that devices share are gathered after sparsifying.

    Returns:
        (B, N, H, D); a (token, head) that no pattern keeps gives 0 and the LSE -inf.
    """
    segment_size, dilation_rate = shared.check_call(LAYER, segment_size, dilation_rate, head_offset)
    table_shape = None if rel_pos_table is None else jnp.shape(rel_pos_table)
    shared.check_tensors(LAYER, query.shape, key.shape, value.shape, table_shape)
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    sizes = query.shape[1], query.shape[2], segment_size, dilation_rate, head_offset
    shares = shared.make_shares(LAYER, *sizes, devices)
    patterns = [share.local for share in shares]
    call = functools.partial(
        _attend,
        is_causal=is_causal,
        scale=scale,
        table=rel_pos_table,
        use_xpos=use_xpos,
        implementation=implementation,
        axis_name=axis_name,
    )
    parts = [call(share, *(_sparsify(x, share.local) for x in (query, key, value))) for share in shares]
    if len(parts) == 1:
        out, lse = parts[0]
        out, total = _densify(out, patterns[0]), _densify(lse, patterns[0], -jnp.inf)
    else:
        out, total = _mix(patterns, parts, stop_weight_grad)
    out = out.astype(value.dtype)
    return (out, jnp.swapaxes(total[..., 0], 1, 2)) if return_lse else out


def _attend(share, query, key, value, is_causal, scale, table, use_xpos, implementation, axis_name):
    """``(out, lse (.., slots, H, 1))`` of one pattern's segments."""
    batch, slots, heads, dim = query.shape
    pattern, first = share.segment, 0  # slot of the first query in its segment
    mask = bias = None
    if share.members > 1:
        first = jax.lax.axis_index(axis_name) % share.members * slots
        key, value = (_gathered(x, axis_name, share.members) for x in (key, value))
    if shared.needs_mask(pattern, is_causal):
        occupied = jnp.asarray(pattern.occupied())
        mask = jnp.tile(occupied, (batch // pattern.segments, 1, 1))[:, :, None, :]
    if table is not None:
        ring = jnp.take(jnp.asarray(table), shared.bucket_ring(pattern, is_causal), axis=0).T
        bias = shared.toeplitz(jnp.tile, jnp.roll(ring, first, axis=1) if share.members > 1 else ring, slots)
    attend = functools.partial(
        flash_attention,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        return_lse=True,
        implementation=implementation,
        q_offset=first if is_causal and share.members > 1 else None,
    )
    if use_xpos and share.members > 1:
        out, lse = _attend_shared_xpos(pattern, attend, query, key, value, bias, first)
    elif use_xpos:
        out, lse = _attend_xpos(pattern, attend, query, key, value, bias, is_causal)
    else:
        out, lse = attend(query, key, value, bias)
    return out, jnp.swapaxes(lse, 1, 2)[..., None]


def _gathered(x, axis_name, members):
    """The sparsified tokens of all devices that share this one's segment."""
    devices = jax.lax.psum(1, axis_name)
    groups = [[start + n for n in range(members)] for start in range(0, devices, members)]
    return jax.lax.all_gather(x, axis_name, axis=1, axis_index_groups=groups if len(groups) > 1 else None, tiled=True)


def _attend_shared_xpos(pattern, attend, query, key, value, bias, first):
    """The core call with xPos where the queries stand at slot ``first`` (traced) of a segment of many devices."""
    shared.check_shared_xpos(LAYER, pattern)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    slots, dim = query.shape[1], query.shape[-1]
    whole = functools.partial(shared.slot_tables, pattern, 0, pattern.slots, pattern.slots // 2, dim)
    own = [jax.lax.dynamic_slice_in_dim(jnp.asarray(table, wide), first, slots) for table in whole(False)]
    return attend(_turn(query.astype(wide), own), _turn(key.astype(wide), whole(True)), value.astype(wide), bias)


def _attend_xpos(pattern, attend, query, key, value, bias, is_causal):
    """The core call with xPos; long segments in tiles of queries, each with a centre of its own."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query, key, value = (x.astype(wide) for x in (query, key, value))
    outs, lses = [], []
    for first, stop in shared.xpos_tiles(LAYER, pattern, is_causal):
        last = stop if is_causal else pattern.slots
        centre = (first + stop) // 2
        q = _turn(query[:, first:stop], shared.slot_tables(pattern, first, stop, centre, query.shape[-1], False))
        k = _turn(key[:, :last], shared.slot_tables(pattern, 0, last, centre, query.shape[-1], True))
        out, lse = attend(q, k, value[:, :last], None if bias is None else bias[:, :, first:stop, :last])
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 2)


def _turn(x, tables):
    cos, sin = (jnp.asarray(table, x.dtype) for table in tables)
    return rotate(jnp.stack, x, cos, sin)


def _mix(patterns, parts, stop_weight_grad):
    """Sum of the patterns' outputs, weighted by their shares of the softmax denominators."""
    lses = jnp.stack([_densify(lse, pattern, -jnp.inf) for pattern, (_, lse) in zip(patterns, parts)])
    total = _log_sum_exp(lses)
    known = jnp.where(total == -jnp.inf, 0.0, total)  # read at kept tokens only
    out = 0.0
    for pattern, (part, lse) in zip(patterns, parts):
        weight = jnp.exp(lse - _sparsify(known, pattern))
        weight = jax.lax.stop_gradient(weight) if stop_weight_grad else weight
        out = out + _densify(weight * part, pattern)
    return out, total


def _log_sum_exp(x):
    """Over axis 0; -inf where all are -inf, with gradient 0 there."""
    peak = jax.lax.stop_gradient(jnp.max(x, 0))
    alive = peak > -jnp.inf
    total = jnp.sum(jnp.exp(x - jnp.where(alive, peak, 0.0)), 0)
    return jnp.where(alive, peak + jnp.log(jnp.where(alive, total, 1.0)), -jnp.inf)


def _sparsify(x, pattern):
    return shared.sparsify(x, pattern, _pad, lambda x: _take(x, pattern.select, pattern.spread, 0.0))


def _densify(x, pattern, fill=0.0):
    return shared.densify(
        x, pattern, lambda x, count: x[:, :count], lambda x: _take(x, pattern.spread, pattern.select, fill)
    )


def _pad(x, count):
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _take(x, index, inverse, fill):
    """``index`` along axis 2, ``fill`` where it points past the end. Its transpose is a gather too, not a scatter."""
    return jnp.take(x, jnp.asarray(index), axis=2, mode="fill", fill_value=fill)


def _take_fwd(x, index, inverse, fill):
    return _take(x, index, inverse, fill), None


def _take_bwd(index, inverse, fill, _, d_out):
    return (_take(d_out, inverse, index, 0.0),)


_take.defvjp(_take_fwd, _take_bwd)


class DilatedAttention(Layer):
    """LongNet's self-attention layer: projections around :func:`dilated_attention`.

    Args:
        dim: width E (alias ``d_model``).
        heads: number of heads H, a divisor of dim (alias ``num_heads``).
        dilation_rate, segment_size: ints, or sequences of equal length for a mixture of patterns.
        dropout: on the attention output, before the output projection; in [0, 1); acts with deterministic=False.
        causal: key j visible only when ``j <= i`` (alias ``casual``, as it is sometimes printed).
        use_xpos: xPos on queries and keys.
        use_rel_pos_bias: T5 bias on the original distances, one table a layer.
        Distributed: x holds this device's tokens of a sequence that ``jax.shard_map`` splits over ``axis_name``; the
            result is that of all. Without an axis there must be one device, and the flag changes nothing.
        dtype: of the computation and the output; parameters are float32.
        recompute: keep no intermediate of the attention for the backward pass.
        head_offset, stop_weight_grad: as in :func:`dilated_attention`.
        axis_name: the mesh axis of ``Distributed``.

    Raises:
        ValueError, TypeError: sizes that do not fit, lists of unequal length, an alias that contradicts its name.
    """

    def __init__(
        self,
        dim=None,
        heads=None,
        dilation_rate=1,
        segment_size=2048,
        dropout=0.0,
        causal=None,
        use_xpos=False,
        use_rel_pos_bias=False,
        Distributed=False,
        *,
        dtype=jnp.float32,
        recompute=False,
        head_offset="mod",
        stop_weight_grad=False,
        axis_name=None,
        d_model=None,
        num_heads=None,
        casual=None,
    ):
        names = {
            "dim": (dim, "d_model", d_model, None),
            "heads": (heads, "num_heads", num_heads, None),
            "causal": (causal, "casual", casual, False),
        }
        flags = {"use_xpos": use_xpos, "use_rel_pos_bias": use_rel_pos_bias, "recompute": recompute}
        flags["stop_weight_grad"] = stop_weight_grad
        self.dim, self.heads, self.causal = shared.check_layer("DilatedAttention", names, flags, dropout, Distributed)
        self.segment_size, self.dilation_rate = shared.check_call(
            "DilatedAttention", segment_size, dilation_rate, head_offset
        )
        self.dropout, self.use_xpos, self.use_rel_pos_bias = float(dropout), use_xpos, use_rel_pos_bias
        self.dtype, self.recompute = dtype, recompute
        self.head_offset, self.stop_weight_grad = head_offset, stop_weight_grad
        self.axis_name = _axis(Distributed, axis_name)

    def init(self, key):
        """New parameters: 'to_q', 'to_k', 'to_v', 'to_out' with 'weight' and 'bias'; 'rel_pos_bias' with 'weight'."""
        *keys, table_key = jax.random.split(key, 5)
        names = ("to_q", "to_k", "to_v", "to_out")
        params = {name: dense_init(k, self.dim, self.dim) for k, name in zip(keys, names)}
        if self.use_rel_pos_bias:
            params["rel_pos_bias"] = {"weight": jax.random.normal(table_key, (shared.NUM_BUCKETS, self.heads))}
        return params

    def __call__(self, x, *, deterministic=True, dropout_rng=None, params=None):
        """Attend.

        Args:
            x: (B, N, dim), any N.
            deterministic: False = training: dropout acts and needs ``dropout_rng``, a PRNG key.
            params: used instead of the layer's own.

        Returns:
            (B, N, dim) in ``dtype``.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            need = "of shape (B, N, {})".format(self.dim)
            raise invalid_value("DilatedAttention", "x", need, "shape {}".format(tuple(x.shape)))
        params = self.params if params is None else params
        shape = x.shape[:2] + (self.heads, self.dim // self.heads)
        query, key, value = (dense(params[name], x, self.dtype).reshape(shape) for name in ("to_q", "to_k", "to_v"))
        attend = functools.partial(
            dilated_attention,
            segment_size=self.segment_size,
            dilation_rate=self.dilation_rate,
            is_causal=self.causal,
            use_xpos=self.use_xpos,
            head_offset=self.head_offset,
            stop_weight_grad=self.stop_weight_grad,
            axis_name=self.axis_name,
        )
        table = params["rel_pos_bias"]["weight"] if self.use_rel_pos_bias else None
        if self.recompute:
            attend = _recomputed(attend)
        out = attend(query, key, value, rel_pos_table=table).reshape(x.shape)
        if self.dropout and not deterministic:
            first = 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name) * x.shape[1]
            out = dropped(out, self.dropout, seed_of("DilatedAttention", dropout_rng), first)
        return dense(params["to_out"], out, self.dtype)


def _recomputed(attend):
    checkpointed = jax.checkpoint(lambda query, key, value, table: attend(query, key, value, rel_pos_table=table))
    return lambda query, key, value, rel_pos_table: checkpointed(query, key, value, rel_pos_table)


def _axis(distributed, name):
    """The axis name that the attention is given, or None."""
    if not distributed:
        if name is not None:
            raise invalid_value("DilatedAttention", "axis_name", "None with Distributed=False", repr(name))
    elif name is None and jax.device_count() > 1:
        need = "the mesh axis that splits the sequence, with Distributed=True on several devices"
        raise invalid_value("DilatedAttention", "axis_name", need, None)
    return name
