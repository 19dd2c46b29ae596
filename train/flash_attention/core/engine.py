"""Engines and how one is chosen. Each framework has one :class:`EngineTable`; an engine joins it with one line."""

from dataclasses import dataclass
from typing import Callable, Tuple

from flash_attention.core.errors import invalid_value


@dataclass(frozen=True)
class Engine:
    """One way to compute attention.

    Attributes:
        name: the name users give to ``engine=`` / ``implementation=``.
        run: ``run(spec, query, key, value, operands) -> (out, lse)`` on tensors in ``spec.layout``; lse (B, N, Sq).
        supports: ``supports(spec) -> Reason or None``. It never raises: an exception in it is a bug.
        order: ``auto`` takes the first supported engine in ascending order; None = only when asked for by name.
        pays: ``pays(spec) -> bool``, by measurement: False where ``auto`` should rather take any engine after it.
        layouts: what ``spec.layout`` may be; other layouts are transposed before the engine is called.
        note: where it was proven, printed by ``info`` ("simulated, not run on device").
    """

    name: str
    run: Callable
    supports: Callable
    order: int = 0
    note: str = ""
    pays: Callable = lambda spec: True
    layouts: Tuple[str, ...] = ("BNSD",)


class EngineTable:
    """The engines of one front end.

    Args:
        argument: how the front end calls the choice: 'engine' or 'implementation'.
        auto: names that mean "choose for me".
    """

    def __init__(self, argument, auto=(None, "auto")):
        self.argument = argument
        self.auto = auto
        self._engines = {}

    def add(self, engine):
        """Register ``engine``; a second one of the same name is an error."""
        if engine.name in self._engines:
            raise ValueError("engine '{}' is registered already".format(engine.name))
        self._engines[engine.name] = engine
        return engine

    def names(self):
        """Registered names in order of preference, those outside ``auto`` last."""
        return [engine.name for engine in self]

    def __iter__(self):
        def preference(engine):
            return (engine.order is None, engine.order or 0)

        return iter(sorted(self._engines.values(), key=preference))

    def __getitem__(self, name):
        return self._engines[name]

    def check_name(self, requested, layer="flash_attention", argument=None):
        """Raise ValueError when ``requested`` is neither an automatic choice nor a registered engine."""
        names = self.auto + tuple(self._engines)
        if not (requested is None or isinstance(requested, str) and requested in names):
            names = ", ".join(repr(name) for name in ["auto"] + self.names())
            raise invalid_value(layer, argument or self.argument, "one of {}".format(names), repr(requested))

    def explain(self, spec):
        """``[(engine, reason)]`` in order of preference; ``reason`` is None where the engine can serve ``spec``."""
        return [(engine, engine.supports(spec)) for engine in self]

    def choose(self, spec, requested=None, layer="flash_attention"):
        """The engine for ``spec``.

        Raises:
            UnsupportedError: the requested engine refuses, with its reason; or every automatic one does.
            ValueError: unknown name.
        """
        self.check_name(requested, layer)
        if requested not in self.auto:
            engine = self._engines[requested]
            reason = engine.supports(spec)
            if reason is not None:
                raise reason.error(layer, engine.name)
            return engine
        automatic = [engine for engine in self if engine.order is not None]
        for engine in sorted(automatic, key=lambda engine: not engine.pays(spec)):
            if engine.supports(spec) is None:
                return engine
        engine = automatic[-1]  # the most portable engine's reason says what no engine can do
        raise engine.supports(spec).error(layer, engine.name)
