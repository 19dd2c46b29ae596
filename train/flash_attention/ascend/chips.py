"""The chips these kernels are built for: cores and memories of each, and how much of them a kernel may plan with.

Sources: the platform files of the vendor's tool chain, which name capacities and cores (``Ascend910.ini``: 32 AI cores;
``Ascend310P3.ini``: ``ai_core_cnt=8``, where the larger 310P1 has ten).
"""

from dataclasses import dataclass

_RESERVED = {"UB": 16 * 1024}
"""Bytes that a kernel leaves to the compiler and to composite instructions."""


@dataclass(frozen=True)
class Chip:
    """One product.

    Attributes:
        soc: name for ``set_current_compile_soc_info``.
        cores: AI cores.
        memory: pairs (scope, bytes a core).
    """

    soc: str
    cores: int
    memory: tuple

    @property
    def capacity(self):
        """Pairs (scope, bytes) that a kernel may use of each memory."""
        return tuple((scope, size - _RESERVED.get(scope, 0)) for scope, size in self.memory)


_FIRST_GENERATION = (
    ("UB", 256 * 1024),
    ("L1", 1024 * 1024),
    ("L0A", 64 * 1024),
    ("L0B", 64 * 1024),
    ("L0C", 256 * 1024),
)

ASCEND_910A = Chip("Ascend910", 32, _FIRST_GENERATION)
ASCEND_310P = Chip("Ascend310P3", 8, _FIRST_GENERATION)
