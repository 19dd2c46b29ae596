"""Entry functions of the kernels for MindSpore's TBE compile processes, which import this very file by its path.

They ask for a function by the operator's name (see :mod:`flash_attention.ascend.entry.request`) and call it with a
description of each tensor, the attribute and ``kernel_name=``. Such a process need not have the package on its path,
so the folder above the package is added behind what is there. Imports neither MindSpore nor JAX, and CANN only when a
kernel is built.
"""

import os
import sys

_SOURCES = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))
if _SOURCES not in sys.path:
    sys.path.append(_SOURCES)

from flash_attention.ascend.entry.request import KINDS, build_operator  # noqa: E402  (needs the path above)


def entry_function(operator):
    """``function(*tensors, request, kernel_name=operator)``, named ``operator``, which builds its kernel."""

    def entry(*arguments, kernel_name=operator, disable_debug=True):
        return build_operator(operator, arguments[:-1], arguments[-1], kernel_name, disable_debug)

    entry.__name__ = entry.__qualname__ = operator
    return entry


def __getattr__(name):
    """The entry function of any operator (PEP 562), as ``getattr(module, name)`` asks for it."""
    if name.split("__")[0] not in KINDS:
        raise AttributeError("module {!r} has no attribute {!r}".format(__name__, name))
    return entry_function(name)
