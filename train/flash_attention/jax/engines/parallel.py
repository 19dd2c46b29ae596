"""The `xla` engine on concrete arrays, a part of the heads (or of the batch) on each core.

XLA shares every operation of a program out among the cores, so that each tile of scores travels between them. Programs
side by side keep a head on its core: 1.1 times as fast where the cores share a cache, twice where they do not (measured
on two cores of an AMD EPYC, S = 1,024 and 4,096). Only a caller outside of ``jax.jit`` can start several programs:
that is the bridge to MindSpore.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from flash_attention.core.cores import cores
from flash_attention.core.spec import Operands
from flash_attention.jax.engines import xla

_SMALL = 2**20
"""Calls of fewer scores run whole: handing them to threads would cost more than it gains."""

_BY_BATCH = ("bias", "mask", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths")


class Part:
    """``count`` rows of the batch (axis 0) or key/value heads (axis 1) of a call, from ``first`` on."""

    def __init__(self, spec, axis, first, count):
        self.whole, self.axis = spec, axis
        self.keys = slice(first, first + count)
        grow = spec.group if axis else 1
        self.rows = slice(first * grow, (first + count) * grow)
        sizes = dict(heads=count * grow, kv_heads=count) if axis else dict(batch=count)
        shapes = {
            name: self._shape(shape)
            for name, shape in (("bias_shape", spec.bias_shape), ("mask_shape", spec.mask_shape))
        }
        if spec.alibi_shape is not None:
            shapes["alibi_shape"] = self._slopes(np.empty(spec.alibi_shape, np.bool_)).shape
        self.spec = replace(spec, **sizes, **shapes)

    def cut(self, x, keys=False):
        """This part of a query-like (or key-like) tensor, or of one whose axis may be 1."""
        index = (slice(None),) * self.axis
        return x if x.shape[self.axis] == 1 else x[index + (self.keys if keys else self.rows,)]

    def operands(self, operands):
        """This part of :class:`Operands`."""
        found = operands._asdict()
        for name in ("bias", "mask") if self.axis else _BY_BATCH:
            x = found[name]
            if x is not None and not (name == "mask" and self.whole.compact_mask):
                found[name] = self.cut(x)
        if not self.axis and np.ndim(operands.q_offset):
            found["q_offset"] = self.cut(operands.q_offset)
        found["slopes"] = None if operands.slopes is None else self._slopes(operands.slopes)
        if self.axis and operands.sinks is not None:
            found["sinks"] = operands.sinks[self.rows]
        if self.whole.dropout_rate:
            found["origin"] = np.array(self.whole.origin if operands.origin is None else operands.origin, np.int32)
            found["origin"][self.axis] += self.rows.start
        return Operands(**found)

    def _slopes(self, x):
        """Slopes (N,) or (B, N)."""
        if self.axis:
            return x[..., self.rows]
        return x[self.rows] if x.ndim == 2 and x.shape[0] > 1 else x

    def _shape(self, shape):
        if shape is None or len(shape) < 4 or shape[self.axis] == 1:
            return shape
        return shape[: self.axis] + (self.rows.stop - self.rows.start,) + shape[self.axis + 1 :]


def parts_of(spec, most):
    """At most ``most`` equal :class:`Part` s of whole key/value heads, else of the batch; one where nothing divides."""
    for axis, size in ((1, spec.kv_heads), (0, spec.batch)):
        count = max(n for n in range(1, min(most, size) + 1) if size % n == 0)
        if count > 1:
            return [Part(spec, axis, n * (size // count), size // count) for n in range(count)]
    return [Part(spec, 0, 0, spec.batch)]


@functools.lru_cache(maxsize=None)
def _plan(spec):
    """(parts, a pool of threads for them) of a spec; (None, None) where the call runs whole."""
    if spec.batch * spec.heads * spec.q_len * spec.kv_len < _SMALL:
        return None, None
    parts = parts_of(spec, cores())
    return (parts, _pool()) if len(parts) > 1 else (None, None)


@functools.lru_cache(maxsize=None)
def _pool():
    return ThreadPoolExecutor(cores(), thread_name_prefix="flash_attention")


def forward_pass(spec, query, key, value, operands):
    """:func:`xla.forward_pass` of numpy arrays."""
    parts, pool = _plan(spec)
    if parts is None:
        return xla.forward_pass(spec, query, key, value, operands)

    def run(part):
        inputs = part.cut(query), part.cut(key, True), part.cut(value, True)
        return [np.asarray(x) for x in xla.forward_pass(part.spec, *inputs, part.operands(operands))]

    outs, lses = zip(*pool.map(run, parts))
    axis = parts[0].axis
    return np.concatenate(outs, axis), np.concatenate(lses, axis)


def backward_pass(spec, saved, cotangents):
    """:func:`xla.backward_pass` of numpy arrays."""
    parts, pool = _plan(spec)
    if parts is None:
        return xla.backward_pass(spec, saved, cotangents)
    query, key, value, operands, out, lse = saved

    def run(part):
        own = part.cut(query), part.cut(key, True), part.cut(value, True), part.operands(operands)
        own += part.cut(out), part.cut(lse)
        grads = xla.backward_pass(part.spec, own, tuple(part.cut(x) for x in cotangents))
        return [None if x is None else np.asarray(x) for x in grads]

    inputs = (query, key, value, operands.bias, operands.slopes, operands.sinks)
    axes = _split_axes(parts[0].axis, inputs)
    return tuple(_join(grads, axis) for grads, axis in zip(zip(*pool.map(run, parts)), axes))


def _split_axes(axis, inputs):
    """The axis along which each input was split; None where every part had the whole of it."""
    bias, slopes, sinks = inputs[3:]
    by_bias = axis if bias is not None and bias.shape[axis] > 1 else None
    if axis:
        return 1, 1, 1, by_bias, -1, 0
    by_slopes = 0 if slopes is not None and slopes.ndim == 2 and slopes.shape[0] > 1 else None
    return 0, 0, 0, by_bias, by_slopes, None


def _join(grads, axis):
    """Gradients of the parts side by side; of what they share, their sum."""
    if grads[0] is None:
        return None
    return sum(grads[1:], grads[0]) if axis is None else np.concatenate(grads, axis)
