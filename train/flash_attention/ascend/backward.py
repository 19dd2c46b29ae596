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
from flash_attention.ascend.program import Program
from flash_attention.ascend.tasks import CORE_FIELDS
from flash_attention.ascend.tile_ops import layout, masks
from flash_attention.ascend.tile_ops.layout import Place, Rows
from flash_attention.ascend.tile_ops.matmul import FRACTAL, Cube, Operand
from flash_attention.ascend.tile_ops.vector import Lanes, convert, fill, with_scalar


def build_backward(tik, geometry, cores, kernel_name="flash_attention_backward", disable_debug=False):
    """Build the kernel; the returned TIK instance runs it by ``tikdb.start_debug``.

    Args:
        tik: module with the interface of ``tbe.tik``.
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`; its spec must be one that ``supports`` takes.
        cores: AI cores to run on.
        kernel_name: of the compiled function.
        disable_debug: for builds that only run on a device.
    """
    return _Backward(Program(tik, disable_debug), geometry).build(cores, kernel_name)


class _Backward:
    """The kernel while it is written. ``self.gm`` and ``self.local`` hold tensors by name."""

    def __init__(self, program, geometry):
        self.program, self.api, self.tik = program, program.api, program.tik
        self.geometry, self.spec, self.tiles = geometry, geometry.spec, geometry.tiles
        self.fp32_scores = needs_fp32_scores(geometry.spec)
        self.exponent = probability_exponent(geometry)
        self.columns = geometry.depth + FRACTAL
        self.rows = self.tiles.groups * FRACTAL  # of a piece of a query tile
        self.gm, self.local, self.buffers, self.field = {}, {}, {}, {}
        self.cube = None
        self.key_parts, self.query_parts = [], []

    # --- program ----------------------------------------------------------------------------------
    def build(self, cores, kernel_name):
        """Write the whole kernel and compile it."""
        inputs, outputs = backward_signature(self.geometry, cores)
        self.gm = {argument.name: self.program.gm(argument) for argument in inputs + outputs}
        with self.api.for_range(0, cores, name="core", block_num=cores) as core:
            self._declare()
            self._constants()
            self.key_parts = [part(self) for part in parts(self.spec, KEY_PASS)]
            self.query_parts = [part(self) for part in parts(self.spec, QUERY_PASS)]
            layout.copy(self.api, Place(self.local["core"]), Place(self.gm["cores"], core * CORE_FIELDS), CORE_FIELDS)
            bounds = [self.program.integer(self.local["core"][number], "bound") for number in range(4)]
            with self.api.for_range(bounds[0], bounds[1], name="key_item") as item:
                self._key_task(item // self.geometry.kv_tiles, item % self.geometry.kv_tiles)
            with self.api.for_range(bounds[2], bounds[3], name="query_item") as item:
                self._query_task(item // self.geometry.q_tiles, item % self.geometry.q_tiles)
        self.api.BuildCCE(
            kernel_name=kernel_name,
            inputs=[self.gm[argument.name] for argument in inputs],
            outputs=[self.gm[argument.name] for argument in outputs],
        )
        return self.api

    def _declare(self):
        """All local buffers, inside the cores' loop; the inner loops declare theirs, twice, for double buffering."""
        self.cube = Cube(self.program)
        self.buffers = {buffer.name: buffer for buffer in backward_buffers(self.geometry)}
        for name, buffer in self.buffers.items():
            if buffer.copies == 1 and buffer.scope not in ("L0A", "L0B"):
                self.local[name] = self.program.local(buffer)

    def _constants(self):
        """What stays the same for all tasks of a core."""
        api, local = self.api, self.local
        fill(api, Lanes(local["zeros"], 0, 1), 0.0, self.buffers["zeros"].elements // 16, mask=16)
        layout.copy(api, Place(local["zeros_l1"]), Place(local["zeros"]), FRACTAL * FRACTAL)
        if "scale" in local:
            fill(api, Lanes(local["scale"]), self.spec.scale, 1)
        if "index" in local:
            masks.index_tile(api, local["index"], self.tiles.kv, masks.UNIT)
        if "key_index" in local:
            masks.index_tile(api, local["key_index"], self.tiles.kv)

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
            self._slopes(head)
            for part in self.key_parts:
                part.start(head, key_tile)
            with api.for_range(first, stop, name="q_tile", thread_num=2) as q_tile:
                query, d_out = (self.program.local(self.buffers[name]) for name in ("query_stream", "d_out_stream"))
                self._load_queries(query, d_out, head, q_tile)
                field = tile_row(self, q_tile)
                pair = TilePair(self, head, q_tile, key_tile, (query, d_out, key, value), field)
                self._work(pair, True, pair.add_key_gradients, self.key_parts)
            for part in self.key_parts:
                part.finish(head, key_tile)
        factors = (("d_value", 2.0**-self.exponent * self._kept), ("d_key", spec.scale * self._kept))
        for number, (name, factor) in enumerate(factors):
            self._store(name, number * self.tiles.kv * depth, kv_head, key_tile, factor)

    def _query_task(self, head, q_tile):
        """dQ of one query tile: all key tiles that it sees."""
        api, depth = self.api, self.geometry.depth
        self.field = field = tile_row(self, q_tile, ("first", "stop"))
        query, d_out = self.local["query_resident"], self.local["d_out_resident"]
        self._load_queries(query, d_out, head, q_tile)
        self._slopes(head)
        for piece in range(self.geometry.pieces):
            self.clear_sums(self.local["sums"][piece * self.rows * depth], self.rows, depth)
        for part in self.query_parts:
            part.start(head, q_tile)
        with api.for_range(field["first"], field["stop"], name="key_tile", thread_num=2) as key_tile:
            key, value = (self.program.local(self.buffers[name]) for name in ("key_stream", "value_stream"))
            self._load_keys(key, value, head // self.spec.group, key_tile)
            pair = TilePair(self, head, q_tile, key_tile, (query, d_out, key, value), field)
            self._work(pair, False, pair.add_query_gradient, self.query_parts)
        for part in self.query_parts:
            part.finish(head, q_tile)
        self._store_query_gradient(head, q_tile)

    def _work(self, pair, with_probs, add_gradients, operand_parts):
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

    @property
    def _kept(self):
        """Products of kept probabilities lack this factor."""
        return 1.0 / (1.0 - self.spec.dropout_rate)

    def _slopes(self, head):
        """The head's slope, and its products with the key index, of both signs."""
        if self.spec.alibi_shape is None:
            return
        layout.copy(self.api, Place(self.local["slope"]), Place(self.gm["slopes"], head * 16), 16)
        for sign in (0, 1):
            tile = Place(self.local["slope_tiles"], sign * self.tiles.kv * 16)
            slope = Lanes(self.local["slope"], sign * 8, 0)
            masks.slope_tile(self.api, tile, self.local["key_index"], slope, self.tiles.kv)

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

    def _store(self, name, offset, kv_head, key_tile, factor):
        """A key tile's gradient from L0C to global memory, as far as its rows exist."""
        geometry, keys = self.geometry, self.tiles.kv
        start = kv_head * (geometry.depth * geometry.kv_rows) + key_tile * (keys * 16)

        def store(rows):
            target = Place(self.gm[name], start)
            self._store_tile(target, Place(self.local["sums"], offset), geometry.kv_rows, keys, rows, factor)

        self.program.with_tail(key_tile, geometry.kv_tiles, keys, geometry.kv_tail, store)

    def _store_query_gradient(self, head, q_tile):
        """dQ from L0C to global memory, piece after piece."""
        geometry, rows = self.geometry, self.rows

        def store(existing):
            for piece in range(geometry.pieces):
                wanted = max(0, min(rows, existing - piece * rows))
                if wanted:
                    row = q_tile * self.tiles.q + piece * rows
                    target = Place(self.gm["d_query"], head * (geometry.depth * geometry.q_rows) + row * 16)
                    source = Place(self.local["sums"], piece * rows * geometry.depth)
                    self._store_tile(target, source, geometry.q_rows, rows, wanted, self.spec.scale * self._kept)

        self.program.with_tail(q_tile, geometry.q_tiles, self.tiles.q, geometry.q_tail, store)

    def _store_tile(self, dst, src, total, tile, rows, factor):
        """``factor`` times a zN tile of L0C as fp16 rows, sixteen columns at a time."""
        api, elements = self.api, tile * FRACTAL
        for group in range(self.geometry.depth // FRACTAL):
            wide, half = (self.local["{}{}".format(name, group % 2)] for name in ("result", "result_half"))
            layout.drain(api, Place(wide), Place(src.tensor, src.offset + group * elements), 1, tile // FRACTAL)
            with_scalar(api.vec_muls, Lanes(wide), Lanes(wide), factor, elements // 64)
            convert(api, Lanes(half, 0, 4), Lanes(wide), elements // 64)
            target = Place(dst.tensor, dst.offset + group * (total * FRACTAL))
            layout.store_rows(api, target, Place(half), Rows(FRACTAL, total, tile, rows))
