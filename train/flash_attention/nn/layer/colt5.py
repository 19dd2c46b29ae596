"""CoLT5's layers in MindSpore (Ainslie et al., 2023): a light branch for every token, a heavy one for the routed."""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import colt5 as shared
from flash_attention.nn.layer.colt5_routing import CoordinateDescentRouter, put_back
from flash_attention.nn.layer.projection import Norm, Projection, normal
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import check_not_additive, computable, flash_attention
from flash_attention.ops.host import is_eager


class ConditionalRoutedFeedForward(nn.Cell):
    r"""``light(x) + gate * heavy(x)``, the heavy network on ``num_heavy_tokens`` routed tokens only.

    Each network is RMSNorm, Linear, exact GELU, Linear.

    Args:
        dim (int): width E.
        num_heavy_tokens (int): keyword only; how many tokens are routed; all where there are no more.
        light_ff_mult, heavy_ff_mult (float): keyword only; hidden widths, as multiples of ``dim``. Default: 0.5, 4.
        router_straight_through (bool): keyword only; see ``CoordinateDescentRouter``. Default: True.
        dtype: keyword only; of the computation and the output; parameters are float32. Default: float32.

    Inputs:
        - **x** (Tensor) - (B, N, dim).
        - **mask** (Tensor) - (B, N), tokens that may be routed, keep where True or > 0. Default: None.

    Outputs:
        Tensor (B, N, dim) in ``dtype``.

    Raises:
        ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self, dim, *, num_heavy_tokens, light_ff_mult=0.5, heavy_ff_mult=4, router_straight_through=True,
        dtype=mstype.float32
    ):  # fmt: skip
        super().__init__()
        layer = "ConditionalRoutedFeedForward"
        shared.check_sizes(layer, {"dim": dim, "num_heavy_tokens": num_heavy_tokens})
        light = shared.inner_width(layer, "light_ff_mult", dim, light_ff_mult)
        heavy = shared.inner_width(layer, "heavy_ff_mult", dim, heavy_ff_mult)
        self.dim, self.num_heavy_tokens, self.dtype = dim, num_heavy_tokens, dtype
        self.router = CoordinateDescentRouter(dim, router_straight_through)
        self.light, self.heavy = _Network(dim, light, dtype), _Network(dim, heavy, dtype)

    def construct(self, x, mask=None):
        """Run; shapes and meaning of the inputs are in the class's documentation."""
        _check("ConditionalRoutedFeedForward", x.shape, None if mask is None else mask.shape, self.dim, "x")
        if mask is not None and is_eager():
            check_not_additive("ConditionalRoutedFeedForward", mask)
        tokens, indices, gates, _ = self.router(x, self.num_heavy_tokens, mask)
        heavy = computable(self.heavy(tokens[:, 0])) * ops.expand_dims(gates[:, 0], -1)
        zeros = ops.zeros((self.dim,), heavy.dtype)
        heavy = put_back(heavy, None if indices is None else indices[:, 0], zeros, x.shape[1])
        return (computable(self.light(x)) + heavy).astype(self.dtype)


class _Network(nn.Cell):
    """RMSNorm, Linear, exact GELU, Linear."""

    def __init__(self, dim, inner, dtype):
        super().__init__()
        self.norm = _RMSNorm(dim, dtype)
        self.fc_in, self.fc_out = Projection(dim, inner, dtype=dtype), Projection(inner, dim, dtype=dtype)
        self.act = nn.GELU(approximate=False)
        self.dtype = dtype

    def construct(self, x):
        return self.fc_out(self.act(computable(self.fc_in(self.norm(x)))).astype(self.dtype))


class _RMSNorm(nn.Cell):
    """``x / sqrt(mean(x^2))`` times a learned scale, in float32."""

    def __init__(self, dim, dtype):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(dim, np.float32)), name="weight")
        self.dtype = dtype

    def construct(self, x):
        x = x.astype(mstype.float32)
        scaled = x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + shared.NORM_EPSILON)
        return (scaled * self.weight).astype(self.dtype)


