"""Engine 'tik': the Ascend 910 kernels on the device, compiled by CANN through MindSpore's TBE operators.

spec -> engine.py (one Cell a direction) -> operands.py, backward_operands.py (tensors as the kernels take them, by
ordinary operators) -> custom.py (``ops.Custom``) -> ``ascend/entry`` in CANN's compile processes.

Kernels join by ``register_kernels``; ``supports`` registers those of this package when it is first asked on a device
that can run them, so that no other machine imports them. Simulated, not run on device.
"""

import importlib.util

from flash_attention.ascend import limits
from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.ops.aclnn import device

TBE_REMOVED = (2, 7)
"""The first MindSpore known to ship without the service that compiles TBE operators."""

_REMEDY = "Use engine='portable', or leave the choice to 'auto'."
_kernels = []  # at most one callable; a list so that registration is visible to the ENGINE below


def register_kernels(run):
    """Let ``run(spec, query, key, value, operands)`` (with ``run.cell(spec, shards)``) serve engine 'tik'."""
    if _kernels:
        raise ValueError("kernels for engine 'tik' are registered already")
    _kernels.append(run)


class _Seam:
    """Forwards to the registered kernels; ``supports`` has refused before when there are none."""

    @staticmethod
    def cell(spec, shards=(1, 1)):
        return _kernels[0].cell(spec, shards)

    def __call__(self, spec, query, key, value, operands):
        return _kernels[0](spec, query, key, value, operands)


def refused_here(soc=None, version=None):
    """The :class:`Reason` why this computer cannot run the kernels, or None.

    Args:
        soc, version: replace the device's name and MindSpore's version.
    """
    import mindspore as ms

    if importlib.util.find_spec("tbe") is None:
        return Reason("engine", "no Python package 'tbe'", "used where CANN is installed (engine 'tik')", _REMEDY)
    soc = device.soc_name() if soc is None else soc
    newer = soc.lower().startswith(device.SOCS)
    if newer or not (soc == "Ascend" or soc.lower().startswith("ascend910")):
        return Reason("engine", soc, "used on Ascend 910 (910A)", _REMEDY)
    version = ms.__version__ if version is None else version
    if tuple(int(part) for part in version.split(".")[:2]) >= TBE_REMOVED:
        need = "used with MindSpore older than {}.{}, which compiles TBE operators".format(*TBE_REMOVED)
        return Reason("engine", "MindSpore {}".format(version), need, _REMEDY)
    return None


def supports(spec):
    """None where CANN and the kernels are here and the spec is within their limits, else the :class:`Reason`."""
    if not _kernels:
        reason = refused_here()
        if reason is not None:
            return reason
        from flash_attention.ops.tik.engine import RUN

        register_kernels(RUN)
    return limits.supports(spec)


ENGINE = Engine(
    "tik", _Seam(), supports, order=10, note="Ascend 910 (910A), MindSpore 2.2-2.6; simulated, not run on device"
)
