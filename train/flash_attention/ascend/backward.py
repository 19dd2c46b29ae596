"""The FlashAttention-2 backward kernel in TIK (Dao, 2023, algorithm 2), for Ascend 910A and 310P.

Two passes, in one kernel. The *key pass* keeps a tile of K and V and walks over the query tiles that see it, for all
heads of the group: dV += P^T dO and dK += dS^T Q stay in L0C from the first to the last. The *query pass* keeps a tile
of Q and dO and walks over the key tiles it sees: dQ += dS K. P and dS are computed in both (:mod:`backward_pair`).
No core adds to what another one writes, so results are bitwise the same in every run and on any number of cores; the
price is seven products instead of five, on a chip whose vector unit, not whose cube, is scarce.

Shapes: Br queries and Bc keys a tile, D head size padded to 16, q1 groups of 16 queries.
"""

from flash_attention.ascend.backward_arguments import backward_signature, probability_exponent
from flash_attention.ascend.backward_budget import backward_buffers, needs_fp32_scores
from flash_attention.ascend.backward_operands import KEY_PASS, QUERY_PASS, parts
from flash_attention.ascend.backward_pair import TilePair, tile_row
from flash_attention.ascend.kernel import Kernel
from flash_attention.ascend.program import Program
from flash_attention.ascend.tile_ops import layout
from flash_attention.ascend.tile_ops.layout import Place, Rows
from flash_attention.ascend.tile_ops.matmul import FRACTAL, Operand
from flash_attention.ascend.tile_ops.vector import LANES, Lanes, binary, convert

_FACTOR = {"d_value": 0, "d_key": 1, "d_query": 1}
"""Row of the argument 'factors' that each gradient is multiplied by."""


def build_backward(tik, geometry, cores, kernel_name="flash_attention_backward", disable_debug=False):
    """Build the kernel; the returned TIK instance runs it by ``tikdb.start_debug``.

    Args:
        tik: module with the interface of ``tbe.tik``.
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`; its spec must be one that ``supports`` takes.
        cores: AI cores to run on.
        kernel_name: of the compiled function.
        disable_debug: for builds that only run on a device.
    """
    kernel = _Backward(Program(tik, disable_debug), geometry)
    return kernel.build(backward_signature(geometry, cores), cores, kernel_name)


