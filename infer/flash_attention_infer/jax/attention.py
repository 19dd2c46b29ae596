"""Prefill and decode over a layer's cache: write the new tokens, view the old ones, call the core, merge by LSE."""

import jax.numpy as jnp

from flash_attention.core.lse import merge
from flash_attention.core.spec import NO_LIMIT
from flash_attention.jax.distributed.ring import add_sinks
from flash_attention.jax.functional import attend, call_of
from flash_attention_infer.core.config import check_blocks, check_call, check_splits, left_window
from flash_attention_infer.jax import storage


def prefill(
    layer,
    step,
    query,
    key,
    value,
    *,
    scale=None,
    local_window_size=None,
    prev_block_num=NO_LIMIT,
    block_size=128,
    alibi_slopes=None,
    logits_soft_cap=None,
    sinks=None,
    implementation=None,
):
    """Write the tokens of a step into a layer's cache and attend, causally, to all tokens up to each one's own.

    Chunks of any length, of sequences of any lengths, new ones or not. Pure: use it under ``jax.jit`` with ``layer``
    donated. What is attended to is what the cache holds (rounded or quantised), however a sequence is cut into steps.

    Args:
        layer: :class:`LayerCache`.
        step: :class:`~flash_attention_infer.core.step.Step`; B sequences, T tokens.
        query: (B, T, N, D). key, value: (B, T, K, D). Rows from ``step.counts[b]`` on are padding.
        scale, prev_block_num, block_size, alibi_slopes, logits_soft_cap, implementation: as in
            ``flash_attention.jax.flash_attention``.
        local_window_size: int or (left, right): tokens before its own that a query sees. A ring has its own window.
        sinks: (N,) logits that join the softmax's denominator (not the ring's sink *tokens*).

    Returns:
        ``(out (B, T, N, D) in the query's dtype, 0 where padded; the layer with the tokens written)``.
    """
    attention = _Attention(
        "prefill", layer, step, query, key, value, scale, local_window_size, (prev_block_num, block_size),
        alibi_slopes, logits_soft_cap, sinks, implementation,
    )  # fmt: skip
    return attention.over_ring() if attention.ring else attention.over_blocks(fresh=step.fresh)


def decode(
    layer,
    step,
    query,
    key,
    value,
    *,
    scale=None,
    local_window_size=None,
    prev_block_num=NO_LIMIT,
    block_size=128,
    alibi_slopes=None,
    logits_soft_cap=None,
    sinks=None,
    num_splits=1,
    implementation=None,
):
    """:func:`prefill` for few tokens a sequence: one, or several guessed ones that ``truncate`` may take back.

    Args:
        num_splits: cut the keys into so many equal parts that are computed side by side and merged by their LSE
            (flash-decoding), for devices that one query does not fill. It must divide the longest sequence's places.

    Other arguments and the result are those of :func:`prefill`.
    """
    attention = _Attention(
        "decode", layer, step, query, key, value, scale, local_window_size, (prev_block_num, block_size),
        alibi_slopes, logits_soft_cap, sinks, implementation,
    )  # fmt: skip
    places = step.tables.shape[1] * layer.block_size
    num_splits = check_splits("decode", num_splits, places, attention.ring)
    return attention.over_ring() if attention.ring else attention.over_blocks(num_splits=num_splits)


