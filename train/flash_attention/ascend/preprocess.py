"""The kernel in front of the backward kernel, in TIK: delta, and the extra columns of query and d_out.

``delta = rowsum(d_out * out) - d_lse`` (Dao, 2023, algorithm 2). Delta and the log-sum-exp become three fp16 parts
each, in sixteen columns that the backward kernel appends to its tiles (:mod:`backward_pair`). It is a kernel of its own
because a core's key pass needs the rows of all cores, and TIK has no barrier between cores.

Rows are worked through in pieces of at most 64 queries; the loads of one overlap with the arithmetic of the one before.
"""

from flash_attention.ascend.backward_arguments import COARSE, HIDING
from flash_attention.ascend.backward_operands import ONE
from flash_attention.ascend.geometry import FRACTAL
from flash_attention.ascend.kernel import Kernel
from flash_attention.ascend.preprocess_arguments import piece_groups, preprocess_buffers, preprocess_signature
from flash_attention.ascend.program import Program
from flash_attention.ascend.tile_ops import layout
from flash_attention.ascend.tile_ops.layout import Place, Rows
from flash_attention.ascend.tile_ops.vector import (
    HALF_LANES,
    Lanes,
    binary,
    convert,
    fill,
    low_level,
    sum_rows,
    with_scalar,
)


def build_preprocess(tik, geometry, cores, kernel_name="flash_attention_preprocess", disable_debug=False):
    """Build the kernel; the returned TIK instance runs it by ``tikdb.start_debug``.

    Args:
        tik: module with the interface of ``tbe.tik``.
        geometry: :class:`~flash_attention.ascend.geometry.Geometry` of the backward kernel it prepares.
        cores: AI cores to run on.
        kernel_name: of the compiled function.
        disable_debug: for builds that only run on a device.
    """
    kernel = _Preprocess(Program(tik, disable_debug), geometry)
    return kernel.build(preprocess_signature(geometry, cores), cores, kernel_name)


class _Preprocess(Kernel):
    """The kernel while it is written."""

    def __init__(self, program, geometry):
        super().__init__(program, geometry, preprocess_buffers(geometry), (False, False))
        self.groups = piece_groups(geometry)
        self.rows = self.groups * FRACTAL
        self.queries = geometry.q_tiles * geometry.tiles.q

    def _constants(self):
        """The columns ``[q1][16 columns][16 queries]``: zero but for HIDING and ONE of the scores'."""
        super()._constants()
        for name in ("score_columns", "delta_columns"):
            fill(self.api, Lanes(self.local[name]), 0.0, self.rows * FRACTAL // HALF_LANES, mask=HALF_LANES)
        for column, value in ((HIDING, COARSE), (ONE, 1.0)):
            fill(self.api, self._column("score_columns", column), value, self.groups, mask=FRACTAL)

    def _column(self, name, column):
        """One extra column of all queries of a piece: a row of each 16 x 16 tile."""
        return Lanes(self.local[name], column * FRACTAL, FRACTAL)

    def _work(self, start, stop):
        pieces = self.queries // self.rows
        with self.api.for_range(start, stop, name="item", thread_num=2) as item:
            out, d_out = (self.program.local(self.buffers[name]) for name in ("out_rows", "d_out_rows"))
            self._piece(out, d_out, item // pieces, item % pieces)

    def _piece(self, out, d_out, head, piece):
        """Both sets of columns of one piece of a head, and its -delta."""
        api, local = self.api, self.local
        self._sum_products(out, d_out, head, piece)
        for number in (0, 1):
            source = Place(self.gm["statistics"], (head * 2 + number) * self.queries + piece * self.rows)
            layout.copy(api, Place(local["statistics"], number * self.rows), source, self.rows)
        scores, delta = (Lanes(local["statistics"], number * self.rows, 2) for number in (0, 1))
        sums, share = Lanes(local["sums"], 0, 2), 1.0 - self.spec.dropout_rate
        with_scalar(api.vec_muls, sums, sums, -share, self.groups, mask=FRACTAL)
        binary(api.vec_add, delta, delta, sums, self.groups, mask=FRACTAL)
        convert(api, Lanes(local["half"], 0, 1), delta, self.groups, mask=FRACTAL)
        target = Place(self.gm["minus_delta"], head * self.queries + piece * self.rows)
        layout.copy(api, target, Place(local["half"]), self.rows)
        for number, (name, statistic) in enumerate((("score_columns", scores), ("delta_columns", delta))):
            self._split(name, statistic)
            layout.transposed_rows(api, Place(local["rows"]), Place(local[name]), self.groups, FRACTAL)
            row = (head * 2 + number) * self.queries + piece * self.rows
            elements = self.rows * FRACTAL
            layout.copy(api, Place(self.gm["query_columns"], row * FRACTAL), Place(local["rows"]), elements)

    def _sum_products(self, out, d_out, head, piece):
        """``rowsum(d_out * out)`` in fp32 to 'sums': column group after column group, then over sixteen lanes."""
        geometry, api = self.geometry, self.api
        products = Lanes(self.local["products"])
        start = head * (geometry.depth * geometry.q_rows) + piece * (self.rows * FRACTAL)
        fill(api, products, 0.0, self.rows // 4)

        def add(existing):
            size = Rows(geometry.depth, geometry.q_rows, self.rows, existing)
            layout.load_rows(api, Place(out), Place(self.gm["output"], start), size)
            layout.load_rows(api, Place(d_out), Place(self.gm["d_out"], start), size)
            for first in range(0, geometry.depth * self.rows, FRACTAL * self.rows):
                low_level(api.vmla, products, Lanes(out, first, 4), Lanes(d_out, first, 4), existing // 4)

        whole, tail = divmod(geometry.q_rows, self.rows)
        if whole * self.rows == self.queries:
            add(self.rows)
        else:  # queries of the last tile that are not in global memory have no products
            if whole:
                with api.if_scope(piece < whole):
                    add(self.rows)
            if tail:
                with api.if_scope(piece == whole):
                    add(tail)
        sum_rows(api, Place(self.local["sums"]), Place(self.local["products"]), self.rows)

    def _split(self, name, statistic):
        """A statistic into its three fp16 parts, with weights (COARSE, 1, 1); what is left of it is in 'statistics'."""
        api, part = self.api, Lanes(self.local["part"], 0, 2)
        for column, unit in enumerate((COARSE, 1.0, 1.0)):
            half = self._column(name, column)
            with_scalar(api.vec_muls, part, statistic, 1.0 / unit, self.groups, mask=FRACTAL)
            convert(api, half, part, self.groups, mask=FRACTAL)
            convert(api, part, half, self.groups, mask=FRACTAL)
            with_scalar(api.vec_muls, part, part, -unit, self.groups, mask=FRACTAL)
            binary(api.vec_add, statistic, statistic, part, self.groups, mask=FRACTAL)