class _HeavyAttention(nn.Cell):
    """Attention of routed queries to routed keys and values; rows that are not routed get the null query's output.

    ``num_routed_kv`` sets of keys, each for an equal group of the heads; a learned null key and value a head.
    """

    def __init__(self, dim, sizes, flags, dtype, engine):
        super().__init__()
        self.dim, self.dtype, self.engine = dim, dtype, engine
        self.tokens_q, self.tokens_kv = sizes["tokens_q"], sizes["tokens_kv"]
        self.sets, self.heads, self.dim_head = sizes["sets"], sizes["heads"], sizes["dim_head"]
        self.scale_keys = flags["multiply_keys_by_score"]
        self.scale_queries = flags["multiply_queries_by_score"]
        straight, inner = flags["router_straight_through"], self.heads * self.dim_head
        self.router_q = CoordinateDescentRouter(dim, straight)
        self.router_kv = CoordinateDescentRouter(dim, straight, num_routing_tokens=self.sets)
        self.norm = _RMSNorm(dim, dtype)
        self.to_q, self.to_out = Projection(dim, inner, False, dtype), Projection(inner, dim, False, dtype)
        self.to_k, self.to_v = Projection(dim, inner, False, dtype), Projection(dim, inner, False, dtype)
        self.null_k = Parameter(normal((self.heads, self.dim_head)), name="null_k")
        self.null_v = Parameter(normal((self.heads, self.dim_head)), name="null_v")
        self.has_null = flags["use_null_q_tokens"]
        self.null_q = Parameter(normal((dim,)), name="null_q") if self.has_null else None
        self.product = P.BatchMatMul(transpose_b=True)

    def construct(self, x, context, mask=None, context_mask=None):
        """(B, N, dim), (B, Nk, dim), their masks -> (B, N, dim)."""
        tokens, indices, gates, _ = self.router_q(x, self.tokens_q, mask)
        gates = ops.expand_dims(gates[:, 0], -1)
        query = computable(self.to_q(self.norm(tokens[:, 0])))
        if self.scale_queries:
            query = query * gates
        query = query.reshape(query.shape[:2] + (self.heads, self.dim_head)).astype(self.dtype)
        tokens, _, kv_gates, seen = self.router_kv(context, self.tokens_kv, context_mask)
        kv_gates = ops.expand_dims(kv_gates, -1)
        tokens = self.norm(tokens)
        key, value = self.of_groups(self.to_k.weight, tokens), self.of_groups(self.to_v.weight, tokens) * kv_gates
        if self.scale_keys:
            key = key * kv_gates
        key, value = self.joined(self.null_k, key), self.joined(self.null_v, value)
        if seen is not None:
            seen = ops.repeat_interleave(seen.astype(mstype.float32), self.heads // self.sets, 1)
            seen = ops.expand_dims(ops.concat((ops.ones_like(seen[:, :, :1]), seen), 2), 2)
        out = flash_attention(query, key, value, mask=seen, engine=self.engine)
        out = computable(self.to_out(computable(out).reshape(out.shape[:2] + (self.heads * self.dim_head,)))) * gates
        null = self.null_q if self.has_null else ops.zeros((self.dim,), mstype.float32)
        out = put_back(out, None if indices is None else indices[:, 0], null, x.shape[1])
        return out.astype(self.dtype)

    def of_groups(self, weight, tokens):
        """(B, R, m, dim) -> (B, R, m, inner / R): the heads of group r project the tokens of set r."""
        weight = computable(weight.astype(self.dtype)).reshape((1, self.sets, -1, self.dim))
        return self.product(computable(tokens), ops.tile(weight, (tokens.shape[0], 1, 1, 1)))

    def joined(self, null, x):
        """(B, R, m, inner / R) -> (B, 1 + m, H, D) behind the null row (H, D)."""
        batch, count = x.shape[0], x.shape[2]
        x = x.swapaxes(1, 2).reshape((batch, count, self.heads, self.dim_head))
        first = ops.zeros((batch, 1, self.heads, self.dim_head), x.dtype) + null.astype(x.dtype)
        return ops.concat((first, x), 1).astype(self.dtype)


class ConditionalRoutedAttention(nn.Cell):
    r"""Local attention for every token, plus full attention between the few that are routed.

    Queries, and keys with their values, are routed separately. Values are multiplied by their gate, and the heavy
    output by the query's. A token that is no routed query gets a learned null vector instead.

    Args:
        dim (int): width E.
        num_heavy_tokens_q, num_heavy_tokens_kv (int): keyword only, as all that follow; how many tokens are routed; all
            where there are no more.
        num_routed_kv (int): sets of routed keys, each with a routing token of its own and an equal group of the heavy
            heads. Default: 1.
        light_dim_head, light_heads, heavy_dim_head, heavy_heads (int): sizes of the heads. Default: 64, 8, 64, 8.
        light_window_size (int): a token sees those at most ``light_window_size // 2`` away. Default: 128.
        router_straight_through (bool): see ``CoordinateDescentRouter``. Default: True.
        multiply_keys_by_score, multiply_queries_by_score (bool): multiply those by their gates too. Default: False.
        use_null_q_tokens (bool): False: 0 instead of the null vector, as in the paper. Default: True.
        dtype: of the computation and the output; parameters are float32. Default: float32.
        engine (str): None or 'auto' = the best engine here. Default: None.

    Inputs:
        - **x** (Tensor) - (B, N, dim).
        - **mask** (Tensor) - (B, N), valid tokens, keep where True or > 0. Default: None.

    Outputs:
        Tensor (B, N, dim) in ``dtype``.

    Raises:
        ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self, dim, *, num_heavy_tokens_q, num_heavy_tokens_kv, num_routed_kv=1, light_dim_head=64, light_heads=8,
        light_window_size=128, heavy_dim_head=64, heavy_heads=8, router_straight_through=True,
        multiply_keys_by_score=False, multiply_queries_by_score=False, use_null_q_tokens=True, dtype=mstype.float32,
        engine=None
    ):  # fmt: skip
        super().__init__()
        layer = "ConditionalRoutedAttention"
        sizes = {
            "dim": dim, "num_heavy_tokens_q": num_heavy_tokens_q, "num_heavy_tokens_kv": num_heavy_tokens_kv,
            "num_routed_kv": num_routed_kv, "light_dim_head": light_dim_head, "light_heads": light_heads,
            "light_window_size": light_window_size, "heavy_dim_head": heavy_dim_head, "heavy_heads": heavy_heads,
        }  # fmt: skip
        flags = shared.routed_flags(
            router_straight_through, multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens
        )
        shared.check_sizes(layer, sizes, flags)
        shared.check_groups(layer, heavy_heads, num_routed_kv)
        ENGINES.check_name(engine, layer)
        self.dim = dim
        self.light = _LightAttention(dim, light_heads, light_dim_head, light_window_size // 2, dtype, engine)
        heavy = {"tokens_q": num_heavy_tokens_q, "tokens_kv": num_heavy_tokens_kv, "sets": num_routed_kv}
        self.heavy = _HeavyAttention(
            dim, dict(heavy, dim_head=heavy_dim_head, heads=heavy_heads), flags, dtype, engine
        )  # fmt: skip

    def construct(self, x, mask=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        _check("ConditionalRoutedAttention", x.shape, None if mask is None else mask.shape, self.dim, "x")
        if mask is not None and is_eager():
            check_not_additive("ConditionalRoutedAttention", mask)
        return self.light(x, mask) + self.heavy(x, x, mask, mask)


class _LightAttention(nn.Cell):
    """Attention within a window, among valid keys."""

    def __init__(self, dim, heads, dim_head, reach, dtype, engine):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dim_head, self.reach, self.dtype, self.engine = heads, dim_head, reach, dtype, engine
        self.norm = Norm(dim, shared.LAYER_NORM_EPSILON)
        self.to_q, self.to_out = Projection(dim, inner, False, dtype), Projection(inner, dim, False, dtype)
        self.to_k, self.to_v = Projection(dim, inner, False, dtype), Projection(dim, inner, False, dtype)

    def construct(self, x, mask):
        normed = self.norm(x.astype(mstype.float32))
        shape = x.shape[:2] + (self.heads, self.dim_head)
        query, key, value = (
            self.to_q(normed).reshape(shape), self.to_k(normed).reshape(shape), self.to_v(normed).reshape(shape)
        )  # fmt: skip
        if mask is not None:
            mask = (mask.astype(mstype.float32) > 0).reshape((x.shape[0], 1, 1, x.shape[1]))
        out = flash_attention(query, key, value, mask=mask, local_window_size=self.reach, engine=self.engine)
        return self.to_out(computable(out).reshape(x.shape[:2] + (self.heads * self.dim_head,)))


class ConditionalRoutedCrossAttention(nn.Cell):
    r"""Full attention from ``num_tokens_q`` routed tokens of x to ``num_tokens_kv`` routed tokens of a context.

    Args:
        dim (int): width of both.
        num_tokens_q, num_tokens_kv (int): keyword only, as all that follow; how many tokens are routed; all where there
            are no more.
        dim_head, heads (int): sizes of the heads. Default: 64, 8.
        num_sets_kv (int): sets of routed keys, each for an equal group of the heads. Default: 1.
        router_straight_through, multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens, dtype, engine:
            as in ``ConditionalRoutedAttention``.

    Inputs:
        - **x** (Tensor) - (B, N, dim).
        - **context** (Tensor) - (B, Nk, dim).
        - **mask**, **context_mask** (Tensor) - (B, N), (B, Nk), keep where True or > 0. Default: None.

    Outputs:
        Tensor (B, N, dim) in ``dtype``; tokens that are no routed queries get the null vector, or 0.
    """

    def __init__(
        self, dim, *, num_tokens_q, num_tokens_kv, dim_head=64, heads=8, num_sets_kv=1, router_straight_through=True,
        multiply_keys_by_score=False, multiply_queries_by_score=False, use_null_q_tokens=True, dtype=mstype.float32,
        engine=None
    ):  # fmt: skip
        super().__init__()
        layer = "ConditionalRoutedCrossAttention"
        flags = shared.routed_flags(
            router_straight_through, multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens
        )
        sizes = {"dim": dim, "num_tokens_q": num_tokens_q, "num_tokens_kv": num_tokens_kv, "num_sets_kv": num_sets_kv}
        shared.check_sizes(layer, dict(sizes, dim_head=dim_head, heads=heads), flags)
        shared.check_groups(layer, heads, num_sets_kv, "num_sets_kv")
        ENGINES.check_name(engine, layer)
        sizes = {"tokens_q": num_tokens_q, "tokens_kv": num_tokens_kv, "sets": num_sets_kv}
        self.dim = dim
        self.heavy = _HeavyAttention(dim, dict(sizes, dim_head=dim_head, heads=heads), flags, dtype, engine)

    def construct(self, x, context, mask=None, context_mask=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        layer = "ConditionalRoutedCrossAttention"
        _check(layer, x.shape, None if mask is None else mask.shape, self.dim, "x")
        _check(layer, context.shape, None if context_mask is None else context_mask.shape, self.dim, "context")
        return self.heavy(x, context, mask, context_mask)


class ConditionalRoutedTransformerBlock(nn.Cell):
    r"""``x + attention(x)``, then ``x + feed_forward(x)``, both routed.

    Args:
        dim (int): width E.
        num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_heavy_ff_tokens (int): keyword only, as all that follow;
            how many tokens are routed.
        light_ff_mult, heavy_ff_mult (float): as in ``ConditionalRoutedFeedForward``.
        router_straight_through, dtype, others: as in ``ConditionalRoutedAttention``.

    Inputs:
        - **x** (Tensor) - (B, N, dim).
        - **mask** (Tensor) - (B, N), valid tokens, keep where True or > 0. Default: None.

    Outputs:
        Tensor (B, N, dim) in ``dtype``.
    """

    def __init__(
        self, dim, *, num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_heavy_ff_tokens, light_ff_mult=0.5,
        heavy_ff_mult=4, router_straight_through=True, dtype=mstype.float32, **others
    ):  # fmt: skip
        super().__init__()
        self.attention = ConditionalRoutedAttention(
            dim, num_heavy_tokens_q=num_heavy_attn_tokens_q, num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            router_straight_through=router_straight_through, dtype=dtype, **others
        )  # fmt: skip
        self.feed_forward = ConditionalRoutedFeedForward(
            dim, num_heavy_tokens=num_heavy_ff_tokens, light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult,
            router_straight_through=router_straight_through, dtype=dtype,
        )  # fmt: skip
        self.dtype = dtype

    def construct(self, x, mask=None):
        """Run the block; shapes and meaning of the inputs are in the class's documentation."""
        x = x.astype(self.dtype)
        x = x + self.attention(x, mask)
        return x + self.feed_forward(x, mask)


@constexpr
def _check(layer, x, mask, dim, name):
    shared.check_inputs(layer, x, mask, dim, name)
