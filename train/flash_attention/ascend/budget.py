"""Which local buffers a forward kernel needs, and the largest tiles whose buffers fit: the kernel declares this list.

``print(Budget(...))`` shows every buffer with its size; a kernel cannot use one that is not listed here.
"""

from dataclasses import replace

from flash_attention.ascend.chips import ASCEND_910A
from flash_attention.ascend.geometry import FRACTAL, Geometry, KernelTiles, round_up
from flash_attention.ascend.program import Buffer
from flash_attention.ascend.tasks import CORE_FIELDS, TASK_HEAD, TILE_FIELDS
from flash_attention.ascend.tile_ops.matmul import FRACTAL_ELEMENTS, cube_buffers
from flash_attention.ascend.tile_ops.vector import LANES
from flash_attention.core.plan import make_plan
from flash_attention.core.tiling import get_strategy
from flash_attention.core.tiling.base import Tile

PREFERRED = Tile(128, 128)
"""128 x 128 x 128 products fill half of L0A and L0B, so that one half is loaded while the cube reads the other."""

_LONGER = Tile(128, 256)
"""Rescales O half as often, but wastes more where few keys are visible."""

# Vector cycles of a tile of 128 queries, measured on the simulator's trace (see test_ascend_cycles.py).
_CYCLES_PER_KEY = 12
_CYCLES_PER_ROW = 4  # of O^T with its row sums: drained from L0C and rescaled once a key tile
_CYCLES_PER_TILE = 88


def forward_buffers(geometry):
    """Every local :class:`~flash_attention.ascend.program.Buffer` of the forward kernel."""
    return _unified_buffer(geometry) + _operand_buffers(geometry) + _l1(geometry) + _cube(geometry)


def _unified_buffer(geometry):
    tiles, groups = geometry.tiles, geometry.tiles.groups
    keys, depth, resident = tiles.kv, geometry.depth, tiles.resident
    statistic = geometry.q_groups * LANES
    piece = groups * FRACTAL
    buffers = [
        ("output", "float32", resident * tiles.q * (depth + FRACTAL), "O transposed, with the row sums l"),
        ("work", "float32", piece * max(keys, depth + FRACTAL), "scores, then P V, from L0C"),
        ("scratch", "float32", max(groups * max(8 * keys, 2 * LANES), 16 * keys, 5 * statistic), "tree of maxima"),
        ("half0", "float16", piece * max(keys, depth), "P on its way to L1"),
        ("half1", "float16", piece * max(keys, depth), "the next piece of P"),
        ("running", "float32", resident * statistic, "running maximum m"),
        ("rescale", "float32", resident * statistic, "exp(m - m')"),
        ("tile_max", "float32", groups * LANES, "maximum over a tile's keys"),
        ("addend", "float32", groups * LANES, "what the exponent subtracts"),
        ("scale", "float32", LANES, "the scale in every lane"),
        ("task", "int32", TASK_HEAD + len(TILE_FIELDS) * resident, "row of the task table"),
        ("core", "int32", CORE_FIELDS, "row of the core table"),
    ]
    tails = [tile - tail for tile, tail in ((tiles.q, geometry.q_tail), (keys, geometry.kv_tail))]
    if any(tails):
        buffers.append(("zeros", "float16", FRACTAL * max(tails), "rows that do not exist"))
    return [Buffer(name, "UB", dtype, elements, content) for name, dtype, elements, content in buffers]


def _operand_buffers(geometry):
    """Buffers of the Unified Buffer that only some calls need."""
    spec, keys = geometry.spec, geometry.tiles.kv
    statistic = geometry.q_groups * LANES
    tile = geometry.tiles.groups * FRACTAL * keys
    positions = [
        ("first_key", "float32", geometry.tiles.resident * statistic, "first visible key", geometry.bounded_below),
        ("last_key", "float32", geometry.tiles.resident * statistic, "last visible key", geometry.bounded_above),
        ("position", "float32", geometry.tiles.resident * statistic, "positions p", spec.alibi_shape is not None),
    ]
    buffers = [row[:4] for row in positions if row[4]]
    if buffers:
        buffers.append(("relative", "float32", geometry.tiles.groups * LANES, "bound or position - first key of tile"))
        buffers.append(("start", "float32", LANES, "first key of the tile"))
        buffers.append(("start_int", "int32", LANES, "the same as an integer"))
    if geometry.bounded_below or geometry.bounded_above:
        buffers.append(("index", "float32", keys * FRACTAL, "key index in the tile, times masks.UNIT"))
    if spec.mask_shape is not None:
        buffers.append(("mask", "float16", tile, "piece of a mask tile"))
    if spec.bias_shape is not None:
        buffers.append(("bias", "float32", tile, "piece of a bias tile"))
    if spec.alibi_shape is not None:
        buffers.append(("key_index", "float32", keys * FRACTAL, "key index in the tile"))
        buffers.append(("slope", "float32", 16, "slope and -slope of the head"))
        buffers.append(("slope_tiles", "float32", 2 * keys * FRACTAL, "slope * key, -slope * key"))
        buffers.append(
            ("lane_bias", "float32", geometry.tiles.groups * LANES, "ALiBi's part that is one value a query")
        )
    if spec.dropout_rate:
        buffers.append(("keep", "uint8", tile, "piece of a dropout tile"))
        buffers.append(("keep_half", "float16", tile, "the same in fp16"))
        buffers.append(("kept", "float16", tile, "P after dropout"))
    return [Buffer(name, "UB", dtype, elements, content) for name, dtype, elements, content in buffers]


