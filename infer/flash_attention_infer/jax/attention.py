"""Prefill and decode over a layer's cache: write the new tokens, view the old ones, call the core, merge by LSE."""

import dataclasses
import functools

import jax.numpy as jnp

from flash_attention.core.lse import merge
from flash_attention.jax.distributed.ring import add_sinks
from flash_attention.jax.engines import ENGINES
from flash_attention.jax.functional import call_of, prepare
from flash_attention_infer.core.config import check_call, check_splits, left_window
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
        scale, alibi_slopes, logits_soft_cap, implementation: as in ``flash_attention.jax.flash_attention``.
        local_window_size: int or (left, right): tokens before its own that a query sees. A ring has its own window.
        sinks: (N,) logits that join the softmax's denominator (not the ring's sink *tokens*).

    Returns:
        ``(out (B, T, N, D) in the query's dtype, 0 where padded; the layer with the tokens written)``.
    """
    attention = _Attention(
        "prefill", layer, step, query, key, value, scale, local_window_size, alibi_slopes, logits_soft_cap, sinks,
        implementation,
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
        "decode", layer, step, query, key, value, scale, local_window_size, alibi_slopes, logits_soft_cap, sinks,
        implementation,
    )  # fmt: skip
    places = step.tables.shape[1] * layer.block_size
    num_splits = check_splits("decode", num_splits, places, attention.ring)
    return attention.over_ring() if attention.ring else attention.over_blocks(num_splits=num_splits)


class _Attention:
    """One call: the step's tensors as the core wants them, and the two ways to the keys."""

    def __init__(self, name, layer, step, query, key, value, scale, window, slopes, soft_cap, sinks, implementation):
        check_call(name, step.slots.shape, query.shape, key.shape, value.shape, layer.key.shape[1], layer.key.shape[3])
        self.name, self.layer, self.step, self.implementation = name, layer, step, implementation
        self.ring = step.history is not None
        window = left_window(name, window, step.history.shape[1] if self.ring else None)
        self.query, self.dtype = jnp.swapaxes(query, 1, 2), query.dtype  # (B, N, T, D)
        self.new = storage.encode(layer, key, value)
        self.starts, self.counts = jnp.asarray(step.starts), jnp.asarray(step.counts)
        self.lengths = self.starts + self.counts
        self.sinks = None if sinks is None else jnp.asarray(sinks)
        self.options = dict(scale=scale, local_window_size=window, alibi_slopes=slopes, logits_soft_cap=soft_cap)

    def over_blocks(self, fresh=False, num_splits=1):
        """Rows and pages: write, then attend to the sequences' blocks; a fresh prefill to its own tokens alone."""
        layer = storage.write(self.layer, self.step.slots, self.new)
        if fresh:
            keys, values = storage.decoded(self.new, self.dtype)
            out, _ = self.attend(keys, values, 0, self.counts, sinks=self.sinks)
        else:
            keys, values = storage.read_tables(layer, self.step, self.dtype)
            attend = self.attend if num_splits == 1 else functools.partial(self.attend_split, num_splits)
            out, _ = attend(keys, values, self.starts, self.lengths, sinks=self.sinks)
        return self.result(out), layer

    def over_ring(self):
        """The window's old tokens and the new ones side by side, and the sink tokens merged to them."""
        step, window, sink_tokens = self.step, self.step.history.shape[1], self.step.sinks.shape[1]
        keys, values = storage.decoded(self.new, self.dtype)
        position = jnp.arange(step.tokens) + self.starts[:, None]
        offset = 0
        if not step.fresh:
            offset, position = window, jnp.arange(-window, step.tokens) + self.starts[:, None]
            there = (position[:, None, :window, None]) >= sink_tokens
            old = storage.read_slots(self.layer, step.history, self.dtype)
            # Other slots hold anything, and hidden NaN would still reach 0 * NaN.
            keys, values = (jnp.concatenate([jnp.where(there, x, 0), new], 2) for x, new in zip(old, (keys, values)))
        mask = (position >= sink_tokens)[:, None, None, :] if sink_tokens or offset else None
        layer = storage.write(self.layer, step.slots, self.new)
        if not sink_tokens:
            out, _ = self.attend(keys, values, offset, self.counts + offset, mask=mask, sinks=self.sinks)
            return self.result(out), layer
        near = self.attend(keys, values, offset, self.counts + offset, mask=mask, wide=True)
        keys, values = storage.read_slots(layer, step.sinks, self.dtype)
        lengths = jnp.minimum(self.lengths, sink_tokens)
        first = self.attend(keys, values, self.starts, lengths, local_window_size=None, wide=True)
        return self.result(self.merged([near[0], first[0]], [near[1], first[1]], self.sinks)[0]), layer

    def attend(self, keys, values, q_offset, kv_lengths, wide=False, **more):
        """The core call: ``(out (B, N, T, D), lse (B, N, T))``; keys and values (B, K, S, D)."""
        arguments = dict(self.options, is_causal=True, q_offset=q_offset, layout="BNSD", **more)
        arguments.update(query_seq_lengths=self.counts, key_value_seq_lengths=kv_lengths)
        return _core(self.name, self.query, keys, values, arguments, wide, self.implementation)

    def attend_split(self, parts, keys, values, starts, lengths, sinks):
        """The core call over equal parts of the keys, as more rows of the batch, merged."""

        def fold(x):  # (B, K, S, D) -> (B * parts, K, S / parts, D)
            x = x.reshape(x.shape[:2] + (parts, -1, x.shape[3]))
            return jnp.moveaxis(x, 2, 1).reshape((-1, x.shape[1]) + x.shape[3:])

        size = keys.shape[2] // parts
        first = size * jnp.arange(parts)

        def shifted(x):  # (B,) counted from the first key of each part, (B * parts,)
            return (x[:, None] - first[None, :]).reshape(-1)

        slopes = self.options["alibi_slopes"]
        if slopes is not None and jnp.ndim(slopes) == 2:
            slopes = jnp.repeat(jnp.asarray(slopes), parts, axis=0)
        arguments = dict(self.options, alibi_slopes=slopes, is_causal=True, q_offset=shifted(starts), layout="BNSD")
        arguments["query_seq_lengths"] = jnp.repeat(self.counts, parts)
        arguments["key_value_seq_lengths"] = jnp.clip(shifted(lengths), 0, size)
        query = jnp.repeat(self.query, parts, axis=0)
        out, lse = _core(self.name, query, fold(keys), fold(values), arguments, True, self.implementation)
        out, lse = (jnp.moveaxis(x.reshape((-1, parts) + x.shape[1:]), 1, 0) for x in (out, lse))
        return self.merged(list(out), list(lse), sinks)

    @staticmethod
    def merged(outs, lses, sinks):
        """Results over disjoint sets of keys as one; sinks join once."""
        out, lse = merge(jnp, outs, lses)
        return (out, lse) if sinks is None else add_sinks(out, lse, sinks)

    def result(self, out):
        """(B, N, T, D) -> (B, T, N, D) in the query's dtype."""
        return jnp.swapaxes(out, 1, 2).astype(self.dtype)


def _core(name, query, keys, values, arguments, wide, implementation):
    """The functional call on BNSD tensors, whose output stays float32 where parts are to be merged."""
    spec, operands = prepare(name, query, keys, values, *call_of(**arguments))
    spec = dataclasses.replace(spec, wide=wide)
    return ENGINES.choose(spec, implementation, name).run(spec, query, keys, values, operands)
