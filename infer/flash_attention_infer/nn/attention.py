"""Prefill and decode over a layer's cache: write the new tokens, view the old ones, call the core, merge by LSE.

The same algebra as flash_attention_infer/jax/attention.py, where the reasons stand.
"""

from mindspore import dtype as mstype
from mindspore import nn, ops
from mindspore.ops.primitive import constexpr

from flash_attention.core.spec import NO_LIMIT
from flash_attention.ops import flash_attention
from flash_attention.ops.functional import swap
from flash_attention.ops.portable.forward import with_sinks
from flash_attention_infer.core.config import check_blocks, check_call, check_splits, left_window
from flash_attention_infer.nn.storage import span


class CachedAttention(nn.Cell):
    """Attention over a cache, and the writing of the new tokens into it; one Cell serves prefill and decode.

    Legend: B sequences, T new tokens (the most of a sequence), N query heads, K key/value heads, D head size.

    Args:
        cache (LayerCache): the layer's pool, written in place.
        scale (float): factor on the scores; default ``1 / sqrt(D)``.
        local_window_size (int, tuple): tokens before its own that a query sees. A ring has its own window.
        prev_block_num (int): blocks of ``block_size`` tokens before its own block that a query sees. Default: 65536,
            no limit; the only value with a ring.
        block_size (int): tokens of such a block (not of the cache's). Default: 128.
        logits_soft_cap (float): scores become ``cap * tanh(score / cap)``.
        engine (str): as in ``flash_attention.ops.flash_attention``.

    Inputs:
        - **query** (Tensor) - (B, T, N, D); rows from ``counts[b]`` on are padding.
        - **key**, **value** (Tensor) - (B, T, K, D).
        - **starts**, **counts**, **slots**, **tables**, **history**, **sink_slots** (Tensor) - of a Step, int32; the
          last two None where it has none.
        - **alibi_slopes** (Tensor) - (N,) or (B, N), or None.
        - **sinks** (Tensor) - (N,) logits that join the softmax's denominator (not sink *tokens*), or None.
        - **fresh** (bool) - no sequence has earlier tokens: attend to the new ones alone.
        - **num_splits** (int) - equal parts of the keys that are computed side by side and merged by their LSE.

    Outputs:
        Tensor (B, T, N, D) in the query's dtype, 0 where padded.

    Supported Platforms:
        ``Ascend`` ``GPU`` ``CPU`` (what was proven where: see the support table)
    """

    def __init__(
        self, cache, scale=None, local_window_size=None, logits_soft_cap=None, engine=None, prev_block_num=NO_LIMIT,
        block_size=128,
    ):  # fmt: skip
        super().__init__(auto_prefix=False)
        self.cache = cache
        self.scale, self.window, self.soft_cap, self.engine = scale, local_window_size, logits_soft_cap, engine
        self.prev_block_num, self.block_size = prev_block_num, block_size

    def construct(
        self, query, key, value, starts, counts, slots, tables, history=None, sink_slots=None, alibi_slopes=None,
        sinks=None, fresh=False, num_splits=1,
    ):  # fmt: skip
        axes = _check(query.shape, key.shape, value.shape, slots.shape, self.cache.key.shape)
        new_key, key_scale = self.cache.encode(key)
        new_value, value_scale = self.cache.encode(value)
        held = (
            swap(self.cache.decode(new_key, key_scale, query.dtype), axes),
            swap(self.cache.decode(new_value, value_scale, query.dtype), axes),
        )
        new = (new_key, key_scale, new_value, value_scale)
        terms = (counts, alibi_slopes, sinks)
        _blocks(self.prev_block_num, self.block_size, history is not None)
        if history is None:
            out = self.over_blocks(swap(query, axes), held, new, starts, slots, tables, terms, fresh, num_splits)
        else:
            _splits(num_splits, num_splits, True)
            places = (slots, history, sink_slots)
            out = self.over_ring(swap(query, axes), held, new, starts, places, terms, fresh)
        return swap(out, axes)

    def over_blocks(self, query, held, new, starts, slots, tables, terms, fresh, num_splits):
        """Rows and pages: write, then attend to the sequences' blocks; a fresh prefill to its own tokens alone."""
        counts, slopes, sinks = terms
        window = _window(self.window, None)
        self.cache.write(slots, *new)
        if fresh:
            return self.attend(query, held, 0, counts, counts, window, slopes, sinks)[0]
        parts = _splits(num_splits, tables.shape[1] * self.cache.block_size)
        keys = self.cache.read_tables(tables, starts + counts, query.dtype, True, parts)
        if parts == 1:  # zeros follow the last key, and what is after a query is hidden: no lengths are needed
            return self.attend(query, keys, starts, None, counts, window, slopes, sinks)[0]
        return self.attend_split(query, keys, starts, window, terms, parts)

    def over_ring(self, query, held, new, starts, places, terms, fresh):
        """The window's old tokens and the new ones side by side, and the sink tokens merged to them."""
        slots, history, sink_slots = places
        counts, slopes, sinks = terms
        window = _window(self.window, history.shape[1])
        sink_tokens = 0 if sink_slots is None else sink_slots.shape[1]
        position = ops.reshape(starts, (-1, 1)) + span(0, query.shape[2])
        offset = 0
        if not fresh:
            offset = history.shape[1]
            position = ops.reshape(starts, (-1, 1)) + span(-offset, query.shape[2])
            old = self.cache.read_slots(history, position[:, :offset] >= sink_tokens, query.dtype, True)
            held = (ops.concat((old[0], held[0]), 2), ops.concat((old[1], held[1]), 2))
        mask = None
        if offset or sink_tokens:
            mask = ops.reshape(position >= sink_tokens, (position.shape[0], 1, 1, position.shape[1]))
        self.cache.write(slots, *new)
        lengths = counts + offset
        if not sink_tokens:
            return self.attend(query, held, offset, lengths, counts, window, slopes, sinks, mask)[0]
        near = self.attend(_wide(query), _both(held), offset, lengths, counts, window, slopes, None, mask)
        there = span(0, sink_tokens) < ops.reshape(starts + counts, (-1, 1))
        keys = self.cache.read_slots(sink_slots, there, mstype.float32, True)
        first = self.attend(_wide(query), keys, starts, None, counts, None, slopes, None)
        return merged((near[0], first[0]), (near[1], first[1]), sinks).astype(query.dtype)

    def attend(self, query, held, q_offset, kv_lengths, counts, window, slopes, sinks, mask=None):
        """The core call, heads first: ``(out (B, N, T, D), lse (B, N, T))``."""
        return flash_attention(
            query, held[0], held[1], mask=mask, scale=self.scale, is_causal=True, query_seq_lengths=counts,
            key_value_seq_lengths=kv_lengths, local_window_size=window, engine=self.engine, alibi_slopes=slopes,
            logits_soft_cap=self.soft_cap, sinks=sinks, q_offset=q_offset, layout="BNSD", return_lse=True,
            prev_block_num=self.prev_block_num, block_size=self.block_size,
        )  # fmt: skip

    def attend_split(self, query, keys, starts, window, terms, parts):
        """The core call over equal parts of the keys, as more rows of the batch, merged."""
        counts, slopes, sinks = terms
        batch, size = query.shape[0], keys[0].shape[2]
        _blocks(self.prev_block_num, self.block_size, False, size)
        offset = ops.reshape(ops.reshape(starts, (-1, 1)) - size * span(0, parts), (-1,))
        if slopes is not None and slopes.ndim == 2:
            slopes = ops.repeat_elements(slopes, parts, 0)
        wide = ops.repeat_elements(_wide(query), parts, 0)
        counts = ops.repeat_elements(counts, parts, 0)
        out, lse = self.attend(wide, _both(keys), offset, None, counts, window, slopes, None)
        out = ops.reshape(out, (batch, parts) + out.shape[1:])
        lse = ops.reshape(lse, (batch, parts) + lse.shape[1:])
        outs, lses = (), ()
        for part in range(parts):
            outs = outs + (out[:, part],)
            lses = lses + (lse[:, part],)
        return merged(outs, lses, sinks).astype(query.dtype)


