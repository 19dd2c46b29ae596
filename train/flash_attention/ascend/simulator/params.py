"""The knobs of the simulator, each chosen so that its default finds bugs."""

from dataclasses import dataclass
from typing import Optional

from flash_attention.core.errors import invalid_value

UNINITIALIZED = ("raise", "nan", "random")


@dataclass(frozen=True)
class SimulatorParams:
    """How programs are checked and executed.

    Attributes:
        strict: True: every violation is an error. False: hazards that working third-party kernels rely on (marked
            "hazard" where they are checked) become counted warnings in ``Tik.report``; accesses out of bounds,
            capacity, lifetime and races stay errors.
        execute: False: programs are built and checked, ``start_debug`` refuses to run them, and ``Tik.count`` still
            walks them for their trace. For shapes too large to simulate.
        uninitialized: what reading bytes that nobody wrote does, in local memory and in outputs. "raise": an error at
            the first computation that reads them (copies carry the mark along). "nan": the bytes are 0xFF (NaN in
            floating point) and are computed with. "random": random bytes, as the vendor's debugger has.
        core_order_seed: cores run one after the other in an order drawn with this seed; None = ascending.
        network_launch: True: GM tensors declared with ``is_atomic_add=True`` start as zeros, as the graph engine
            makes them in a network. False: they start undefined, as in a bare launch or the vendor's debugger.
        trace: True: ``Tik.trace`` holds one record for each executed instruction.
        reciprocal_error: relative error of ``vec_rec``, drawn uniformly from [-e, e]. The unit works from a table; the
            vendor's example shows 2**-9. 0 = correctly rounded.
        random_seed: seed of the random bytes and errors above.
    """

    strict: bool = True
    execute: bool = True
    uninitialized: str = "raise"
    core_order_seed: Optional[int] = 0
    network_launch: bool = True
    trace: bool = False
    reciprocal_error: float = 0.0
    random_seed: int = 0

    def __post_init__(self):
        if self.uninitialized not in UNINITIALIZED:
            need = "one of {}".format(", ".join(UNINITIALIZED))
            raise invalid_value("SimulatorParams", "uninitialized", need, repr(self.uninitialized))
        if not 0.0 <= self.reciprocal_error < 0.5:
            raise invalid_value("SimulatorParams", "reciprocal_error", "in [0, 0.5)", self.reciprocal_error)
