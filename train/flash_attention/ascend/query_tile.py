"""One query tile of the forward kernel: start, the phases of a key tile, end.

Shapes: Br queries and Bc keys a tile, D head size padded to 16, q1 groups of 16 queries. The Unified Buffer holds one
*piece* of the scores at a time: ``tiles.groups`` groups.
"""

import contextlib

from flash_attention.ascend.tasks import TASK_HEAD, TILE_FIELDS
from flash_attention.ascend.tile_ops import finish, layout, masks, softmax
from flash_attention.ascend.tile_ops.layout import Rows
from flash_attention.ascend.tile_ops.matmul import Operand
from flash_attention.ascend.tile_ops.vector import LANES, Lanes, Place, binary, fill, low_level, with_scalar


class QueryTile:
    """One resident query tile, the number ``slot`` of its task.

    Args:
        kernel: the kernel that is being written (``forward._Forward``): its geometry, buffers and cube.
        head: (batch, head) pair, an expression. task: number of the task in the head, an expression.
        slot: 0 .. resident - 1.
    """

    def __init__(self, kernel, head, task, slot):
        self.kernel, self.api, self.local, self.gm = kernel, kernel.api, kernel.local, kernel.gm
        self.geometry, self.spec, self.tiles = kernel.geometry, kernel.spec, kernel.tiles
        self.head, self.slot = head, slot
        self.tile = kernel.program.integer(task * self.tiles.resident + slot, "q_tile{}".format(slot))
        base = TASK_HEAD + slot * len(TILE_FIELDS)
        self.field = {
            name: kernel.program.integer(self.local["task"][base + number], "{}{}".format(name, slot))
            for number, name in enumerate(TILE_FIELDS)
            if name in self._used_fields()
        }

    def _used_fields(self):
        used = {"first", "stop"} if self.tiles.resident > 1 else set()
        used |= {"low_stop"} if self.geometry.bounded_below else set()
        used |= {"high_first"} if self.geometry.bounded_above else set()
        used |= {"before_stop", "after_first"} if self.spec.alibi_shape is not None else set()
        used |= {"strip_row", "strip_first"} if self.spec.compact_mask else set()
        return used

    def exists(self):
        """Branch where a head has an odd number of tiles: the tile is not beyond the last one."""
        if self.geometry.q_tiles % self.tiles.resident == 0:
            return contextlib.nullcontext()
        return self.api.if_scope(self.tile < self.geometry.q_tiles)

    def visits(self, key_tile):
        """Branch where tiles share key tiles: this one visits ``key_tile``, not only the task's other one."""
        if self.tiles.resident == 1:
            return contextlib.nullcontext()
        return self.api.if_scope(self.kernel.tik_all(key_tile >= self.field["first"], key_tile < self.field["stop"]))

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

        self.kernel.program.with_tail(self.tile, geometry.q_tiles, rows_of_tile, geometry.q_tail, load)
        for number, name in enumerate(("first_key", "last_key", "position")):
            if name in self.local:
                column = (number * geometry.q_tiles + self.tile) * rows_of_tile
                layout.spread_lanes(api, self.lanes(name).place, Place(self.gm["bounds"], column), geometry.q_groups)
        fill(api, self.lanes("running"), softmax.LOWEST, geometry.q_groups)
        fill(api, self.output(), 0.0, geometry.q_groups * self.kernel.rows // 4)

    def _row_in_gm(self):
        """Element of this tile's first row in the query and in the output."""
        return self.head * (self.geometry.depth * self.geometry.q_rows) + self.tile * (self.tiles.q * 16)

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
            self._load_operand("keep", piece, key_tile)
            masks.drop(api, local["kept"], half, local["keep"], local["keep_half"], elements)
            kept = self.probs("kept_l1")
            layout.copy(api, Place(kept.tensor, kept.offset + piece * elements), Place(local["kept"]), elements)

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

    # --- what changes the scores ------------------------------------------------------------------
    def _modify(self, piece, key_tile):
        """Scale, bias, ALiBi, mask and bounds, on the piece of scores in 'work'."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        work = local["work"]
        factor = Lanes(local["scale"], 0, 0)
        if self.spec.bias_shape is not None:
            bias_groups = self._load_operand("bias", piece, key_tile)
            masks.add_bias(api, work, Place(local["bias"]), groups, keys, bias_groups, factor)
            factor = None
        if self.spec.alibi_shape is not None:
            self._alibi(piece, key_tile, factor)
            factor = None
        if factor is not None and not self.geometry.scaled_late:
            with_scalar(api.vec_muls, Lanes(work), Lanes(work), self.spec.scale, groups * keys // 4)
        if self.spec.compact_mask:
            strip = key_tile - self.field["strip_first"]
            tiles = self.gm["mask"].shape[3]
            with api.if_scope(self.kernel.tik_all(strip >= 0, strip < tiles)):
                self._load_operand("mask", piece, strip, self.field["strip_row"])
                masks.discard(api, work, Place(local["mask"]), groups, keys, groups)
        elif self.spec.mask_shape is not None:
            mask_groups = self._load_operand("mask", piece, key_tile)
            masks.discard(api, work, Place(local["mask"]), groups, keys, mask_groups)
        if self.geometry.bounded_below:
            with api.if_scope(key_tile < self.field["low_stop"]):
                first = self._relative("first_key", piece, key_tile, masks.UNIT)
                masks.hide_before(api, work, first, local["index"], local["scratch"], groups, keys)
        if self.geometry.bounded_above:
            with api.if_scope(key_tile >= self.field["high_first"]):
                last = self._relative("last_key", piece, key_tile, masks.UNIT)
                masks.hide_after(api, work, last, local["index"], local["scratch"], groups, keys)

    def _relative(self, name, piece, key_tile, unit=1.0):
        """Lanes of a bound or position minus the tile's first key, in units of ``unit``."""
        api, local = self.api, self.local
        masks.first_key_of_tile(api, local["start"], local["start_int"], key_tile * self.tiles.kv, unit)
        relative = Lanes(local["relative"])
        binary(api.vec_sub, relative, self.lanes(name, piece), Lanes(local["start"], 0, 0), self.tiles.groups)
        return relative

    def _alibi(self, piece, key_tile, factor):
        """Scale and add ALiBi; what is one value a query goes to 'lane_bias' instead where that is possible."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        relative = self._relative("position", piece, key_tile)
        with api.if_scope(key_tile < self.field["before_stop"]):
            self._alibi_one_sided(relative, 0, factor)
        with api.elif_scope(key_tile >= self.field["after_first"]):
            self._alibi_one_sided(relative, 1, factor)
        with api.else_scope():
            args = local["key_index"], Lanes(local["slope"], 8, 0), local["scratch"], groups, keys, factor
            masks.add_alibi(api, local["work"], relative, *args)
            fill(api, Lanes(local["lane_bias"]), 0.0, groups)

    def _alibi_one_sided(self, relative, sign, factor):
        """-slope * (position - key) before the diagonal (sign 0), its negative after it (sign 1)."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        tile = Place(local["slope_tiles"], sign * keys * 16)
        masks.add_bias(api, local["work"], tile, groups, keys, 1, factor)
        minus_slope = Lanes(local["slope"], 8 * (1 - sign), 0)
        low_level(api.vmul, Lanes(local["lane_bias"]), relative, minus_slope, groups, blocks=(1, 1, 0))

    def _load_operand(self, name, piece, key_tile, q_tile=None):
        """One piece of a packed operand to its buffer in UB, see :func:`layout.load_operand`."""
        q_tile = self.tile if q_tile is None else q_tile
        return layout.load_operand(
            self.api, self.local[name], self.gm[name], self.head, self.spec.heads, q_tile, key_tile, piece,
            self.tiles.groups,
        )  # fmt: skip

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
                target = Place(self.gm["lse"], self.head * geometry.q_rows + self.tile * self.tiles.q)
                finish.store_statistic(api, target, lse.place, spare.place, rows // 16)
            for piece in range(geometry.pieces):
                self._store_piece(piece, divisor, rows)

        self.kernel.program.with_tail(self.tile, geometry.q_tiles, self.tiles.q, geometry.q_tail, write)

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
