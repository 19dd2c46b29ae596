"""Dropout as a function of position: the same mask whatever the engine, the tile size or the number of devices.

``keep`` hashes (seed, batch, head, query, key) with uint32 multiply, xor and shift. The per-row and per-column parts
are computed once, so that an element costs two multiplies, one shift and two xors. Backward recomputes the mask.
:data:`TEST_VECTORS` pins the definition for engines written in another language.
"""

import numpy as np

# Odd constants with good avalanche for two multiply-xorshift rounds (found by exhaustive search, public domain,
# C. Wellons, "Prospecting for hash functions", 2018).
_M1 = 0x7FEB352D
_M2 = 0x846CA68B
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: neighbouring indices land far apart


def _u32(xp, x):
    if isinstance(x, int):  # a literal above 2**31 must not pass through a signed default type
        return xp.uint32(x & 0xFFFFFFFF)
    return xp.asarray(x).astype(xp.uint32)


def _mix(xp, x):
    """A full avalanche of one uint32."""
    x = x ^ (x >> _u32(xp, 16))
    x = x * _u32(xp, _M1)
    x = x ^ (x >> _u32(xp, 15))
    x = x * _u32(xp, _M2)
    return x ^ (x >> _u32(xp, 16))


def _absorb(xp, state, index):
    return _mix(xp, state ^ ((_u32(xp, index) + _u32(xp, 1)) * _u32(xp, _GOLDEN)))


def row_key(xp, seed, b, h, i):
    """uint32 key of query rows: one a (batch, head, query); broadcasts over its arguments."""
    with np.errstate(over="ignore"):
        return _absorb(xp, _absorb(xp, _absorb(xp, _mix(xp, _u32(xp, seed)), b), h), i)


def col_key(xp, j):
    """uint32 key of key columns: one a key index."""
    with np.errstate(over="ignore"):
        return _mix(xp, (_u32(xp, j) + _u32(xp, 1)) * _u32(xp, _GOLDEN))


def threshold(rate):
    """Elements whose hash is at or above ``round(rate * 2**32)`` are kept."""
    return min(int(round(rate * 2.0**32)), 2**32 - 1)


def element_hash(xp, row, col):
    """uint32 hash of every (row, column) from their keys; its high bits decide."""
    with np.errstate(over="ignore"):
        x = (row ^ col) * _u32(xp, _M1)
        x = x ^ (x >> _u32(xp, 15))
        return x * _u32(xp, _M2)


def keep_from_keys(xp, row, col, rate):
    """Boolean keep mask from broadcastable row and column keys. The comparison is unsigned."""
    return element_hash(xp, row, col) >= _u32(xp, threshold(rate))


def keep(xp, seed, b, h, i, j, rate):
    """True where the probability of (batch, head, query, key) survives dropout at ``rate``.

    Args:
        xp: numpy or jax.numpy.
        seed: uint32 scalar (or array broadcasting with the rest).
        b, h, i, j: *global* indices, broadcastable integers >= 0.
        rate: dropout probability, a Python float in [0, 1).

    Returns:
        boolean array of the broadcast shape; kept probabilities are to be divided by ``1 - rate``.
    """
    return keep_from_keys(xp, row_key(xp, seed, b, h, i), col_key(xp, j), rate)


# (seed, b, h, i, j, element_hash); the element is kept when element_hash >= threshold(rate), unsigned.
TEST_VECTORS = (
    (0, 0, 0, 0, 0, 0x6BE587E8),
    (1, 0, 0, 0, 0, 0x2EC699BD),
    (1, 0, 0, 0, 1, 0x5EA28A3F),
    (1, 0, 0, 1, 0, 0x04AF4AE5),
    (1, 0, 1, 0, 0, 0xDDC79386),
    (1, 1, 0, 0, 0, 0x575968F0),
    (0xFFFFFFFF, 3, 31, 65535, 1048575, 0x1E241FEF),
)
