"""'wukong': tiles for the attention shapes of a latent-diffusion U-Net.

Self-attention runs at 4096, 1024, 256 and 64 tokens, cross-attention at 77 text tokens, with head sizes 40, 80 and
160. The text fits one key tile; the larger the head, the shorter the tile, so that Q, K, V and the output of a tile
keep about the same number of bytes.
"""

from flash_attention.core.tiling.base import Strategy, Tile, fit

_ROWS = ((48, 256), (96, 128), (192, 64))  # (largest head_dim, rows a tile)


def _candidates(spec, offered):
    del offered
    rows = next((rows for limit, rows in _ROWS if spec.head_dim <= limit), 64)
    keys = spec.kv_len if spec.kv_len <= 128 else rows
    return (fit(Tile(rows, keys), spec),)


WUKONG = Strategy("wukong", block_size=64, candidates=_candidates)
