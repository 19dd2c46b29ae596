"""Which tiles a kernel gets: those of the spec's strategy, as far as their buffers fit the chip's memories.

Where the strategy leaves a choice ('auto'), the cost model predicts the time of the call with each candidate. It is
registered with core's strategies from here and imported when it is asked first, once a call's shape: compile processes
are told the tiles and need no model.
"""

import functools
import importlib
from dataclasses import replace

from flash_attention.ascend.backward_budget import backward_buffers
from flash_attention.ascend.budget import Budget, forward_buffers
from flash_attention.ascend.chips import ASCEND_910A
from flash_attention.ascend.geometry import FRACTAL, Geometry, KernelTiles, round_up
from flash_attention.core.tiling import Tile, choose_tile, get_strategy, register_cost

MOST_GROUPS = 8
"""Groups of 16 queries that the forward kernel has in the Unified Buffer at a time."""


def choose_tiles(spec, direction="forward", chip=ASCEND_910A):
    """The :class:`~flash_attention.ascend.geometry.KernelTiles` of a spec.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec`.
        direction: 'forward' or 'backward'.
        chip: :class:`~flash_attention.ascend.chips.Chip`.
    """
    strategy, kernel = get_strategy(spec.tiling), _KERNELS[direction]
    return kernel.fit(spec, choose_tile(strategy, spec, kernel.name, kernel.offered, chip), chip)


def candidate_tiles(spec, direction="forward", chip=ASCEND_910A):
    """All that :func:`choose_tiles` may return: a list without repetitions; the model is not asked."""
    kernel = _KERNELS[direction]
    wanted = get_strategy(spec.tiling).candidates(spec, kernel.offered)
    return list(dict.fromkeys(kernel.fit(spec, tile, chip) for tile in wanted))


def candidate_seconds(spec, direction="forward", chip=ASCEND_910A):
    """``{KernelTiles: predicted seconds}`` of :func:`candidate_tiles`."""
    kernel = _KERNELS[direction]
    wanted = get_strategy(spec.tiling).candidates(spec, kernel.offered)
    return {kernel.fit(spec, tile, chip): _seconds(direction, spec, tile, chip) for tile in wanted}


# --- from a wanted tile to one that fits ------------------------------------------------------------------------------
def fit_forward(spec, wanted, chip=ASCEND_910A):
    """The forward kernel's tiles for a wanted :class:`~flash_attention.core.tiling.base.Tile`, halved until they fit.

    Two query tiles are resident, so that cube and vector unit work at the same time: whole ones where every core gets
    two, which halves key and value traffic, else the two halves of one.
    """
    q, kv = round_up(wanted.q), round_up(wanted.kv)
    if spec.batch * spec.heads * -(-spec.q_len // q) < 2 * chip.cores:
        q = round_up(q // 2)
    while True:
        resident = 2 if spec.q_len > q else 1
        tiles = fit_groups(spec, KernelTiles(q, kv, resident, q // FRACTAL), chip)
        if tiles is not None:
            return tiles
        if q > FRACTAL and q >= kv // 2:
            q = round_up(q // 2)
        else:
            kv = round_up(kv // 2)


def fit_groups(spec, tiles, chip=ASCEND_910A):
    """``tiles`` with as many groups of queries in the Unified Buffer as fit; None when not even one does."""
    groups = tiles.q // FRACTAL
    for divisor in range(1, groups + 1):
        if groups % divisor == 0 and groups // divisor <= MOST_GROUPS:
            candidate = replace(tiles, groups=groups // divisor)
            if Budget(forward_buffers(Geometry(spec, candidate)), chip).fits:
                return candidate
    return None


def fit_backward(spec, wanted, chip=ASCEND_910A):
    """The backward kernel's tiles for a wanted tile, halved until they fit.

    The queries are worked through in two pieces, so that the cube works for one while the vector unit works on the
    other.
    """
    tiles = KernelTiles(round_up(wanted.q), round_up(wanted.kv), 1, 1)
    while True:
        groups = tiles.q // FRACTAL
        candidate = replace(tiles, groups=groups // 2 if groups % 2 == 0 else groups)
        if Budget(backward_buffers(Geometry(spec, candidate)), chip).fits:
            return candidate
        if tiles.kv > FRACTAL and tiles.kv >= tiles.q:
            tiles = replace(tiles, kv=round_up(tiles.kv // 2))
        else:
            tiles = replace(tiles, q=round_up(tiles.q // 2))


# --- the kernels, and what a tile costs them --------------------------------------------------------------------------
class _Tiling:
    """What is known of a kernel's tiles.

    Attributes:
        name: under which its cost function is registered.
        offered: tiles that suit it: products of 128 x 128 x 128 fill half of L0A and L0B, so that one half is loaded
            while the cube reads the other; longer key tiles rescale O less often, and waste more where few keys are
            visible; smaller tiles give more cores something to do.
        fit: ``fit(spec, wanted, chip)`` -> KernelTiles.
    """

    def __init__(self, direction, offered, fit):
        self.name, self.offered, self.fit = "ascend " + direction, tuple(Tile(*tile) for tile in offered), fit
        register_cost(self.name, functools.partial(_seconds, direction))


@functools.lru_cache(maxsize=None)
def _seconds(direction, spec, tile, chip):
    """Predicted time of the call with a wanted tile."""
    model = importlib.import_module("flash_attention.ascend.cost")
    return model.predict(spec, direction, chip, tiles=_KERNELS[direction].fit(spec, tile, chip)).seconds


_KERNELS = {
    "forward": _Tiling("forward", ((128, 256), (128, 128)), fit_forward),
    "backward": _Tiling("backward", ((128, 128), (64, 64)), fit_backward),
}
