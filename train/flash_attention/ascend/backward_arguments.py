"""The arguments of the backward kernel, and numpy on the host: a call's tensors to arguments and gradients back.

Beside the forward kernel's kinds of arguments there are *extra columns*: sixteen more columns of query, d_out, key and
value that let the cube subtract what belongs to a query and hide keys that do not exist. Those of query and d_out come
from the kernel in front of it (:mod:`preprocess`).
"""

import numpy as np

from flash_attention.ascend import backward_operands, host, tasks
from flash_attention.ascend.backward_operands import KEY_SUMS, KEY_UNIT
from flash_attention.ascend.geometry import FRACTAL
from flash_attention.ascend.program import GmTensor
from flash_attention.ascend.signature import BOUND_ROWS, key_matrix, packed_operands, query_matrix
from flash_attention.ascend.tasks import CORE_FIELDS, TILE_FIELDS
from flash_attention.ascend.tile_ops.vector import LANES

LARGEST = 65504.0
COARSE = 1024.0
"""Unit of the first of a statistic's three fp16 parts. They resolve 2**-33 of the value and reach 1024 * 65504: a logit
at the end of fp16's range, divided by the smallest scale that is taken."""
ROOM = 2.0**15
"""What ``|dP - delta|`` is kept within: half of fp16's range."""
MOST_EXPONENT = 14
"""Cotangents are divided by at most 2**14, whose reciprocal is a normal fp16: enough for products up to 2**29."""
HIDING = 3
"""The extra column that lowers all scores of a key that does not exist by COARSE * LARGEST, before the scale."""
KEPT = 16.0
"""What a mask tile holds where a key is kept: above every exponent that belongs to a probability."""


def backward_signature(geometry, cores):
    """(inputs, outputs) of the backward kernel: lists of :class:`~flash_attention.ascend.program.GmTensor`.

    Args:
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`.
        cores: number of cores the kernel runs on.
    """
    spec = geometry.spec
    queries, keys = geometry.q_tiles * geometry.tiles.q, geometry.kv_tiles * geometry.tiles.kv
    columns = geometry.batch_heads + (2, queries, FRACTAL)
    inputs = [
        query_matrix(geometry, "query"),
        key_matrix(geometry, "key"),
        key_matrix(geometry, "value"),
        query_matrix(geometry, "d_out"),
        GmTensor("query_columns", "float16", columns, "extra columns of query and d_out"),
        GmTensor("key_columns", "float16", (keys, FRACTAL), "extra columns of key and value"),
        GmTensor("factors", "float32", (2, LANES), "what dV, and what dQ and dK, are multiplied by"),
    ]
    inputs += packed_operands(geometry, kept=16)
    if spec.dropout_rate:
        inputs.append(GmTensor("minus_delta", "float16", geometry.batch_heads + (queries,), "-delta"))
    if needs_positions(spec):
        inputs.append(
            GmTensor("bounds", "float32", (BOUND_ROWS, queries), "first visible key, last visible key, position")
        )
    inputs.append(GmTensor("key_tasks", "int32", (geometry.kv_tiles, 8), "tasks.key_tasks"))
    inputs.append(GmTensor("tiles", "int32", (geometry.q_tiles, len(TILE_FIELDS)), "tasks.query_tiles"))
    inputs.append(GmTensor("cores", "int32", (cores, CORE_FIELDS), "tasks.split of the key and of the query tiles"))
    outputs = [query_matrix(geometry, "d_query"), key_matrix(geometry, "d_key"), key_matrix(geometry, "d_value")]
    return inputs, outputs + [part.output(geometry) for part in backward_operands.parts(geometry)]


def needs_positions(spec):
    """True when some tile needs a predicate or a position. Keys that do not exist are hidden by their columns."""
    return not spec.band.is_dense or spec.alibi_shape is not None


def probability_exponent(geometry):
    """k such that the kernel computes ``2**k P``: half the logarithm of the number of keys that a query sees.

    P from 1 down to one share in all keys then have exponents about 0, which fp16 rounds least, and stay normal.
    """
    first, last = tasks.visible_keys(geometry.plan())
    seen = np.mean(np.maximum(last - first + 1, 1))
    return int(np.log2(seen) / 2.0)


