"""Multi-query and grouped-query attention: which key/value head a query head uses, and the checks of the layer.

Shazeer, "Fast Transformer Decoding", 2019; Ainslie et al., "GQA", 2023. The core call groups neighbouring query heads
('interleave', h // group); 'tile' (h % kv_heads) is that call between two reorderings of the query heads.
"""

from flash_attention.core.errors import invalid_value
from flash_attention.core.validation import check_bool, check_int

MAPPINGS = ("interleave", "tile")


def check_mapping(layer, mapping):
    """Raise unless ``mapping`` is known."""
    if mapping not in MAPPINGS:
        need = "one of {}".format(", ".join(map(repr, MAPPINGS)))
        raise invalid_value(layer, "kv_head_mapping", need, repr(mapping))


def check_layer(layer, dim, heads, dim_head, kv_heads, causal, mapping):
    """Raise unless the layer's sizes fit; returns the size of a head."""
    check_int(layer, "dim", dim, 1)
    check_int(layer, "heads", heads, 1)
    check_int(layer, "kv_heads", kv_heads, 1)
    check_bool(layer, "causal", causal)
    check_mapping(layer, mapping)
    if heads % kv_heads:
        raise invalid_value(layer, "kv_heads", "a divisor of heads = {}".format(heads), kv_heads)
    if dim_head is not None:
        return check_int(layer, "dim_head", dim_head, 1)
    if dim % heads:
        raise invalid_value(layer, "dim", "a multiple of heads = {}".format(heads), dim, "Or give dim_head=.")
    return dim // heads


def group_heads(x, kv_heads, axis):
    """Reorder tiled query heads (h % kv_heads) along ``axis`` so that those of one key/value head are neighbours."""
    return _transposed(x, (x.shape[axis] // kv_heads, kv_heads), axis)


def tile_heads(x, kv_heads, axis):
    """The inverse of :func:`group_heads`."""
    return _transposed(x, (kv_heads, x.shape[axis] // kv_heads), axis)


def _transposed(x, sizes, axis):
    shape = x.shape
    return x.reshape(shape[:axis] + sizes + shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(shape)
