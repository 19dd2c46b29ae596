"""Which options go together: rules as data, one wording, and construction from a caller's arguments."""

import dataclasses
from typing import NamedTuple, Tuple

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import check_bool


class Excludes(NamedTuple):
    """``argument`` may not be set together with any of ``others``."""

    argument: str
    others: Tuple[str, ...]
    because: str
    remedy: str = ""

    def broken(self, options):
        """The first of ``others`` that is set while ``argument`` is, or None."""
        if not is_set(options, self.argument):
            return None
        return next((name for name in self.others if is_set(options, name)), None)

    def need(self, other):
        """What the message asks for."""
        return "left out with {}= ({})".format(other, self.because)


class Needs(NamedTuple):
    """``argument`` has a meaning only where ``other`` is set."""

    argument: str
    other: str
    because: str
    remedy: str = ""

    @property
    def others(self):
        """The options that the rule is about, as those of :class:`Excludes`."""
        return (self.other,)

    def broken(self, options):
        """``other`` where it is missing, or None."""
        return self.other if is_set(options, self.argument) and not is_set(options, self.other) else None

    def need(self, other):
        """What the message asks for."""
        return "left out without {}= ({})".format(other, self.because)


def is_set(options, name):
    """Whether an option differs from its default."""
    default = type(options).__dataclass_fields__[name].default
    value = getattr(options, name)
    return value is not default and (callable(value) or value != default)


def check_bools(layer, options):
    """Raise unless every option whose default is a bool is one."""
    for name, field in type(options).__dataclass_fields__.items():
        if isinstance(field.default, bool):
            check_bool(layer, name, getattr(options, name))


def check_rules(layer, options, rules):
    """Raise for the first rule that is broken."""
    for rule in rules:
        other = rule.broken(options)
        if other is not None:
            raise invalid_value(
                layer, rule.argument, rule.need(other), repr(getattr(options, rule.argument)), rule.remedy
            )


def make(cls, layer, args, keywords):
    """``cls(*args, **keywords)``, with our message for an unknown keyword, a double or a missing one."""
    fields = [field.name for field in dataclasses.fields(cls)]
    if len(args) > len(fields):
        raise invalid_type(layer, "args", "at most {} positional arguments".format(len(fields)), len(args))
    given = dict(zip(fields, args))
    for name, value in keywords.items():
        if name not in fields:
            raise invalid_type(layer, name, "one of {}".format(", ".join(fields)), "an unknown argument")
        if name in given:
            raise invalid_type(layer, name, "given once", "a positional argument and a keyword")
        given[name] = value
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    for name in required:
        if name not in given:
            raise invalid_type(layer, name, "given", "nothing")
    return cls(**given)


def split_by_prefix(keywords, prefixes):
    """``[own, ...]``: keywords without a prefix, then those of each prefix, with it taken off."""
    parts = [{} for _ in range(len(prefixes) + 1)]
    for name, value in keywords.items():
        which = next((n for n, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if which is None:
            parts[0][name] = value
        else:
            parts[which + 1][name[len(prefixes[which]) :]] = value
    return parts


def signature(options):
    """``"dim=512, heads=8"``: the options that differ from their defaults, for ``print(model)``."""
    fields = dataclasses.fields(options)
    shown = [f.name for f in fields if f.default is dataclasses.MISSING or is_set(options, f.name)]
    return ", ".join("{}={!r}".format(name, getattr(options, name)) for name in shown)