class _Backward(Kernel):
    """The kernel while it is written."""

    SHARES = 2

    def __init__(self, program, geometry):
        band = geometry.spec.band
        super().__init__(program, geometry, backward_buffers(geometry), (band.bounded_below, band.bounded_above))
        self.fp32_scores = needs_fp32_scores(geometry.spec)
        self.exponent = probability_exponent(geometry)
        self.columns = geometry.depth + FRACTAL
        self.rows = self.tiles.groups * FRACTAL  # of a piece of a query tile
        self.field = {}
        self.key_parts, self.query_parts = [], []

    def _constants(self):
        super()._constants()
        layout.copy(self.api, Place(self.local["zeros_l1"]), Place(self.local["zeros"]), FRACTAL * FRACTAL)
        layout.copy(self.api, Place(self.local["factors"]), Place(self.gm["factors"]), 2 * LANES)

    def _work(self, first_key, stop_key, first_query, stop_query):
        self.key_parts = [part(self) for part in parts(self.geometry, KEY_PASS)]
        self.query_parts = [part(self) for part in parts(self.geometry, QUERY_PASS)]
        with self.api.for_range(first_key, stop_key, name="key_item") as item:
            self._key_task(item // self.geometry.kv_tiles, item % self.geometry.kv_tiles)
        with self.api.for_range(first_query, stop_query, name="query_item") as item:
            self._query_task(item // self.geometry.q_tiles, item % self.geometry.q_tiles)

    # --- the two passes ---------------------------------------------------------------------------
    def _key_task(self, kv_head, key_tile):
        """dK and dV of one key tile: all query tiles of the group's heads that see it."""
        api, spec, depth = self.api, self.spec, self.geometry.depth
        layout.copy(api, Place(self.local["key_task"]), Place(self.gm["key_tasks"], key_tile * 8), 8)
        first = self.program.integer(self.local["key_task"][0], "first")
        stop = self.program.integer(self.local["key_task"][1], "stop")
        key, value = self.local["key_resident"], self.local["value_resident"]
        self._load_keys(key, value, kv_head, key_tile)
        for number in (0, 1):
            self.clear_sums(self.local["sums"][number * self.tiles.kv * depth], self.tiles.kv, depth)
        with api.for_range(0, spec.group, name="member") as member:
            head = kv_head * spec.group + member
            self.load_slopes(head)
            for part in self.key_parts:
                part.start(head, key_tile)
            with api.for_range(first, stop, name="q_tile", thread_num=2) as q_tile:
                query, d_out = (self.program.local(self.buffers[name]) for name in ("query_stream", "d_out_stream"))
                self._load_queries(query, d_out, head, q_tile)
                field = tile_row(self, q_tile)
                pair = TilePair(self, head, q_tile, key_tile, (query, d_out, key, value), field)
                self._visit(pair, True, pair.add_key_gradients, self.key_parts)
            for part in self.key_parts:
                part.finish(head, key_tile)
        for number, name in enumerate(("d_value", "d_key")):
            self._store_key_gradient(name, number * self.tiles.kv * depth, kv_head, key_tile)

    def _query_task(self, head, q_tile):
        """dQ of one query tile: all key tiles that it sees."""
        api, depth = self.api, self.geometry.depth
        self.field = field = tile_row(self, q_tile, ("first", "stop"))
        query, d_out = self.local["query_resident"], self.local["d_out_resident"]
        self._load_queries(query, d_out, head, q_tile)
        self.load_slopes(head)
        for piece in range(self.geometry.pieces):
            self.clear_sums(self.local["sums"][piece * self.rows * depth], self.rows, depth)
        for part in self.query_parts:
            part.start(head, q_tile)
        with api.for_range(field["first"], field["stop"], name="key_tile", thread_num=2) as key_tile:
            key, value = (self.program.local(self.buffers[name]) for name in ("key_stream", "value_stream"))
            self._load_keys(key, value, head // self.spec.group, key_tile)
            pair = TilePair(self, head, q_tile, key_tile, (query, d_out, key, value), field)
            self._visit(pair, False, pair.add_query_gradient, self.query_parts)
        for part in self.query_parts:
            part.finish(head, q_tile)
        self._store_query_gradient(head, q_tile)

    def _visit(self, pair, with_probs, add_gradients, operand_parts):
        """All pieces of a pair, phase by phase: the cube works for one piece while the vector unit works on another."""
        pieces = range(self.geometry.pieces)
        for piece in pieces:
            pair.products(piece)
        for piece in pieces:
            d_scores = pair.differentiate(piece, with_probs)
            for part in operand_parts:
                part.vector(pair, piece, d_scores)
        for piece in pieces:
            add_gradients(piece)
            for part in operand_parts:
                part.cube(pair, piece)

    def clear_sums(self, dst, rows, columns):
        """Zero a zN tile of L0C by a product of zeros: it is then right for tasks that visit nothing, too."""
        zeros = self.local["zeros_l1"]
        left = Operand(zeros, rows, FRACTAL, uniform=True)
        self.cube.multiply(dst, left, Operand(zeros, FRACTAL, columns, uniform=True))

    # --- global memory ----------------------------------------------------------------------------
    def _load_keys(self, key, value, kv_head, key_tile):
        """A tile of K and of V with their extra columns to L1; rows beyond the last one are zero."""
        geometry, keys, depth = self.geometry, self.tiles.kv, self.geometry.depth
        start = kv_head * (depth * geometry.kv_rows) + key_tile * (keys * 16)

        def load(rows):
            for dst, name in ((key, "key"), (value, "value")):
                extra = Place(self.gm["key_columns"], key_tile * (keys * 16))
                self._load_tile(
                    Place(dst), Place(self.gm[name], start), extra, Rows(depth, geometry.kv_rows, keys, rows)
                )

        self.program.with_tail(key_tile, geometry.kv_tiles, keys, geometry.kv_tail, load)

    def _load_queries(self, query, d_out, head, q_tile):
        """A tile of Q and of dO with their extra columns to L1, piece after piece; missing rows are zero."""
        geometry, rows = self.geometry, self.rows
        queries = geometry.q_tiles * self.tiles.q

        def load(existing):
            for number, (dst, name) in enumerate(((query, "query"), (d_out, "d_out"))):
                for piece in range(geometry.pieces):
                    row = q_tile * self.tiles.q + piece * rows
                    size = Rows(geometry.depth, geometry.q_rows, rows, max(0, min(rows, existing - piece * rows)))
                    target = Place(dst, piece * rows * self.columns)
                    source = Place(self.gm[name], head * (geometry.depth * geometry.q_rows) + row * 16)
                    extra = Place(self.gm["query_columns"], ((head * 2 + number) * queries + row) * 16)
                    self._load_tile(target, source, extra, size)

        self.program.with_tail(q_tile, geometry.q_tiles, self.tiles.q, geometry.q_tail, load)

    def _load_tile(self, dst, src, extra, size):
        """Rows of a head and extra columns of the whole tile; rows of the tile that the head has not are zero."""
        if size.rows:
            layout.load_rows(self.api, dst, src, size)
        if size.rows < size.tile:  # what was there before could be NaN, and 0 * NaN is not 0
            layout.clear_rows(self.api, dst, self.local["zeros"], size)
        columns = Place(dst.tensor, dst.offset + size.tile * size.columns)
        layout.copy(self.api, columns, extra, size.tile * FRACTAL)

    def _store_key_gradient(self, name, offset, kv_head, key_tile):
        """dK or dV of a key tile from L0C to global memory, as far as its rows exist."""
        geometry, keys = self.geometry, self.tiles.kv
        start = kv_head * (geometry.depth * geometry.kv_rows) + key_tile * (keys * 16)

        def store(rows):
            self._store_tile(
                name, start, Place(self.local["sums"], offset), Rows(FRACTAL, geometry.kv_rows, keys, rows)
            )

        self.program.with_tail(key_tile, geometry.kv_tiles, keys, geometry.kv_tail, store)

    def _store_query_gradient(self, head, q_tile):
        """dQ from L0C to global memory, piece after piece."""
        geometry, rows = self.geometry, self.rows

        def store(existing):
            for piece in range(geometry.pieces):
                wanted = max(0, min(rows, existing - piece * rows))
                if wanted:
                    row = q_tile * self.tiles.q + piece * rows
                    start = head * (geometry.depth * geometry.q_rows) + row * 16
                    source = Place(self.local["sums"], piece * rows * geometry.depth)
                    self._store_tile("d_query", start, source, Rows(FRACTAL, geometry.q_rows, rows, wanted))

        self.program.with_tail(q_tile, geometry.q_tiles, self.tiles.q, geometry.q_tail, store)

    def _store_tile(self, name, start, src, size):
        """A zN tile of L0C, times its row of 'factors', as fp16 rows from element ``start`` of tensor ``name`` on.

        Sixteen columns at a time; ``size``: the :class:`Rows` of such a column group.
        """
        api, elements = self.api, size.tile * FRACTAL
        lanes = Lanes(self.local["factors"], _FACTOR[name] * LANES, 0)
        for group in range(self.geometry.depth // FRACTAL):
            wide, half = (self.local["{}{}".format(buffer, group % 2)] for buffer in ("result", "result_half"))
            layout.drain(api, Place(wide), Place(src.tensor, src.offset + group * elements), 1, size.tile // FRACTAL)
            binary(api.vec_mul, Lanes(wide), Lanes(wide), lanes, elements // LANES)
            convert(api, Lanes(half, 0, 4), Lanes(wide), elements // LANES)
            layout.store_rows(api, Place(self.gm[name], start + group * (size.total * FRACTAL)), Place(half), size)
