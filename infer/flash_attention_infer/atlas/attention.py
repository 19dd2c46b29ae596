"""AtlasAttention: attention over a cache by the vendor's operators. From documentation only, not run on a device.

mapping (decisions) -> **tensors and the call** (this file). What is added to the operators: rows of padding become 0,
and sinks join through the LSE. Keys of a *view* are gathered in front of the call, those of the *pool* never move.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.ops.portable.forward import with_sinks
from flash_attention_infer.atlas.mapping import COMPACT, INCRE, NO_TOKENS, PAGED, PROMPT, CacheCall, map_call, refused
from flash_attention_infer.core.config import check_call, left_window
from flash_attention_infer.nn.storage import span

LAYER = "AtlasAttention"


class AtlasAttention(nn.Cell):
    """:class:`~flash_attention_infer.nn.CachedAttention` on Atlas A2 and A3; same inputs and output, without splits.

    Args:
        cache (LayerCache): the layer's pool, written in place.
        heads (int): query heads.
        scale, local_window_size, logits_soft_cap: as there.
        lite (bool): the graph is exported for MindSpore Lite: ReshapeAndCache and PagedAttention where they serve.

    Raises:
        UnsupportedError: no operator serves the call, with the reason.
    """

    def __init__(self, cache, heads, scale=None, local_window_size=None, logits_soft_cap=None, lite=False):
        super().__init__(auto_prefix=False)
        _, self.block_size, self.kv_heads, self.head_dim = cache.key.shape
        self.cache, self.heads, self.lite = cache, heads, lite
        self.scale = float(scale if scale is not None else self.head_dim**-0.5)
        self.window, self.soft_cap = local_window_size, logits_soft_cap
        self.triangle = Tensor(np.triu(np.ones((COMPACT, COMPACT), np.uint8), 1))
        if lite:
            from mindspore.ops.operations.nn_ops import PagedAttention, ReshapeAndCache

            self.paged, self.put = PagedAttention(heads, self.scale, self.kv_heads), ReshapeAndCache()

    def construct(
        self, query, key, value, starts, counts, slots, tables, history=None, sink_slots=None, alibi_slopes=None,
        sinks=None, fresh=False,
    ):  # fmt: skip
        batch, tokens = slots.shape
        _check(query.shape, key.shape, value.shape, slots.shape, self.cache.key.shape)
        window = _window(self.window, None if history is None else history.shape[1])
        given = (tokens, bool(fresh), history is not None, alibi_slopes is not None, sinks is not None)
        options = (self.heads, self.kv_heads, self.head_dim, self.block_size, self.scale, self.soft_cap, self.lite)
        operator, keys, mask, scales = _choose(str(query.dtype), str(self.cache.rounded), given, window, options)
        old = self.old(starts, history, sink_slots, query.dtype)
        held = self.written(slots, key, value, query.dtype)
        lengths = ops.maximum(starts + counts, ops.ones_like(starts))  # the operators take no empty sequence
        rows = ops.reshape(starts, (-1, 1)) + span(0, tokens)
        if keys == "pool":
            position = span(0, tables.shape[1] * self.block_size)
            shift = self.shift(rows, position, alibi_slopes, query.dtype)
            hidden = None if mask is None else self.hidden(rows, position, window)[:, 0]
            out, lse = self.one_token(operator, query, tables, lengths, hidden, shift, scales, sinks is not None)
        elif operator == PROMPT:
            out, lse = self.prompt(query, held, counts, self.shift(rows, rows, alibi_slopes, query.dtype), window), None
        else:
            held, position, first = self.view(held, old, tables, sink_slots, starts, lengths, history, fresh)
            shift = self.shift(rows, position, alibi_slopes, query.dtype)
            hidden = self.hidden(rows, position, window)
            if history is not None:
                hidden = self.ring_hidden(
                    hidden, rows, position, first, 0 if sink_slots is None else sink_slots.shape[1]
                )
            out, lse = self.fused(query, held, ops.expand_dims(hidden, 1), shift, sinks is not None)
        out = ops.reshape(out, (batch, tokens, self.heads, self.head_dim))
        if sinks is not None:
            out = _joined(out, lse, sinks)
        padding = ops.reshape(span(0, tokens) >= ops.reshape(counts, (-1, 1)), (batch, tokens, 1, 1))
        return ops.where(padding, ops.zeros_like(out), out)

    # --- the operators ----------------------------------------------------------------------------
    def prompt(self, query, held, counts, shift, window):
        """New sequences: their own tokens, causal."""
        pre, mode = (NO_TOKENS, 2) if window is None else (window[0], 4)
        lengths = ops.maximum(counts, ops.ones_like(counts)).astype(mstype.int64)
        return ops.prompt_flash_attention(
            self.flat(query), self.flat(held[0]), self.flat(held[1]), attn_mask=self.triangle,
            actual_seq_lengths=lengths, actual_seq_lengths_kv=lengths, pse_shift=shift, num_heads=self.heads,
            scale_value=self.scale, pre_tokens=pre, next_tokens=0, input_layout="BSH",
            num_key_value_heads=self.kv_heads, sparse_mode=mode,
        )  # fmt: skip

    def one_token(self, operator, query, tables, lengths, hidden, shift, scales, with_lse):
        """One token a sequence over the pool: ``(out, lse or None)``."""
        q, key, value = self.flat(query), self.flat(self.cache.key), self.flat(self.cache.value)
        if operator == PAGED:
            return self.paged(query[:, 0], self.cache.key, self.cache.value, tables, lengths), None
        lengths = lengths.astype(mstype.int64)
        if operator == INCRE:
            out = ops.incre_flash_attention(
                q, [key], [value], attn_mask=hidden, actual_seq_lengths=lengths, pse_shift=shift, block_table=tables,
                num_heads=self.heads, input_layout="BSH", scale_value=self.scale, num_key_value_heads=self.kv_heads,
                block_size=self.block_size,
            )  # fmt: skip
            return out, None
        return ops.fused_infer_attention_score(
            q, key, value, pse_shift=shift, atten_mask=hidden, actual_seq_lengths_kv=lengths,
            antiquant_scale=self.scales(tables) if scales else None, block_table=tables, num_heads=self.heads,
            scale=self.scale, input_layout="BSH", num_key_value_heads=self.kv_heads, block_size=self.block_size,
            antiquant_mode=1 if scales else 0, softmax_lse_flag=with_lse,
        )  # fmt: skip

    def fused(self, query, held, hidden, shift, with_lse):
        """Any tokens over gathered keys with an explicit mask: ``(out, lse)``."""
        return ops.fused_infer_attention_score(
            self.flat(query), self.flat(held[0]), self.flat(held[1]), pse_shift=shift, atten_mask=hidden,
            num_heads=self.heads, scale=self.scale, input_layout="BSH", num_key_value_heads=self.kv_heads,
            sparse_mode=1, inner_precise=2 if query.shape[1] > 1 else 0, softmax_lse_flag=with_lse,
        )  # fmt: skip

    # --- their tensors ----------------------------------------------------------------------------
    def written(self, slots, key, value, dtype):
        """Write the new tokens; gives them as the cache holds them, in ``dtype``."""
        new_key, key_scale = self.cache.encode(key)
        new_value, value_scale = self.cache.encode(value)
        if self.lite and str(self.cache.rounded) == "Float16":
            self.put_tokens(slots, new_key, new_value)
        else:
            self.cache.write(slots, new_key, key_scale, new_value, value_scale)
        return self.cache.decode(new_key, key_scale, dtype), self.cache.decode(new_value, value_scale, dtype)

    @staticmethod
    def flat(x):
        """(.., .., N, D) -> (.., .., N * D), the operators' BSH."""
        return ops.reshape(x, x.shape[:2] + (-1,))

    def old(self, starts, history, sink_slots, dtype):
        """Keys and values of the ring's window, before the step overwrites them; None without a ring."""
        if history is None:
            return None
        there = self.before(starts, history) >= (0 if sink_slots is None else sink_slots.shape[1])
        return self.cache.read_slots(history, there, dtype)

    def put_tokens(self, slots, key, value):
        """ReshapeAndCache; padding goes to the block for it."""
        slots = ops.reshape(slots, (-1,))
        slots = ops.where(slots < 0, ops.full_like(slots, self.cache.scratch), slots)
        tokens = (-1, self.kv_heads, self.head_dim)
        self.put(ops.reshape(key, tokens), ops.reshape(value, tokens), self.cache.key, self.cache.value, slots)

    def scales(self, tables):
        """antiquant_scale: float32 (2, B, S) of the blocks."""
        shape = (1, tables.shape[0], -1)
        pair = (ops.gather(self.cache.key_scale, tables, 0), ops.gather(self.cache.value_scale, tables, 0))
        return ops.concat((ops.reshape(pair[0], shape), ops.reshape(pair[1], shape)), 0)

    def view(self, held, old, tables, sink_slots, starts, lengths, history, fresh):
        """Gathered keys (B, S, K, D) twice, their positions (B, S), and the first position that is there, (B,).

        A key at a position below the first one does not exist, or stands among the sink tokens already; what does not
        exist at the end has a position beyond every query.
        """
        first, dtype = ops.zeros_like(starts), held[0].dtype
        column = ops.reshape(first, (-1, 1))
        after = ops.reshape(starts, (-1, 1)) + span(0, held[0].shape[1])
        if history is None:
            if fresh:
                return held, after, first
            held = self.cache.read_tables(tables, lengths, dtype)
            return held, column + span(0, held[0].shape[1]), first
        sink_tokens = 0 if sink_slots is None else sink_slots.shape[1]
        before = self.before(starts, history)
        keys, values = (old[0], held[0]), (old[1], held[1])
        position = ops.concat((before, after), 1)
        if sink_tokens:
            there = span(0, sink_tokens) < ops.reshape(lengths, (-1, 1))
            kept = self.cache.read_slots(sink_slots, there, dtype)
            keys, values = (kept[0],) + keys, (kept[1],) + values
            position = ops.concat((column + span(0, sink_tokens), position), 1)
        return (ops.concat(keys, 1), ops.concat(values, 1)), position, first + sink_tokens

    @staticmethod
    def before(starts, history):
        """Positions (B, window) of the ring's tokens before the step."""
        return ops.reshape(starts, (-1, 1)) + span(-history.shape[1], 0)

    def shift(self, rows, position, slopes, dtype):
        """pse_shift of ALiBi, (B, N, T, S) in the query's dtype, or None."""
        if slopes is None:
            return None
        distance = ops.abs(ops.expand_dims(rows, 2) - ops.expand_dims(position, 1)).astype(mstype.float32)
        bias = -ops.reshape(slopes.astype(mstype.float32), (-1, self.heads, 1, 1)) * ops.expand_dims(distance, 1)
        return ops.maximum(bias, Tensor(-65504.0, mstype.float32)).astype(dtype)

    @staticmethod
    def hidden(rows, position, window):
        """What a query does not see, uint8 (B, T, S), 1 = discard: later keys, and those before the window."""
        p, j = ops.expand_dims(rows, 2), ops.expand_dims(position, 1)
        hidden = j > p
        if window is not None:
            hidden = ops.logical_or(hidden, j < p - window[0])
        return hidden.astype(mstype.uint8)

    @staticmethod
    def ring_hidden(hidden, rows, position, first, sink_tokens):
        """The same in a ring: no key below the first position, and the sink tokens, which lie in front, always."""
        absent = ops.expand_dims(position, 1) < ops.reshape(first, (-1, 1, 1))
        hidden = ops.logical_or(hidden > 0, absent).astype(mstype.uint8)
        if sink_tokens == 0:
            return hidden
        early = ops.expand_dims(position[:, :sink_tokens], 1) > ops.expand_dims(rows, 2)
        return ops.concat((early.astype(mstype.uint8), hidden[:, :, sink_tokens:]), 2)