def cotangent_exponent(spec, value, d_out, d_lse):
    """0 <= j <= MOST_EXPONENT: divided by 2**j, cotangents give no ``|dP - delta|``, and so no dS, beyond :data:`ROOM`.

    Neither dP nor delta without d_lse exceeds D max|dO| max|V|. Gradients are linear in the cotangents: the kernel
    multiplies them by 2**j again, in fp32, where they are stored (:func:`result_factors`).
    """
    bound = 2.0 * spec.head_dim * _top(d_out) * _top(value) + _top(d_lse)
    return min(max(0, int(np.ceil(np.log2(max(bound, 1.0) / ROOM)))), MOST_EXPONENT)


def _top(x):
    """Largest finite magnitude, 0 when there is none."""
    x = np.abs(np.asarray(x, np.float64))
    return float(np.max(x, initial=0.0, where=np.isfinite(x)))


def divided_cotangents(spec, value, lse, d_out, d_lse):
    """``(d_out, d_lse, power)``: both divided by a power of two, ``2**cotangent_exponent``.

    The cotangent of the LSE of a query that sees no key is not looked at.
    """
    power = 2.0 ** cotangent_exponent(spec, value, d_out, d_lse[~np.isneginf(lse)])
    return (d_out.astype(np.float32) / power).astype(np.float16), d_lse / power, power


def result_factors(geometry, power):
    """fp32 (2, LANES), the same in every lane: what the kernel's sums for dV, and for dQ and dK, lack.

    ``power`` is what the cotangents were divided by; 2**k is in P, the scale not in dS, dropout's share in neither.
    """
    spec = geometry.spec
    gain = power / (1.0 - spec.dropout_rate)
    factors = [2.0 ** -probability_exponent(geometry) * gain, spec.scale * gain]
    return np.repeat(np.float32(factors)[:, None], LANES, axis=1)


