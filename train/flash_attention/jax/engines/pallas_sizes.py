"""Tile sizes of the `pallas` engine, and the shared memory that its kernels need. Plain integers, no Pallas.

Triton works on blocks whose sides are powers of two, at least 16 where they meet in a product. The first tile of each
list was the fastest of 4 to 17 on an H200 (bfloat16, 8,192 tokens; decoding: 32,768 keys); a call takes the first whose
bound of shared memory fits the device.
"""

from dataclasses import replace
from typing import NamedTuple

import jax

SHARED_LIMITS = {
    "8.0": 163 * 1024,
    "8.6": 99 * 1024,
    "8.7": 163 * 1024,
    "8.9": 99 * 1024,
    "9.0": 227 * 1024,
    "10.0": 227 * 1024,
    "12.0": 99 * 1024,
}
"""Bytes of shared memory that one thread block may have, by compute capability (CUDA C++ Programming Guide)."""

LEAST_SHARED = min(SHARED_LIMITS.values())
MAX_HEAD_DIM = 256
MOST_PROGRAMS = 65535
"""Along the second and third axis of a grid of CUDA."""

SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


class Tiles(NamedTuple):
    """Rows (queries) and keys of a tile, padded head size, warps of a program, stages of the load pipeline."""

    rows: int
    keys: int
    dim: int
    warps: int
    stages: int


# (rows, keys, warps, stages)
_SMALLER = ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1))
_FORWARD = {
    64: ((64, 64, 4, 3),) + _SMALLER,
    128: ((128, 64, 4, 2),) + _SMALLER,
    256: ((128, 64, 8, 2),) + _SMALLER,
}  # by padded head size, up to and including
_KEY = {64: ((32, 128, 4, 3),) + _SMALLER}
_FLOAT32 = ((32, 32, 4, 1), (32, 16, 4, 1))  # no tensor cores: larger tiles spill registers and take long to compile
_FEW_ROWS = 32
_DECODING = ((_FEW_ROWS, 128, 4, 3), (_FEW_ROWS, 64, 4, 3), (_FEW_ROWS, 64, 4, 2)) + _SMALLER
_LEAST = (16, 16, 4, 1)
DIRECTIONS = ("forward", "query", "key", "bias")


def power_of_two(size, least=16):
    """The smallest power of two that is >= ``size`` and >= ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def shared_bytes(spec, tiles, direction):
    """Upper bound of the shared memory of one program, in bytes.

    Triton keeps there what a product reads: the resident operands once, those that a loop streams once a stage, and the
    operands that were computed (P, dS) on their way from registers; accumulators stay in registers, and pass through
    shared memory only when they are stored.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec`.
        direction: 'forward', 'query' (dQ), 'key' (dK and dV) or 'bias' (its gradient).
    """
    size = SIZE[spec.dtype]
    by_rows, by_keys = tiles.rows * tiles.dim * size, tiles.keys * tiles.dim * size
    resident = {"forward": by_rows, "query": 2 * by_rows, "key": 2 * by_keys, "bias": 2 * by_rows}[direction]
    streamed = 2 * by_rows if direction == "key" else 2 * by_keys
    scores = tiles.rows * tiles.keys
    streamed += scores * ((spec.mask_shape is not None) + 4 * (spec.bias_shape is not None))
    # Statistics, bounds, segment ids and dropout keys: at most six 4-byte values a row and two a key.
    streamed += 4 * (6 * tiles.rows + 2 * tiles.keys)
    computed = scores * size * {"forward": 1, "query": 2, "key": 2, "bias": 0}[direction]
    by_dim = tiles.dim * (2 * tiles.keys if direction == "key" else tiles.rows)
    stored = scores if direction == "bias" else by_dim
    # Three TF32 products for one of float32 (if the caller asks for them): Hopper takes an operand's halves from there.
    halves = 2 * max(by_rows, by_keys) if spec.dtype == "float32" and capability().startswith("9") else 0
    return max(resident + tiles.stages * streamed + computed + halves, 4 * stored)


def capability():
    """Compute capability of the GPU at hand, '' where there is none."""
    if jax.default_backend() != "gpu":
        return ""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def shared_limit():
    """Bytes that a program may use on the GPU at hand; where there is none, on every GPU since compute capability 8."""
    return SHARED_LIMITS.get(capability(), LEAST_SHARED)


def tiles_of(spec, direction):
    """The :class:`Tiles` of a call: as ``spec.tile`` asks, else the largest that fit :func:`shared_limit`."""
    dim = power_of_two(spec.head_dim)
    if spec.tile is not None:
        rows, keys = (max(16, 1 << (min(size, 128).bit_length() - 1)) for size in spec.tile)
        return Tiles(rows, keys, dim, 4, 1)
    most_rows, most_keys = power_of_two(spec.q_len), power_of_two(spec.kv_len)
    for rows, keys, warps, stages in _candidates(spec.dtype, dim, most_rows, direction):
        tiles = Tiles(min(rows, most_rows), min(keys, most_keys), dim, warps, stages)
        if shared_bytes(spec, tiles, direction) <= shared_limit():
            return tiles
    rows, keys, warps, stages = _LEAST
    return Tiles(rows, keys, dim, warps, stages)


def _candidates(dtype, dim, most_rows, direction):
    if dtype == "float32":
        return _FLOAT32[1:] if direction == "key" and dim > 128 else _FLOAT32
    if direction == "key":
        return _KEY.get(max(64, dim), _SMALLER)
    if direction != "forward":
        return _SMALLER
    return _DECODING if most_rows <= _FEW_ROWS else next(tiles for most, tiles in _FORWARD.items() if dim <= most)


MOST_STACKED = 64  # rows


def stacks(spec):
    """Whether the query heads that share a key/value head are rows of one tile: few queries, and nothing a head."""
    told_apart = (spec.mask_shape, spec.bias_shape, spec.alibi_shape, spec.segments, spec.q_lengths, spec.dropout_rate)
    return 1 < spec.group and spec.group * spec.q_len <= MOST_STACKED and not any(told_apart)


def stacked(spec):
    """The call with a group's heads as queries of one head; where they stand, and sinks, are the caller's to give."""
    return replace(spec, heads=spec.kv_heads, q_len=spec.group * spec.q_len, sinks=False)


_PROGRAMS_A_PROCESSOR = 2
_LEAST_PART = 4  # key tiles
_MOST_PARTS = 32
_PROCESSORS = 132  # of an H100; of the GPU at hand where there is one


def parts_of(spec, tiles):
    """Programs that share out the keys of a head: more than one where few queries would leave the GPU idle.

    As many as give each processor two programs, at least 4 key tiles each. What is seen is estimated for queries at the
    end of the keys; it decides about speed alone.
    """
    if spec.q_len > tiles.rows:
        return 1
    last = spec.kv_len - 1
    seen = spec.band.last_key(last) - spec.band.first_key(last - spec.q_len + 1) + 1
    processors = jax.devices()[0].core_count if jax.default_backend() == "gpu" else _PROCESSORS
    wanted = -(-_PROGRAMS_A_PROCESSOR * processors // (spec.batch * spec.heads))
    return max(1, min(wanted, seen // tiles.keys // _LEAST_PART, _MOST_PARTS))
