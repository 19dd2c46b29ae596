"""What each chip has: capacities, scopes, and the rates the cost functions use. A further chip is one more table row.

Sources: [C] the platform files of the vendor's public tool chain for the Ascend 910 (capacities, bytes per cycle) and
the Ascend C sources for 310P; [U] a figure nobody published, which the cost model varies (``cost.SCENARIOS``).
"""

from dataclasses import dataclass, field
from typing import Dict

from flash_attention.ascend.chips import ASCEND_310P, ASCEND_910A
from flash_attention.core.errors import invalid_value

GM, UB, L1, L0A, L0B, L0C = "GM", "UB", "L1", "L0A", "L0B", "L0C"
LOCAL_SCOPES = (UB, L1, L0A, L0B, L0C)

# TIK's scope strings. scope_cbuf_out (L1OUT) and scope_cc are one memory, L0C.
SCOPE_STRINGS = {
    "global": GM,
    "local.UB": UB,
    "local.L1": L1,
    "local.L0A": L0A,
    "local.L0B": L0B,
    "local.L0C": L0C,
}
TIK_SCOPES = {
    "scope_gm": "global",
    "scope_ubuf": "local.UB",
    "scope_cbuf": "local.L1",
    "scope_cbuf_out": "local.L0C",
    "scope_ca": "local.L0A",
    "scope_cb": "local.L0B",
    "scope_cc": "local.L0C",
}

# Bytes a tensor's start is aligned to when it is allocated, and its size rounded up to.
ALLOCATION = {GM: 1, UB: 32, L1: 512, L0A: 512, L0B: 512, L0C: 1024}

# The vendor's own code keeps the last part of UB for itself: above this, programs are warned. [C]
UB_BUDGET = 245760

# A program's statements: warned above the first, refused above the second. [C]
IR_WARNING, IR_LIMIT = 60000, 80000


@dataclass(frozen=True)
class Rates:
    """Throughput of one core in bytes (or multiply-adds) per cycle. Start-up and issue costs are unknown [U], hence 0.

    Attributes:
        vector: bytes a simple vector instruction processes per cycle [C].
        slow_vector: factor for exp, ln, division, reciprocal and roots [U].
        cube_fractals: 16 x 16 x 16 products per cycle [C].
        scalar_access: cycles of one scalar read or write of UB [U].
        clock_mhz: [C] for 910A, [U] for 310P.
        others: bytes per cycle of the path they name [C]; ``gm_*`` are HBM, ``l2_*`` where the data is in L2.
    """

    vector: int = 256
    slow_vector: int = 4
    cube_fractals: int = 1
    scalar_access: int = 30
    l1_to_l0a: int = 512
    l1_to_l0b: int = 256
    l1_to_ub: int = 256
    l0c_to_ub: int = 256
    ub_to_l0c: int = 256
    ub_to_l1: int = 128
    gm_read: int = 40
    gm_write: int = 40
    l2_read: int = 80
    l2_write: int = 80
    clock_mhz: int = 1000


@dataclass(frozen=True)
class Chip:
    """One product.

    Attributes:
        name: short name used in instruction tables.
        socs: names ``set_current_compile_soc_info`` accepts, by prefix.
        cores: AI cores. l2: bytes of the shared cache.
        capacity: scope -> bytes.
        rates: :class:`Rates`.
    """

    name: str
    socs: tuple
    cores: int
    l2: int
    capacity: Dict[str, int] = field(hash=False, default_factory=dict)
    rates: Rates = Rates()

    def spec(self, soc):
        """What ``get_soc_spec`` answers, key -> value."""
        return {
            "SOC_VERSION": soc,
            "AICORE_TYPE": "AiCore",
            "CORE_NUM": self.cores,
            "UB_SIZE": self.capacity[UB],
            "L2_SIZE": self.l2,
            "L1_SIZE": self.capacity[L1],
            "CUBE_SIZE": [16, 16, 16],
            "L0A_SIZE": self.capacity[L0A],
            "L0B_SIZE": self.capacity[L0B],
            "L0C_SIZE": self.capacity[L0C],
            "SMASK_SIZE": 256,
        }


CHIPS = (
    Chip("910A", ("Ascend910", "Ascend910A", "Ascend910Pro"), ASCEND_910A.cores, 32 << 20, dict(ASCEND_910A.memory)),
    # The clock and the DDR rate of 310P are not settled: [U].
    Chip("310P", ("Ascend310P",), ASCEND_310P.cores, 16 << 20, dict(ASCEND_310P.memory),
         Rates(gm_read=17, gm_write=17)),
)  # fmt: skip
SPEC_KEYS = tuple(CHIPS[0].spec(""))


def chip_of(soc):
    """The chip behind a SoC name.

    Raises:
        ValueError: no table row; 910B, A2 and A3 have no path from L0C to UB and are not simulated.
    """
    text = str(soc)
    # Plain 'Ascend910B' is an older name of a first-generation product; 910B's own are 'Ascend910B1' and so on.
    newer = text.startswith(("Ascend910B", "Ascend910_9")) and text != "Ascend910B"
    for chip in CHIPS:
        if not newer and text.startswith(chip.socs):
            return chip
    need = "the name of a simulated chip ({})".format(", ".join(name for chip in CHIPS for name in chip.socs))
    raise invalid_value("set_current_compile_soc_info", "soc_version", need, repr(soc))
