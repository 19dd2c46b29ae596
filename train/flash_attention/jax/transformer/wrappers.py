"""Wrappers of a JAX stack: tokens or vectors in, absolute positions, memory tokens, logits out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.transformer import wrappers as shared
from flash_attention.core.transformer.layers import cache_refusal
from flash_attention.core.transformer.rules import make, signature
from flash_attention.core.validation import is_int
from flash_attention.jax.mechanisms.layers import dense, dense_init, dropped
from flash_attention.jax.transformer.layers import AttentionLayers
from flash_attention.jax.transformer.parts import Model, Seeds, norm, norm_init


class Inputs(NamedTuple):
    """What a wrapper hands to its stack beside the embedded tokens."""

    mask: Any = None
    context: Any = None
    context_mask: Any = None
    attn_mask: Any = None


class _Wrapper(Model):
    """Absolute positions, norm and dropout of embedded tokens; the stack; what a model says of itself."""

    def __init__(self, layer, options_class, options):
        self.attn_layers = options.pop("attn_layers", None)
        if not isinstance(self.attn_layers, AttentionLayers):
            need = "an Encoder, Decoder, CrossAttender or AttentionLayers"
            raise invalid_type(layer, "attn_layers", need, repr(self.attn_layers))
        self.options = make(options_class, layer, (), options)
        self.options.check_stack(self.layers)
        self.dtype = self.attn_layers.dtype
        self.embedding = shared.embedding_kind(self.options, self.layers)

    @property
    def layers(self):
        """The stack's ``LayersOptions``."""
        return self.attn_layers.stack.layers

    def _common_init(self, key):
        """'attn_layers', 'pos_emb', 'post_emb_norm'."""
        stack_key, position_key = jax.random.split(key)
        params, width = {"attn_layers": self.attn_layers.init(stack_key)}, self.options.width(self.layers)
        if self.embedding == "learned":
            params["pos_emb"] = {"weight": jax.random.normal(position_key, (self.options.max_seq_len, width))}
        elif self.embedding == "sinusoidal":
            params["pos_emb"] = {"scale": jnp.full(1, width**-0.5)}
        if self.options.post_emb_norm:
            params["post_emb_norm"] = norm_init("layernorm", width)
        return params

    def _positioned(self, params, x, pos, first):
        """x (B, N, width) plus its absolute embedding; token 0 stands at ``first`` unless ``pos`` says."""
        if self.embedding is None:
            if pos is not None:
                raise invalid_value(type(self).__name__, "pos", "left out without an absolute embedding", "an array")
            return x
        shared.check_length(type(self).__name__, self.embedding, x.shape[1], self.options.max_seq_len)
        positions = jnp.arange(x.shape[1]) + first if pos is None else jnp.asarray(pos)
        if self.embedding == "learned":
            table = params["pos_emb"]["weight"]
            return x + (table[positions] * table.shape[1] ** -0.5).astype(self.dtype)
        angles = positions[..., None] * jnp.asarray(shared.sinusoidal_frequencies(x.shape[-1]), x.dtype)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        return x + (waves * params["pos_emb"]["scale"]).astype(self.dtype)

    def _embedded(self, params, x, seed):
        """Norm and dropout of embedded tokens."""
        if self.options.post_emb_norm:
            x = norm("layernorm", params["post_emb_norm"], x, self.dtype)
        return dropped(x, self.options.emb_dropout, seed)

    def _seeds(self, deterministic, rng):
        stack = self.attn_layers.stack
        rates = (
            self.options.emb_dropout, stack.layers.layer_dropout, stack.attention.dropout, stack.feed_forward.dropout
        )  # fmt: skip
        return Seeds(type(self).__name__, not deterministic and any(rates), rng)

    def explain(self):
        """Which path each kind of attention takes, and why; see ``AttentionLayers.explain``."""
        return self.attn_layers.explain()

    def lines(self):
        """The wrapper, then its stack."""
        inside = ["  " + line for line in self.attn_layers.lines()]
        return ["{}({})".format(type(self).__name__, signature(self.options))] + inside