class _Attention:
    """One call: the step's tensors as the core wants them, and the two ways to the keys."""

    def __init__(
        self, name, layer, step, query, key, value, scale, window, blocks, slopes, soft_cap, sinks, implementation
    ):  # fmt: skip
        check_call(name, step.slots.shape, query.shape, key.shape, value.shape, layer.key.shape[2], layer.key.shape[3])
        self.name, self.layer, self.step, self.implementation = name, layer, step, implementation
        self.ring = step.history is not None
        window = left_window(name, window, step.history.shape[1] if self.ring else None)
        self.query, self.dtype = query, query.dtype
        self.new = storage.encode(layer, key, value)
        self.starts, self.counts = jnp.asarray(step.starts), jnp.asarray(step.counts)
        self.lengths = self.starts + self.counts
        self.sinks = None if sinks is None else jnp.asarray(sinks)
        self.blocks = blocks
        check_blocks(name, *blocks, self.ring)
        self.options = dict(scale=scale, local_window_size=window, alibi_slopes=slopes, logits_soft_cap=soft_cap)
        self.options.update(prev_block_num=blocks[0], block_size=blocks[1])

    def over_blocks(self, fresh=False, num_splits=1):
        """Rows and pages: write, then attend to the sequences' blocks; a fresh prefill to its own tokens alone."""
        layer = storage.write(self.layer, self.step.slots, self.new)
        if fresh:
            keys, values = storage.decoded(self.new, self.dtype)
            out, _ = self.attend(keys, values, 0, self.counts, sinks=self.sinks)
        else:
            keys, values = storage.read_tables(layer, self.step, self.dtype)
            if num_splits > 1:
                return self.attend_split(num_splits, keys, values).astype(self.dtype), layer
            out, _ = self.attend(keys, values, self.starts, self.lengths, sinks=self.sinks)
        return out, layer

    def over_ring(self):
        """The window's old tokens and the new ones side by side, and the sink tokens merged to them."""
        step, window, sink_tokens = self.step, self.step.history.shape[1], self.step.sinks.shape[1]
        keys, values = storage.decoded(self.new, self.dtype)
        position = jnp.arange(step.tokens) + self.starts[:, None]
        offset = 0
        if not step.fresh:
            offset, position = window, jnp.arange(-window, step.tokens) + self.starts[:, None]
            there = (position[:, :window] >= sink_tokens)[..., None, None]
            old = storage.read_slots(self.layer, step.history, self.dtype)
            # Other slots hold anything, and hidden NaN would still reach 0 * NaN.
            keys, values = (jnp.concatenate([jnp.where(there, x, 0), new], 1) for x, new in zip(old, (keys, values)))
        mask = (position >= sink_tokens)[:, None, None, :] if sink_tokens or offset else None
        layer = storage.write(self.layer, step.slots, self.new)
        if not sink_tokens:
            out, _ = self.attend(keys, values, offset, self.counts + offset, mask=mask, sinks=self.sinks)
            return out, layer
        near = self.attend(keys, values, offset, self.counts + offset, mask=mask, wide=True)
        keys, values = storage.read_slots(layer, step.sinks, self.dtype)
        lengths = jnp.minimum(self.lengths, sink_tokens)
        first = self.attend(keys, values, self.starts, lengths, local_window_size=None, wide=True)
        return self.merged([near[0], first[0]], [near[1], first[1]]).astype(self.dtype), layer

    def attend(self, keys, values, q_offset, kv_lengths, wide=False, **more):
        """The core call: ``(out (B, T, N, D), lse (B, N, T))``; keys and values (B, S, K, D)."""
        arguments = dict(self.options, is_causal=True, q_offset=q_offset, **more)
        arguments.update(query_seq_lengths=self.counts, key_value_seq_lengths=kv_lengths)
        return attend(self.name, self.query, keys, values, *call_of(**arguments), self.implementation, wide)

    def attend_split(self, parts, keys, values):
        """The core call over equal parts of the keys, as more rows of the batch, merged: the output."""
        size = keys.shape[1] // parts
        check_blocks(self.name, *self.blocks, False, size)
        first = size * jnp.arange(parts)

        def fold(x):  # (B, S, K, D) -> (B * parts, S / parts, K, D)
            return x.reshape((-1, size) + x.shape[2:])

        def shifted(x):  # (B,) counted from the first key of each part, (B * parts,)
            return (x[:, None] - first[None, :]).reshape(-1)

        slopes = self.options["alibi_slopes"]
        if slopes is not None and jnp.ndim(slopes) == 2:
            slopes = jnp.repeat(jnp.asarray(slopes), parts, axis=0)
        arguments = dict(self.options, alibi_slopes=slopes, is_causal=True, q_offset=shifted(self.starts))
        arguments["query_seq_lengths"] = jnp.repeat(self.counts, parts)
        arguments["key_value_seq_lengths"] = jnp.clip(shifted(self.lengths), 0, size)
        query = jnp.repeat(self.query, parts, axis=0)
        call = call_of(**arguments)
        out, lse = attend(self.name, query, fold(keys), fold(values), *call, self.implementation, wide=True)
        out, lse = (x.reshape((-1, parts) + x.shape[1:]) for x in (out, lse))
        return self.merged([out[:, n] for n in range(parts)], [lse[:, n] for n in range(parts)])

    def merged(self, outs, lses):
        """Results (B, T, N, D) over disjoint sets of keys as one, float32; the sinks' logits join once."""
        out, lse = merge(jnp, [jnp.swapaxes(x, 1, 2) for x in outs], lses)
        if self.sinks is not None:
            out, _ = add_sinks(out, lse, self.sinks)
        return jnp.swapaxes(out, 1, 2)
