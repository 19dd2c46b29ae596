"""``Attention`` of the JAX transformer: projections, norms and rotation of heads, gates around `attend.py`."""

from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from flash_attention.core.transformer import attention as shared
from flash_attention.core.transformer.attention import AttentionOptions
from flash_attention.core.transformer.rules import make, signature
from flash_attention.jax.functional import checked_mask
from flash_attention.jax.mechanisms.layers import dense, dense_init
from flash_attention.jax.transformer.attend import Call, attend, mechanism_of
from flash_attention.jax.transformer.parts import Model, Seeds, l2_normalised


class Given(NamedTuple):
    """What a stack hands to one attention layer; None where absent.

    Attributes:
        rotate: ``rotate(x, first, downscale)``. bias: (H, N, S). slopes: (H,).
        mem: (B, M, dim), tokens before x that only keys and values are made from.
        cache: ``{"key", "value"}`` (B, L, Hkv, D | Dv) of which ``index`` places are written.
        previous: ``Made.heads`` of the layer before, whose scores are added to this one's.
        return_weights: also give the weights.
    """

    rotate: Any = None
    bias: Any = None
    slopes: Any = None
    mem: Any = None
    cache: Any = None
    index: Any = None
    previous: Any = None
    return_weights: bool = False


class Made(NamedTuple):
    """What one attention layer hands back: the cache with its tokens, heads for the next layer, weights."""

    cache: Any = None
    heads: Any = None
    weights: Optional[jax.Array] = None


