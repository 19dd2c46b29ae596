"""Engine 'simulator': the Ascend 910 kernels, run in numpy, inside MindSpore on the CPU.

For checking a model's numerics for Ascend 910 at small sizes; it is chosen by name only.
"""

import mindspore as ms

from flash_attention.ascend import limits, simulated
from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.ops.hosted import hosted_engine


def supports(spec):
    """None on the CPU where the kernels take ``spec``, else the :class:`Reason`."""
    target = ms.get_context("device_target")
    if target != "CPU":
        return Reason("engine", target, "used on the CPU", "Use engine='tik' on Ascend 910.")
    return limits.supports(spec)


ENGINE = Engine(
    "simulator",
    hosted_engine(simulated.forward, simulated.backward),
    supports,
    order=None,
    note="Ascend 910 kernels on the simulator",
)
