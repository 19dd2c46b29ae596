"""The seam of the Ascend 910 kernels: engine 'tik' runs what ``register_kernels`` gave, and says why it cannot else."""

import importlib.util

from flash_attention.ascend import limits
from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason

_REMEDY = "Use engine='portable', or leave the choice to 'auto'."
_kernels = []  # at most one callable; a list so that registration is visible to the ENGINE below


def register_kernels(run):
    """Let ``run(spec, query, key, value, operands)`` (with ``run.cell(spec)``) serve engine 'tik'."""
    if _kernels:
        raise ValueError("kernels for engine 'tik' are registered already")
    _kernels.append(run)


class _Seam:
    """Forwards to the registered kernels; ``supports`` has refused before when there are none."""

    @staticmethod
    def cell(spec):
        return _kernels[0].cell(spec)

    def __call__(self, spec, query, key, value, operands):
        return _kernels[0](spec, query, key, value, operands)


def supports(spec):
    """None where CANN and the kernels are here and the spec is within their limits, else the :class:`Reason`."""
    if importlib.util.find_spec("tbe") is None:
        return Reason("engine", "no Python package 'tbe'", "used where CANN is installed (engine 'tik')", _REMEDY)
    if not _kernels:
        return Reason("engine", "no kernels in this version", "served by registered TIK kernels", _REMEDY)
    return limits.supports(spec)


ENGINE = Engine("tik", _Seam(), supports, order=10, note="Ascend 910 (910A); needs CANN")
