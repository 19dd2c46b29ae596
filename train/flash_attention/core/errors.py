"""Errors of the whole package: one wording, one place. Every front end and every engine builds its messages here."""

from dataclasses import dataclass


class UnsupportedError(ValueError):
    """A valid request that the chosen engine cannot serve; the message carries the engine's :class:`Reason`."""


def _sentence(layer, engine, argument, need, got, remedy):
    where = "For '{}'{}".format(layer, " (engine '{}')".format(engine) if engine else "")
    text = "{}, '{}' must be {}, but got {}.".format(where, argument, need, got)
    return "{} {}".format(text, remedy) if remedy else text


@dataclass(frozen=True)
class Reason:
    """Why an engine refuses a call. ``info``, ``check``, the tables in the docs and the tests print these objects.

    Attributes:
        argument: the argument that cannot be honoured, by its public name.
        value: what was given.
        need: what the engine needs, worded to follow "must be".
        remedy: one sentence that says what to do instead.
    """

    argument: str
    value: object
    need: str
    remedy: str = ""

    def message(self, layer="flash_attention", engine=None):
        """The full text, in MindSpore's wording."""
        return _sentence(layer, engine, self.argument, self.need, self.value, self.remedy)

    def error(self, layer="flash_attention", engine=None):
        """The exception to raise: ``raise reason.error(layer, engine)``."""
        return UnsupportedError(self.message(layer, engine))

    def __str__(self):
        text = "'{}' must be {}, but got {}".format(self.argument, self.need, self.value)
        return "{}. {}".format(text, self.remedy) if self.remedy else text


def invalid_value(layer, argument, need, got, remedy=""):
    """Build the ValueError for an argument of the right type with an impossible value."""
    return ValueError(_sentence(layer, None, argument, need, got, remedy))


def invalid_type(layer, argument, need, got, remedy=""):
    """Build the TypeError for an argument of a wrong type or dtype."""
    return TypeError(_sentence(layer, None, argument, need, got, remedy))
