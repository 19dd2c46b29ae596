"""``Attention`` of the MindSpore transformer: projections, norms and rotation of heads, gates."""

import numpy as np
from mindspore import Parameter, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_type
from flash_attention.core.mechanisms.multi_query import group_heads, tile_heads
from flash_attention.core.transformer import attention as shared
from flash_attention.core.transformer.attention import FUSED, MECHANISM, AttentionOptions
from flash_attention.core.transformer.rules import make, signature
from flash_attention.nn.layer.flexible import FlexibleAttention
from flash_attention.nn.layer.projection import Projection
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.nn.transformer.attend import Formed, Fused
from flash_attention.nn.transformer.parts import l2_normalised, learned
from flash_attention.nn.transformer.positions import NO_ROTATION, rotated
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import computable


class Attention(SeededCell):
    r"""Attention with the options of x-transformers on the core call.

    ``to_out(softmax(scale q k^T + bias) v)``; q from x, k and v from x or a context, without biases.

    Args:
        args, options: see ``flash_attention.core.transformer.attention.AttentionOptions``: ``dim``, ``dim_head=64``,
            ``heads=8``, ``causal=False``, and the others by keyword.
        dtype: keyword only; of the computation and the output; parameters are float32. Default: float32.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.

    ``attention=`` takes a name of ``MechanismRegistry``, or a ``FlexibleAttention``; what it does not take is refused
    with the reason.

    Inputs:
        - **x** (Tensor) - (B, N, dim).
        - **context** (Tensor) - (B, Nk, dim), source of keys and values; None = x. Default: None.
        - **mask** (Tensor) - (B, N), keep where True or > 0: the other tokens are no keys, and their outputs are 0.
          With a context it is not used. Default: None.
        - **context_mask** (Tensor) - (B, Nk), keep where True or > 0. Default: None.
        - **attn_mask** (Tensor) - keep where True or > 0; (N, Nk), (1|H, N, Nk) or (1|B, 1|H, N, Nk). Default: None.

    Outputs:
        Tensor (B, N, dim) in ``dtype``.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, *args, dtype=mstype.float32, engine=None, **options):
        made = make(AttentionOptions, shared.LAYER, args, options)
        super().__init__(float(made.dropout))
        ENGINES.check_name(engine, shared.LAYER)
        self.options, self.dtype, self.dim = made, dtype, made.dim
        self.heads, self.kv_heads, self.dim_head = made.heads, made.key_heads, made.dim_head
        self.value_dim, self.tiled, self.groups = made.value_dim, made.tiled, made.qk_norm_groups
        self._make_projections(made, dtype)
        self._make_parameters(made)
        self.by_mechanism = made.path.name == MECHANISM
        if self.by_mechanism:
            self.attend = _mechanism(made, engine)
        else:
            self.attend = Fused(made, engine) if made.path.name == FUSED else Formed(made)
        self.form = Formed(made, with_weights=True)

    def _make_projections(self, made, dtype):
        self.shared_kv, self.on_attn, self.gates = made.shared_kv, made.on_attn, made.gate_values
        self.to_q = Projection(made.dim, made.heads * made.dim_head, False, dtype)
        self.to_k = Projection(made.dim, made.key_heads * made.dim_head, False, dtype)
        value = made.heads * made.value_dim
        if not made.shared_kv:
            self.to_v = Projection(made.dim, made.key_heads * made.value_dim, False, dtype)
        self.to_out = Projection(value, made.dim * (2 if made.on_attn else 1), False, dtype)
        if made.zero_init_output:
            self.to_out.weight.set_data(learned(np.zeros(self.to_out.weight.shape)))
        if made.gate_values:
            self.to_v_gate = Projection(made.dim, value, True, dtype)
            self.to_v_gate.weight.set_data(learned(np.zeros((value, made.dim))))
            self.to_v_gate.bias.set_data(learned(np.full(value, shared.GATE_BIAS)))

    def _make_parameters(self, made):
        def parameter(wanted, name, array):
            return Parameter(learned(array), name=name) if wanted else None

        size = (made.key_heads, made.num_mem_kv)
        self.learns, self.normalises = made.num_mem_kv > 0, made.qk_norm
        self.mem_k = parameter(self.learns, "mem_k", np.random.standard_normal(size + (made.dim_head,)))
        self.mem_v = parameter(self.learns, "mem_v", np.random.standard_normal(size + (made.value_dim,)))
        scales = made.qk_norm_dim_scale
        self.qk_norm_q_scale = parameter(scales, "qk_norm_q_scale", np.ones((made.heads, made.dim_head)))
        self.qk_norm_k_scale = parameter(scales, "qk_norm_k_scale", np.ones((made.key_heads, made.dim_head)))
        bound, square = made.heads**-0.5, (made.heads, made.heads)
        self.pre_talking = parameter(made.talking_heads, "pre_talking", np.random.uniform(-bound, bound, square))
        self.post_talking = parameter(made.talking_heads, "post_talking", np.random.uniform(-bound, bound, square))
        self.scales_heads = made.head_scale
        self.head_scale = parameter(made.head_scale, "head_scale", np.ones(made.heads))

    def construct(self, x, context=None, mask=None, context_mask=None, attn_mask=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        return self.attended(
            x, context, mask, context_mask, attn_mask, None, None, None, None, None, NO_ROTATION, False
        )[0]  # fmt: skip

    def attended(
        self, x, context, mask, context_mask, attn_mask, bias, slopes, mem, cache, previous, rotation, return_weights
    ):  # fmt: skip
        """What ``construct`` computes with what a stack hands on.

        Args:
            bias: (1, H, N, S). slopes: (H,). mem: (B, M, dim), tokens before x for keys and values.
            cache: (key, value) of the S places before x and under it: x takes the last, the oldest fall out.
            previous: (layers, query, key, learned key) of the layer before, whose scores are added.
            rotation: see ``rotated``.
            return_weights: also give the weights.

        Returns:
            (out, previous of the next layer, weights or None, the (key, value) of the next call).
        """
        _check_inputs(x.shape, None if context is None else context.shape, self.dim)
        query, key, value = self.split(x, context, mem, cache, rotation)
        written = (key, value)
        visible = self.visible(
            x.shape, key.shape[1], context is not None, mask, context_mask, attn_mask, self.heads
        )  # fmt: skip
        mem_key = self.learned_key()
        count = 1
        if previous is not None:
            count = previous[0] + 1
            query, key = _beside(previous[1], query), _beside(previous[2], key)
            if mem_key is not None:
                mem_key = _beside(previous[3], mem_key)
        handed = (count, query, key, mem_key)
        if bias is not None:
            bias = bias * count
        if slopes is not None:
            slopes = slopes * count
        seed = None
        if self.training and self.dropout_rate > 0:
            seed = self.next_seed(ops.expand_dims(x, 0))
        out, weights = self.softmax(query, key, value, mem_key, visible, bias, slopes, seed, return_weights)
        return self.project(x, out, None if context is not None else mask), handed, weights, written

    def softmax(self, query, key, value, mem_key, mask, bias, slopes, seed, return_weights):
        """(B, N, H, Dv) and the weights where they are formed; query heads are grouped around it for 'tile'."""
        pre, post = self.pre_talking, self.post_talking
        if self.tiled:
            query, mask, bias = self.group(query, 2), self.group(mask, 1), self.group(bias, 1)
            slopes = self.group(slopes, 0)
            pre, post = self.group(self.group(pre, 0), 1), self.group(self.group(post, 0), 1)
        if self.by_mechanism:
            out = self.attend(query, key, value, mask, bias, None, None, None, None, slopes, None, None, seed)
            weights = None
        elif return_weights:
            out, weights = self.form(
                query, key, value, mem_key, self.mem_v, mask, bias, slopes, pre, post, seed
            )  # fmt: skip
        else:
            out, weights = self.attend(
                query, key, value, mem_key, self.mem_v, mask, bias, slopes, pre, post, seed
            )  # fmt: skip
        if self.tiled:
            out = tile_heads(computable(out), self.kv_heads, 2).astype(query.dtype)
            if weights is not None:
                weights = tile_heads(weights, self.kv_heads, 1)
        return out, weights

    def group(self, x, axis):
        """Query heads of one key/value head beside each other along ``axis``."""
        if x is None or x.shape[axis] == 1:
            return x
        if x.dtype == mstype.bool_:
            return group_heads(x.astype(mstype.float32), self.kv_heads, axis)
        return group_heads(computable(x), self.kv_heads, axis).astype(x.dtype)

    def split(self, x, context, mem, cache, rotation):
        """Queries (B, N, H, D), keys (B, S, Hkv, D) and values (B, S, Hkv, Dv), normalised and rotated."""
        source = x if context is None else context
        if mem is not None:
            source = ops.concat((computable(mem), computable(source)), 1).astype(x.dtype)
        tokens, keys = x.shape[1], source.shape[1]
        query = self.to_q(x).reshape((x.shape[0], tokens, self.heads, self.dim_head))
        key = self.to_k(source).reshape((x.shape[0], keys, self.kv_heads, self.dim_head))
        value = key
        if not self.shared_kv:
            value = self.to_v(source).reshape((x.shape[0], keys, self.kv_heads, self.value_dim))
        if self.normalises:
            query = self.normalised(query, self.qk_norm_q_scale)
            key = self.normalised(key, self.qk_norm_k_scale)
        query, key = rotated(query, keys - tokens, keys, rotation, False), rotated(key, 0, keys, rotation, True)
        if cache is not None:
            key, value = _after(cache[0], key), _after(cache[1], value)
        return query, key, value

    def normalised(self, x, scale):
        """Each group of features of a head at length 1, times the learned factors."""
        grouped = x.reshape(x.shape[:-1] + (self.groups, self.dim_head // self.groups))
        unit = l2_normalised(grouped).reshape(x.shape)
        if scale is not None:
            unit = unit * scale
        return unit.astype(x.dtype)

    def learned_key(self):
        """Learned keys (Hkv, M, D) as they meet the queries, or None."""
        if not self.learns:
            return None
        if not self.normalises:
            return self.mem_k + 0.0
        scale = self.qk_norm_k_scale
        return self.normalised(self.mem_k, None if scale is None else ops.expand_dims(scale, 1))

    @staticmethod
    def visible(shape, length, crosses, mask, context_mask, attn_mask, heads):
        """The keep mask, 0 or 1, (1|B, 1|H, 1|N, S), or None. Tokens in front (mems) are all kept."""
        of_keys = context_mask if crosses else mask
        found = None
        if of_keys is not None:
            known = length if crosses else shape[1]
            _check_key_mask("context_mask" if crosses else "mask", of_keys.shape, shape[0], known)
            found = (of_keys.astype(mstype.float32) > 0).astype(mstype.float32)
            if known < length:
                found = ops.concat((ops.ones((shape[0], length - known), mstype.float32), found), 1)
            found = found.reshape((shape[0], 1, 1, length))
        if attn_mask is None:
            return found
        full = _attn_mask_shape(attn_mask.shape, shape[0], heads, shape[1], length)
        kept = (attn_mask.astype(mstype.float32) > 0).astype(mstype.float32).reshape(full)
        return kept if found is None else found * kept

    def project(self, x, out, mask):
        """Scaled and gated heads (B, N, H, Dv) -> (B, N, dim)."""
        if self.scales_heads:
            out = out * ops.expand_dims(self.head_scale, 1).astype(out.dtype)
        out = out.reshape((x.shape[0], x.shape[1], self.heads * self.value_dim))
        if self.gates:
            out = out * ops.sigmoid(computable(self.to_v_gate(x))).astype(out.dtype)
        out = self.to_out(out)
        if self.on_attn:
            wide = computable(out)
            out = (wide[..., : self.dim] * ops.sigmoid(wide[..., self.dim :])).astype(out.dtype)
        if mask is not None:
            out = out * ops.expand_dims((mask.astype(mstype.float32) > 0).astype(out.dtype), -1)
        return out

    def explain(self):
        """The path of the computation, and why: 'fused: ...', 'formed: ...' or 'mechanism: ...'."""
        return str(self.options.path)

    def extend_repr(self):
        """The options, for ``print``."""
        return signature(self.options)


def _mechanism(made, engine):
    """The Cell of ``attention=``: a ``FlexibleAttention`` of that name, or the one that was given."""
    if isinstance(made.attention, nn.Cell):
        return made.attention
    if not isinstance(made.attention, str):
        need = "None, a name of MechanismRegistry or a FlexibleAttention"
        raise invalid_type(shared.LAYER, "attention", need, repr(made.attention))
    options = dict(made.attention_options or {})
    if made.max_attend_past is not None:
        options["local_window_size"] = (made.max_attend_past, None)
    scale = made.scale if made.qk_norm else None
    return FlexibleAttention(
        made.attention, made.heads, made.dim_head, made.key_heads, scale, float(made.dropout), made.causal,
        engine=engine, **options
    )  # fmt: skip


def _beside(old, new):
    """Features of earlier layers, then those of this one."""
    return ops.concat((computable(old), computable(new)), -1).astype(new.dtype)


def _after(old, new):
    """(B, S, H, D) of a cache moved towards position 0 by the tokens that enter at its end."""
    return ops.concat((computable(old)[:, new.shape[1] :], computable(new)), 1).astype(new.dtype)


@constexpr
def _check_inputs(x, context, dim):
    shared.check_inputs(x, context, dim)


@constexpr
def _check_key_mask(name, shape, batch, length):
    shared.check_key_mask(name, shape, batch, length)


@constexpr
def _attn_mask_shape(shape, batch, heads, q_len, kv_len):
    return shared.attn_mask_shape(shape, batch, heads, q_len, kv_len)
