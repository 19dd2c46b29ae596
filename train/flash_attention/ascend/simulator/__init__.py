"""A numpy execution of TIK that enforces the documented limits of Ascend 910 and 310P. Start at ``toolkit.py``.

    toolkit = Toolkit()                                   # Ascend 910, strict
    tik_instance = toolkit.tik.Tik(disable_debug=False)   # then as with `from tbe import tik`

Flow: tik.py (facade) -> program.py (statements, build-time checks) -> isa.py (the table: vector, reduce, select,
layout, move, cube, highlevel) -> machine.py (closures over numpy views) -> trace.py (what a cost model reads).
"""

from .errors import SimulatorError
from .isa import INSTRUCTIONS, table
from .params import SimulatorParams
from .toolkit import Toolkit, installed_as_tbe
from .trace import Span, Trace, TraceRecord

__all__ = [
    "INSTRUCTIONS", "SimulatorError", "SimulatorParams", "Span", "Toolkit", "Trace", "TraceRecord", "installed_as_tbe",
    "table",
]  # fmt: skip
