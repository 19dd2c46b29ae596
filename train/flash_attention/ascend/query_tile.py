"""One query tile of the forward kernel: start, the phases of a key tile, end.

Shapes: Br queries and Bc keys a tile, D head size padded to 16, q1 groups of 16 queries. The Unified Buffer holds one
*piece* of the scores at a time: ``tiles.groups`` groups.
"""

import contextlib

from flash_attention.ascend.score_tile import ScoreTile, needed_fields
from flash_attention.ascend.tasks import TASK_HEAD, TILE_FIELDS
from flash_attention.ascend.tile_ops import finish, layout, masks, softmax
from flash_attention.ascend.tile_ops.layout import Rows
from flash_attention.ascend.tile_ops.matmul import Operand
from flash_attention.ascend.tile_ops.vector import LANES, Lanes, Place, binary, fill, with_scalar

_BOUNDS = ("first_key", "last_key", "position")
"""Buffers that hold the rows of the argument 'bounds', where the kernel needs them."""


class QueryTile(ScoreTile):
    """One resident query tile, the number ``slot`` of its task.

    Args:
        kernel: the forward kernel that is being written.
        head: (batch, head) pair, an expression. task: number of the task in the head, an expression.
        slot: 0 .. resident - 1.
    """

    def __init__(self, kernel, head, task, slot):
        resident = kernel.tiles.resident
        q_tile = kernel.program.integer(task * resident + slot, "q_tile{}".format(slot))
        needed = needed_fields(kernel.spec, kernel.bounded) + (["first", "stop"] if resident > 1 else [])
        base = TASK_HEAD + slot * len(TILE_FIELDS)
        field = {
            name: kernel.program.integer(kernel.local["task"][base + TILE_FIELDS.index(name)], name + str(slot))
            for name in needed
        }
        super().__init__(kernel, head, q_tile, field)
        self.slot = slot

    def exists(self):
        """Branch where a head has an odd number of tiles: the tile is not beyond the last one."""
        if self.geometry.q_tiles % self.tiles.resident == 0:
            return contextlib.nullcontext()
        return self.api.if_scope(self.q_tile < self.geometry.q_tiles)

    def visits(self, key_tile):
        """Branch where tiles share key tiles: this one visits ``key_tile``, not only the task's other one."""
        if self.tiles.resident == 1:
            return contextlib.nullcontext()
        return self.api.if_scope(self.kernel.tik.all(key_tile >= self.field["first"], key_tile < self.field["stop"]))

    # --- places -----------------------------------------------------------------------------------
    def lanes(self, name, piece=0):
        """A statistic of this tile, from the first group of ``piece`` on."""
        return Lanes(self.local[name], self.slot * self.kernel.statistic + piece * self.tiles.groups * LANES)

    def output(self, piece=0):
        """This tile's O^T in the Unified Buffer, from ``piece`` on: fp32 [q1][D + 16][16]."""
        return Lanes(self.local["output"], (self.slot * self.geometry.q_groups + piece * self.tiles.groups)
                     * self.kernel.rows * 16)  # fmt: skip

    def products(self, offset=0):
        """This tile's slot of L0C, which holds first S^T, then O^T of the key tile."""
        slot = self.kernel.buffers["products"].elements // self.tiles.resident
        return Place(self.local["products"], self.slot * slot + offset)

    def probs(self, name="probs_l1"):
        """P^T of the key tile in L1: zN, Bc rows and Br columns."""
        return Operand(self.local[name], self.tiles.kv, self.tiles.q, offset=self.slot * self.tiles.q * self.tiles.kv)

    # --- start ------------------------------------------------------------------------------------
    def start(self):
        """Load Q (to L1) and the queries' bounds; m = LOWEST, l = O = 0."""
        geometry, api, rows_of_tile = self.geometry, self.api, self.tiles.q
        query = Place(self.local["query_l1"], self.slot * rows_of_tile * geometry.depth)
        source = Place(self.gm["query"], self._row_in_gm())

        def load(rows):
            size = Rows(geometry.depth, geometry.q_rows, rows_of_tile, rows)
            layout.load_rows(api, query, source, size)
            if rows < rows_of_tile:
                layout.clear_rows(api, query, self.local["zeros"], size)

        self.kernel.program.with_tail(self.q_tile, geometry.q_tiles, rows_of_tile, geometry.q_tail, load)
        for row, name in enumerate(_BOUNDS):
            if name in self.local:
                column = (row * geometry.q_tiles + self.q_tile) * rows_of_tile
                layout.spread_lanes(api, self.lanes(name).place, Place(self.gm["bounds"], column), geometry.q_groups)
        fill(api, self.lanes("running"), softmax.LOWEST, geometry.q_groups)
        fill(api, self.output(), 0.0, geometry.q_groups * self.kernel.rows // 4)

    def _row_in_gm(self):
        """Element of this tile's first row in the query and in the output."""
        return self.head * (self.geometry.depth * self.geometry.q_rows) + self.q_tile * (self.tiles.q * 16)

    # --- phases of a key tile ---------------------------------------------------------------------
    def scores(self, key):
        """S^T = K Q^T to L0C: zN, Bc rows and Br columns, which is [q1][key][16 queries]."""
        depth = self.geometry.depth
        query = Operand(self.local["query_l1"], self.tiles.q, depth, transposed=True,
                        offset=self.slot * self.tiles.q * depth)  # fmt: skip
        self.kernel.cube.multiply(self.products().at(), Operand(key, self.tiles.kv, depth), query)

    def attend(self, key_tile, value):
        """Softmax of the scores, P^T to L1 and O^T = [V 1]^T P^T to L0C."""
        for piece in range(self.geometry.pieces):
            self._softmax(piece, key_tile)
        depth, keys = self.geometry.depth, self.tiles.kv
        values = Operand(value, keys, depth, transposed=True)
        ones = Operand(self.local["ones_l1"], keys, 16, transposed=True, uniform=True)
        if not self.spec.dropout_rate:
            self.kernel.cube.multiply(self.products().at(), [values, ones], self.probs())
        else:  # the sums are those before dropout
            self.kernel.cube.multiply(self.products().at(), values, self.probs("kept_l1"))
            self.kernel.cube.multiply(self.products(self.tiles.q * depth).at(), ones, self.probs())

    def _softmax(self, piece, key_tile):
        """One piece: scores from L0C, P^T to L1; the running maximum and the factor on O are updated."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        elements = groups * keys * 16
        work, half = local["work"], local["half{}".format(piece % 2)]
        layout.drain(api, Place(work), self.products(piece * elements), 1, elements // 256)
        self._modify(piece, key_tile)
        softmax.max_over_keys(api, local["tile_max"], work, local["scratch"], groups, keys)
        tile_max, addend = Lanes(local["tile_max"]), Lanes(local["addend"])
        if "lane_bias" in local:
            binary(api.vec_add, tile_max, tile_max, Lanes(local["lane_bias"]), groups)
        scale = self.spec.scale if self.geometry.scaled_late else 1.0
        factor = Lanes(local["scale"], 0, 0) if self.geometry.scaled_late else None
        running, rescale = self.lanes("running", piece), self.lanes("rescale", piece)
        softmax.update_maximum(api, running, tile_max, rescale, addend, groups, scale)
        if "lane_bias" in local:
            binary(api.vec_add, addend, addend, Lanes(local["lane_bias"]), groups)
        softmax.probabilities(api, half, work, addend, groups, keys, factor)
        probs = self.probs()
        layout.copy(api, Place(probs.tensor, probs.offset + piece * elements), Place(half), elements)
        if self.spec.dropout_rate:
            self.load_operand("keep", piece, key_tile)
            masks.drop(api, local["kept"], half, local["keep"], local["keep_half"], elements)
            kept = self.probs("kept_l1")
            layout.copy(api, Place(kept.tensor, kept.offset + piece * elements), Place(local["kept"]), elements)

    def bound(self, row, piece):
        return self.lanes(_BOUNDS[row], piece)

    def _modify(self, piece, key_tile):
        """Everything that changes scores; what ALiBi adds to a whole query goes to 'lane_bias'."""

        def discard(mask_groups):
            sizes = self.tiles.groups, self.tiles.kv, mask_groups
            masks.discard(self.api, self.local["work"], Place(self.local["mask"]), *sizes)

        self.add_terms(piece, key_tile, scaled=not self.geometry.scaled_late, apart=True)
        self.mask(piece, key_tile, discard)
        self.hide(piece, key_tile)

    def accumulate(self):
        """O^T = rescale * O^T + this key tile's, the row sums with it."""
        api, groups, rows, depth = self.api, self.tiles.groups, self.kernel.rows, self.geometry.depth
        work = Place(self.local["work"])
        for piece in range(self.geometry.pieces):
            first = piece * groups
            if not self.spec.dropout_rate:
                layout.drain(api, work, self.products(first * rows * 16), 1, groups * rows // 16)
            else:
                layout.drain(api, work, self.products(first * depth * 16), groups, depth // 16, dst_gap=32)
                sums = self.products(self.tiles.q * depth + first * 256)
                layout.drain(api, work._replace(offset=depth * 16), sums, groups, 1, dst_gap=2 * depth)
            softmax.accumulate(api, self.output(piece), work.tensor, self.lanes("rescale", piece), groups, rows)

    # --- end --------------------------------------------------------------------------------------
    def store(self):
        """O / l to global memory as fp16 rows, and the log-sum-exp."""
        geometry, api = self.geometry, self.api
        scratch = [Lanes(self.local["scratch"], number * self.kernel.statistic) for number in range(5)]
        sums, alive, divisor, lse, spare = scratch
        groups = geometry.q_groups
        finish.row_sums(api, sums.place, self.output().place, groups, self.kernel.rows)
        finish.alive_and_divisor(api, alive, divisor, sums, spare, groups)
        if self.kernel.with_lse:
            scale = self.spec.scale if geometry.scaled_late else 1.0
            finish.log_sum_exp(api, lse, self.lanes("running"), alive, divisor, groups, scale)
        if self.spec.dropout_rate:
            with_scalar(api.vec_muls, divisor, divisor, 1.0 - self.spec.dropout_rate, groups)

        def write(rows):
            if self.kernel.with_lse:
                target = Place(self.gm["lse"], self.head * geometry.q_rows + self.q_tile * self.tiles.q)
                finish.store_statistic(api, target, lse.place, spare.place, rows // 16)
            for piece in range(geometry.pieces):
                self._store_piece(piece, divisor, rows)

        self.kernel.program.with_tail(self.q_tile, geometry.q_tiles, self.tiles.q, geometry.q_tail, write)

    def _store_piece(self, piece, divisor, rows):
        """One piece of the output, as far as its rows exist."""
        first = piece * self.tiles.groups
        groups = min(self.tiles.groups, rows // 16 - first)
        if groups <= 0:
            return
        half, out = Place(self.local["half0"]), Place(self.local["half1"])
        lane = divisor._replace(offset=divisor.offset + first * LANES)
        finish.normalized_rows(self.api, out, self.output(piece), lane, half, groups, self.kernel.rows)
        size = Rows(self.geometry.depth, self.geometry.q_rows, groups * 16, groups * 16)
        target = Place(self.gm["output"], self._row_in_gm() + first * 256)
        layout.store_rows(self.api, target, out, size)