def merged(outs, lses, sinks):
    """Results (B, N, T, D) and (B, N, T) over disjoint sets of keys as one output; sinks join once."""
    peak = lses[0]
    for lse in lses[1:]:
        peak = ops.maximum(peak, lse)
    alive = peak > -3e38
    peak = ops.where(alive, peak, ops.zeros_like(peak))
    total, out = ops.zeros_like(peak), 0.0
    for index in range(len(outs)):
        weight = ops.exp(lses[index] - peak)
        total = total + weight
        out = out + ops.expand_dims(weight, 3) * outs[index]
    total = ops.where(alive, total, ops.ones_like(total))
    out = out / ops.expand_dims(total, 3)
    if sinks is None:
        return out
    lse = ops.where(alive, peak + ops.log(total), ops.full_like(peak, 3e38))  # a dead row keeps its zeros
    sink = ops.reshape(sinks.astype(mstype.float32), (1, -1, 1, 1))
    return with_sinks(out, ops.expand_dims(lse, 3), sink)[0]


def _wide(x):
    return x.astype(mstype.float32)


def _both(pair):
    return _wide(pair[0]), _wide(pair[1])


@constexpr(check=False)
def _check(query, key, value, slots, pool):
    """The axes that change places between (B, T, N, D) and the heads first."""
    check_call("CachedAttention", slots, query, key, value, pool[2], pool[3])
    return (1, 2)


@constexpr(check=False)
def _window(window, ring_window):
    return left_window("CachedAttention", window, ring_window)


@constexpr(check=False)
def _blocks(prev_block_num, block_size, ring, part=None):
    check_blocks("CachedAttention", prev_block_num, block_size, ring, part)


@constexpr(check=False)
def _splits(num_splits, places, ring=False):
    return check_splits("CachedAttention", num_splits, places, ring)
