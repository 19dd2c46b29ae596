"""The blockwise parallel transformer block in JAX: a query chunk goes through attention, then through the network.

Scan over query chunks [ core call over all keys -> projection -> residual -> feed-forward network -> residual ].
"""

import jax
import jax.numpy as jnp

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms import blockwise as shared
from flash_attention.core.spec import Operands
from flash_attention.core.validation import Options, check_bool
from flash_attention.jax.functional import attend, checked_mask
from flash_attention.jax.mechanisms.blockwise import engine_for
from flash_attention.jax.mechanisms.chunks import over_chunks, rematerialised
from flash_attention.jax.mechanisms.layers import Layer, dense, dense_init, dropped, layer_norm, norm_init, seed_of
from flash_attention.jax.mechanisms.positions import rotary

LAYER = "BlockwiseParallelJax"
_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class BlockwiseParallelJax(Layer):
    """Transformer block whose memory is that of one query chunk (Liu and Abbeel, 2023).

    ``h = x + dropout(attention(LN1(x)) Wo)``, then ``h + dropout(fc_out(act(fc_in(LN2(h)))))``; rotary positions.

    Args:
        q_chunk_size, k_chunk_size: most queries and keys of a chunk; None = all. The former also chunks the network.
        hidden_size: E; num_heads: a divisor of it.
        rotary_dim: features of a head that are rotated, interleaved pairs; None or 0 = all.
        intermediate_size: width of the network.
        layer_norm_epsilon: of both norms.
        activation_function: 'gelu' (exact), 'gelu_new' (tanh), 'relu', 'silu' = 'swish', 'quick_gelu'.
        attn_pdrop: dropout on the softmax weights; resid_pdrop: on both branches.
        max_position_embeddings: kept as an attribute; any position works, angles are computed.
        dtype: of the computation and the output; parameters are float32.
        causal: key j visible to query i only when ``j <= i``.
        policy: name of a ``jax.checkpoint_policies`` member: what of a query chunk is kept for the backward pass;
            None = everything but the scores.
        prevent_cse: as in ``jax.checkpoint``.
        float32_logits: queries, keys and values enter the attention in float32.

    Attributes:
        cache: None, or the keys and values written so far; set it to None to forget them.

    Raises:
        KeyError: an unknown policy. ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self,
        q_chunk_size,
        k_chunk_size,
        hidden_size,
        num_heads,
        rotary_dim,
        intermediate_size,
        layer_norm_epsilon=1e-5,
        activation_function="gelu",
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        max_position_embeddings=1024,
        dtype=jnp.float32,
        causal=True,
        policy="nothing_saveable",
        prevent_cse=False,
        float32_logits=False,
    ):
        shared.check_policy(LAYER, policy, prevent_cse)
        sizes = {
            "q_chunk_size": q_chunk_size,
            "k_chunk_size": k_chunk_size,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": max_position_embeddings,
        }
        rates = {"attn_pdrop": attn_pdrop, "resid_pdrop": resid_pdrop}
        flags = {"causal": causal, "float32_logits": float32_logits}
        self._rotated = shared.check_block(
            LAYER, sizes, rates, flags, rotary_dim, layer_norm_epsilon, activation_function
        )
        self.q_chunk_size, self.k_chunk_size = q_chunk_size, k_chunk_size
        self.hidden_size, self.num_heads, self.rotary_dim = hidden_size, num_heads, rotary_dim
        self.intermediate_size, self.layer_norm_epsilon = intermediate_size, layer_norm_epsilon
        self.activation_function = activation_function
        self.attn_pdrop, self.resid_pdrop = float(attn_pdrop), float(resid_pdrop)
        self.max_position_embeddings, self.dtype, self.causal = max_position_embeddings, dtype, causal
        self.policy, self.prevent_cse, self.float32_logits = policy, prevent_cse, float32_logits
        self.cache = None
        self._compiled = jax.jit(self.apply, static_argnames="deterministic")

    def init(self, key):
        """New parameters: 'norm', 'to_q', 'to_k', 'to_v', 'to_out' (weights only), 'ffn': 'norm', 'fc_in', 'fc_out'."""
        width, inner = self.hidden_size, self.intermediate_size
        *keys, in_key, out_key = jax.random.split(key, 6)
        params = {
            name: dense_init(k, width, width, bias=False, std=width**-0.5)
            for k, name in zip(keys, ("to_q", "to_k", "to_v", "to_out"))
        }
        fc_in = dense_init(in_key, width, inner, std=width**-0.5)
        fc_out = dense_init(out_key, inner, width, std=inner**-0.5)
        return dict(params, norm=norm_init(width), ffn={"norm": norm_init(width), "fc_in": fc_in, "fc_out": fc_out})

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        deterministic=True,
        init_cache=False,
        *,
        dropout_rng=None,
        params=None,
    ):
        """Run the block; with a cache, on the tokens that follow those in it.

        Args:
            hidden_states: (B, S, hidden_size), any S.
            attention_mask: keep where > 0; (B, Nk), (1|B, 1, 1, Nk) or (1|B, 1|H, S, Nk); None = all. Nk is S, or the
                cache's length.
            position_ids: (1|B, S) integers, positions of the tokens; None = from 0, or from the cache's index on.
            deterministic: False = training: dropout acts and needs ``dropout_rng``, a PRNG key.
            init_cache: begin a cache of S places, empty, and run as without one.
            params: used instead of the block's own.

        Returns:
            (B, S, hidden_size) in ``dtype``.
        """
        for name, flag in (("init_cache", init_cache), ("deterministic", deterministic)):
            check_bool(LAYER, name, flag)
        params = self.params if params is None else params
        attention_mask = checked_mask(LAYER, attention_mask, "attention_mask")
        call = (params, hidden_states, attention_mask, position_ids, deterministic)
        if init_cache:
            shared.check_hidden(LAYER, hidden_states.shape, self.hidden_size)
            self.cache = self.new_cache(*hidden_states.shape[:2])
            return self._compiled(*call, dropout_rng=dropout_rng)[0]
        if self.cache is not None:
            shared.check_room(LAYER, int(self.cache["index"]), hidden_states.shape[1], self.cache["key"].shape[2])
        out, self.cache = self._compiled(*call, dropout_rng=dropout_rng, cache=self.cache)
        return out

    __call__ = forward

    def new_cache(self, batch, length):
        """An empty cache: ``{"key": (B, H, length, D), "value": the same, "index": 0}``, in ``dtype``."""
        buffer = jnp.zeros((batch, self.num_heads, length, self.hidden_size // self.num_heads), self.dtype)
        return {"key": buffer, "value": buffer, "index": jnp.int32(0)}

    def apply(
        self,
        params,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        deterministic=True,
        *,
        dropout_rng=None,
        cache=None,
    ):
        """:meth:`forward` as a pure function, for jit: ``(out, cache)``, the cache with the new tokens, or None."""
        shared.check_hidden(LAYER, hidden_states.shape, self.hidden_size)
        batch, length = hidden_states.shape[:2]
        index = jnp.int32(0) if cache is None else cache["index"]
        x = hidden_states.astype(self.dtype)
        query, key, value = self._heads(params, x, position_ids, index)
        if cache is not None:
            cache = _written(cache, key, value, index)
            key, value = cache["key"], cache["value"]
        if self.float32_logits:
            query, key, value = (y.astype(jnp.promote_types(y.dtype, jnp.float32)) for y in (query, key, value))
        mask = self._mask(attention_mask, batch, length, key.shape[2])
        filled = None
        if cache is not None and not self.causal:
            filled = jnp.full((batch,), index + length, jnp.int32)
        by_row = mask is not None and mask.shape[2] > 1
        rates, seeds = self._dropout(deterministic, dropout_rng)
        size = shared.check_chunk(LAYER, "q_chunk_size", self.q_chunk_size, length)
        options = Options(
            is_causal=self.causal,
            dropout_rate=rates[0],
            layout="BNSD",
            tile=(size, shared.check_chunk(LAYER, "k_chunk_size", self.k_chunk_size, key.shape[2])),
        )

        def chunk(carry, start, arrays):
            x, query, rows = arrays
            first = start + index
            zero = jnp.int32(0)
            operands = Operands(
                mask=jnp.swapaxes(rows, 1, 2) if by_row else mask,
                kv_lengths=filled,
                q_offset=first,
                dropout_seed=seeds[0],
                origin=jnp.stack([zero, zero, first, zero]),
            )
            query = jnp.swapaxes(query, 1, 2)
            attended = attend(LAYER, query, key, value, operands, options, engine_for(query))[0]
            attended = jnp.swapaxes(attended, 1, 2).reshape(x.shape)
            h = x + dropped(dense(params["to_out"], attended, self.dtype), rates[1], seeds[1], first)
            return carry, h + dropped(self.forward_ffn(h, params=params), rates[1], seeds[2], first)

        rows = jnp.swapaxes(mask, 1, 2) if by_row else None
        body = rematerialised(chunk, self.policy, self.prevent_cse)
        return over_chunks(body, (x, jnp.swapaxes(query, 1, 2), rows), size)[1], cache

    def forward_ffn(self, hidden_states, deterministic=True, *, params=None):
        """``fc_out(act(fc_in(LN2(h))))`` of (B, n, hidden_size): the network without its residual.

        Dropout of its output belongs to :meth:`forward`: with ``resid_pdrop``, deterministic=False is refused.
        """
        if not deterministic and self.resid_pdrop:
            raise invalid_value(LAYER, "deterministic", "True in forward_ffn", False, "Dropout acts in forward().")
        params = (self.params if params is None else params)["ffn"]
        hidden = layer_norm(params["norm"], hidden_states, self.layer_norm_epsilon, self.dtype)
        hidden = _ACTIVATIONS[self.activation_function](dense(params["fc_in"], hidden, self.dtype))
        return dense(params["fc_out"], hidden, self.dtype)

    def _heads(self, params, x, position_ids, index):
        """Rotated queries and keys, and values: (B, H, S, D)."""
        if position_ids is None:
            position_ids = (jnp.arange(x.shape[1], dtype=jnp.int32) + index)[None]
        shared.check_positions(LAYER, jnp.shape(position_ids), *x.shape[:2])
        normed = layer_norm(params["norm"], x, self.layer_norm_epsilon, self.dtype)
        query, key, value = (
            jnp.swapaxes(dense(params[name], normed, self.dtype).reshape(x.shape[:2] + (self.num_heads, -1)), 1, 2)
            for name in ("to_q", "to_k", "to_v")
        )
        positions = jnp.asarray(position_ids)[:, None]
        return rotary(query, positions, dims=self._rotated), rotary(key, positions, dims=self._rotated), value

    def _mask(self, attention_mask, batch, length, kv_len):
        """The keep mask, boolean (1|B, 1|H, 1|S, Nk), or None."""
        shape = None if attention_mask is None else jnp.shape(attention_mask)
        shape = shared.mask_shape(LAYER, shape, batch, self.num_heads, length, kv_len)
        if attention_mask is None:
            return None
        return (jnp.asarray(checked_mask(LAYER, attention_mask, "attention_mask")) > 0).reshape(shape)

    def _dropout(self, deterministic, rng):
        """``(attention's rate, the branches' rate), (three seeds or None)``."""
        rates = (0.0, 0.0) if deterministic else (self.attn_pdrop, self.resid_pdrop)
        if not any(rates):
            return rates, (None, None, None)
        seed_of(LAYER, rng)
        return rates, [seed_of(LAYER, key) for key in jax.random.split(rng, 3)]


def _written(cache, key, value, index):
    """The cache with new keys and values from ``index`` on."""
    place = (0, 0, index, 0)
    return {
        "key": jax.lax.dynamic_update_slice(cache["key"], key.astype(cache["key"].dtype), place),
        "value": jax.lax.dynamic_update_slice(cache["value"], value.astype(cache["value"].dtype), place),
        "index": index + key.shape[2],
    }
