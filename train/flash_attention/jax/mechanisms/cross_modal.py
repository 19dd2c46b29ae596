"""Cross-modal attention and block in JAX, in ImageBind's manner; the joint embedding's scale and loss."""

import jax
import jax.numpy as jnp

from flash_attention.core.mechanisms import cross_modal as shared
from flash_attention.jax.functional import flash_attention
from flash_attention.jax.mechanisms.layers import Layer, dense, dense_init, layer_norm, norm_init, seed_of


class CrossModalAttention(Layer):
    """Queries of one modality attend to another's tokens, with ImageBind's learned extra key and value.

    Args:
        dim: width of x and of the output; num_heads: a divisor of it.
        context_dim: width of the context; None = dim.
        bias: whether the projections have biases.
        add_bias_kv: append one learned key and value after projection, always visible.
        dropout: on the softmax weights, inverted; acts with deterministic=False.
        dtype: of the computation and the output; parameters are float32.
    """

    def __init__(
        self, dim, num_heads, context_dim=None, bias=True, add_bias_kv=True, dropout=0.0, *, dtype=jnp.float32
    ):
        flags = {"bias": bias, "add_bias_kv": add_bias_kv}
        self.context_dim = shared.check_layer(dim, num_heads, context_dim, flags, dropout)
        self.dim, self.num_heads, self.bias, self.add_bias_kv = dim, num_heads, bias, add_bias_kv
        self.dropout, self.dtype = float(dropout), dtype

    def init(self, key):
        """New parameters: 'to_q', 'to_k', 'to_v', 'to_out', and 'bias_k', 'bias_v' (1, 1, dim)."""
        keys = jax.random.split(key, 6)
        widths = {"to_q": self.dim, "to_k": self.context_dim, "to_v": self.context_dim, "to_out": self.dim}
        params = {n: dense_init(k, width, self.dim, self.bias) for k, (n, width) in zip(keys, widths.items())}
        if self.add_bias_kv:
            for k, name in zip(keys[4:], ("bias_k", "bias_v")):
                params[name] = 0.02 * jax.random.normal(k, (1, 1, self.dim))
        return params

    def __call__(
        self, x, context=None, attn_mask=None, key_padding_mask=None, *, deterministic=True, dropout_rng=None,
        params=None,
    ):  # fmt: skip
        """Attend.

        Args:
            x: (B, Nq, dim).
            context: (B, Nk, context_dim); None = x, self-attention.
            attn_mask: keep where True or > 0; (Nq, Nk), (1|B, Nq, Nk) or (1|B, 1|H, Nq, Nk).
            key_padding_mask: keep where True or > 0; (B, Nk).
            deterministic: False = training: dropout acts and needs ``dropout_rng``, a PRNG key.
            params: used instead of the layer's own.

        Returns:
            (B, Nq, dim) in ``dtype``.
        """
        params = self.params if params is None else params
        context = x if context is None else context
        shared.check_inputs(x.shape, context.shape, self.dim, self.context_dim)
        query = dense(params["to_q"], x, self.dtype)
        key, value = (dense(params[name], context, self.dtype) for name in ("to_k", "to_v"))
        mask = self._mask(attn_mask, key_padding_mask, x.shape, context.shape[1])
        if self.add_bias_kv:
            row = (x.shape[0], 1, self.dim)
            key, value = (
                jnp.concatenate([y, jnp.broadcast_to(params[name].astype(self.dtype), row)], 1)
                for y, name in ((key, "bias_k"), (value, "bias_v"))
            )
        rate = 0.0 if deterministic else self.dropout
        out = flash_attention(
            *(y.reshape(y.shape[:2] + (self.num_heads, -1)) for y in (query, key, value)),
            mask=mask,
            dropout_rate=rate,
            dropout_seed=seed_of(shared.LAYER, dropout_rng) if rate else None,
        )
        return dense(params["to_out"], out.reshape(query.shape), self.dtype)

    def _mask(self, attn_mask, padding, x_shape, kv_len):
        """The two masks as one, with a last column that is always seen where a learned key stands."""
        mask = None
        if attn_mask is not None:
            shape = shared.mask_shape(jnp.shape(attn_mask), x_shape[0], self.num_heads, x_shape[1], kv_len)
            mask = (jnp.asarray(attn_mask) > 0).reshape(shape)
        if padding is not None:
            shared.check_padding(jnp.shape(padding), x_shape[0], kv_len)
            padding = (jnp.asarray(padding) > 0)[:, None, None]
            mask = padding if mask is None else mask & padding
        if mask is None or not self.add_bias_kv:
            return mask
        return jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)


