"""Tile sizes of the `mosaic` engine, and what its kernels take of a Hopper multiprocessor. Plain integers, no Pallas.

A block has two warpgroups that compute and one that copies. The two own the rows of a *resident* tile, half each, and
sweep over *streamed* tiles, which arrive in a ring of stages. Queries are resident for the output and dQ, keys for dK
and dV. No size was tuned: no Hopper was at hand.
"""

from typing import NamedTuple

WARPGROUPS = 2
"""Warpgroups that compute."""

M = 64
"""Rows of one wgmma, and the unit of every tile side: a warpgroup owns so many, or a multiple."""

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one block may have on compute capability 9.0 (CUDA C++ Programming Guide)."""

ALIGNMENT = 1024
"""Bytes to which a swizzled buffer is aligned."""

RESERVED = 4096
"""Bytes for barriers and for what the compiler keeps there."""

COMPUTING_REGISTERS, COPYING_REGISTERS = 240, 24
"""Registers of a thread that computes and of one that copies: 2 * 240 + 24 is what three warpgroups have, 3 * 168.

ptxas 13.0 spills none of them at head size 64, and at 128 some of dK and dV's in tiles with a predicate (36 bytes a
thread when causal); with 232 and 40 more.
"""

OTHER_REGISTERS = 24
"""Of the former, for row statistics, addresses and loop counters."""

HEAD_DIMS = (64, 128)
"""256 would need 256 registers for the sums of dK and dV alone."""

DIRECTIONS = ("forward", "query", "key")
_STREAMED = {("forward", 64): 128, ("forward", 128): 128}  # else M
_STAGES = 2


class Tiles(NamedTuple):
    """Queries and keys of a block's tile, and stages of the ring."""

    rows: int
    keys: int
    stages: int


def tiles_of(spec, direction):
    """The :class:`Tiles` of a call, as ``spec.tile`` asks (rounded down to what a warpgroup can own), else our own.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec`.
        direction: 'forward', 'query' (dQ) or 'key' (dK and dV).
    """
    resident, streamed = WARPGROUPS * M, _STREAMED.get((direction, spec.head_dim), M)
    if spec.tile is not None:
        asked = spec.tile[::-1] if direction == "key" else spec.tile
        resident, streamed = (max(unit, size // unit * unit) for unit, size in zip((WARPGROUPS * M, M), asked))
    sides = (streamed, resident) if direction == "key" else (resident, streamed)
    return Tiles(*sides, _STAGES)


def sides(tiles, direction):
    """(resident, streamed) side of a tile."""
    return (tiles.keys, tiles.rows) if direction == "key" else (tiles.rows, tiles.keys)


def shared_bytes(spec, tiles, direction):
    """Upper bound of the shared memory of one block, in bytes.

    Two 16-bit operands a streamed tile and stage (K and V, or Q and dO), one resident operand in the forward direction
    (Q), two in the others (Q and dO, or K and V); results leave through the resident operands' place. Beside them one
    float32 value a resident row on its way out, and for dK and dV two a streamed row (LSE and delta).
    """
    resident, streamed = sides(tiles, direction)
    row = 2 * spec.head_dim
    buffers = [resident * row] * (1 if direction == "forward" else 2) + [tiles.stages * streamed * row] * 2
    values = resident + (2 * tiles.stages * streamed if direction == "key" else 0)
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in buffers) + 4 * values + RESERVED


def registers(spec, tiles, direction):
    """Registers a thread that computes needs for its tiles of scores and sums; 128 threads share each tile.

    float32: the sums (out; dQ; dK and dV) and the scores (S; S and dP). 16 bit: the left operand of the next product.
    """
    resident, streamed = sides(tiles, direction)
    own = resident // WARPGROUPS
    sums = own * spec.head_dim * (2 if direction == "key" else 1)
    scores = own * streamed * (1 if direction == "forward" else 2)
    return (sums + scores + own * streamed // 2) // 128 + OTHER_REGISTERS