class TransformerWrapper(_Wrapper):
    """A transformer of tokens: embedding, positions, memory tokens, a stack, logits.

    Args:
        attn_layers: the stack, an :class:`Encoder`, :class:`Decoder` or another :class:`AttentionLayers`.
        options: see :class:`flash_attention.core.transformer.wrappers.TokenOptions`: ``num_tokens``, ``max_seq_len``,
            and the others, all by keyword. The dtype is the stack's.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, **options):
        super().__init__(shared.TOKENS, shared.TokenOptions, options)

    def init(self, key):
        """New parameters: 'token_emb', 'pos_emb', 'post_emb_norm', 'project_emb', 'memory_tokens', 'attn_layers',
        'to_logits', as far as the options ask for them."""
        options, dim = self.options, self.layers.dim
        width = options.width(self.layers)
        common_key, token_key, project_key, memory_key, logits_key = jax.random.split(key, 5)
        params = self._common_init(common_key)
        std = shared.token_std(width)
        params["token_emb"] = {"weight": std * jax.random.normal(token_key, (options.num_tokens, width))}
        if width != dim:
            params["project_emb"] = dense_init(project_key, width, dim)
        if options.memory_tokens:
            params["memory_tokens"] = jax.random.normal(memory_key, (options.memory_tokens, dim))
        if not options.tie_embedding:
            params["to_logits"] = dense_init(logits_key, dim, options.outputs)
        return params

    def __call__(
        self, x, *, mask=None, context=None, context_mask=None, attn_mask=None, return_embeddings=False,
        return_logits_and_embeddings=False, return_mems=False, mems=None, return_attn=False, prepend_embeds=None,
        sum_embeds=None, pos=None, cache=None, deterministic=True, dropout_rng=None, params=None,
    ):  # fmt: skip
        """Logits of tokens.

        Args:
            x: int (B, N).
            mask, context, context_mask, attn_mask: as in :class:`AttentionLayers`; memory tokens are always seen.
            return_embeddings: the stack's output instead of logits.
            return_logits_and_embeddings: the pair of both.
            return_mems: also the last ``max_mem_len`` hidden states before each self-attention, without gradient, the
                ``mems`` of the next call.
            return_attn: also the weights of every attention, (B, H, N, Nk) each: memory O(N * Nk).
            prepend_embeds: (B, P, dim), in front of the tokens, with outputs of their own; ``mask`` is (B, P + N) then.
            sum_embeds: (B, N, emb_dim), added to the embedded tokens.
            pos: int (N,) or (B, N), positions for the absolute embedding.
            cache: an int begins one with places for so many tokens, x being the first; then that of the call before,
                x being the tokens that follow. Also returned then; ValueError where options forbid one.
            deterministic: False = training: dropout acts and needs ``dropout_rng``, a PRNG key.
            params: used instead of the model's own.

        Returns:
            (B, N, num_tokens), or what was asked for; with return_mems, return_attn or a cache a pair.
        """
        params, options = self.params if params is None else params, self.options
        self._check_call(x, return_embeddings, return_logits_and_embeddings, return_mems, return_attn)
        if cache is not None:
            given = {"return_mems": return_mems, "return_attn": return_attn}
            arrays = {"mask": mask, "attn_mask": attn_mask, "mems": mems, "prepend_embeds": prepend_embeds}
            given.update((name, array is not None) for name, array in arrays.items())
            places, refusal = cache if is_int(cache) else None, cache_refusal(self.attn_layers.stack)
            shared.check_cache(shared.TOKENS, refusal, x.shape[1], places, given)
        seeds = self._seeds(deterministic, dropout_rng)
        first, memories = 0, options.memory_tokens
        if is_int(cache):
            cache = self.attn_layers.new_cache(x.shape[0], cache + memories)
        elif cache is not None:
            first, memories = cache["index"] - memories, 0
        embedded = params["token_emb"]["weight"][jnp.asarray(x)].astype(self.dtype)
        embedded = self._positioned(params, embedded, pos, first)
        if sum_embeds is not None:
            embedded = embedded + sum_embeds.astype(self.dtype)
        embedded = self._embedded(params, embedded, seeds.next())
        if "project_emb" in params:
            embedded = dense(params["project_emb"], embedded, self.dtype)
        if prepend_embeds is not None:
            embedded = jnp.concatenate([prepend_embeds.astype(self.dtype), embedded], 1)
        inputs = Inputs(mask, context, context_mask, attn_mask)
        if memories:
            embedded, inputs = self._with_memory(params, embedded, inputs)
        out, state = self.attn_layers.apply(
            params["attn_layers"], embedded, inputs.context, inputs.mask, inputs.context_mask, inputs.attn_mask,
            mems=mems, cache=cache, return_weights=return_attn, deterministic=deterministic,
            dropout_rng=seeds.next_key(),
        )  # fmt: skip
        out = out[:, memories:]
        result = out
        if not return_embeddings:
            logits = self._logits(params, out)
            result = (logits, out) if return_logits_and_embeddings else logits
        if return_mems:
            return result, self._mems(state.hiddens, mems)
        if return_attn:
            return result, state.weights
        return result if cache is None else (result, state.cache)

    def _check_call(self, x, embeddings, both, mems, attn):
        flags = {"return_embeddings": embeddings, "return_logits_and_embeddings": both}
        shared.check_flags(shared.TOKENS, flags)
        shared.check_flags(shared.TOKENS, {"return_mems": mems, "return_attn": attn})
        if jnp.ndim(x) != 2 or not jnp.issubdtype(jnp.asarray(x).dtype, jnp.integer):
            raise invalid_type(shared.TOKENS, "x", "an int array of shape (B, N)", "shape {}".format(np.shape(x)))
        if mems and not self.options.max_mem_len:
            need = "False when max_mem_len is 0 (nothing would be kept)"
            raise invalid_value(shared.TOKENS, "return_mems", need, True)

    def _memory(self, params, batch):
        tokens = params["memory_tokens"].astype(self.dtype)
        return jnp.broadcast_to(tokens, (batch,) + tokens.shape)

    def _with_memory(self, params, x, inputs):
        """Learned tokens in front; no mask hides them, and ``attn_mask`` lets them see one another and all keys."""
        count = self.options.memory_tokens
        mask, attn_mask = inputs.mask, inputs.attn_mask
        if mask is not None:
            mask = jnp.pad(jnp.asarray(mask) > 0, ((0, 0), (count, 0)), constant_values=True)
        if attn_mask is not None:
            before = [(0, 0)] * (jnp.ndim(attn_mask) - 2) + [(count, 0)] * 2
            attn_mask = jnp.pad(jnp.asarray(attn_mask) > 0, before, constant_values=True)
        return jnp.concatenate([self._memory(params, x.shape[0]), x], 1), inputs._replace(
            mask=mask, attn_mask=attn_mask
        )

    def _logits(self, params, out):
        if self.options.tie_embedding:
            return dense(params["token_emb"], out, self.dtype)
        return dense(params["to_logits"], out, self.dtype)

    def _mems(self, hiddens, mems):
        before = mems or [None] * len(hiddens)
        joined = (new if old is None else jnp.concatenate([old, new], 1) for old, new in zip(before, hiddens))
        return [jax.lax.stop_gradient(x[:, -self.options.max_mem_len :]) for x in joined]


class ContinuousTransformerWrapper(_Wrapper):
    """A transformer of vectors: projection, positions, a stack, projection.

    Args:
        attn_layers: the stack, an :class:`Encoder`, :class:`Decoder` or another :class:`AttentionLayers`.
        options: see :class:`flash_attention.core.transformer.wrappers.ContinuousOptions`: ``max_seq_len``, ``dim_in``,
            ``dim_out``, and the others, all by keyword. The dtype is the stack's.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, **options):
        super().__init__(shared.CONTINUOUS, shared.ContinuousOptions, options)

    def init(self, key):
        """New parameters: 'project_in', 'pos_emb', 'post_emb_norm', 'attn_layers', 'project_out'."""
        common_key, in_key, out_key = jax.random.split(key, 3)
        params, dim = self._common_init(common_key), self.layers.dim
        if self.options.dim_in is not None:
            params["project_in"] = dense_init(in_key, self.options.dim_in, dim)
        if self.options.dim_out is not None:
            params["project_out"] = dense_init(out_key, dim, self.options.dim_out)
        return params

    def __call__(
        self, x, *, mask=None, context=None, context_mask=None, attn_mask=None, return_embeddings=False,
        return_attn=False, prepend_embeds=None, pos=None, deterministic=True, dropout_rng=None, params=None,
    ):  # fmt: skip
        """(B, N, dim_in) -> (B, N, dim_out); arguments as in :class:`TransformerWrapper`."""
        params = self.params if params is None else params
        shared.check_flags(shared.CONTINUOUS, {"return_embeddings": return_embeddings})
        shared.check_flags(shared.CONTINUOUS, {"return_attn": return_attn})
        width = self.options.dim_in or self.layers.dim
        if jnp.ndim(x) != 3 or x.shape[2] != width:
            need = "of shape (B, N, {})".format(width)
            raise invalid_value(shared.CONTINUOUS, "x", need, "shape {}".format(jnp.shape(x)))
        seeds = self._seeds(deterministic, dropout_rng)
        x = dense(params["project_in"], x, self.dtype) if "project_in" in params else x.astype(self.dtype)
        x = self._embedded(params, self._positioned(params, x, pos, 0), seeds.next())
        if prepend_embeds is not None:
            x = jnp.concatenate([prepend_embeds.astype(self.dtype), x], 1)
        out, state = self.attn_layers.apply(
            params["attn_layers"], x, context, mask, context_mask, attn_mask, return_weights=return_attn,
            deterministic=deterministic, dropout_rng=seeds.next_key(),
        )  # fmt: skip
        if "project_out" in params and not return_embeddings:
            out = dense(params["project_out"], out, self.dtype)
        return (out, state.weights) if return_attn else out
