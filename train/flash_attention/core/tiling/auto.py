"""'auto': the tile the engine itself finds fastest for this shape."""

from flash_attention.core.tiling.base import Strategy, fit


def _tiles(spec, preferred):
    return fit(preferred, spec)


AUTO = Strategy("auto", block_size=128, tiles=_tiles)