class CrossModalBlock(Layer):
    """``x + s1 * attention(LN(x), LN(context))``, then ``x + s2 * MLP(LN(x))``; LN epsilon 1e-6, exact GELU, ratio 4.

    Args:
        dim, num_heads, context_dim, bias, add_bias_kv, dropout, dtype: as in :class:`CrossModalAttention`.
        layer_scale: s1 and s2: None = 1, 'per_channel' or 'scalar' learned.
        layer_scale_init: where they begin.
    """

    def __init__(
        self, dim, num_heads, context_dim=None, bias=True, add_bias_kv=True, dropout=0.0, *, layer_scale=None,
        layer_scale_init=1e-4, dtype=jnp.float32,
    ):  # fmt: skip
        self.attention = CrossModalAttention(dim, num_heads, context_dim, bias, add_bias_kv, dropout, dtype=dtype)
        shared.check_block(layer_scale, layer_scale_init)
        self.layer_scale, self.layer_scale_init = layer_scale, layer_scale_init

    def init(self, key):
        """New parameters: 'attention', 'norm_1', 'norm_context', 'norm_2', 'fc_in', 'fc_out', 'scale_1', 'scale_2'."""
        attention_key, in_key, out_key = jax.random.split(key, 3)
        dim = self.attention.dim
        params = {"attention": self.attention.init(attention_key), "norm_1": norm_init(dim), "norm_2": norm_init(dim)}
        params["norm_context"] = norm_init(self.attention.context_dim)
        params["fc_in"], params["fc_out"] = dense_init(in_key, dim, 4 * dim), dense_init(out_key, 4 * dim, dim)
        if self.layer_scale is not None:
            width = dim if self.layer_scale == "per_channel" else 1
            params.update({name: jnp.full(width, self.layer_scale_init) for name in ("scale_1", "scale_2")})
        return params

    def __call__(
        self, x, context=None, attn_mask=None, key_padding_mask=None, *, deterministic=True, dropout_rng=None,
        params=None,
    ):  # fmt: skip
        """Arguments of :class:`CrossModalAttention`; with context=None the attention is of LN(x) with itself."""
        params, dtype = self.params if params is None else params, self.attention.dtype
        x = x.astype(dtype)
        if context is not None:
            context = layer_norm(params["norm_context"], context, 1e-6, dtype)
        attended = self.attention(
            layer_norm(params["norm_1"], x, 1e-6, dtype),
            context,
            attn_mask,
            key_padding_mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            params=params["attention"],
        )
        x = x + self._scaled(params, "scale_1", attended)
        hidden = dense(params["fc_in"], layer_norm(params["norm_2"], x, 1e-6, dtype), dtype)
        hidden = jax.nn.gelu(hidden, approximate=False)
        return x + self._scaled(params, "scale_2", dense(params["fc_out"], hidden, dtype))

    @staticmethod
    def _scaled(params, name, x):
        return x * params[name].astype(x.dtype) if name in params else x


def l2_normalize(x):
    """``x / max(|x|, 1e-12)`` over the last axis."""
    norm = jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), shared.EPSILON**2))
    return x / norm


def logit_scale(log_scale):
    """``min(exp(log_scale), 100)``; initial values by modality: ``core.mechanisms.cross_modal.LOGIT_SCALES``."""
    return jnp.minimum(jnp.exp(log_scale), shared.LARGEST_SCALE)


def info_nce(a, b, scale):
    """Symmetric InfoNCE of matched rows: mean cross-entropy of ``scale * a b^T``, both ways; a, b (B, E) normalised."""
    logits = scale * a @ b.T
    rows, columns = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
    return -0.5 * (jnp.diagonal(rows).mean() + jnp.diagonal(columns).mean())
