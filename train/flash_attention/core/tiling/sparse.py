"""'sparse': 128 x 128 tiles with ragged tails, the unit of block-sparse windows."""

from flash_attention.core.tiling.base import Strategy, Tile, fit


def _candidates(spec, offered):
    del offered
    return (fit(Tile(128, 128), spec),)


SPARSE = Strategy("sparse", block_size=128, candidates=_candidates)
