"""Public names that are imported when they are first used: a mechanism costs nothing to those who do not call it."""

import importlib


def lazy_names(package, modules, eager=()):
    """``(__getattr__, __dir__)`` for a package's ``__init__.py`` (PEP 562).

    Args:
        package: dotted name of the package below which the modules lie.
        modules: ``{module: (public names, ...)}``, one entry a mechanism.
        eager: names that the package defines itself.
    """
    home = {name: module for module, names in modules.items() for name in names}

    def get(name):
        if name not in home:
            raise AttributeError("module {!r} has no attribute {!r}".format(package, name))
        return getattr(importlib.import_module("{}.{}".format(package, home[name])), name)

    return get, lambda: sorted(set(home) | set(eager))
