"""Gradients of bias and ALiBi slopes, as more work on the dS that the backward kernel has anyway.

Each of the classes below joins one pass of the kernel: ``start`` before its loop over a head's tiles, ``vector`` where
a piece of dS^T is in the Unified Buffer, ``cube`` where it is in L1, ``finish`` after the loop. What they write are
sums that the host, or ordinary operators behind the kernel, combine (:mod:`backward_arguments`).
"""

from flash_attention.ascend.program import Buffer, GmTensor
from flash_attention.ascend.signature import tile_axes
from flash_attention.ascend.tile_ops import gradient, layout
from flash_attention.ascend.tile_ops.layout import Place
from flash_attention.ascend.tile_ops.matmul import FRACTAL, Operand
from flash_attention.ascend.tile_ops.vector import HALF_LANES, Lanes, fill

ONE = 7
"""The query's extra column that is 1, for sums of dS over the queries; the key's is 0."""
KEY_SUMS = (4, 5, 6)
"""The key's extra columns that dS is summed with for the slopes: 1, key // KEY_UNIT, key % KEY_UNIT, exact in fp16."""
KEY_UNIT = 2048


class _Part:
    """What the parts share: no work at any step. ``kernel`` is the backward kernel that is being written."""

    def __init__(self, kernel):
        self.kernel, self.api, self.local, self.gm = kernel, kernel.api, kernel.local, kernel.gm
        self.geometry, self.spec, self.tiles = kernel.geometry, kernel.spec, kernel.tiles

    @staticmethod
    def wanted(spec):
        """Whether a call needs this part."""
        raise NotImplementedError

    @staticmethod
    def output(geometry):
        """The :class:`~flash_attention.ascend.program.GmTensor` it writes."""
        raise NotImplementedError

    @staticmethod
    def buffers(geometry):
        """Local buffers of this part alone."""
        del geometry
        return []

    def start(self, head, tile):
        """Before the loop over the tiles that the resident ``tile`` of ``head`` visits."""

    def vector(self, pair, piece, d_scores):
        """dS^T of a piece is in the Unified Buffer, in tensor ``d_scores``."""

    def cube(self, pair, piece):
        """dS^T of a piece is in L1."""

    def finish(self, head, tile):
        """After the loop."""


