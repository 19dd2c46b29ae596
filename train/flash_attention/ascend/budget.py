"""Which local buffers a forward kernel needs: the kernel declares this list.

``print(Budget(...))`` shows every buffer with its size; a kernel cannot use one that is not listed here.
"""

from flash_attention.ascend.chips import ASCEND_910A
from flash_attention.ascend.geometry import FRACTAL
from flash_attention.ascend.program import Buffer
from flash_attention.ascend.tasks import CORE_FIELDS, TASK_HEAD, TILE_FIELDS
from flash_attention.ascend.tile_ops.matmul import FRACTAL_ELEMENTS, cube_buffers
from flash_attention.ascend.tile_ops.vector import LANES


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
