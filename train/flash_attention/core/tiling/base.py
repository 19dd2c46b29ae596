"""What a tiling strategy is: a name, the block size of its windows, and a rule from a spec to candidate tiles."""

from dataclasses import dataclass
from typing import Callable, NamedTuple


class Tile(NamedTuple):
    """A compute tile: ``q`` query rows by ``kv`` keys."""

    q: int
    kv: int


@dataclass(frozen=True)
class Strategy:
    """One tiling strategy.

    Attributes:
        name: value of ``tiling_stgy_name``.
        block_size: default unit of ``prev_block_num``, ``next_block_num`` and the compact mask, in tokens.
        candidates: ``candidates(spec, offered) -> tuple of Tile``, at least one. ``offered`` are the tiles that an
            engine works well with, first the one to take when nothing is known. Of several candidates the engine's
            cost function chooses (:func:`~flash_attention.core.tiling.choice.choose_tile`).
    """

    name: str
    block_size: int
    candidates: Callable


def fit(tile, spec):
    """Shrink a tile to the sequence: a tile never exceeds the lengths rounded up to 16 (the device's fractal)."""
    return Tile(min(tile.q, -(-spec.q_len // 16) * 16), min(tile.kv, -(-spec.kv_len // 16) * 16))
