"""Memory of the chips these kernels are built for, in bytes, and how much of it a kernel may plan with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Capacities a kernel may use, bytes a core.

    Attributes:
        soc: name for ``set_current_compile_soc_info``.
        simulated: the simulator's name of the chip.
        cores: AI cores.
        capacity: pairs (scope, bytes).
    """

    soc: str
    simulated: str
    cores: int
    capacity: tuple


# Of the 256 KB of UB a kernel leaves 16 KB to the compiler and to composite instructions.
_CAPACITY = (
    ("UB", 240 * 1024),
    ("L1", 1024 * 1024),
    ("L0A", 64 * 1024),
    ("L0B", 64 * 1024),
    ("L0C", 256 * 1024),
)

ASCEND_910A = Chip("Ascend910", "Ascend910A", 32, _CAPACITY)
ASCEND_310P = Chip("Ascend310P3", "Ascend310P3", 8, _CAPACITY)
"""Eight of the ten cores: some products have no more."""
