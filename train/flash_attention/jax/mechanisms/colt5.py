"""CoLT5's layers in JAX (Ainslie et al., 2023): a light branch for every token, a heavy one for the routed."""

import jax
import jax.numpy as jnp

from flash_attention.core.mechanisms import colt5 as shared
from flash_attention.jax.functional import checked_mask, flash_attention
from flash_attention.jax.mechanisms.colt5_routing import CoordinateDescentRouter, put_back
from flash_attention.jax.mechanisms.layers import Layer, dense, dense_init, layer_norm, norm_init


class ConditionalRoutedFeedForward(Layer):
    """``light(x) + gate * heavy(x)``, the heavy network on ``num_heavy_tokens`` routed tokens only.

    Each network is RMSNorm, Linear, exact GELU, Linear.

    Args:
        dim: width E.
        num_heavy_tokens: how many tokens are routed; all where there are no more.
        light_ff_mult, heavy_ff_mult: hidden widths, as multiples of ``dim``.
        router_straight_through: see :class:`CoordinateDescentRouter`.
        dtype: of the computation and the output; parameters are float32.

    Raises:
        ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self,
        dim,
        *,
        num_heavy_tokens,
        light_ff_mult=0.5,
        heavy_ff_mult=4,
        router_straight_through=True,
        dtype=jnp.float32,
    ):
        layer = "ConditionalRoutedFeedForward"
        shared.check_sizes(layer, {"dim": dim, "num_heavy_tokens": num_heavy_tokens})
        self.widths = {
            "light": shared.inner_width(layer, "light_ff_mult", dim, light_ff_mult),
            "heavy": shared.inner_width(layer, "heavy_ff_mult", dim, heavy_ff_mult),
        }
        self.dim, self.num_heavy_tokens, self.dtype = dim, num_heavy_tokens, dtype
        self.router = CoordinateDescentRouter(dim, router_straight_through)

    def init(self, key):
        """New parameters: 'router', and 'light', 'heavy' with 'norm', 'fc_in', 'fc_out'."""
        router_key, *keys = jax.random.split(key, 3)
        params = {"router": self.router.init(router_key)}
        for k, (name, width) in zip(keys, self.widths.items()):
            in_key, out_key = jax.random.split(k)
            fc_in, fc_out = dense_init(in_key, self.dim, width), dense_init(out_key, width, self.dim)
            params[name] = {"norm": _rms_init(self.dim), "fc_in": fc_in, "fc_out": fc_out}
        return params

    def __call__(self, x, mask=None, *, params=None):
        """x (B, N, dim), mask (B, N): tokens that may be routed, keep where True or > 0. Returns (B, N, dim)."""
        layer = "ConditionalRoutedFeedForward"
        shared.check_inputs(layer, x.shape, None if mask is None else jnp.shape(mask), self.dim)
        params = self.params if params is None else params
        routed = self.router(x, self.num_heavy_tokens, checked_mask(layer, mask), params=params["router"])
        heavy = self._network(params["heavy"], routed.tokens[:, 0])
        heavy = heavy * routed.gates[:, 0, :, None].astype(self.dtype)
        indices = None if routed.indices is None else routed.indices[:, 0]
        out = self._network(params["light"], x)
        return out + put_back(heavy, indices, jnp.zeros(x.shape, self.dtype))

    def _network(self, params, x):
        hidden = dense(params["fc_in"], _rms_norm(params["norm"], x, self.dtype), self.dtype)
        return dense(params["fc_out"], jax.nn.gelu(hidden, approximate=False), self.dtype)


class _HeavyAttention(Layer):
    """Attention of routed queries to routed keys and values; rows that are not routed get the null query's output.

    ``num_routed_kv`` sets of keys, each for an equal group of the heads; a learned null key and value a head.
    """

    def __init__(self, dim, sizes, flags, dtype):
        """``sizes``: 'tokens_q', 'tokens_kv', 'sets', 'dim_head', 'heads'. ``flags``: by their published names."""
        self.dim, self.sizes, self.flags, self.dtype = dim, sizes, flags, dtype
        straight = flags["router_straight_through"]
        self.router_q = CoordinateDescentRouter(dim, straight)
        self.router_kv = CoordinateDescentRouter(dim, straight, num_routing_tokens=sizes["sets"])

    def init(self, key):
        """'router_q', 'router_kv', 'norm', 'to_q', 'to_k', 'to_v', 'to_out', 'null_k', 'null_v', perhaps 'null_q'."""
        *keys, q_key, kv_key, null_key, value_key, query_key = jax.random.split(key, 9)
        inner = self.sizes["heads"] * self.sizes["dim_head"]
        params = {n: dense_init(k, self.dim, inner, bias=False) for n, k in zip(("to_q", "to_k", "to_v"), keys)}
        params["to_out"] = dense_init(keys[3], inner, self.dim, bias=False)
        params.update(router_q=self.router_q.init(q_key), router_kv=self.router_kv.init(kv_key))
        shape = self.sizes["heads"], self.sizes["dim_head"]
        params.update(null_k=jax.random.normal(null_key, shape), null_v=jax.random.normal(value_key, shape))
        params["norm"] = _rms_init(self.dim)
        if self.flags["use_null_q_tokens"]:
            params["null_q"] = jax.random.normal(query_key, (self.dim,))
        return params

    def __call__(self, x, context, mask=None, context_mask=None, *, params=None):
        """x (B, N, dim), context (B, Nk, dim), masks (B, N), (B, Nk): returns (B, N, dim)."""
        params = self.params if params is None else params
        queries = self.router_q(x, self.sizes["tokens_q"], mask, params=params["router_q"])
        keys = self.router_kv(context, self.sizes["tokens_kv"], context_mask, params=params["router_kv"])
        gates = queries.gates[:, 0, :, None].astype(self.dtype)
        tokens = _rms_norm(params["norm"], queries.tokens[:, 0], self.dtype)
        query = dense(params["to_q"], tokens, self.dtype)
        if self.flags["multiply_queries_by_score"]:
            query = query * gates
        query = query.reshape(query.shape[:2] + (self.sizes["heads"], -1))
        key, value, seen = self._keys(params, keys)
        out = flash_attention(query, key, value, mask=seen)
        out = dense(params["to_out"], out.reshape(out.shape[:2] + (-1,)), self.dtype) * gates
        null = params["null_q"].astype(self.dtype) if "null_q" in params else jnp.zeros(self.dim, self.dtype)
        indices = None if queries.indices is None else queries.indices[:, 0]
        return put_back(out, indices, jnp.broadcast_to(null, x.shape))

    def _keys(self, params, keys):
        """Keys and values (B, 1 + m, H, D), the null ones first, and which are seen, (B, H, 1, 1 + m) or None."""
        tokens = _rms_norm(params["norm"], keys.tokens, self.dtype)
        gates = keys.gates[..., None].astype(self.dtype)
        key, value = (self._of_groups(params[name], tokens) for name in ("to_k", "to_v"))
        value = self._joined(params["null_v"], value * gates)
        key = self._joined(params["null_k"], key * gates if self.flags["multiply_keys_by_score"] else key)
        if keys.mask is None:
            return key, value, None
        seen = jnp.repeat(keys.mask, self.sizes["heads"] // self.sizes["sets"], 1)[:, :, None]
        return key, value, jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (1, 0)), constant_values=True)

    def _of_groups(self, params, tokens):
        """(B, R, m, dim) -> (B, R, m, inner / R): the heads of group r project the tokens of set r."""
        weight = params["weight"].astype(self.dtype).reshape(self.sizes["sets"], -1, self.dim)
        return jnp.einsum("brmd,rod->brmo", tokens, weight)

    def _joined(self, null, x):
        """(B, R, m, inner / R) -> (B, 1 + m, H, D) behind the null row (H, D)."""
        batch, _, count, _ = x.shape
        x = jnp.moveaxis(x, 1, 2).reshape(batch, count, self.sizes["heads"], -1)
        return jnp.concatenate([jnp.broadcast_to(null.astype(self.dtype), (batch, 1) + null.shape), x], 1)


class ConditionalRoutedAttention(Layer):
    """Local attention for every token, plus full attention between the few that are routed.

    Queries, and keys with their values, are routed separately. Values are multiplied by their gate, and the heavy
    output by the query's. A token that is no routed query gets a learned null vector instead.

    Args:
        dim: width E.
        num_heavy_tokens_q, num_heavy_tokens_kv: how many tokens are routed; all where there are no more.
        num_routed_kv: sets of routed keys, each with a routing token of its own and an equal group of the heavy heads.
        light_dim_head, light_heads, heavy_dim_head, heavy_heads: sizes of the heads.
        light_window_size: a token sees those at most ``light_window_size // 2`` away.
        router_straight_through: see :class:`CoordinateDescentRouter`.
        multiply_keys_by_score, multiply_queries_by_score: multiply those by their gates too.
        use_null_q_tokens: False: 0 instead of the null vector, as in the paper.
        dtype: of the computation and the output; parameters are float32.

    Raises:
        ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self,
        dim,
        *,
        num_heavy_tokens_q,
        num_heavy_tokens_kv,
        num_routed_kv=1,
        light_dim_head=64,
        light_heads=8,
        light_window_size=128,
        heavy_dim_head=64,
        heavy_heads=8,
        router_straight_through=True,
        multiply_keys_by_score=False,
        multiply_queries_by_score=False,
        use_null_q_tokens=True,
        dtype=jnp.float32,
    ):
        layer = "ConditionalRoutedAttention"
        sizes = {
            "dim": dim,
            "num_heavy_tokens_q": num_heavy_tokens_q,
            "num_heavy_tokens_kv": num_heavy_tokens_kv,
            "num_routed_kv": num_routed_kv,
            "light_dim_head": light_dim_head,
            "light_heads": light_heads,
            "light_window_size": light_window_size,
            "heavy_dim_head": heavy_dim_head,
            "heavy_heads": heavy_heads,
        }
        flags = shared.routed_flags(
            router_straight_through, multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens
        )
        shared.check_sizes(layer, sizes, flags)
        shared.check_groups(layer, heavy_heads, num_routed_kv)
        self.dim, self.dtype, self.reach = dim, dtype, light_window_size // 2
        self.light_heads, self.light_inner = light_heads, light_heads * light_dim_head
        heavy = {"tokens_q": num_heavy_tokens_q, "tokens_kv": num_heavy_tokens_kv, "sets": num_routed_kv}
        heavy.update(dim_head=heavy_dim_head, heads=heavy_heads)
        self.heavy = _HeavyAttention(dim, heavy, flags, dtype)

    def init(self, key):
        """'light' with 'norm', 'to_q', 'to_k', 'to_v', 'to_out'; 'heavy' with those, routers and nulls."""
        heavy_key, *keys, out_key = jax.random.split(key, 5)
        names = ("to_q", "to_k", "to_v")
        light = {n: dense_init(k, self.dim, self.light_inner, bias=False) for n, k in zip(names, keys)}
        light["to_out"] = dense_init(out_key, self.light_inner, self.dim, bias=False)
        return {"light": dict(light, norm=norm_init(self.dim)), "heavy": self.heavy.init(heavy_key)}

    def __call__(self, x, mask=None, *, params=None):
        """x (B, N, dim), mask (B, N): valid tokens, keep where True or > 0. Returns (B, N, dim)."""
        layer = "ConditionalRoutedAttention"
        shared.check_inputs(layer, x.shape, None if mask is None else jnp.shape(mask), self.dim)
        params, mask = self.params if params is None else params, checked_mask(layer, mask)
        light = self._light(params["light"], x, mask)
        return light + self.heavy(x, x, mask, mask, params=params["heavy"])

    def _light(self, params, x, mask):
        """Attention within the window, among valid keys."""
        normed = layer_norm(params["norm"], x, shared.LAYER_NORM_EPSILON, self.dtype)
        shape = x.shape[:2] + (self.light_heads, -1)
        query, key, value = (dense(params[n], normed, self.dtype).reshape(shape) for n in ("to_q", "to_k", "to_v"))
        seen = None if mask is None else (jnp.asarray(mask) > 0)[:, None, None]
        out = flash_attention(query, key, value, mask=seen, local_window_size=self.reach)
        return dense(params["to_out"], out.reshape(x.shape[:2] + (-1,)), self.dtype)


