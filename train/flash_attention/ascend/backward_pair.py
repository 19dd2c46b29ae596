"""One pair of a query tile and a key tile in the backward kernel: P and dS, the same in both of its passes.

S'^T = [K k'] [Q q']^T and dP'^T = [V k'] [dO d']^T come out of the cube with ``lse / scale`` and delta subtracted: the
extra columns q', d' hold these in three fp16 parts, k' their units. What is left for the vector unit are differences
that fit fp16: ``P = exp(scale * S')`` and ``dS = P * dP'``. P is 2**k times the probabilities (see
``backward_arguments.probability_exponent``) until it meets dP', where the product must not overflow.
Tiles that something is added to, or that a bound crosses, go through fp32 with the forward kernel's tile operations.
"""

from flash_attention.ascend.tasks import TILE_FIELDS
from flash_attention.ascend.tile_ops import gradient, layout, masks
from flash_attention.ascend.tile_ops.layout import Place
from flash_attention.ascend.tile_ops.matmul import FRACTAL, Operand
from flash_attention.ascend.tile_ops.vector import HALF_LANES, LANES, Lanes, binary, convert, low_level, with_scalar


def tile_row(kernel, q_tile, fields=()):
    """The query tile's row of the table, as int32 Scalars by field: ``fields`` and those that a pair needs."""
    fields = list(fields) + _fields(kernel.spec)
    if not fields:
        return {}
    width = len(TILE_FIELDS)
    layout.copy(kernel.api, Place(kernel.local["tile"]), Place(kernel.gm["tiles"], q_tile * width), width)
    return {name: kernel.program.integer(kernel.local["tile"][TILE_FIELDS.index(name)], name) for name in fields}


def _fields(spec):
    fields = []
    fields += ["low_stop"] if spec.band.bounded_below else []
    fields += ["high_first"] if spec.band.bounded_above else []
    fields += ["before_stop", "after_first"] if spec.alibi_shape is not None else []
    fields += ["strip_row", "strip_first"] if spec.compact_mask else []
    return fields