class BiasTiles(_Part):
    """Query pass: dS itself, as tiles, for a bias that has a value for each query (so its gradient is as large)."""

    @staticmethod
    def wanted(spec):
        return spec.bias_shape is not None and spec.bias_shape[2] > 1

    @staticmethod
    def output(geometry):
        spec = geometry.spec
        axes = tile_axes(geometry, (spec.batch, spec.heads, spec.q_len, spec.kv_len))
        return GmTensor("bias_tiles", "float16", axes, "dS as tiles")

    def _tile(self, head, q_tile, key_tile):
        elements = self.tiles.q * self.tiles.kv
        tile = (head * self.geometry.q_tiles + q_tile) * self.geometry.kv_tiles + key_tile
        return Place(self.gm["bias_tiles"], tile * elements)

    def start(self, head, tile):
        """Tiles that are not visited have gradient zero."""
        field = self.kernel.field
        elements = self.kernel.rows * self.tiles.kv
        zeros = self.local["probs0"]
        fill(self.api, Lanes(zeros), 0.0, elements // HALF_LANES, mask=HALF_LANES)
        for bounds in ((0, field["first"]), (field["stop"], self.geometry.kv_tiles)):
            with self.api.for_range(*bounds, name="unvisited") as key_tile:
                target = self._tile(head, tile, key_tile)
                for piece in range(self.geometry.pieces):
                    layout.copy(
                        self.api, Place(target.tensor, target.offset + piece * elements), Place(zeros), elements
                    )

    def vector(self, pair, piece, d_scores):
        target = self._tile(pair.head, pair.q_tile, pair.key_tile)
        target = target._replace(offset=target.offset + piece * pair.elements)
        layout.copy(self.api, target, Place(d_scores), pair.elements)


class BiasSums(_Part):
    """Key pass: the sum of dS over the queries, one value a key and head, for a bias that all queries share."""

    @staticmethod
    def wanted(spec):
        return spec.bias_shape is not None and spec.bias_shape[2] == 1

    @staticmethod
    def output(geometry):
        return GmTensor(
            "bias_sums", "float32", geometry.batch_heads + (geometry.kv_rows,), "sum of dS over the queries"
        )

    @staticmethod
    def buffers(geometry):
        elements = geometry.tiles.kv * FRACTAL
        return [
            Buffer("bias_l0c", "L0C", "float32", elements, "sums of dS over the queries, in one row of each fractal"),
            Buffer("bias_ub", "UB", "float32", elements, "the same, to be stored"),
        ]

    def start(self, head, tile):
        self.kernel.clear_sums(self.local["bias_l0c"][0], FRACTAL, self.tiles.kv)

    def cube(self, pair, piece):
        """(q')^T dS, of which row ONE is wanted: zN, 16 rows and Bc columns."""
        rows, depth = self.kernel.rows, self.geometry.depth
        offset = piece * rows * (depth + FRACTAL) + rows * depth
        left = Operand(pair.query, rows, FRACTAL, transposed=True, offset=offset)
        right = Operand(self.local["d_scores_l1"], self.tiles.kv, rows, transposed=True, offset=piece * pair.elements)
        self.kernel.cube.multiply(self.local["bias_l0c"][0], left, right, accumulate=True)

    def finish(self, head, tile):
        geometry, keys = self.geometry, self.tiles.kv
        source = Place(self.local["bias_ub"])
        layout.drain(self.api, source, Place(self.local["bias_l0c"]), 1, keys // FRACTAL)

        def store(rows):
            target = Place(self.gm["bias_sums"], head * geometry.kv_rows + tile * keys)
            store_row(self.api, target, source, ONE, rows // FRACTAL)

        self.kernel.program.with_tail(tile, geometry.kv_tiles, keys, geometry.kv_tail, store)


class SlopeSums(_Part):
    """Query pass: per query, sums over the keys of +-dS and of +-dS times the key: + before its position, - after it.

    The slope's gradient is minus the sum of dS |position - key|, so these are all that is needed, in O(Sq) memory.
    """

    @staticmethod
    def wanted(spec):
        return spec.alibi_shape is not None

    @staticmethod
    def output(geometry):
        rows = geometry.q_tiles * geometry.tiles.q
        shape = geometry.batch_heads + (len(KEY_SUMS), rows)
        return GmTensor("slope_sums", "float32", shape, "sums of +-dS (1, key)")

    @staticmethod
    def buffers(geometry):
        tiles = geometry.tiles
        piece = tiles.groups * FRACTAL
        buffers = [
            Buffer("slope_ub", "UB", "float32", tiles.q * FRACTAL, "sums of dS over the keys, in rows of each fractal"),
        ]
        if _sees_later_keys(geometry.spec):
            buffers.append(Buffer("signed", "UB", "float16", piece * tiles.kv, "sign(position - key), then +-dS"))
            buffers.append(Buffer("units", "UB", "float16", 2 * HALF_LANES, "1 and -1 in every lane"))
            buffers.append(Buffer("signed_l1", "L1", "float16", tiles.q * tiles.kv, "+-dS transposed"))
        return buffers

    def start(self, head, tile):
        if "units" in self.local:
            for number, unit in enumerate((1.0, -1.0)):
                fill(self.api, Lanes(self.local["units"], number * HALF_LANES), unit, 1, mask=HALF_LANES)
        for piece in range(self.geometry.pieces):
            self.kernel.clear_sums(self._sums(piece).at(), FRACTAL, self.kernel.rows)

    def _sums(self, piece):
        """Behind dQ in L0C, a tile a piece: zN, 16 rows."""
        return Place(self.local["sums"], self.tiles.q * self.geometry.depth + piece * self.kernel.rows * FRACTAL)

    def vector(self, pair, piece, d_scores):
        """Give dS the sign of position - key; before the diagonal there is nothing to do."""
        if "signed" not in self.local:
            return
        api, signed = self.api, self.local["signed"]
        target = Place(self.local["signed_l1"], piece * pair.elements)
        with api.if_scope(pair.key_tile < pair.field["before_stop"]):
            layout.copy(api, target, Place(d_scores), pair.elements)
        with api.elif_scope(pair.key_tile >= pair.field["after_first"]):
            gradient.scale(api, signed, d_scores, -1.0, pair.elements)
            layout.copy(api, target, Place(signed), pair.elements)
        with api.else_scope():
            relative = pair.relative_positions(piece)
            index, work, units = self.local["key_index"], self.local["work"], self.local["units"]
            gradient.signs(api, signed, relative, index, work, units, self.tiles.groups, self.tiles.kv)
            gradient.score_gradients(api, signed, d_scores, pair.elements)
            layout.copy(api, target, Place(signed), pair.elements)

    def cube(self, pair, piece):
        """(k')^T (+-dS), of which rows KEY_SUMS are wanted: zN, 16 rows and a column a query."""
        left = Operand(pair.key, self.tiles.kv, FRACTAL, transposed=True, offset=self.tiles.kv * self.geometry.depth)
        name = "signed_l1" if "signed_l1" in self.local else "d_scores_l1"
        right = Operand(self.local[name], self.tiles.kv, self.kernel.rows, offset=piece * pair.elements)
        self.kernel.cube.multiply(self._sums(piece).at(), left, right, accumulate=True)

    def finish(self, head, tile):
        geometry = self.geometry
        source = Place(self.local["slope_ub"])
        layout.drain(self.api, source, self._sums(0), 1, geometry.q_groups)
        for number, row in enumerate(KEY_SUMS):
            offset = ((head * len(KEY_SUMS) + number) * geometry.q_tiles + tile) * self.tiles.q
            store_row(self.api, Place(self.gm["slope_sums"], offset), source, row, geometry.q_groups)


def _sees_later_keys(spec):
    """True when a query may see keys after its own position."""
    return spec.band.right is None or spec.band.right > 0


def store_row(api, dst, src, row, fractals):
    """One row of each of ``fractals`` fp32 fractals in UB -> consecutive values in global memory."""
    api.data_move(dst.at(), src.at(row * FRACTAL), 0, fractals, 2, 2 * FRACTAL - 2, 0)


KEY_PASS, QUERY_PASS = (BiasSums,), (BiasTiles, SlopeSums)
"""The parts of each pass, in the order of their outputs."""


def parts(geometry, of=KEY_PASS + QUERY_PASS):
    """The classes whose work the kernel of ``geometry`` has to do."""
    return [part for part in of if geometry.term_gradients and part.wanted(geometry.spec)]