class Attention(Model):
    """Attention with the options of x-transformers on the core call.

    ``to_out(softmax(scale q k^T + bias) v)``; q from x, k and v from x or a context, without biases.

    Args:
        args, options: see :class:`flash_attention.core.transformer.attention.AttentionOptions`: ``dim``,
            ``dim_head=64``, ``heads=8``, ``causal=False``, and the others by keyword.
        dtype: of the computation and the output; parameters are float32.
        implementation: of the core call, as in :func:`flash_attention.jax.flash_attention`.

    ``attention=`` takes a name of ``AttentionRegistry`` (which then runs on one device), an ``AttentionImpl``, or a
    function of (query, key, value), BTHD, with keywords of the core call: what it does not take is refused with the
    reason.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, *args, dtype=jnp.float32, implementation=None, **options):
        self.options = make(AttentionOptions, shared.LAYER, args, options)
        self.dtype, self.implementation = dtype, implementation
        self._mechanism = None if self.options.attention is None else mechanism_of(self.options.attention)

    def init(self, key):
        """New parameters: 'to_q', 'to_k', 'to_v', 'to_out', and those of the options."""
        options = self.options
        keys = iter(jax.random.split(key, 8))
        inner, value = options.heads * options.dim_head, options.heads * options.value_dim
        params = {
            "to_q": dense_init(next(keys), options.dim, inner, bias=False),
            "to_k": dense_init(next(keys), options.dim, options.key_heads * options.dim_head, bias=False),
            "to_out": dense_init(next(keys), value, options.dim * (2 if options.on_attn else 1), bias=False),
        }
        if not options.shared_kv:
            params["to_v"] = dense_init(next(keys), options.dim, options.key_heads * options.value_dim, bias=False)
        if options.zero_init_output:
            params["to_out"] = jax.tree.map(jnp.zeros_like, params["to_out"])
        if options.num_mem_kv:
            for name, width in (("mem_k", options.dim_head), ("mem_v", options.value_dim)):
                params[name] = jax.random.normal(next(keys), (options.key_heads, options.num_mem_kv, width))
        if options.qk_norm_dim_scale:
            params["qk_norm_q_scale"] = jnp.ones((options.heads, options.dim_head))
            params["qk_norm_k_scale"] = jnp.ones((options.key_heads, options.dim_head))
        if options.talking_heads:
            for name in ("pre_talking", "post_talking"):
                params[name] = dense_init(next(keys), options.heads, options.heads, bias=False)["weight"]
        if options.head_scale:
            params["head_scale"] = jnp.ones(options.heads)
        if options.gate_values:
            gate = {"weight": jnp.zeros((value, options.dim)), "bias": jnp.full(value, shared.GATE_BIAS)}
            params["to_v_gate"] = gate
        return params

    def __call__(
        self, x, context=None, mask=None, context_mask=None, attn_mask=None, *, deterministic=True, dropout_rng=None,
        params=None,
    ):  # fmt: skip
        """Attend.

        Args:
            x: (B, N, dim).
            context: (B, Nk, dim), source of keys and values; None = x.
            mask: (B, N), keep where True or > 0: the other tokens are no keys, and their outputs are 0. With a context
                it is not used: ``context_mask`` (B, Nk) says which keys there are.
            attn_mask: keep where True or > 0; (N, Nk), (1|H, N, Nk) or (1|B, 1|H, N, Nk).
            deterministic: False = training: dropout acts and needs ``dropout_rng``, a PRNG key.
            params: used instead of the layer's own.

        Returns:
            (B, N, dim) in ``dtype``.
        """
        params = self.params if params is None else params
        return self.apply(params, x, context, mask, context_mask, attn_mask, Given(), deterministic, dropout_rng)[0]

    def apply(
        self, params, x, context=None, mask=None, context_mask=None, attn_mask=None, given=None, deterministic=True,
        dropout_rng=None,
    ):  # fmt: skip
        """What :meth:`__call__` computes with what a stack hands on: ``(out, Made)``."""
        options, given = self.options, given or Given()
        shared.check_inputs(x.shape, None if context is None else context.shape, options.dim)
        seeds = Seeds(shared.LAYER, not deterministic and options.dropout > 0, dropout_rng)
        query, key, value = self._heads(params, x, context, given)
        cache = _written(given, key, value)
        if cache is not None:
            key, value = cache["key"], cache["value"]
        length = key.shape[1]
        visible = self._mask(x.shape, length, context is not None, mask, context_mask, attn_mask)
        layers, heads = _stacked(given.previous, (query, key, self._mem_key(params)))
        call = Call(
            *heads[:2],
            value,
            heads[2],
            params["mem_v"] if options.num_mem_kv else None,
            visible,
            None if given.bias is None else given.bias * layers,
            None if given.slopes is None else given.slopes * layers,
            params.get("pre_talking"),
            params.get("post_talking"),
            given.index,
            seeds.next(),
        )
        out, weights = attend(options, call, self._mechanism, given.return_weights, self.implementation)
        made = Made(cache, (layers, heads), weights)
        return self._project(params, x, out, None if context is not None else mask), made

    def _heads(self, params, x, context, given):
        """Queries (B, N, H, D), keys (B, S, Hkv, D) and values (B, S, Hkv, Dv), normalised and rotated."""
        options = self.options
        source = x if context is None else context
        if given.mem is not None:
            source = jnp.concatenate([given.mem.astype(x.dtype), source], 1)

        def heads(name, tokens, count):
            return dense(params[name], tokens, self.dtype).reshape(tokens.shape[:2] + (count, -1))

        query, key = heads("to_q", x, options.heads), heads("to_k", source, options.key_heads)
        value = key if options.shared_kv else heads("to_v", source, options.key_heads)
        if options.qk_norm:
            query = self._normalised(query, params.get("qk_norm_q_scale"))
            key = self._normalised(key, params.get("qk_norm_k_scale"))
        if given.rotate is not None:
            first = 0 if given.index is None else given.index
            query = given.rotate(query, first + source.shape[1] - x.shape[1])
            key = given.rotate(key, first, downscale=True)
        return query, key, value

    def _normalised(self, x, scale):
        """Each group of features of a head at length 1, times the learned factors (H, D)."""
        groups = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        groups = groups.reshape(x.shape[:-1] + (self.options.qk_norm_groups, -1))
        unit = l2_normalised(groups).reshape(x.shape)
        return (unit if scale is None else unit * scale).astype(self.dtype)

    def _mem_key(self, params):
        """Learned keys (Hkv, M, D) as they meet the queries, or None."""
        options = self.options
        if not options.num_mem_kv:
            return None
        key = params["mem_k"].astype(self.dtype)
        if not options.qk_norm:
            return key
        scale = params.get("qk_norm_k_scale")
        return self._normalised(key, None if scale is None else scale[:, None])

    def _mask(self, shape, length, crosses, mask, context_mask, attn_mask):
        """The keep mask, boolean (1|B, 1|H, 1|N, S), or None. Tokens in front (mems) are all kept."""
        batch, tokens = shape[:2]
        name, of_keys = ("context_mask", context_mask) if crosses else ("mask", mask)
        visible = None
        if of_keys is not None:
            known = length if crosses else tokens
            shared.check_key_mask(name, jnp.shape(of_keys), batch, known)
            kept = jnp.asarray(checked_mask(shared.LAYER, of_keys, name)) > 0
            visible = jnp.pad(kept, ((0, 0), (length - known, 0)), constant_values=True)[:, None, None]
        if attn_mask is None:
            return visible
        full = shared.attn_mask_shape(jnp.shape(attn_mask), batch, self.options.heads, tokens, length)
        attn_mask = (jnp.asarray(checked_mask(shared.LAYER, attn_mask, "attn_mask")) > 0).reshape(full)
        return attn_mask if visible is None else visible & attn_mask

    def _project(self, params, x, out, mask):
        """Scaled and gated heads (B, N, H, Dv) -> (B, N, dim)."""
        options = self.options
        if options.head_scale:
            out = out * params["head_scale"].astype(self.dtype)[:, None]
        out = out.reshape(out.shape[:2] + (-1,))
        if options.gate_values:
            out = out * jax.nn.sigmoid(dense(params["to_v_gate"], x, self.dtype))
        out = dense(params["to_out"], out, self.dtype)
        if options.on_attn:
            value, gate = jnp.split(out, 2, -1)
            out = value * jax.nn.sigmoid(gate)
        return out if mask is None else jnp.where((jnp.asarray(mask) > 0)[..., None], out, 0.0)

    def explain(self):
        """The path of the computation, and why: 'fused: ...', 'formed: ...' or 'mechanism: ...'."""
        return str(self.options.path)

    def lines(self):
        """The layer and its options."""
        return ["Attention({})".format(signature(self.options))]


def _written(given, key, value):
    """The cache with new keys and values from ``index`` on, or None."""
    if given.cache is None:
        return None
    place = (0, given.index, 0, 0)
    return {
        name: jax.lax.dynamic_update_slice(given.cache[name], new.astype(given.cache[name].dtype), place)
        for name, new in (("key", key), ("value", value))
    }


def _stacked(previous, heads):
    """``(layers, (query, key, learned key))`` beside the features of the layers before.

    The sum of the scores of n layers is the product of their queries and keys side by side: no score is handed on.
    """
    if previous is None:
        return 1, heads
    layers, before = previous
    joined = (new if new is None else jnp.concatenate([old, new], -1) for old, new in zip(before, heads))
    return layers + 1, tuple(joined)
