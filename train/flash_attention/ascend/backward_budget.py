"""Which local buffers the backward kernel needs: the kernel declares this list."""

from flash_attention.ascend import backward_operands
from flash_attention.ascend.geometry import FRACTAL
from flash_attention.ascend.program import Buffer
from flash_attention.ascend.tasks import CORE_FIELDS, TILE_FIELDS
from flash_attention.ascend.tile_ops.matmul import FRACTAL_ELEMENTS, cube_buffers
from flash_attention.ascend.tile_ops.vector import HALF_LANES, LANES


def needs_fp32_scores(spec):
    """True when something is added to the scaled scores, in every tile."""
    return spec.bias_shape is not None or spec.alibi_shape is not None


def backward_buffers(geometry):
    """Every local :class:`~flash_attention.ascend.program.Buffer` of the backward kernel."""
    buffers = _unified_buffer(geometry) + _operand_buffers(geometry) + _l1(geometry) + _cube(geometry)
    for part in backward_operands.parts(geometry):
        buffers += part.buffers(geometry)
    return buffers


def _unified_buffer(geometry):
    tiles, band = geometry.tiles, geometry.spec.band
    piece = tiles.groups * FRACTAL * tiles.kv
    column_group = FRACTAL * max(tiles.kv, tiles.groups * FRACTAL)
    tails = (tiles.q - geometry.q_tail, tiles.kv - geometry.kv_tail)
    rows = [
        ("probs0", "float16", piece, "exponents, then 2**k P"),
        ("probs1", "float16", piece, "the next piece of it"),
        ("shrunk", "float16", piece, "P without its factor 2**k"),
        ("d_scores0", "float16", piece, "dP - delta, then dS"),
        ("d_scores1", "float16", piece, "the next piece of dS"),
        ("result0", "float32", column_group, "16 columns of a gradient from L0C"),
        ("result1", "float32", column_group, "the next 16 columns"),
        ("result_half0", "float16", column_group, "the same, to be stored"),
        ("result_half1", "float16", column_group, "the next 16 columns"),
        ("zeros", "float16", FRACTAL * max(FRACTAL, *tails), "rows that do not exist, and a fractal of zeros"),
        ("factors", "float32", 2 * LANES, "what dV, and what dQ and dK, are multiplied by"),
        ("key_task", "int32", 8, "row of the key-major task table"),
        ("tile", "int32", len(TILE_FIELDS), "row of the query tiles' table"),
        ("core", "int32", CORE_FIELDS, "row of the core table"),
    ]
    if needs_fp32_scores(geometry.spec) or not band.is_dense:
        rows.append(("work", "float32", piece, "scores that something is added to, or that are bounded"))
        rows.append(("scratch", "float32", FRACTAL * tiles.kv, "bound or bias of a group of queries"))
        rows.append(("scale", "float32", LANES, "the scale in every lane"))
    return [Buffer(name, "UB", dtype, elements, content) for name, dtype, elements, content in rows]


def _operand_buffers(geometry):
    """Buffers of the Unified Buffer that only some calls need."""
    spec, band, keys = geometry.spec, geometry.spec.band, geometry.tiles.kv
    statistic = geometry.tiles.groups * LANES
    piece = geometry.tiles.groups * FRACTAL * keys
    rows = []
    if band.bounded_below or band.bounded_above:
        rows.append(("index", "float32", keys * FRACTAL, "key index in the tile, times masks.UNIT"))
    if band.bounded_below or band.bounded_above or spec.alibi_shape is not None:
        rows.append(("relative", "float32", statistic, "bound or position - first key of tile"))
        rows.append(("start", "float32", LANES, "first key of the tile"))
        rows.append(("start_int", "int32", LANES, "the same as an integer"))
    if spec.mask_shape is not None:
        rows.append(("mask", "float16", piece, "piece of a mask tile"))
    if spec.bias_shape is not None:
        rows.append(("bias", "float32", piece, "piece of a bias tile"))
    if spec.alibi_shape is not None:
        rows.append(("key_index", "float32", keys * FRACTAL, "key index in the tile"))
        rows.append(("slope", "float32", 16, "slope and -slope of the head"))
        rows.append(("slope_tiles", "float32", 2 * keys * FRACTAL, "slope * key, -slope * key"))
        rows.append(("lane_bias", "float32", statistic, "ALiBi's part that is one value a query"))
    if spec.dropout_rate:
        rows.append(("keep", "uint8", piece, "piece of a dropout tile"))
        rows.append(("keep_half", "float16", piece, "the same in fp16, then the dropped P"))
        rows.append(("kept", "float16", piece, "P after dropout"))
        rows.append(("delta", "float16", geometry.tiles.groups * HALF_LANES, "-delta, eight copies"))
    return [Buffer(name, "UB", dtype, elements, content) for name, dtype, elements, content in rows]


def _l1(geometry):
    tiles, columns = geometry.tiles, geometry.depth + FRACTAL
    rows = [
        ("probs_l1", tiles.q * tiles.kv, "P transposed", 1),
        ("d_scores_l1", tiles.q * tiles.kv, "dS transposed", 1),
    ]
    for name, length in (("query", tiles.q), ("d_out", tiles.q), ("key", tiles.kv), ("value", tiles.kv)):
        rows.append((name + "_resident", length * columns, "tile of the pass that keeps it, with its columns", 1))
        rows.append((name + "_stream", length * columns, "tile of the pass that walks over it", 2))
    rows.append(("zeros_l1", FRACTAL_ELEMENTS, "one fractal of zeros", 1))
    return [Buffer(name, "L1", "float16", elements, content, copies) for name, elements, content, copies in rows]


def _cube(geometry):
    tiles, depth = geometry.tiles, geometry.depth
    query_columns = depth + (FRACTAL if geometry.spec.alibi_shape is not None else 0)
    return cube_buffers() + [
        Buffer("scores", "L0C", "float32", tiles.q * tiles.kv, "S transposed - lse / scale"),
        Buffer("d_probs", "L0C", "float32", tiles.q * tiles.kv, "dP transposed - delta"),
        Buffer("sums", "L0C", "float32", max(2 * tiles.kv * depth, tiles.q * query_columns), "dV and dK, or dQ"),
    ]