class ConditionalRoutedCrossAttention(Layer):
    """Full attention from ``num_tokens_q`` routed tokens of x to ``num_tokens_kv`` routed tokens of a context.

    Args:
        dim: width of both.
        num_tokens_q, num_tokens_kv: how many tokens are routed; all where there are no more.
        dim_head, heads: sizes of the heads.
        num_sets_kv: sets of routed keys, each for an equal group of the heads.
        router_straight_through, multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens, dtype: as in
            :class:`ConditionalRoutedAttention`.
    """

    def __init__(
        self,
        dim,
        *,
        num_tokens_q,
        num_tokens_kv,
        dim_head=64,
        heads=8,
        num_sets_kv=1,
        router_straight_through=True,
        multiply_keys_by_score=False,
        multiply_queries_by_score=False,
        use_null_q_tokens=True,
        dtype=jnp.float32,
    ):
        layer = "ConditionalRoutedCrossAttention"
        flags = shared.routed_flags(
            router_straight_through, multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens
        )
        sizes = {"dim": dim, "num_tokens_q": num_tokens_q, "num_tokens_kv": num_tokens_kv, "num_sets_kv": num_sets_kv}
        shared.check_sizes(layer, dict(sizes, dim_head=dim_head, heads=heads), flags)
        shared.check_groups(layer, heads, num_sets_kv, "num_sets_kv")
        sizes = {"tokens_q": num_tokens_q, "tokens_kv": num_tokens_kv, "sets": num_sets_kv}
        self.dim = dim
        self.heavy = _HeavyAttention(dim, dict(sizes, dim_head=dim_head, heads=heads), flags, dtype)

    def init(self, key):
        """New parameters: 'heavy', as in :class:`ConditionalRoutedAttention`."""
        return {"heavy": self.heavy.init(key)}

    def __call__(self, x, context, mask=None, context_mask=None, *, params=None):
        """x (B, N, dim), context (B, Nk, dim), masks (B, N) and (B, Nk), keep where True or > 0: (B, N, dim).

        Tokens that are no routed queries get the null vector, or 0.
        """
        layer = "ConditionalRoutedCrossAttention"
        for name, tokens, kept in (("x", x, mask), ("context", context, context_mask)):
            shared.check_inputs(layer, tokens.shape, None if kept is None else jnp.shape(kept), self.dim, name)
            checked_mask(layer, kept)
        params = self.params if params is None else params
        return self.heavy(x, context, mask, context_mask, params=params["heavy"])


