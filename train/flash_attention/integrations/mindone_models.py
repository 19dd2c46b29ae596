"""Attention classes for the models of mindone that have no registry. Imported by :func:`mindone.enable` alone.

Each is the library's class (its weights, its arguments) with another ``construct``: projections, cache, then one call
of :func:`mindone.attend`.
"""

from mindone.transformers.cache_utils import DynamicCache
from mindone.transformers.models.bloom import modeling_bloom
from mindone.transformers.models.falcon import modeling_falcon
from mindone.transformers.models.gpt2 import modeling_gpt2
from mindone.transformers.models.llama import modeling_llama
from mindone.transformers.models.mistral import modeling_mistral
from mindone.transformers.models.mpt import modeling_mpt
from mindspore import ops

from flash_attention.integrations.mindone import attend, refuse, short_mask

_SHORT_MASKS = (
    modeling_llama.LlamaModel,
    modeling_mistral.MistralModel,
    modeling_falcon.FalconModel,
    modeling_bloom.BloomModel,
)


class GPT2Attention(modeling_gpt2.GPT2Attention):
    """GPT-2: causal by itself, an additive padding mask (B, 1, 1, Sk) beside it."""

    engine = None

    def _attn(self, query, key, value, attention_mask=None, head_mask=None):
        refuse(("head_mask",), (head_mask is not None,))
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            scale = scale / (self.layer_idx + 1)
        out = attend(
            query,
            key,
            value,
            attention_mask,
            scale=scale,
            causal=not self.is_cross_attention,
            dropout=self.attn_dropout.p if self.training else 0.0,
            engine=self.engine,
        )
        return out.swapaxes(1, 2), None

    _upcast_and_reordered_attn = _attn  # statistics are float32 in any case

    def construct(self, hidden_states, layer_past=None, attention_mask=None, head_mask=None, encoder_hidden_states=None,
                  encoder_attention_mask=None, use_cache=False, output_attentions=False):  # fmt: skip
        """As the library's, which calls ``_attn``; the weights cannot be asked for."""
        refuse(("output_attentions",), (output_attentions,))
        return super().construct(
            hidden_states,
            layer_past,
            attention_mask,
            head_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            use_cache,
        )


class MptAttention(modeling_mpt.MptAttention):
    """MPT: ALiBi as a bias (N, 1, longest), a bool mask (B, 1, Sq, Sk) that is True where it hides, never the past."""

    engine = None

    def construct(self, hidden_states, position_bias, past_key_value=None, attention_mask=None):
        """``(output, None, (key, value))``."""
        batch, length = hidden_states.shape[:2]
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        shape = (batch, length, self.n_heads, self.head_dim)
        query, key, value = (x.reshape(shape).swapaxes(1, 2) for x in mixed.chunk(3, 2))
        if past_key_value:
            key, value = ops.cat((past_key_value[0], key), 2), ops.cat((past_key_value[1], value), 2)
        bias = None if position_bias is None else position_bias[None, :, :, -key.shape[2] :]
        out = attend(
            query,
            key,
            value,
            None if attention_mask is None else ops.logical_not(attention_mask),
            bias,
            scale=self.softmax_scale,
            causal=attention_mask is not None,
            dropout=self.attn_dropout_p if self.training else 0.0,
            engine=self.engine,
        )
        return self.out_proj(out.reshape(batch, length, -1)), None, (key, value)


class FalconAttention(modeling_falcon.FalconAttention):
    """Falcon: rotary positions, or ALiBi that the model writes into the mask (B, N, Sq, Sk) and gives beside it too.

    The library's own attention adds both, so ALiBi counts twice there; here it does likewise.
    """

    engine = None

    def construct(self, hidden_states, alibi, attention_mask, position_ids=None, layer_past=None, head_mask=None,
                  use_cache=False, output_attentions=False, cache_position=None, position_embeddings=None):  # fmt: skip
        """``(output, layer_past)``."""
        refuse(("output_attentions", "head_mask"), (output_attentions, head_mask is not None))
        batch, length = hidden_states.shape[:2]
        query, key, value = (x.swapaxes(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        rotary = {}
        if alibi is None:
            cos, sin = position_embeddings
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, cos, sin)
            rotary = {"sin": sin, "cos": cos}
        if layer_past is not None:
            rotary["cache_position"] = cache_position
            key, value = layer_past.update(key, value, self.layer_idx, rotary)
        out = attend(
            query,
            key,
            value,
            attention_mask,
            None if alibi is None else alibi.reshape(batch, self.num_heads, 1, -1) * self.inv_norm_factor,
            scale=self.inv_norm_factor,
            causal=attention_mask is None or attention_mask.ndim == 2,
            dropout=self.attention_dropout.p if self.training and alibi is not None else 0.0,  # as in the library
            engine=self.engine,
        )
        return self.dense(out.reshape(batch, length, -1)), layer_past


class BloomAttention(modeling_bloom.BloomAttention):
    """BLOOM: ALiBi as slope times key position, (B * N, 1, Sk); the residual is added inside."""

    engine = None

    def construct(self, hidden_states, residual, alibi, attention_mask, layer_past=None, head_mask=None,
                  use_cache=False, output_attentions=False, cache_position=None):  # fmt: skip
        """``(output, layer_past)``."""
        exact = self.slow_but_exact and self.pretraining_tp > 1
        refuse(("output_attentions", "head_mask", "slow_but_exact"), (output_attentions, head_mask is not None, exact))
        batch, length = hidden_states.shape[:2]
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx, {"cache_position": cache_position})
        out = attend(
            query,
            key,
            value,
            attention_mask,
            alibi.reshape(batch, self.num_heads, 1, -1),
            scale=self.inv_norm_factor,
            causal=attention_mask is None or attention_mask.ndim == 2,
            dropout=self.attention_dropout.p if self.training else 0.0,
            engine=self.engine,
        )
        out = self.dense(out.reshape(batch, length, -1))
        return modeling_bloom.dropout_add(out, residual, self.hidden_dropout, self.training), layer_past


def patch(patches, name, engine):
    """Make models whose configuration names ``name`` build these classes, and short masks."""
    for table, ours in (
        (modeling_gpt2.GPT2_ATTENTION_CLASSES, GPT2Attention),
        (modeling_falcon.FALCON_ATTENTION_CLASSES, FalconAttention),
    ):
        patches.put(table, name, _with_engine(ours, engine))
    for module, ours in ((modeling_mpt, MptAttention), (modeling_bloom, BloomAttention)):
        theirs = getattr(module, ours.__name__)
        patches.set(module, ours.__name__, _chooser(theirs, _with_engine(ours, engine), name))
    for model in _SHORT_MASKS:
        patches.set(model, "_update_causal_mask", short_mask(model._update_causal_mask, name, DynamicCache))


def _with_engine(attention, engine):
    """Builds ``attention`` with that engine. No subclass: in a graph, ``super()`` means that of the object's class."""

    def build(*arguments, **keywords):
        made = attention(*arguments, **keywords)
        made.engine = engine
        return made

    return build


def _chooser(theirs, ours, name):
    def attention(config, *arguments, **keywords):
        chosen = ours if config._attn_implementation == name else theirs
        return chosen(config, *arguments, **keywords)

    return attention
