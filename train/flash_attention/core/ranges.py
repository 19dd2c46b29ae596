"""Which keys a query sees, as integer formulas. The only place of the package that knows how windows are defined.

Spec -> Band -> tile ranges -> TilePlan. A query at position ``p`` sees the keys ``first_key(p) .. last_key(p)``; both
bounds never decrease with ``p``. That one property gives everything below: the keys visible to *some* query of a tile
run from the first query's lower bound to the last query's upper bound, the keys visible to *every* query from the last
query's lower bound to the first query's upper bound, and the same holds transposed for the backward pass.

Only operators are used, so Python ints, numpy arrays and traced integers (JAX, MindSpore) all work.
Position and key index stay below 2**29, so that sums of two of them fit int32.
"""

from dataclasses import dataclass
from typing import Optional


def minimum(a, b):
    """min(a, b) by operators only."""
    return (a + b - abs(a - b)) // 2


def maximum(a, b):
    """max(a, b) by operators only."""
    return (a + b + abs(a - b)) // 2


@dataclass(frozen=True)
class Band:
    """The monotone band of visible keys of one attention call. Every limit is a Python int or None (no limit).

    Attributes:
        q_len, kv_len: number of queries and keys.
        left, right: tokens visible before and after the query's own position, inclusive; causal means ``right == 0``.
        prev, next: blocks visible before and after the query's own block.
        block_size: tokens in a block, the unit of ``prev`` and ``next``.
    """

    q_len: int
    kv_len: int
    left: Optional[int] = None
    right: Optional[int] = None
    prev: Optional[int] = None
    next: Optional[int] = None
    block_size: int = 128

    @property
    def bounded_below(self):
        """True when some lower limit exists."""
        return self.left is not None or self.prev is not None

    @property
    def bounded_above(self):
        """True when some upper limit exists (causal included)."""
        return self.right is not None or self.next is not None

    @property
    def is_dense(self):
        """True when every query sees every key."""
        return not (self.bounded_below or self.bounded_above)

    def first_key(self, p):
        """First key that position ``p`` sees, at least 0; may exceed ``last_key(p)``: then it sees none."""
        low = p * 0
        if self.left is not None:
            low = maximum(low, p - self.left)
        if self.prev is not None:
            low = maximum(low, (p // self.block_size - self.prev) * self.block_size)
        return low

    def last_key(self, p):
        """Last key that position ``p`` sees, at most ``kv_len - 1``; may be negative: then it sees none."""
        high = p * 0 + (self.kv_len - 1)
        if self.right is not None:
            high = minimum(high, p + self.right)
        if self.next is not None:
            high = minimum(high, (p // self.block_size + self.next + 1) * self.block_size - 1)
        return high

    def first_query(self, j):
        """First *position* that sees key ``j``, or None when unlimited. Not clipped to the queries that exist."""
        low = None
        if self.right is not None:
            low = j - self.right
        if self.next is not None:
            block = (j // self.block_size - self.next) * self.block_size
            low = block if low is None else maximum(low, block)
        return low

    def last_query(self, j):
        """Last *position* that sees key ``j``, or None when unlimited. Not clipped to the queries that exist."""
        high = None
        if self.left is not None:
            high = j + self.left
        if self.prev is not None:
            block = (j // self.block_size + self.prev + 1) * self.block_size - 1
            high = block if high is None else minimum(high, block)
        return high


def visible(band, p, j):
    """Predicate of a partial tile: boolean array, True where position ``p`` sees key ``j`` (broadcastable integers)."""
    return (j >= band.first_key(p)) & (j <= band.last_key(p))


def _clip(x, low, high):
    return maximum(low, minimum(x, high))


def key_tiles(band, p_first, p_last, kv_tile):
    """Key tiles visited by the queries at positions ``p_first .. p_last`` (inclusive).

    Returns:
        ``(first, stop, full_first, full_stop)`` in units of ``kv_tile`` keys. ``[first, stop)`` are visited; those in
        ``[full_first, full_stop)`` are visible to every one of these queries and need no predicate. Both ranges may be
        empty (stop <= first is never returned: an empty range has ``stop == first``). The last tile may be ragged; it
        is full when all of its existing keys are visible.
    """
    tiles = -(-band.kv_len // kv_tile)
    first = _clip(band.first_key(p_first) // kv_tile, 0, tiles)
    stop = _clip(band.last_key(p_last) // kv_tile + 1, first, tiles)
    # Every key of tile t is seen by every query when t starts at or after the last query's first key
    # and ends at or before the first query's last key (or at the last key there is).
    last_of_all = band.last_key(p_first)
    full_stop = (last_of_all + 1) // kv_tile
    reaches_end = (last_of_all == band.kv_len - 1) * 1
    full_stop = _clip(full_stop + reaches_end * (tiles - full_stop), first, stop)
    full_first = _clip(-(-band.first_key(p_last) // kv_tile), first, full_stop)
    return first, stop, full_first, full_stop


def query_tiles(band, offset, j_first, j_last, q_tile):
    """The transposed view: query tiles that visit the keys ``j_first .. j_last`` (inclusive).

    ``offset`` is the position of query 0. Returns ``(first, stop, full_first, full_stop)`` in units of ``q_tile``
    queries, with the meaning of :func:`key_tiles`.
    """
    tiles = -(-band.q_len // q_tile)
    zero = (j_first + offset) * 0
    low, high = band.first_query(j_first), band.last_query(j_last)
    first = zero if low is None else _clip((low - offset) // q_tile, 0, tiles)
    stop = zero + tiles if high is None else _clip((high - offset) // q_tile + 1, 0, tiles)
    stop = maximum(first, stop)
    low_all, high_all = band.first_query(j_last), band.last_query(j_first)
    full_first = first if low_all is None else -(-(low_all - offset) // q_tile)
    if high_all is None:
        full_stop = stop
    else:
        last = minimum(high_all - offset, band.q_len - 1)  # last query that sees them all
        reaches_end = (last == band.q_len - 1) * 1
        full_stop = (last + 1) // q_tile
        full_stop = full_stop + reaches_end * (tiles - full_stop)
    full_stop = _clip(full_stop, first, stop)
    full_first = _clip(full_first, first, full_stop)
    return first, stop, full_first, full_stop