def _l1(geometry):
    tiles, depth = geometry.tiles, geometry.depth
    buffers = [
        Buffer("query_l1", "L1", "float16", tiles.resident * tiles.q * depth, "query tiles"),
        Buffer("key_l1", "L1", "float16", tiles.kv * depth, "key tile", copies=2),
        Buffer("value_l1", "L1", "float16", tiles.kv * depth, "value tile", copies=2),
        Buffer("probs_l1", "L1", "float16", tiles.resident * tiles.q * tiles.kv, "P transposed"),
        Buffer("ones_l1", "L1", "float16", FRACTAL_ELEMENTS, "one fractal of ones"),
    ]
    if geometry.spec.dropout_rate:
        buffers.append(
            Buffer("kept_l1", "L1", "float16", tiles.resident * tiles.q * tiles.kv, "P transposed, after dropout")
        )
    return buffers


def _cube(geometry):
    tiles = geometry.tiles
    slot = tiles.q * max(tiles.kv, geometry.depth + FRACTAL)
    return cube_buffers() + [
        Buffer("products", "L0C", "float32", tiles.resident * slot, "scores, then P V, a tile each")
    ]


class Budget:
    """The buffers of a geometry beside a chip's capacities; ``str()`` is a table.

    Args:
        buffers: list of :class:`~flash_attention.ascend.program.Buffer`.
        chip: :class:`~flash_attention.ascend.chips.Chip`.
    """

    def __init__(self, buffers, chip=ASCEND_910A):
        self.buffers = buffers
        self.chip = chip

    def used(self, scope):
        """Bytes of a scope that the buffers take."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.scope == scope)

    @property
    def fits(self):
        """True when every scope has room."""
        return all(self.used(scope) <= capacity for scope, capacity in self.chip.capacity)

    def __str__(self):
        lines = []
        for scope, capacity in self.chip.capacity:
            lines.append("{:<4} {:>8} of {:>8} bytes".format(scope, self.used(scope), capacity))
            for buffer in self.buffers:
                if buffer.scope == scope:
                    size = "{} x {}".format(buffer.copies, buffer.bytes // buffer.copies)
                    lines.append("  {:<10} {:<8} {:>14}  {}".format(buffer.name, buffer.dtype, size, buffer.content))
        return "\n".join(lines)


def preferred_tile(spec):
    """The tile with the fewest predicted vector cycles, which the 'auto' strategy takes: (128, 256) or (128, 128)."""

    def cycles(tile):
        visited = make_plan(spec.band, spec.offset, tile.q, tile.kv).visited
        per_tile = _CYCLES_PER_TILE + _CYCLES_PER_ROW * (round_up(spec.head_dim) + FRACTAL)
        return visited * (_CYCLES_PER_KEY * tile.kv + per_tile)

    return min((_LONGER, PREFERRED), key=cycles)


def choose_tiles(spec, chip=ASCEND_910A):
    """The :class:`~flash_attention.ascend.geometry.KernelTiles` of a spec.

    The tile of the spec's strategy, halved until its buffers fit. Two query tiles are resident, so that cube and vector
    unit work at the same time: whole ones where every core gets two, which halves key and value traffic, else the two
    halves of one.
    """
    wanted = get_strategy(spec.tiling).tiles(spec, preferred_tile(spec))
    q, kv = round_up(wanted.q), round_up(wanted.kv)
    if spec.batch * spec.heads * -(-spec.q_len // q) < 2 * chip.cores:
        q = round_up(q // 2)
    while True:
        resident = 2 if spec.q_len > q else 1
        tiles = fit_groups(spec, KernelTiles(q, kv, resident, q // FRACTAL), chip)
        if tiles is not None:
            return tiles
        if q > FRACTAL and q >= kv // 2:
            q = round_up(q // 2)
        else:
            kv = round_up(kv // 2)


def fit_groups(spec, tiles, chip=ASCEND_910A):
    """``tiles`` with as many groups of queries in the Unified Buffer as fit, at most 8; None when not even one does."""
    groups = tiles.q // FRACTAL
    for divisor in range(1, groups + 1):
        if groups % divisor == 0 and groups // divisor <= 8:
            candidate = replace(tiles, groups=groups // divisor)
            if Budget(forward_buffers(Geometry(spec, candidate)), chip).fits:
                return candidate
    return None
