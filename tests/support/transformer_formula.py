"""The judge of the transformer wrappers: a whole stack in dense jax.numpy, straight from the specification.

Every array of scores is formed; nothing of the package but its option records and its parameter names is used.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from support.layers import dense, split


def norm(kind, params, x):
    """LayerNorm (epsilon 1e-5, no bias), RMSNorm or ScaleNorm."""
    if kind == "layernorm":
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["weight"]
    return x / jnp.sqrt((x * x).sum(-1, keepdims=True)) * math.sqrt(x.shape[-1]) * params["weight"]


def rotated(stack, x, positions, length, is_key):
    """Half-split rotary of (B, N, H, D), with xPos's factor where asked for."""
    layers, dims = stack.layers, stack.rotated
    half = dims // 2
    theta = 10000.0 ** (-np.arange(half) * 2.0 / dims)
    angle = positions[:, None] * theta
    factor = np.ones_like(angle)
    if layers.rotary_xpos:
        zeta = (np.arange(half) * 2 + 0.4 * dims) / (1.4 * dims)
        power = (positions - length // 2)[:, None] / layers.rotary_xpos_scale_base
        factor = zeta ** (-power if is_key else power)
    cos, sin = (np.cos(angle) * factor)[:, None], (np.sin(angle) * factor)[:, None]
    a, b = x[..., :half], x[..., half:dims]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., dims:]], -1)


def position_bias(stack, params, q_len, kv_len):
    """(H, Nq, Nk) of ALiBi, T5 or the network of the distance; None without one."""
    layers = stack.layers
    query = np.arange(q_len)[:, None] + kv_len - q_len
    relative = np.arange(kv_len)[None, :] - query
    if layers.alibi_pos_bias:
        heads = layers.alibi_num_heads or layers.heads
        slopes = np.zeros(layers.heads)
        power = 1 << (heads.bit_length() - 1)
        first = [2.0 ** (-8.0 * (k + 1) / power) for k in range(power)]
        more = [2.0 ** (-8.0 * (k + 1) / (2 * power)) for k in range(0, 2 * power, 2)]
        slopes[:heads] = (first + more)[:heads]
        return jnp.asarray(-slopes[:, None, None] * np.abs(relative))
    if layers.rel_pos_bias:
        count, most = layers.rel_pos_num_buckets, layers.rel_pos_max_distance
        buckets = np.empty_like(relative)
        for place, value in np.ndenumerate(relative):
            buckets[place] = _t5_bucket(int(value), count, most, not layers.causal)
        return jnp.moveaxis(params["bias"]["weight"][buckets], -1, 0) * math.sqrt(stack.attention.dim_head)
    if layers.dynamic_pos_bias:
        distance = -relative.astype(np.float64)
        if layers.dynamic_pos_bias_log_distance:
            distance = np.sign(distance) * np.log(np.abs(distance) + 1)
        hidden = jnp.asarray(distance)[..., None]
        last = len(params["bias"]) - 1
        for n in range(last + 1):
            hidden = dense(params["bias"][str(n)], hidden)
            hidden = hidden * jax.nn.sigmoid(hidden) if n < last else hidden
        return jnp.moveaxis(hidden, -1, 0)
    return None


def _t5_bucket(relative, count, most, both_ways):
    first, distance = 0, max(-relative, 0)
    if both_ways:
        count //= 2
        first, distance = (count if relative > 0 else 0), abs(relative)
    exact = count // 2
    if distance < exact:
        return first + distance
    coarse = exact + int(math.log(distance / exact) / math.log(most / exact) * (count - exact) + 1e-9)
    return first + min(count - 1, coarse)


def attention(stack, kind, params, x, context=None, mask=None, key_mask=None, attn_mask=None, bias=None, before=None):
    """``(out, scores)`` of one layer; ``before``: the scores of the layer before; mask: of x; key_mask: of the keys."""
    o = stack.options_of(kind)
    source = x if context is None else context
    q = split(dense(params["to_q"], x), o.heads)
    k = split(dense(params["to_k"], source), o.key_heads)
    v = k if o.shared_kv else split(dense(params["to_v"], source), o.key_heads)
    learned = o.num_mem_kv
    if o.qk_norm:
        q = _unit(q, o.qk_norm_groups) * params.get("qk_norm_q_scale", 1.0)
        k = _unit(k, o.qk_norm_groups) * params.get("qk_norm_k_scale", 1.0)
    if stack.layers.rotates and context is None:
        positions = np.arange(x.shape[1], dtype=float)
        q, k = (rotated(stack, y, positions, x.shape[1], is_key) for y, is_key in ((q, False), (k, True)))
    if learned:
        mem_k, mem_v = (jnp.moveaxis(params[name], 0, 1)[None] for name in ("mem_k", "mem_v"))
        if o.qk_norm:
            mem_k = _unit(mem_k, o.qk_norm_groups) * params.get("qk_norm_k_scale", 1.0)
        k, v = (
            jnp.concatenate([jnp.broadcast_to(m, x.shape[:1] + m.shape[1:]), y], 1) for m, y in ((mem_k, k), (mem_v, v))
        )
    group = o.heads // o.key_heads
    used = np.arange(o.heads) % o.key_heads if o.kv_head_mapping == "tile" else np.arange(o.heads) // group
    k, v = k[:, :, used], v[:, :, used]
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * (o.qk_norm_scale if o.qk_norm else o.dim_head**-0.5)
    if bias is not None:
        scores = scores + jnp.pad(bias, ((0, 0), (0, 0), (learned, 0)))
    if before is not None:
        scores = scores + before
    mixed = jnp.einsum("gh,bhij->bgij", params["pre_talking"], scores) if o.talking_heads else scores
    seen = _seen(o, x.shape[1], source.shape[1])[None, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    if attn_mask is not None:
        seen = seen & attn_mask[None]
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (learned, 0)), constant_values=True)
    seen = jnp.broadcast_to(seen, mixed.shape)
    if o.sparse_topk is not None:
        order = jnp.argsort(jnp.where(seen, -mixed, jnp.inf), -1)
        seen = seen & (jnp.argsort(order, -1) < o.sparse_topk)  # by rank: no draw has ties
    alive = seen.any(-1, keepdims=True)
    weights = jnp.where(alive, jax.nn.softmax(jnp.where(alive, jnp.where(seen, mixed, -jnp.inf), 0.0), -1), 0.0)
    if o.talking_heads:
        weights = jnp.einsum("gh,bhij->bgij", params["post_talking"], weights)
    out = jnp.einsum("bhij,bjhd->bihd", weights, v)
    if o.head_scale:
        out = out * params["head_scale"][:, None]
    out = out.reshape(x.shape[:2] + (-1,))
    if o.gate_values:
        out = out * jax.nn.sigmoid(dense(params["to_v_gate"], x))
    out = dense(params["to_out"], out)
    if o.on_attn:
        out = out[..., : o.dim] * jax.nn.sigmoid(out[..., o.dim :])
    return (out if mask is None else out * mask[..., None]), scores


