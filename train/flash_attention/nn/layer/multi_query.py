"""Multi-query and grouped-query attention in MindSpore: the core call shares key heads; here are mapping and layer."""

from mindspore import dtype as mstype
from mindspore import nn, ops
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import multi_query as shared
from flash_attention.nn.layer.projection import Projection
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import computable, flash_attention


def grouped_query_attention(
    query, key, value, mask=None, *, is_causal=False, scale=None, kv_head_mapping="interleave", engine=None
):
    """Attention with fewer key/value heads than query heads; keys and values are never repeated.

    Args:
        query (Tensor): (B, Nq, H, D).
        key, value (Tensor): (B, Nk, Hkv, D), Hkv divides H.
        mask (Tensor): keep where True or > 0; broadcastable to (B, H, Nq, Nk).
        is_causal (bool): key j visible to query i when ``j <= i + Nk - Nq``.
        scale (float): default ``1 / sqrt(D)``.
        kv_head_mapping (str): 'interleave': query head h uses key/value head ``h // (H / Hkv)`` (Llama, torch);
            'tile': ``h % Hkv`` (x-transformers).
        engine (str): as in ``flash_attention.ops.flash_attention``.

    Returns:
        Tensor (B, Nq, H, D).
    """
    _check_mapping(kv_head_mapping)
    kv_heads = key.shape[2]
    tiled = kv_head_mapping == "tile" and kv_heads > 1
    if tiled:
        query = shared.group_heads(computable(query), kv_heads, 2).astype(key.dtype)
        if mask is not None and mask.ndim > 2 and mask.shape[mask.ndim - 3] > 1:
            mask = shared.group_heads(mask, kv_heads, mask.ndim - 3)
    out = flash_attention(query, key, value, mask=mask, is_causal=is_causal, scale=scale, engine=engine)
    if tiled:
        return shared.tile_heads(computable(out), kv_heads, 2).astype(key.dtype)
    return out


@constexpr
def _check_mapping(mapping):
    shared.check_mapping("grouped_query_attention", mapping)


class MultiQueryAttention(nn.Cell):
    r"""Attention layer whose query heads share ``kv_heads`` key/value heads (Shazeer, 2019; Ainslie et al., 2023).

    Args:
        dim (int): width E of the input and of the output.
        heads (int): query heads H.
        dim_head (int): size D of a head; None = ``dim / heads``. Default: None.
        kv_heads (int): key/value heads, a divisor of ``heads``; 1 = multi-query, ``heads`` = ordinary attention.
            Default: 1.
        causal (bool): bottom-right: the queries are the last of the keys' positions. Default: False.
        kv_head_mapping (str): keyword only; 'interleave' or 'tile', see ``grouped_query_attention``.
        bias (bool): keyword only; whether the projections have biases. Default: False.
        dtype: keyword only; of the computation and the output; parameters are float32. Default: float32.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.

    Inputs:
        - **x** (Tensor) - (B, Nq, dim).
        - **context** (Tensor) - (B, N, dim), source of keys and values; None = x. Default: None.
        - **mask** (Tensor) - keep where True or > 0; broadcastable to (B, heads, Nq, Nk). Default: None.
        - **cache** (tuple) - keys and values of earlier positions, each (B, N, kv_heads, D), put in front.
          Default: None.
        - **return_cache** (bool) - also return all keys and values, the ``cache`` of the next call. Default: False.

    Outputs:
        Tensor (B, Nq, dim), or with return_cache a pair (output, cache).

    Raises:
        ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self,
        dim,
        heads,
        dim_head=None,
        kv_heads=1,
        causal=False,
        *,
        kv_head_mapping="interleave",
        bias=False,
        dtype=mstype.float32,
        engine=None
    ):  # fmt: skip
        super().__init__()
        self.dim_head = shared.check_layer(
            "MultiQueryAttention", dim, heads, dim_head, kv_heads, causal, kv_head_mapping
        )
        ENGINES.check_name(engine, "MultiQueryAttention")
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.kv_head_mapping, self.engine = kv_head_mapping, engine
        self.to_q = Projection(dim, heads * self.dim_head, bias, dtype)
        self.to_k = Projection(dim, kv_heads * self.dim_head, bias, dtype)
        self.to_v = Projection(dim, kv_heads * self.dim_head, bias, dtype)
        self.to_out = Projection(heads * self.dim_head, dim, bias, dtype)

    def construct(self, x, context=None, mask=None, cache=None, return_cache=False):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        source = x if context is None else context
        query = self._split(self.to_q(x), self.heads)
        key = self._split(self.to_k(source), self.kv_heads)
        value = self._split(self.to_v(source), self.kv_heads)
        if cache is not None:
            key = ops.concat((cache[0].astype(key.dtype), key), 1)
            value = ops.concat((cache[1].astype(value.dtype), value), 1)
        out = grouped_query_attention(
            query, key, value, mask, is_causal=self.causal, kv_head_mapping=self.kv_head_mapping, engine=self.engine
        )
        out = self.to_out(out.reshape(x.shape[:2] + (self.heads * self.dim_head,)))
        if return_cache:
            return out, (key, value)
        return out

    def _split(self, x, heads):
        return x.reshape(x.shape[:2] + (heads, self.dim_head))
