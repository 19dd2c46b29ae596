"""One tile of scores, in either kernel, and what changes its scores: scale, bias, ALiBi, mask, bounds of visible keys.

Scores are transposed, ``[q1][key][16 queries]``. The Unified Buffer holds a *piece* of them at a time, ``tiles.groups``
groups of 16 queries; the methods below work in fp32 on the piece in buffer 'work'.
"""

from flash_attention.ascend.tile_ops import layout, masks
from flash_attention.ascend.tile_ops.layout import Place
from flash_attention.ascend.tile_ops.vector import Lanes, binary, fill, with_scalar

FIRST_KEY, LAST_KEY, POSITION = range(3)
"""Rows of the argument 'bounds'."""


def needed_fields(spec, bounded):
    """The :data:`~flash_attention.ascend.tasks.TILE_FIELDS` that the methods of :class:`ScoreTile` read."""
    below, above = bounded
    needed = ["low_stop"] if below else []
    needed += ["high_first"] if above else []
    needed += ["before_stop", "after_first"] if spec.alibi_shape is not None else []
    return needed + (["strip_row", "strip_first"] if spec.compact_mask else [])


class ScoreTile:
    """A query tile of one head, beside one key tile at a time.

    Args:
        kernel: the :class:`~flash_attention.ascend.kernel.Kernel` that is being written.
        head: batch and head, counted together, an expression. q_tile: number of the query tile, an expression.
        field: int32 Scalars by name, at least those of :func:`needed_fields`.
    """

    def __init__(self, kernel, head, q_tile, field):
        self.kernel, self.api, self.local, self.gm = kernel, kernel.api, kernel.local, kernel.gm
        self.geometry, self.spec, self.tiles = kernel.geometry, kernel.spec, kernel.tiles
        self.head, self.q_tile, self.field = head, q_tile, field

    def bound(self, row, piece):
        """Lanes of a row of 'bounds' (:data:`FIRST_KEY` ...) for the piece's queries."""
        raise NotImplementedError

    def relative(self, row, piece, key_tile, unit=1.0):
        """Lanes, in buffer 'relative', of a row of 'bounds' minus the tile's first key, in units of ``unit``."""
        api, local = self.api, self.local
        masks.first_key_of_tile(api, local["start"], local["start_int"], key_tile * self.tiles.kv, unit)
        relative = Lanes(local["relative"])
        binary(api.vec_sub, relative, self.bound(row, piece), Lanes(local["start"], 0, 0), self.tiles.groups)
        return relative

    def add_terms(self, piece, key_tile, scaled, apart=False):
        """Bias and ALiBi, and with ``scaled``, or where there is one of them, the scale.

        Args:
            piece, key_tile: which scores are in 'work'.
            scaled: multiply by the scale where nothing is added.
            apart: leave what ALiBi adds to all scores of a query alike in 'lane_bias', for the caller.
        """
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        factor = Lanes(local["scale"], 0, 0)
        if self.spec.bias_shape is not None:
            bias_groups = self.load_operand("bias", piece, key_tile)
            masks.add_bias(api, local["work"], Place(local["bias"]), groups, keys, bias_groups, factor)
            factor = None
        if self.spec.alibi_shape is not None:
            self._add_alibi(piece, key_tile, factor, apart)
        elif factor is not None and scaled:
            with_scalar(api.vec_muls, Lanes(local["work"]), Lanes(local["work"]), self.spec.scale, groups * keys // 4)

    def _add_alibi(self, piece, key_tile, factor, apart):
        """Scale by ``factor`` and add ALiBi; the distance is only formed where the diagonal crosses the tile."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        relative, lanes = self.relative(POSITION, piece, key_tile), Lanes(local["lane_bias"])

        def one_side(sign):
            tables = local["slope_tiles"], local["slope"]
            masks.add_one_sided_alibi(api, local["work"], lanes, relative, tables, sign, groups, keys, factor)
            if not apart:
                masks.add_lanes(api, local["work"], lanes, groups, keys)

        with api.if_scope(key_tile < self.field["before_stop"]):
            one_side(0)
        with api.elif_scope(key_tile >= self.field["after_first"]):
            one_side(1)
        with api.else_scope():
            minus_slope = Lanes(local["slope"], 8, 0)
            tables = local["key_index"], minus_slope, local["scratch"]
            masks.add_alibi(api, local["work"], relative, *tables, groups, keys, factor)
            if apart:
                fill(api, lanes, 0.0, groups)

    def mask(self, piece, key_tile, discard):
        """Where the call has a mask: load its tile to buffer 'mask' and call ``discard(groups of queries it has)``."""
        if self.spec.compact_mask:
            strip = key_tile - self.field["strip_first"]
            with self.api.if_scope(self.kernel.tik.all(strip >= 0, strip < self.gm["mask"].shape[3])):
                discard(self.load_operand("mask", piece, strip, self.field["strip_row"]))
        elif self.spec.mask_shape is not None:
            discard(self.load_operand("mask", piece, key_tile))

    def hide(self, piece, key_tile):
        """Lower the scores of keys beyond a query's bounds, in tiles that have any."""
        api, local, below_and_above = self.api, self.local, self.kernel.bounded
        sizes = self.tiles.groups, self.tiles.kv
        if below_and_above[0]:
            with api.if_scope(key_tile < self.field["low_stop"]):
                first = self.relative(FIRST_KEY, piece, key_tile, masks.UNIT)
                masks.hide_before(api, local["work"], first, local["index"], local["scratch"], *sizes)
        if below_and_above[1]:
            with api.if_scope(key_tile >= self.field["high_first"]):
                last = self.relative(LAST_KEY, piece, key_tile, masks.UNIT)
                masks.hide_after(api, local["work"], last, local["index"], local["scratch"], *sizes)

    def load_operand(self, name, piece, key_tile, q_tile=None):
        """One piece of a packed operand to its buffer, see :func:`layout.load_operand`; returns the groups it has."""
        q_tile = self.q_tile if q_tile is None else q_tile
        place = self.head, self.spec.heads, q_tile, key_tile, piece, self.tiles.groups
        return layout.load_operand(self.api, self.local[name], self.gm[name], *place)