def _unit(x, groups):
    parts = x.reshape(x.shape[:-1] + (groups, -1))
    return (parts / jnp.sqrt((parts**2).sum(-1, keepdims=True))).reshape(x.shape)


def _seen(o, q_len, kv_len):
    distance = np.arange(q_len)[:, None] + kv_len - q_len - np.arange(kv_len)[None, :]
    seen = np.ones(distance.shape, bool)
    if o.causal:
        seen &= distance >= 0
    if o.max_attend_past is not None:
        seen &= distance <= o.max_attend_past
    return jnp.asarray(seen)


def feed_forward(o, params, x):
    """The position-wise network."""

    def act(h):
        if o.relu_squared:
            return jnp.maximum(h, 0.0) ** 2
        return h * jax.nn.sigmoid(h) if o.swish else 0.5 * h * (1.0 + jax.scipy.special.erf(h / math.sqrt(2.0)))

    hidden = dense(params["proj_in"], x)
    hidden = hidden[..., : o.inner] * act(hidden[..., o.inner :]) if o.glu else act(hidden)
    if o.post_act_ln:
        hidden = norm("layernorm", params["post_act_norm"], hidden)
    return dense(params["proj_out"], hidden)


def shifted(x, shifts, mask):
    """Share n of the features comes from the token ``shifts[n]`` places before; outside the sequence is 0."""
    x = x if mask is None else x * mask[..., None]
    share = x.shape[-1] // len(shifts)
    columns = []
    for n, by in enumerate(shifts):
        moved = np.eye(x.shape[1], k=-by)  # XLA 0.6 on the CPU gets a gather by constants wrong in this place
        columns.append(jnp.einsum("ij,bjd->bid", moved, x[..., n * share : (n + 1) * share]))
    return jnp.concatenate(columns + [x[..., len(shifts) * share :]], -1)


def residual(layers, params, branch, x):
    """A sum, or torch's GRU cell."""
    if layers.scale_residual:
        x = x * params["scale"]
    if not layers.gate_residual:
        return branch + x * ((2.0 * layers.depth) ** 0.25 if layers.deepnorm else 1.0)
    width = x.shape[-1]
    new, old = dense(params["input"], branch), dense(params["hidden"], x)
    r = jax.nn.sigmoid(new[..., :width] + old[..., :width])
    z = jax.nn.sigmoid(new[..., width : 2 * width] + old[..., width : 2 * width])
    n = jnp.tanh(new[..., 2 * width :] + r * old[..., 2 * width :])
    return (1.0 - z) * n + z * x


def run_stack(stack, params, x, context=None, mask=None, context_mask=None, attn_mask=None):
    """The whole stack; masks are boolean numpy arrays."""
    layers = stack.layers
    first = layers.pre_norm and not layers.resi_dual and not layers.deepnorm
    bias, dual, before = position_bias(stack, params, x.shape[1], x.shape[1]), x, {}
    for n, kind in enumerate(layers.order):
        own = params["layers"][str(n)]
        branch = norm(layers.norm, own["norm"], x) if first else x
        if layers.shift_tokens:
            low = 0 if layers.causal else -layers.shift_tokens
            branch = shifted(branch, range(low, layers.shift_tokens + 1), mask)
        if kind == "f":
            branch = feed_forward(stack.feed_forward, own["block"], branch) * (0.5 if layers.macaron else 1.0)
        elif kind == "a":
            branch, scores = attention(
                stack, kind, own["block"], branch, None, mask, mask, attn_mask, bias, before.get("a")
            )  # fmt: skip
            before["a"] = scores if layers.residual_attn else None
        else:
            branch, scores = attention(
                stack, kind, own["block"], branch, context, None, context_mask, before=before.get("c")
            )  # fmt: skip
            before["c"] = scores if layers.cross_residual_attn else None
        dual = dual + branch
        if layers.sandwich_norm:
            branch = norm(layers.norm, own["branch_norm"], branch)
        x = residual(layers, own.get("residual"), branch, x)
        if not first:
            x = norm(layers.norm, own["norm"], x)
    if layers.resi_dual:
        return x + norm(layers.norm, params["final_norm"], dual)
    return norm(layers.norm, params["final_norm"], x) if first else x
