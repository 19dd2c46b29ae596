"""One pair of a query tile and a key tile in the backward kernel: P and dS, the same in both of its passes.

S'^T = [K k'] [Q q']^T and dP'^T = [V k'] [dO d']^T come out of the cube with ``lse / scale`` and delta subtracted: the
extra columns q', d' hold these in three fp16 parts, k' their units. What is left for the vector unit are differences
that fit fp16: ``P = exp(scale * S')`` and ``dS = P * dP'``. P is 2**k times the probabilities (see
``backward_arguments.probability_exponent``) until it meets dP', where the product must not overflow.
Tiles that something is added to, or that a bound crosses, go through fp32 with the forward kernel's tile operations.
"""

from flash_attention.ascend.score_tile import POSITION, ScoreTile, needed_fields
from flash_attention.ascend.tasks import TILE_FIELDS
from flash_attention.ascend.tile_ops import gradient, layout
from flash_attention.ascend.tile_ops.layout import Place
from flash_attention.ascend.tile_ops.matmul import FRACTAL, Operand
from flash_attention.ascend.tile_ops.vector import HALF_LANES, LANES, Lanes, convert


def tile_row(kernel, q_tile, fields=()):
    """The query tile's row of the table, as int32 Scalars by field: ``fields`` and those that a pair needs."""
    fields = list(fields) + needed_fields(kernel.spec, kernel.bounded)
    if not fields:
        return {}
    width = len(TILE_FIELDS)
    layout.copy(kernel.api, Place(kernel.local["tile"]), Place(kernel.gm["tiles"], q_tile * width), width)
    return {name: kernel.program.integer(kernel.local["tile"][TILE_FIELDS.index(name)], name) for name in fields}


class TilePair(ScoreTile):
    """One query tile and one key tile.

    ``query``, ``d_out``, ``key``, ``value``: tiles in L1 with their extra columns; ``field``: of :func:`tile_row`.

    A query tile lies in L1 as ``pieces`` tiles of ``groups * 16`` rows, one after the other.
    """

    def __init__(self, kernel, head, q_tile, key_tile, tensors, field):
        super().__init__(kernel, head, q_tile, field)
        self.key_tile = key_tile
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
            self.load_operand("keep", piece, self.key_tile)
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
        crossed, (below, above) = [], self.kernel.bounded
        if below:
            crossed.append(self.key_tile < self.field["low_stop"])
        if above:
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

        def discard(mask_groups):
            gradient.discard(self.api, probs, self.local["mask"], self.tiles.groups, self.tiles.kv, mask_groups)

        self.mask(piece, self.key_tile, discard)

    def _exponents_in_fp16(self, piece, probs):
        layout.drain(
            self.api, Place(probs), Place(self.local["scores"], piece * self.elements), 1, self.elements // 256
        )
        gradient.scale(self.api, probs, probs, self.spec.scale, self.elements)

    def _exponents_in_fp32(self, piece, probs):
        """Scale, bias, ALiBi and bounds; ``lse`` covers them all, so the sum is an exponent again."""
        work = self.local["work"]
        layout.drain(self.api, Place(work), Place(self.local["scores"], piece * self.elements), 1, self.elements // 256)
        self.add_terms(piece, self.key_tile, scaled=True)
        self.hide(piece, self.key_tile)
        convert(self.api, Lanes(probs, 0, 4), Lanes(work), self.elements // LANES)

    def bound(self, row, piece):
        """A row of 'bounds' for the piece's queries, from global memory to buffer 'relative'."""
        column = (row * self.geometry.q_tiles + self.q_tile) * self.tiles.q + piece * self.rows
        target = Lanes(self.local["relative"])
        layout.spread_lanes(self.api, target.place, Place(self.gm["bounds"], column), self.tiles.groups)
        return target

    def relative_positions(self, piece):
        """Lanes of the queries' positions, minus the tile's first key."""
        return self.relative(POSITION, piece, self.key_tile)
