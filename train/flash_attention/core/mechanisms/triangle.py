"""Checks of ``TriangleAttention``, whose mask is (1|B, S, S), non-zero = discard, on top of causality."""

from flash_attention.core.errors import invalid_value
from flash_attention.core.validation import check_int, check_rate

LAYER = "TriangleAttention"


def check_layer(block_size, dropout_rate, dp, mp):
    """Raise unless the constructor's arguments are possible."""
    check_int(LAYER, "block_size", block_size, 1)
    check_rate(LAYER, "dropout_rate", dropout_rate)
    check_int(LAYER, "dp", dp, 1)
    check_int(LAYER, "mp", mp, 1)


def check_shapes(query, key, mask):
    """Raise unless the lengths agree and the mask is (1|B, S, S). All arguments are shapes, ``mask`` may be None."""
    if len(query) != 4 or len(key) != 4 or query[2] != key[2]:
        need = "of shape (B, N, S, D), the length S of the query's {}".format(tuple(query))
        raise invalid_value(LAYER, "key", need, "shape {}".format(tuple(key)))
    batch, _, length, _ = query
    if mask is not None and (len(mask) != 3 or mask[0] not in (1, batch) or tuple(mask[1:]) != (length, length)):
        need = "of shape (1|{}, {}, {})".format(batch, length, length)
        raise invalid_value(LAYER, "attention_mask", need, "shape {}".format(tuple(mask)))