def _joined(out, lse, sinks):
    """(B, T, N, D) with the sinks' logits in the denominators."""
    sink = ops.reshape(sinks.astype(mstype.float32), (1, -1, 1, 1))
    joined, _ = with_sinks(out.swapaxes(1, 2).astype(mstype.float32), lse, sink)
    return joined.swapaxes(1, 2).astype(out.dtype)


@constexpr(check=False)
def _check(query, key, value, slots, pool):
    check_call(LAYER, slots, query, key, value, pool[2], pool[3])


@constexpr(check=False)
def _window(window, ring_window):
    return left_window(LAYER, window, ring_window)


@constexpr(check=False)
def _choose(dtype, held, given, window, options):
    """(operator, keys, mask, scales) of a call, or its refusal."""
    tokens, fresh, ring, alibi, sinks = given
    heads, kv_heads, head_dim, block_size, scale, soft_cap, lite = options
    call = CacheCall(
        tokens, fresh, heads, kv_heads, head_dim, dtype.lower(), held.lower(), block_size, scale,
        None if window is None else window[0], ring, alibi, sinks, soft_cap, lite,
    )  # fmt: skip
    reason = refused(call)
    if reason is not None:
        raise reason.error(LAYER)
    chosen = map_call(call)
    return chosen.operator, chosen.keys, chosen.mask, chosen.scales
