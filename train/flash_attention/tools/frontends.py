"""The two front ends as the tools see them: how to find their engines, without importing a framework too early."""

import importlib
import sys

from flash_attention.tools.machine import installed


class FrontEnd:
    """A framework and its engine table.

    Attributes:
        name: 'MindSpore' or 'JAX'.
        module: the framework's module.
        table: the module that holds ``ENGINES``.
        python: lowest Python version, or None.
        choice: the module whose ``TABLE`` says what `auto` takes on which platform, or None.
    """

    def __init__(self, name, module, table, python=None, choice=None):
        self.name, self.module, self.table, self.python, self.choice = name, module, table, python, choice

    def missing(self):
        """Why the front end cannot be used here, or None."""
        if self.python and sys.version_info < self.python:
            return "needs Python {}.{} or newer".format(*self.python)
        if not installed(self.module):
            return "{} is not installed".format(self.module)
        try:
            importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # installed, but a library below it is absent
            return "{} cannot be imported: {}".format(self.module, str(error).split("\n")[0])
        return None

    def engines(self):
        """Its :class:`~flash_attention.core.engine.EngineTable`."""
        return importlib.import_module(self.table).ENGINES

    def choices(self):
        """Rows ``[platform, engines that `auto` takes, why]``; none where the order of the engines alone decides."""
        table = importlib.import_module(self.choice).TABLE if self.choice else ()
        return [[row.backend, ", ".join(row.engines), row.because] for row in table]


FRONT_ENDS = (
    FrontEnd("MindSpore", "mindspore", "flash_attention.ops"),
    FrontEnd("JAX", "jax", "flash_attention.jax", python=(3, 10), choice="flash_attention.jax.engines.choice"),
)
