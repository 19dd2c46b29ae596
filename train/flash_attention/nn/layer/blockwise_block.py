"""The blockwise parallel transformer block in MindSpore: attention and feed-forward network in chunks, with a cache."""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import blockwise as shared
from flash_attention.core.validation import check_bool
from flash_attention.nn.layer.blockwise import chunked_attention, over_chunks, tiled_options
from flash_attention.nn.layer.positions import Rotary
from flash_attention.nn.layer.projection import Norm, Projection
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import check_not_additive, computable, counted
from flash_attention.ops.host import is_eager

LAYER = "BlockwiseParallel"


class BlockwiseParallel(SeededCell):
    r"""Transformer block in chunks (Liu and Abbeel, 2023); ``BlockwiseParallelJax`` of the JAX side, same weights.

    ``h = x + dropout(attention(LN1(x)) Wo)``, then ``h + dropout(fc_out(act(fc_in(LN2(h)))))``; rotary positions.

    Args:
        q_chunk_size, k_chunk_size (int): most queries and keys of a chunk; None = all. The former also chunks the
            network.
        hidden_size (int): E.
        num_heads (int): a divisor of it.
        rotary_dim (int): features of a head that are rotated, interleaved pairs; None or 0 = all.
        intermediate_size (int): width of the network.
        layer_norm_epsilon (float): of both norms. Default: 1e-5.
        activation_function (str): 'gelu' (exact), 'gelu_new' (tanh), 'relu', 'silu' = 'swish', 'quick_gelu'.
            Default: 'gelu'.
        attn_pdrop (float): dropout on the softmax weights; in [0, 1), acts in training mode. Default: 0.0.
        resid_pdrop (float): dropout on both branches; likewise. Default: 0.0.
        max_position_embeddings (int): kept as an attribute; any position works, angles are computed. Default: 1024.
        dtype: of the computation and the output; parameters are float32. Default: float32.
        causal (bool): key j visible to query i only when ``j <= i``. Default: True.
        policy (str): 'nothing_saveable' computes a chunk of the network again in the backward pass, in graph mode; None
            and the other ``jax.checkpoint_policies`` keep what it needs. Scores are never kept.
            Default: 'nothing_saveable'.
        prevent_cse (bool): JAX's; recomputed operators are always kept apart here. Default: False.
        float32_logits (bool): queries, keys and values enter the attention in float32. Default: False.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.

    Inputs:
        - **hidden_states** (Tensor) - (B, S, hidden_size), any S.
        - **attention_mask** (Tensor) - keep where > 0; (B, Nk), (1|B, 1, 1, Nk) or (1|B, 1|H, S, Nk); Nk is S, or the
          cache's length. Default: None.
        - **position_ids** (Tensor) - (1|B, S) integers; None = from 0, or from the cache's index on. Default: None.
        - **cache** (tuple) - keys and values (B, H, L, D) and the int32 index of the next one, see ``new_cache``.
          Default: None.

    Outputs:
        Tensor (B, S, hidden_size) in ``dtype``; with a cache the pair (output, cache with the new tokens).

    Raises:
        KeyError: an unknown policy.
        ValueError, TypeError: sizes that do not fit.
    """

    def __init__(
        self, q_chunk_size, k_chunk_size, hidden_size, num_heads, rotary_dim, intermediate_size,
        layer_norm_epsilon=1e-5, activation_function="gelu", attn_pdrop=0.0, resid_pdrop=0.0,
        max_position_embeddings=1024, dtype=mstype.float32, causal=True, policy="nothing_saveable", prevent_cse=False,
        float32_logits=False, *, engine=None
    ):  # fmt: skip
        shared.check_policy(LAYER, policy, prevent_cse)
        sizes = {
            "q_chunk_size": q_chunk_size, "k_chunk_size": k_chunk_size, "hidden_size": hidden_size,
            "num_heads": num_heads, "intermediate_size": intermediate_size,
            "max_position_embeddings": max_position_embeddings,
        }  # fmt: skip
        rates = {"attn_pdrop": attn_pdrop, "resid_pdrop": resid_pdrop}
        flags = {"causal": causal, "float32_logits": float32_logits}
        rotated = shared.check_block(LAYER, sizes, rates, flags, rotary_dim, layer_norm_epsilon, activation_function)
        super().__init__(float(attn_pdrop))
        ENGINES.check_name(engine, LAYER)
        self.q_chunk_size, self.k_chunk_size = q_chunk_size, k_chunk_size
        self.hidden_size, self.num_heads, self.rotary_dim = hidden_size, num_heads, rotary_dim
        self.intermediate_size, self.layer_norm_epsilon = intermediate_size, layer_norm_epsilon
        self.activation_function, self.attn_pdrop, self.resid_pdrop = activation_function, attn_pdrop, resid_pdrop
        self.max_position_embeddings, self.dtype, self.causal = max_position_embeddings, dtype, causal
        self.policy, self.prevent_cse, self.float32_logits, self.engine = policy, prevent_cse, float32_logits, engine
        self.cache = None
        self.norm = Norm(hidden_size, layer_norm_epsilon)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Projection(hidden_size, hidden_size, False, dtype, hidden_size**-0.5) for _ in range(4)
        )
        self.rotary = Rotary(dims=rotated)
        self.ffn = _Network(hidden_size, intermediate_size, layer_norm_epsilon, activation_function, dtype)
        if shared.recomputes(policy):
            self.ffn.recompute()
        self.drop = nn.Dropout(p=float(resid_pdrop)) if resid_pdrop else None

    def construct(self, hidden_states, attention_mask=None, position_ids=None, cache=None):
        """Run the block; shapes and meaning of the inputs are in the class's documentation."""
        mask_shape = None if attention_mask is None else attention_mask.shape
        position_shape = None if position_ids is None else position_ids.shape
        places = None if cache is None else cache[0].shape[2]
        rate = self.dropout_rate if self.training else 0.0
        chunks = (self.q_chunk_size, self.k_chunk_size)
        mask_shape, size, options = _plan(
            hidden_states.shape, mask_shape, position_shape, places, self.hidden_size, self.num_heads, self.causal,
            rate, chunks,
        )  # fmt: skip
        x = hidden_states.astype(self.dtype)
        query, key, value = self.heads(x, position_ids, cache)
        offset, filled = None, None
        if cache is not None:
            offset = cache[2]
            cache = (_written(cache[0], key, offset), _written(cache[1], value, offset), offset + x.shape[1])
            key, value = cache[0], cache[1]
            if not self.causal:
                filled = ops.zeros((x.shape[0],), mstype.int32) + cache[2]
        if self.float32_logits:
            query, key, value = query.astype(mstype.float32), key.astype(mstype.float32), value.astype(mstype.float32)
        mask = None
        if attention_mask is not None:
            if is_eager():
                check_not_additive(LAYER, attention_mask)
            mask = (attention_mask.astype(mstype.float32) > 0).reshape(mask_shape)
        seed = self.next_seed(query) if rate > 0 else None
        attended = chunked_attention(
            LAYER, query, key, value, None, mask, filled, offset, seed, options, self.engine
        )  # fmt: skip
        attended = computable(attended).swapaxes(1, 2).reshape(x.shape)
        h = x + self.dropped(self.to_out(attended))
        out = h + self.dropped(over_chunks(self.ffn, h, size))
        if cache is None:
            return out
        return out, cache

    def forward(self, hidden_states, attention_mask=None, position_ids=None, init_cache=False):
        """The call with a cache that the block keeps itself, in ``cache``; PyNative, or around a compiled block.

        Args:
            hidden_states, attention_mask, position_ids (Tensor): as the inputs of the Cell.
            init_cache (bool): begin a cache of S places, empty, and run as without one. Default: False.

        Returns:
            Tensor (B, S, hidden_size).
        """
        check_bool(LAYER, "init_cache", init_cache)
        shared.check_hidden(LAYER, hidden_states.shape, self.hidden_size)
        if init_cache:
            self.cache = self.new_cache(hidden_states.shape[0], hidden_states.shape[1])
            return self(hidden_states, attention_mask, position_ids)
        if self.cache is None:
            return self(hidden_states, attention_mask, position_ids)
        shared.check_room(LAYER, int(self.cache[2].asnumpy()), hidden_states.shape[1], self.cache[0].shape[2])
        out, self.cache = self(hidden_states, attention_mask, position_ids, self.cache)
        return out

    def new_cache(self, batch, length):
        """An empty cache: (keys (B, H, length, D), values, index 0), in ``dtype``."""
        shape = (batch, self.num_heads, length, self.hidden_size // self.num_heads)
        return ops.zeros(shape, self.dtype), ops.zeros(shape, self.dtype), Tensor(0, mstype.int32)

    def forward_ffn(self, hidden_states):
        """``fc_out(act(fc_in(LN2(h))))`` of (B, n, hidden_size): the network without its residual and dropout."""
        return self.ffn(hidden_states)

    def dropped(self, x):
        """A branch after its dropout."""
        return x if self.drop is None else self.drop(x)

    def heads(self, x, position_ids, cache):
        """Rotated queries and keys, and values: (B, H, S, D)."""
        if position_ids is None:
            position_ids = ops.expand_dims(counted(x.shape[1]), 0)
            if cache is not None:
                position_ids = position_ids + cache[2]
        positions = ops.expand_dims(position_ids, 1)
        normed = self.norm(x)
        shape = x.shape[:2] + (self.num_heads, self.hidden_size // self.num_heads)
        query = computable(self.to_q(normed)).reshape(shape).swapaxes(1, 2)
        key = computable(self.to_k(normed)).reshape(shape).swapaxes(1, 2)
        value = computable(self.to_v(normed)).reshape(shape).swapaxes(1, 2)
        query, key = self.rotary(query, positions), self.rotary(key, positions)
        return query.astype(self.dtype), key.astype(self.dtype), value.astype(self.dtype)


class _Network(nn.Cell):
    """``fc_out(act(fc_in(norm(x))))``."""

    def __init__(self, width, inner, epsilon, activation, dtype):
        super().__init__()
        self.norm = Norm(width, epsilon)
        self.fc_in = Projection(width, inner, dtype=dtype, std=width**-0.5)
        self.fc_out = Projection(inner, width, dtype=dtype, std=inner**-0.5)
        self.act = _ACTIVATIONS[activation]()
        self.dtype = dtype

    def construct(self, x):
        hidden = self.act(computable(self.fc_in(self.norm(x))))
        return self.fc_out(hidden.astype(self.dtype))


class _QuickGelu(nn.Cell):
    """``x * sigmoid(1.702 x)``."""

    def construct(self, x):
        return x * ops.sigmoid(1.702 * x)


class _Silu(nn.Cell):
    """``x * sigmoid(x)``."""

    def construct(self, x):
        return x * ops.sigmoid(x)


_ACTIVATIONS = {
    "gelu": lambda: nn.GELU(approximate=False),
    "gelu_new": lambda: nn.GELU(approximate=True),
    "relu": nn.ReLU,
    "silu": _Silu,
    "swish": _Silu,
    "quick_gelu": _QuickGelu,
}


def _written(buffer, new, index):
    """The buffer (B, H, L, D) with ``new`` (B, H, n, D) from ``index`` (a tensor) on."""
    rows = counted(buffer.shape[2]) - index
    inside = ops.logical_and(rows >= 0, rows < new.shape[2]).reshape((1, 1, -1, 1))
    rows = ops.clip_by_value(rows, Tensor(0, mstype.int32), Tensor(new.shape[2] - 1, mstype.int32))
    picked = ops.gather(computable(new), rows, 2)
    return ops.where(inside, picked, computable(buffer)).astype(buffer.dtype)


@constexpr
def _plan(hidden, mask, positions, places, width, heads, causal, rate, chunks):
    """``(4-D shape of the mask or (), tokens of a chunk, options of the core call)``; raises for wrong shapes."""
    shared.check_hidden(LAYER, hidden, width)
    batch, length = hidden[:2]
    kv_len = length if places is None else places
    mask = shared.mask_shape(LAYER, mask, batch, heads, length, kv_len)
    if positions is not None:
        shared.check_positions(LAYER, positions, batch, length)
    options = tiled_options(chunks, length, kv_len, is_causal=causal, dropout_rate=rate)
    return mask, shared.check_chunk(LAYER, "q_chunk_size", chunks[0], length), options
