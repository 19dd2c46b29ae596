"""Cross-modal attention and block in MindSpore, in ImageBind's manner; the joint embedding's scale and loss."""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import cross_modal as shared
from flash_attention.nn.layer.projection import Norm, Projection, normal
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import flash_attention


class CrossModalAttention(SeededCell):
    r"""Queries of one modality attend to another's tokens, with ImageBind's learned extra key and value.

    Args:
        dim (int): width of x and of the output.
        num_heads (int): a divisor of dim.
        context_dim (int): width of the context; None = dim. Default: None.
        bias (bool): whether the projections have biases. Default: True.
        add_bias_kv (bool): append one learned key and value after projection, always visible. Default: True.
        dropout (float): on the softmax weights, inverted; acts in training mode. Default: 0.0.
        dtype: keyword only; of the computation and the output; parameters are float32. Default: float32.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.

    Inputs:
        - **x** (Tensor) - (B, Nq, dim).
        - **context** (Tensor) - (B, Nk, context_dim); None = x, self-attention. Default: None.
        - **attn_mask** (Tensor) - keep where True or > 0; (Nq, Nk), (1|B, Nq, Nk) or (1|B, 1|H, Nq, Nk). Default: None.
        - **key_padding_mask** (Tensor) - keep where True or > 0; (B, Nk). Default: None.

    Outputs:
        Tensor (B, Nq, dim) in ``dtype``.
    """

    def __init__(
        self, dim, num_heads, context_dim=None, bias=True, add_bias_kv=True, dropout=0.0, *, dtype=mstype.float32,
        engine=None
    ):  # fmt: skip
        flags = {"bias": bias, "add_bias_kv": add_bias_kv}
        width = shared.check_layer(dim, num_heads, context_dim, flags, dropout)
        super().__init__(float(dropout))
        ENGINES.check_name(engine, shared.LAYER)
        self.dim, self.num_heads, self.context_dim, self.engine = dim, num_heads, width, engine
        self.to_q, self.to_out = Projection(dim, dim, bias, dtype), Projection(dim, dim, bias, dtype)
        self.to_k, self.to_v = Projection(width, dim, bias, dtype), Projection(width, dim, bias, dtype)
        self.add_bias_kv = add_bias_kv
        self.bias_k = Parameter(normal((1, 1, dim), 0.02), name="bias_k") if add_bias_kv else None
        self.bias_v = Parameter(normal((1, 1, dim), 0.02), name="bias_v") if add_bias_kv else None

    def construct(self, x, context=None, attn_mask=None, key_padding_mask=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        context = x if context is None else context
        _check_inputs(x.shape, context.shape, self.dim, self.context_dim)
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        mask = self.mask(attn_mask, key_padding_mask, x.shape, context.shape[1])
        if self.add_bias_kv:
            key, value = _append(key, self.bias_k), _append(value, self.bias_v)
            key, value = key.astype(query.dtype), value.astype(query.dtype)  # a model's to_float narrows what is joined
        seed, rate = None, 0.0
        if self.training and self.dropout_rate > 0:
            seed, rate = self.next_seed(ops.expand_dims(query, 0)), self.dropout_rate
        out = flash_attention(
            self.split(query), self.split(key), self.split(value), mask=mask, dropout_rate=rate, dropout_seed=seed,
            engine=self.engine,
        )  # fmt: skip
        return self.to_out(out.reshape(query.shape))

    def split(self, x):
        """(B, N, dim) -> (B, N, H, D)."""
        return x.reshape((x.shape[0], x.shape[1], self.num_heads, self.dim // self.num_heads))

    def mask(self, attn_mask, padding, x_shape, kv_len):
        """The two masks as one (0 or 1), with a last column that is always seen where a learned key stands."""
        mask = None
        if attn_mask is not None:
            shape = _mask_shape(attn_mask.shape, x_shape[0], self.num_heads, x_shape[1], kv_len)
            mask = (attn_mask.astype(mstype.float32) > 0).astype(mstype.float32).reshape(shape)
        if padding is not None:
            _check_padding(padding.shape, x_shape[0], kv_len)
            kept = (padding.astype(mstype.float32) > 0).astype(mstype.float32).reshape((x_shape[0], 1, 1, kv_len))
            mask = kept if mask is None else mask * kept
        if mask is None or not self.add_bias_kv:
            return mask
        return ops.concat((mask, ops.ones_like(mask[:, :, :, :1])), -1)


class CrossModalBlock(nn.Cell):
    r"""``x + s1 * attention(LN(x), LN(context))``, then ``x + s2 * MLP(LN(x))``; LN epsilon 1e-6, exact GELU, ratio 4.

    Args:
        dim, num_heads, context_dim, bias, add_bias_kv, dropout, dtype, engine: as in ``CrossModalAttention``.
        layer_scale (str): keyword only; s1 and s2: None = 1, 'per_channel' or 'scalar' learned. Default: None.
        layer_scale_init (float): keyword only; where they begin. Default: 1e-4.

    Inputs:
        As of ``CrossModalAttention``.

    Outputs:
        Tensor (B, Nq, dim) in ``dtype``.
    """

    def __init__(
        self, dim, num_heads, context_dim=None, bias=True, add_bias_kv=True, dropout=0.0, *, layer_scale=None,
        layer_scale_init=1e-4, dtype=mstype.float32, engine=None
    ):  # fmt: skip
        super().__init__()
        self.attention = CrossModalAttention(
            dim, num_heads, context_dim, bias, add_bias_kv, dropout, dtype=dtype, engine=engine
        )
        shared.check_block(layer_scale, layer_scale_init)
        self.dtype = dtype
        self.norm_1, self.norm_2 = Norm(dim, 1e-6), Norm(dim, 1e-6)
        self.norm_context = Norm(self.attention.context_dim, 1e-6)
        self.fc_in, self.fc_out = Projection(dim, 4 * dim, dtype=dtype), Projection(4 * dim, dim, dtype=dtype)
        self.gelu = nn.GELU(approximate=False)
        self.scaled = layer_scale is not None
        scale = np.full(dim if layer_scale == "per_channel" else 1, layer_scale_init, np.float32)
        self.scale_1 = Parameter(Tensor(scale), name="scale_1") if self.scaled else None
        self.scale_2 = Parameter(Tensor(scale), name="scale_2") if self.scaled else None

    def construct(self, x, context=None, attn_mask=None, key_padding_mask=None):
        """Run the block; shapes and meaning of the inputs are in the class's documentation."""
        x = x.astype(self.dtype)
        if context is not None:
            context = self.norm_context(context.astype(self.dtype))
        attended = self.attention(self.norm_1(x), context, attn_mask, key_padding_mask)
        if self.scaled:
            attended = attended * self.scale_1.astype(self.dtype)
        x = x + attended
        out = self.fc_out(self.gelu(self.fc_in(self.norm_2(x))))
        if self.scaled:
            out = out * self.scale_2.astype(self.dtype)
        return x + out


def l2_normalize(x):
    """``x / max(|x|, 1e-12)`` over the last axis."""
    norm = ops.sqrt((x * x).sum(-1, keepdims=True))
    return x / ops.maximum(norm, Tensor(shared.EPSILON, x.dtype))


def logit_scale(log_scale):
    """``min(exp(log_scale), 100)``; initial values by modality: ``core.mechanisms.cross_modal.LOGIT_SCALES``."""
    return ops.minimum(ops.exp(log_scale), Tensor(shared.LARGEST_SCALE, mstype.float32))


def info_nce(a, b, scale):
    """Symmetric InfoNCE of matched rows: mean cross-entropy of ``scale * a b^T``, both ways; a, b (B, E) normalised."""
    logits = scale * ops.matmul(a, b.swapaxes(0, 1))
    own = (a * b).sum(-1) * scale
    return 0.5 * ((_log_sum_exp(logits) - own).mean() + (_log_sum_exp(logits.swapaxes(0, 1)) - own).mean())


def _log_sum_exp(x):
    peak = ops.stop_gradient(x.max(-1, keepdims=True))
    return (peak + ops.log(ops.exp(x - peak).sum(-1, keepdims=True)))[:, 0]


def _append(x, row):
    """One learned row after the tokens of every example."""
    rows = ops.zeros((x.shape[0], 1, x.shape[2]), mstype.float32) + row
    return ops.concat((x, rows.astype(x.dtype)), 1)


@constexpr
def _check_inputs(x, context, dim, context_dim):
    shared.check_inputs(x, context, dim, context_dim)


@constexpr
def _mask_shape(shape, batch, heads, q_len, kv_len):
    return shared.mask_shape(shape, batch, heads, q_len, kv_len)


@constexpr
def _check_padding(shape, batch, kv_len):
    shared.check_padding(shape, batch, kv_len)