class ConditionalRoutedTransformerBlock(Layer):
    """``x + attention(x)``, then ``x + feed_forward(x)``, both routed.

    Args:
        dim: width E.
        num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_heavy_ff_tokens: how many tokens are routed.
        light_ff_mult, heavy_ff_mult: as in :class:`ConditionalRoutedFeedForward`.
        others: as in :class:`ConditionalRoutedAttention`.
    """

    def __init__(
        self,
        dim,
        *,
        num_heavy_attn_tokens_q,
        num_heavy_attn_tokens_kv,
        num_heavy_ff_tokens,
        light_ff_mult=0.5,
        heavy_ff_mult=4,
        router_straight_through=True,
        dtype=jnp.float32,
        **others,
    ):
        self.attention = ConditionalRoutedAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            router_straight_through=router_straight_through,
            dtype=dtype,
            **others,
        )
        self.feed_forward = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            router_straight_through=router_straight_through,
            dtype=dtype,
        )
        self.dtype = dtype

    def init(self, key):
        """New parameters: 'attention', 'feed_forward'."""
        attention_key, ff_key = jax.random.split(key)
        return {"attention": self.attention.init(attention_key), "feed_forward": self.feed_forward.init(ff_key)}

    def __call__(self, x, mask=None, *, params=None):
        """x (B, N, dim), mask (B, N): valid tokens, keep where True or > 0. Returns (B, N, dim)."""
        params = self.params if params is None else params
        x = x.astype(self.dtype)
        x = x + self.attention(x, mask, params=params["attention"])
        return x + self.feed_forward(x, mask, params=params["feed_forward"])


def _rms_init(width):
    return {"weight": jnp.ones(width)}


def _rms_norm(params, x, dtype):
    """``x / sqrt(mean(x^2))`` times a learned scale, in float32 at least."""
    wide = x.astype(jnp.promote_types(dtype, jnp.float32))
    scaled = wide / jnp.sqrt((wide**2).mean(-1, keepdims=True) + shared.NORM_EPSILON)
    return (scaled * params["weight"]).astype(dtype)
