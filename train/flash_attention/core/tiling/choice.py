"""From a strategy's candidates to one tile: the one that the engine's cost function finds cheapest.

Engines register their cost functions here under their own names, so core knows none of them.
"""

_COSTS = {}


def register_cost(engine, cost):
    """Let ``cost`` decide between the candidate tiles of an engine; a second one for the same name is an error.

    Args:
        engine: name that the engine gives to :func:`choose_tile`.
        cost: ``cost(spec, tile, target)`` -> a number, smaller is better; called only where there are several tiles.
    """
    if engine in _COSTS:
        raise ValueError("a cost function for '{}' is registered already".format(engine))
    _COSTS[engine] = cost


def choose_tile(strategy, spec, engine, offered, target=None):
    """One of the strategy's candidates; the first one where the engine has registered no cost function.

    Args:
        strategy: :class:`~flash_attention.core.tiling.base.Strategy`.
        spec: :class:`~flash_attention.core.spec.AttentionSpec`.
        engine: name under which a cost function may be registered.
        offered: tiles that the engine works well with, first the one to take when nothing is known.
        target: what the cost function is told beside spec and tile, such as the chip.
    """
    candidates = strategy.candidates(spec, offered)
    cost = _COSTS.get(engine)
    if len(candidates) == 1 or cost is None:
        return candidates[0]
    return min(candidates, key=lambda tile: cost(spec, tile, target))