def pack_key_columns(geometry):
    """fp16 (keys of whole tiles, 16): where a key exists the parts' units and KEY_SUMS, else what hides it."""
    spec = geometry.spec
    packed = np.zeros((geometry.kv_tiles * geometry.tiles.kv, FRACTAL), np.float16)
    index = np.arange(spec.kv_len)
    packed[: spec.kv_len, :3] = COARSE, 1.0, 1.0
    packed[: spec.kv_len, KEY_SUMS] = np.stack([np.ones_like(index), index // KEY_UNIT, index % KEY_UNIT], axis=1)
    packed[spec.kv_len :, HIDING] = -LARGEST if spec.scale > 0 else LARGEST
    return packed


def pack_cores(geometry, cores):
    """int32 (cores, 8): [start, stop) of the key-major items, then of the query-major ones."""
    plan = geometry.plan()
    by_key = (plan.q_range[:, 1] - plan.q_range[:, 0]) * geometry.spec.group + host.TASK_COST
    table = tasks.split(by_key, geometry.spec.batch * geometry.spec.kv_heads, cores)
    table[:, 2:4] = tasks.split(host.task_loads(plan, 1), geometry.heads, cores)[:, :2]
    return table


def backward_constants(geometry, cores):
    """The backward kernel's inputs that depend on no tensor, by name, in the order of the signature."""
    plan = geometry.plan()
    constants = {"key_columns": pack_key_columns(geometry)}
    if needs_positions(geometry.spec):
        constants["bounds"] = host.pack_bounds(geometry)
    constants["key_tasks"] = tasks.key_tasks(plan)
    constants["tiles"] = tasks.query_tiles(plan)
    constants["cores"] = pack_cores(geometry, cores)
    return constants


def pack_backward(geometry, cores, query, key, value, operands, d_out, prepared, power):
    """The kernel's inputs by name, in the order of :func:`backward_signature`.

    Args:
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`.
        cores: number of cores the kernel was built for.
        query, key, value: float16 (B, N, Sq, D), (B, Nkv, Sk, D), (B, Nkv, Sk, D).
        operands: :class:`~flash_attention.core.spec.Operands` of numpy arrays.
        d_out, power: of :func:`divided_cotangents`.
        prepared: outputs of the kernel in front, (query_columns, minus_delta).
    """
    spec, constants = geometry.spec, backward_constants(geometry, cores)
    feed = {name: host.to_nz(x) for name, x in zip(("query", "key", "value", "d_out"), (query, key, value, d_out))}
    feed["query_columns"], minus_delta = prepared
    feed["key_columns"] = constants.pop("key_columns")
    feed["factors"] = result_factors(geometry, power)
    if spec.mask_shape is not None:
        packed = host.pack_mask(geometry, operands.mask)
        feed["mask"] = np.where(packed == 0.0, np.float16(KEPT), packed)
    if spec.bias_shape is not None:
        feed["bias"] = host.pack_bias(geometry, operands.bias)
    if spec.alibi_shape is not None:
        feed["slopes"] = host.pack_slopes(geometry, operands.slopes)
    if spec.dropout_rate:
        feed["keep"] = host.pack_keep(geometry, operands.dropout_seed)
        feed["minus_delta"] = minus_delta
    feed.update(constants)
    host.check_feed(feed, backward_signature(geometry, cores)[0])
    return feed


def unpack_backward(geometry, outputs, factors):
    """Kernel outputs -> gradients by name: 'query', 'key', 'value' in float16, 'bias' and 'slopes' in float32.

    Shapes are those of the tensors; 'bias' and 'slopes' are there when the kernel gives them. ``factors``: the argument
    of that name, which the kernel has applied to the first three.
    """
    spec = geometry.spec
    lengths = (spec.q_len, spec.kv_len, spec.kv_len)
    grads = {
        name: host.from_nz(x, length, spec.head_dim)
        for name, x, length in zip(("query", "key", "value"), outputs, lengths)
    }
    sums = {part.output(geometry).name: x for part, x in zip(backward_operands.parts(geometry), outputs[3:])}
    gain = factors[1, 0] / np.float32(spec.scale)
    if "bias_tiles" in sums:
        grads["bias"] = gain * _reduce_to(_from_tiles(geometry, sums["bias_tiles"]), spec.bias_shape)
    if "bias_sums" in sums:
        per_key = sums["bias_sums"].reshape(spec.batch, spec.heads, 1, -1)[..., : spec.kv_len]
        grads["bias"] = gain * _reduce_to(per_key, spec.bias_shape)
    if "slope_sums" in sums:
        d_slopes = gain * _slope_gradients(spec, sums["slope_sums"])
        grads["slopes"] = d_slopes if len(spec.alibi_shape) == 2 else d_slopes.sum(axis=0)
    return grads


def _from_tiles(geometry, tiles):
    """Transposed tiles of ``tile_axes`` -> (B, N, Sq, Sk) float32."""
    batch, heads, q_tiles, kv_tiles, groups, keys = tiles.shape[:6]
    rows = tiles.transpose(0, 1, 2, 4, 6, 3, 5).reshape(batch, heads, q_tiles * groups * FRACTAL, kv_tiles * keys)
    return rows[:, :, : geometry.spec.q_len, : geometry.spec.kv_len].astype(np.float32)


def _reduce_to(x, shape):
    """Sum the axes along which ``shape`` was broadcast."""
    return x.sum(axis=tuple(axis for axis, size in enumerate(shape) if size == 1), keepdims=True)


def _slope_gradients(spec, sums):
    """(B, N, 3, queries) sums of +-dS (1, key // KEY_UNIT, key % KEY_UNIT) -> (B, N) float32."""
    total, high, low = np.moveaxis(sums[..., : spec.q_len].astype(np.float64), 2, 0)
    position = np.arange(spec.q_len) + spec.offset
    distances = position * total - KEY_UNIT * high - low
    return -distances.sum(axis=-1).astype(np.float32)
