"""Sizes of one kernel: from a spec and its tiles to padded lengths, tile counts and what the kernel must contain.

Every number here is a Python int that the kernel is specialised on; nothing depends on tensor values.
"""

from dataclasses import dataclass

from flash_attention.core.plan import make_plan
from flash_attention.core.spec import AttentionSpec

FRACTAL = 16
"""Rows and columns of the cube's 16 x 16 fractal: lengths and head sizes are padded to multiples of it."""

SCALE_RANGE = (2.0**-10, 2.0**10)
"""Scales with which unscaled products keep hidden scores, and small differences, apart."""


def round_up(x, unit=FRACTAL):
    """``x`` rounded up to a multiple of ``unit``."""
    return -(-x // unit) * unit


@dataclass(frozen=True)
class KernelTiles:
    """Tile sizes of a kernel, multiples of 16.

    Attributes:
        q, kv: queries and keys of a tile.
        resident: query tiles (1 or 2) that a core works on together: they share every key and value tile it loads,
            and the vector unit works on one while the cube works on the other.
        groups: groups of 16 queries that are in the Unified Buffer at a time; divides ``q / 16``.
    """

    q: int
    kv: int
    resident: int
    groups: int


@dataclass(frozen=True)
class Geometry:
    """The static half of one kernel: a spec with its tiles. Symbols: B batch, N heads, Nkv key/value heads.

    ``term_gradients``: whether the backward kernel also gives the gradients of bias and slopes, where there are any.
    """

    spec: AttentionSpec
    tiles: KernelTiles
    term_gradients: bool = True

    @property
    def depth(self):
        """Head size padded to 16."""
        return round_up(self.spec.head_dim)

    @property
    def q_rows(self):
        """Rows of query and output in global memory: Sq padded to 16."""
        return round_up(self.spec.q_len)

    @property
    def kv_rows(self):
        """Rows of key and value in global memory: Sk padded to 16."""
        return round_up(self.spec.kv_len)

    @property
    def q_tiles(self):
        """Query tiles of a head; the last one may be ragged."""
        return -(-self.q_rows // self.tiles.q)

    @property
    def kv_tiles(self):
        """Key tiles of a head; the last one may be ragged."""
        return -(-self.kv_rows // self.tiles.kv)

    @property
    def q_tail(self):
        """Rows of the last query tile that exist in global memory, a multiple of 16; all when not ragged."""
        return self.q_rows - (self.q_tiles - 1) * self.tiles.q

    @property
    def kv_tail(self):
        """Rows of the last key tile that exist in global memory, a multiple of 16."""
        return self.kv_rows - (self.kv_tiles - 1) * self.tiles.kv

    @property
    def q_groups(self):
        """Groups of 16 queries in a query tile: the outermost axis of a transposed score tile."""
        return self.tiles.q // FRACTAL

    @property
    def pieces(self):
        """Times the Unified Buffer is filled to work through one score tile."""
        return self.q_groups // self.tiles.groups

    @property
    def q_tasks(self):
        """Tasks of a head, ``resident`` query tiles each; the last one may have fewer."""
        return -(-self.q_tiles // self.tiles.resident)

    @property
    def heads(self):
        """(batch, head) pairs: B * N."""
        return self.spec.batch * self.spec.heads

    @property
    def batch_heads(self):
        """(B, N): the leading axes of what there is one of for each head."""
        return self.spec.batch, self.spec.heads

    @property
    def bounded_below(self):
        """True when some query does not see key 0."""
        return self.spec.band.bounded_below

    @property
    def bounded_above(self):
        """True when some query of some tile does not see the tile's last key, be it only for want of keys."""
        return self.spec.band.bounded_above or self.spec.kv_len % self.tiles.kv != 0

    @property
    def scaled_late(self):
        """True when the maximum is taken over raw products, and the scale applied together with its subtraction.

        Not where something is added to the scaled scores, and not where the scale is so small or so large that hidden
        scores would not stay apart from real ones.
        """
        added = self.spec.bias_shape is not None or self.spec.alibi_shape is not None
        return not added and SCALE_RANGE[0] <= self.spec.scale <= SCALE_RANGE[1]

    def plan(self, cores=1):
        """The :class:`~flash_attention.core.plan.TilePlan` at these tiles."""
        return make_plan(self.spec.band, self.spec.offset, self.tiles.q, self.tiles.kv, cores)