class TilePair:
    """``query``, ``d_out``, ``key``, ``value``: tiles in L1 with their extra columns; ``field``: of :func:`tile_row`.

    A query tile lies in L1 as ``pieces`` tiles of ``groups * 16`` rows, one after the other.
    """

    def __init__(self, kernel, head, q_tile, key_tile, tensors, field):
        self.kernel, self.api, self.local, self.gm = kernel, kernel.api, kernel.local, kernel.gm
        self.spec, self.tiles, self.geometry = kernel.spec, kernel.tiles, kernel.geometry
        self.head, self.q_tile, self.key_tile, self.field = head, q_tile, key_tile, field
        self.query, self.d_out, self.key, self.value = tensors
        self.rows = self.tiles.groups * FRACTAL
        self.elements = self.rows * self.tiles.kv

    # --- products ---------------------------------------------------------------------------------
    def _rows_of(self, tensor, piece, columns, transposed=False):
        """A piece of a query tile as a factor, with its first ``columns`` columns."""
        offset = piece * self.rows * (self.geometry.depth + FRACTAL)
        return Operand(tensor, self.rows, columns, transposed, offset)

    def _tile_of(self, name, piece, transposed=False):
        """A piece of P^T or dS^T in L1 as a factor."""
        return Operand(self.local[name], self.tiles.kv, self.rows, transposed, piece * self.elements)

    def products(self, piece):
        """S'^T and dP'^T of a piece to L0C: zN, Bc rows, which is [q1][key][16 queries]."""
        columns = self.geometry.depth + FRACTAL
        for name, left, right in (("scores", self.key, self.query), ("d_probs", self.value, self.d_out)):
            self.kernel.cube.multiply(
                self.local[name][piece * self.elements],
                Operand(left, self.tiles.kv, columns),
                self._rows_of(right, piece, columns, transposed=True),
            )

    def add_key_gradients(self, piece):
        """dV += P^T dO and dK += dS^T Q / scale, in L0C."""
        depth = self.geometry.depth
        for number, (name, right) in enumerate((("probs_l1", self.d_out), ("d_scores_l1", self.query))):
            dst = self.local["sums"][number * self.tiles.kv * depth]
            right = self._rows_of(right, piece, depth)
            self.kernel.cube.multiply(dst, self._tile_of(name, piece), right, accumulate=True)

    def add_query_gradient(self, piece):
        """dQ += dS K / scale, in L0C: each piece a zN tile of its own."""
        depth = self.geometry.depth
        dst = self.local["sums"][piece * self.rows * depth]
        left = self._tile_of("d_scores_l1", piece, transposed=True)
        self.kernel.cube.multiply(dst, left, Operand(self.key, self.tiles.kv, depth), accumulate=True)

    # --- P and dS ---------------------------------------------------------------------------------
    def differentiate(self, piece, with_probs):
        """dS^T of a piece to L1 and into the returned tensor, and with ``with_probs`` P^T (after dropout) to L1."""
        api, local = self.api, self.local
        probs, d_scores = (local["{}{}".format(name, piece % 2)] for name in ("probs", "d_scores"))
        self._exponents(piece, probs)
        gradient.exponential(api, probs, self.elements)
        kept = probs
        if self.spec.dropout_rate:
            kept = local["kept"]
            self._load_operand("keep", piece, self.key_tile)
            gradient.drop(api, kept, local["keep_half"], probs, local["keep"], self.elements)
        if with_probs:
            layout.copy(api, Place(local["probs_l1"], piece * self.elements), Place(kept), self.elements)
        shrunk = kept
        if self.kernel.exponent:
            shrunk = local["shrunk"]
            gradient.scale(api, shrunk, kept, 2.0**-self.kernel.exponent, self.elements)
        layout.drain(api, Place(d_scores), Place(local["d_probs"], piece * self.elements), 1, self.elements // 256)
        gradient.score_gradients(api, d_scores, shrunk, self.elements)
        if self.spec.dropout_rate:
            self._load_minus_delta(piece)
            dropped = local["keep_half"]
            if self.kernel.exponent:
                gradient.scale(api, dropped, dropped, 2.0**-self.kernel.exponent, self.elements)
            args = d_scores, dropped, local["delta"], self.tiles.groups, self.tiles.kv
            gradient.add_dropped(api, *args)
        layout.copy(api, Place(local["d_scores_l1"], piece * self.elements), Place(d_scores), self.elements)
        return d_scores

    def _load_minus_delta(self, piece):
        first = (self.head * self.geometry.q_tiles + self.q_tile) * self.tiles.q + piece * self.rows
        for copy in range(HALF_LANES // 16):
            self.api.data_move(
                self.local["delta"][copy * 16], self.gm["minus_delta"][first], 0, self.tiles.groups, 1, 0, 7
            )

    # --- exponents --------------------------------------------------------------------------------
    def _exponents(self, piece, probs):
        """``scale * S'`` and everything that changes scores, as fp16 in ``probs``."""
        crossed = []
        if self.spec.band.bounded_below:
            crossed.append(self.key_tile < self.field["low_stop"])
        if self.spec.band.bounded_above:
            crossed.append(self.key_tile >= self.field["high_first"])
        if self.kernel.fp32_scores:
            self._exponents_in_fp32(piece, probs)
        elif crossed:
            with self.api.if_scope(self.kernel.tik.any(*crossed)):
                self._exponents_in_fp32(piece, probs)
            with self.api.else_scope():
                self._exponents_in_fp16(piece, probs)
        else:
            self._exponents_in_fp16(piece, probs)
        self._mask(piece, probs)

    def _exponents_in_fp16(self, piece, probs):
        layout.drain(
            self.api, Place(probs), Place(self.local["scores"], piece * self.elements), 1, self.elements // 256
        )
        gradient.scale(self.api, probs, probs, self.spec.scale, self.elements)

    def _exponents_in_fp32(self, piece, probs):
        """Scale, bias, ALiBi and bounds; ``lse`` covers them all, so the sum is an exponent again."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        work = local["work"]
        layout.drain(api, Place(work), Place(local["scores"], piece * self.elements), 1, self.elements // 256)
        factor = Lanes(local["scale"], 0, 0)
        if self.spec.bias_shape is not None:
            bias_groups = self._load_operand("bias", piece, self.key_tile)
            masks.add_bias(api, work, Place(local["bias"]), groups, keys, bias_groups, factor)
            factor = None
        if self.spec.alibi_shape is not None:
            self._alibi(piece, factor)
            factor = None
        if factor is not None:
            with_scalar(api.vec_muls, Lanes(work), Lanes(work), self.spec.scale, groups * keys // 4)
        if self.spec.band.bounded_below:
            with api.if_scope(self.key_tile < self.field["low_stop"]):
                bound = self._relative(0, piece, masks.UNIT)
                masks.hide_before(api, work, bound, local["index"], local["scratch"], groups, keys)
        if self.spec.band.bounded_above:
            with api.if_scope(self.key_tile >= self.field["high_first"]):
                bound = self._relative(1, piece, masks.UNIT)
                masks.hide_after(api, work, bound, local["index"], local["scratch"], groups, keys)
        convert(api, Lanes(probs, 0, 4), Lanes(work), groups * keys // 4)

    def _relative(self, row, piece, unit=1.0):
        """A row of 'bounds' for the piece's queries, minus the tile's first key, in units of ``unit``."""
        api, local = self.api, self.local
        column = (row * self.geometry.q_tiles + self.q_tile) * self.tiles.q + piece * self.rows
        layout.spread_lanes(api, Place(local["bound"]), Place(self.gm["bounds"], column), self.tiles.groups)
        masks.first_key_of_tile(api, local["start"], local["start_int"], self.key_tile * self.tiles.kv, unit)
        bound = Lanes(local["bound"])
        binary(api.vec_sub, bound, bound, Lanes(local["start"], 0, 0), self.tiles.groups)
        return bound

    def relative_positions(self, piece):
        """Lanes of the queries' positions, minus the tile's first key."""
        return self._relative(2, piece)

    def _alibi(self, piece, factor):
        """``scale * S' - slope * |position - key|``; on one side of the diagonal without forming the distance."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        relative = self.relative_positions(piece)
        with api.if_scope(self.key_tile < self.field["before_stop"]):
            self._alibi_one_sided(relative, 0, factor)
        with api.elif_scope(self.key_tile >= self.field["after_first"]):
            self._alibi_one_sided(relative, 1, factor)
        with api.else_scope():
            args = local["key_index"], Lanes(local["slope"], 8, 0), local["scratch"], groups, keys, factor
            masks.add_alibi(api, local["work"], relative, *args)

    def _alibi_one_sided(self, relative, sign, factor):
        """-slope * (position - key) before the diagonal (sign 0), its negative after it (sign 1)."""
        api, local, groups, keys = self.api, self.local, self.tiles.groups, self.tiles.kv
        tile = Place(local["slope_tiles"], sign * keys * 16)
        masks.add_bias(api, local["work"], tile, groups, keys, 1, factor)
        lanes = Lanes(local["lane_bias"])
        low_level(api.vmul, lanes, relative, Lanes(local["slope"], 8 * (1 - sign), 0), groups, blocks=(1, 1, 0))
        for group in range(groups):
            score = Lanes(local["work"], group * keys * 16)
            binary(api.vec_add, score, score, Lanes(local["lane_bias"], group * LANES, 0), keys // 4)

    def _mask(self, piece, probs):
        api, groups, keys = self.api, self.tiles.groups, self.tiles.kv
        if self.spec.compact_mask:
            strip = self.key_tile - self.field["strip_first"]
            tiles = self.gm["mask"].shape[3]
            with api.if_scope(self.kernel.tik.all(strip >= 0, strip < tiles)):
                self._load_operand("mask", piece, strip, self.field["strip_row"])
                gradient.discard(api, probs, self.local["mask"], groups, keys, groups)
        elif self.spec.mask_shape is not None:
            mask_groups = self._load_operand("mask", piece, self.key_tile)
            gradient.discard(api, probs, self.local["mask"], groups, keys, mask_groups)

    def _load_operand(self, name, piece, key_tile, q_tile=None):
        """One piece of a packed operand to its buffer in UB, see :func:`layout.load_operand`."""
        q_tile = self.q_tile if q_tile is None else q_tile
        return layout.load_operand(
            self.api, self.local[name], self.gm[name], self.head, self.spec.heads, q_tile, key_tile, piece,
            self.tiles.groups,
        )  # fmt: skip
