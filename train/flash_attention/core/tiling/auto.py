"""'auto': every tile that the engine offers; its cost function finds the fastest one for the shape."""

from flash_attention.core.tiling.base import Strategy, fit


def _candidates(spec, offered):
    return tuple(dict.fromkeys(fit(tile, spec) for tile in offered))


AUTO = Strategy("auto", block_size=128, candidates=_candidates)
