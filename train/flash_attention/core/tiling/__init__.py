"""Tiling strategies: which compute tiles an engine uses, and the default unit of block windows.

A strategy is one file beside this one and one line here. Tiles never change a result beyond rounding.
spec -> Strategy.candidates -> choice.py (the engine's cost function, where there are several) -> Tile.
"""

from flash_attention.core.errors import invalid_value
from flash_attention.core.tiling.auto import AUTO
from flash_attention.core.tiling.base import Strategy, Tile
from flash_attention.core.tiling.choice import choose_tile, register_cost
from flash_attention.core.tiling.sparse import SPARSE
from flash_attention.core.tiling.wukong import WUKONG

__all__ = [
    "Strategy", "Tile", "choose_tile", "get_strategy", "register_cost", "register_strategy", "strategy_names",
]  # fmt: skip

_STRATEGIES = {}


def register_strategy(strategy):
    """Add a strategy under its name; a second one of the same name is an error."""
    if strategy.name in _STRATEGIES:
        raise ValueError("tiling strategy '{}' is registered already".format(strategy.name))
    _STRATEGIES[strategy.name] = strategy


def strategy_names():
    """Names of the registered strategies."""
    return list(_STRATEGIES)


def get_strategy(name, layer="FlashAttention"):
    """The strategy called ``name``; ValueError with the known names otherwise."""
    if not isinstance(name, str) or name not in _STRATEGIES:
        names = ", ".join(repr(known) for known in _STRATEGIES)
        raise invalid_value(layer, "tiling_stgy_name", "one of {}".format(names), repr(name))
    return _STRATEGIES[name]


for _strategy in (SPARSE, WUKONG, AUTO):
    register_strategy(_strategy)
