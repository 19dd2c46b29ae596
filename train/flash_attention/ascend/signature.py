"""The arguments of the forward kernel, in order: one list for the builder, host packing, registration and docs.

FRACTAL_NZ is the frameworks' layout of query, key, value and output. The other tensors are plain (ND) ones that the
host, or ordinary operators in front of the kernel, prepare: tiles are whole and contiguous, whatever the lengths, and
transposed like the scores, ``[q1][key][16 queries]``. An argument of rank 2 is a table that serves all heads; the
leading axes of any other are batch and heads, of size 1 where shared.
"""

from flash_attention.ascend.geometry import FRACTAL
from flash_attention.ascend.program import GmTensor
from flash_attention.ascend.tasks import CORE_FIELDS, TASK_HEAD, TILE_FIELDS, strip_shape

BOUND_ROWS = 3
"""Rows of 'bounds': first visible key, last visible key, position (see ``host.pack_bounds``)."""


def forward_signature(geometry, cores, with_lse):
    """(inputs, outputs) of the forward kernel: lists of :class:`~flash_attention.ascend.program.GmTensor`.

    Args:
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`.
        cores: number of cores the kernel runs on.
        with_lse: whether the kernel writes the log-sum-exp (training) or not (inference).
    """
    inputs = [query_matrix(geometry, "query"), key_matrix(geometry, "key"), key_matrix(geometry, "value")]
    inputs += packed_operands(geometry, kept=0)
    if needs_bounds(geometry):
        shape = (BOUND_ROWS, geometry.q_tiles * geometry.tiles.q)
        inputs.append(GmTensor("bounds", "float32", shape, "first visible key, last visible key, position"))
    row = TASK_HEAD + len(TILE_FIELDS) * geometry.tiles.resident
    inputs.append(GmTensor("tasks", "int32", (geometry.q_tasks, row), "tasks.query_tasks"))
    inputs.append(GmTensor("cores", "int32", (cores, CORE_FIELDS), "tasks.split"))
    outputs = [query_matrix(geometry, "output")]
    if with_lse:
        outputs.append(GmTensor("lse", "float32", geometry.batch_heads + (geometry.q_rows,), "natural logarithm"))
    return inputs, outputs


def query_matrix(geometry, name):
    """A tensor like the query: FRACTAL_NZ, a row a query."""
    spec = geometry.spec
    shape = (spec.batch, spec.heads, geometry.depth // FRACTAL, geometry.q_rows // FRACTAL, FRACTAL, FRACTAL)
    nd_shape = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
    return GmTensor(name, "float16", shape, "FRACTAL_NZ of (B, N, Sq, D)", nd_shape)


def key_matrix(geometry, name):
    """A tensor like key and value: FRACTAL_NZ, a row a key."""
    spec = geometry.spec
    shape = (spec.batch, spec.kv_heads, geometry.depth // FRACTAL, geometry.kv_rows // FRACTAL, FRACTAL, FRACTAL)
    nd_shape = (spec.batch, spec.kv_heads, spec.kv_len, spec.head_dim)
    return GmTensor(name, "float16", shape, "FRACTAL_NZ of (B, Nkv, Sk, D)", nd_shape)


def packed_operands(geometry, kept):
    """The spec's mask, bias, slopes and dropout tiles; ``kept`` is the mask's value where a key is kept."""
    spec, found = geometry.spec, []
    if spec.mask_shape is not None:
        content = "tiles: {} = keep, -65504 = discard".format(kept)
        found.append(GmTensor("mask", "float16", mask_axes(geometry), content))
    if spec.bias_shape is not None:
        found.append(GmTensor("bias", "float32", tile_axes(geometry, spec.bias_shape), "tiles"))
    if spec.alibi_shape is not None:
        shape = geometry.batch_heads + (2, 8)
        found.append(GmTensor("slopes", "float32", shape, "eight times slope, eight times -slope"))
    if spec.dropout_rate:
        full = (spec.batch, spec.heads, spec.q_len, spec.kv_len)
        found.append(GmTensor("keep", "uint8", tile_axes(geometry, full), "tiles: 1 = keep, 0 = drop"))
    return found


def needs_bounds(geometry):
    """True when some tile needs a predicate or a position."""
    return geometry.bounded_below or geometry.bounded_above or geometry.spec.alibi_shape is not None


def tile_axes(geometry, shape):
    """Axes of an operand packed as tiles: (1|B, 1|N, query tiles, key tiles, q1, keys, 16).

    An operand of one row (shape[2] == 1) has a single query tile with a single group, which serves all queries.
    """
    shared = shape[2] == 1
    q_tiles, groups = (1, 1) if shared else (geometry.q_tiles, geometry.q_groups)
    return (shape[0], shape[1], q_tiles, geometry.kv_tiles, groups, geometry.tiles.kv, FRACTAL)


def mask_axes(geometry):
    """Axes of the packed mask; a compact one has only the tiles around the queries' own blocks."""
    if not geometry.spec.compact_mask:
        return tile_axes(geometry, geometry.spec.mask_shape)
    rows, tiles = strip_shape(geometry.plan())
    return (1, 1, rows, tiles, geometry.q_groups, geometry.tiles.kv, FRACTAL)
