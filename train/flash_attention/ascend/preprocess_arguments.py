"""The arguments and buffers of the kernel in front of the backward kernel, and numpy on the host for them."""

import numpy as np

from flash_attention.ascend import host, tasks
from flash_attention.ascend.backward_arguments import probability_exponent
from flash_attention.ascend.geometry import FRACTAL
from flash_attention.ascend.program import Buffer, GmTensor
from flash_attention.ascend.signature import query_matrix
from flash_attention.ascend.tasks import CORE_FIELDS

DEAD = 2.0**23
"""Stands for the LSE of a query that does not exist: its exponents saturate, P is exactly 0."""
MOST_GROUPS = 4
"""Groups of 16 queries that are in the Unified Buffer at a time: two copies of two such tiles fit at any head size."""


def piece_groups(geometry):
    """Groups of 16 queries of a piece: the most that divide a query tile."""
    return max(groups for groups in range(1, MOST_GROUPS + 1) if geometry.q_groups % groups == 0)


def preprocess_signature(geometry, cores):
    """(inputs, outputs) of the kernel: lists of :class:`~flash_attention.ascend.program.GmTensor`.

    Args:
        geometry: :class:`~flash_attention.ascend.geometry.Geometry` of the backward kernel.
        cores: number of cores the kernel runs on.
    """
    queries = geometry.q_tiles * geometry.tiles.q
    heads = geometry.batch_heads
    inputs = [
        query_matrix(geometry, "output"),
        query_matrix(geometry, "d_out"),
        GmTensor("statistics", "float32", heads + (2, queries), "minus what scores lack; d_lse's part of -delta"),
        GmTensor("cores", "int32", (cores, CORE_FIELDS), "tasks.split of the pieces"),
    ]
    outputs = [
        GmTensor("query_columns", "float16", heads + (2, queries, FRACTAL), "extra columns of query and d_out"),
        GmTensor("minus_delta", "float16", heads + (queries,), "-delta"),
    ]
    return inputs, outputs


def preprocess_buffers(geometry):
    """Every local :class:`~flash_attention.ascend.program.Buffer` of the kernel."""
    rows = piece_groups(geometry) * FRACTAL
    buffers = [
        ("out_rows", "float16", rows * geometry.depth, "O", 2),
        ("d_out_rows", "float16", rows * geometry.depth, "dO", 2),
        ("products", "float32", rows * FRACTAL, "dO * O, added over the column groups", 1),
        ("sums", "float32", rows, "rowsum(dO * O)", 1),
        ("statistics", "float32", 2 * rows, "what is subtracted from scores and from dP, negated", 1),
        ("part", "float32", rows, "an fp16 part of it", 1),
        ("half", "float16", rows, "-delta, to be stored", 1),
        ("score_columns", "float16", rows * FRACTAL, "extra columns of the query, transposed", 1),
        ("delta_columns", "float16", rows * FRACTAL, "extra columns of d_out, transposed", 1),
        ("rows", "float16", rows * FRACTAL, "extra columns, to be stored", 1),
        ("core", "int32", CORE_FIELDS, "row of the core table", 1),
    ]
    return [Buffer(name, "UB", dtype, elements, content, copies) for name, dtype, elements, content, copies in buffers]


def preprocess_constants(geometry, cores):
    """The kernel's inputs that depend on no tensor, by name."""
    pieces = geometry.q_tiles * geometry.q_groups // piece_groups(geometry)
    return {"cores": tasks.split(np.ones(pieces), geometry.heads, cores)}


def row_statistics(geometry, lse, d_lse):
    """fp32 (B, N, 2, queries of whole tiles): ``-(lse - k ln 2) / scale`` and ``(1 - rate) d_lse``.

    ``2**k P`` is what the backward kernel computes. Queries that see no key have 0 for both: every key is hidden from
    them. Queries that do not exist have :data:`DEAD` for the LSE.
    """
    spec = geometry.spec
    dead = np.isneginf(lse)
    packed = np.zeros(geometry.batch_heads + (2, geometry.q_tiles * geometry.tiles.q), np.float32)
    packed[:, :, 0] = -DEAD / spec.scale
    shifted = probability_exponent(geometry) * np.log(2.0) - lse
    packed[:, :, 0, : spec.q_len] = np.where(dead, 0.0, shifted) / spec.scale
    packed[:, :, 1, : spec.q_len] = np.where(dead, 0.0, d_lse) * (1.0 - spec.dropout_rate)
    return packed


def pack_preprocess(geometry, cores, out, lse, d_out, d_lse):
    """The kernel's inputs by name, in the order of :func:`preprocess_signature`.

    Args:
        geometry: :class:`~flash_attention.ascend.geometry.Geometry` of the backward kernel.
        cores: number of cores the kernel was built for.
        out, d_out: float16 (B, N, Sq, D). lse, d_lse: float32 (B, N, Sq). Cotangents are divided already
            (``backward_arguments.divided_cotangents``).
    """
    feed = {"output": host.to_nz(out), "d_out": host.to_nz(d_out)}
    feed["statistics"] = row_statistics(geometry, lse, d_lse)
    feed.update(preprocess_constants(geometry, cores))
    host.check_feed(feed, preprocess_signature(geometry, cores)[0])
    return feed
