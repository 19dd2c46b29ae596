"""Entry of engine 'aclnn': which specs and devices it serves, and the two passes of a spec."""

from flash_attention.core.engine import Engine
from flash_attention.ops.aclnn import constraints, device
from flash_attention.ops.aclnn.passes import Backward, Forward
from flash_attention.ops.autograd import DifferentiableEngine


def supports(spec):
    """None, or the :class:`~flash_attention.core.errors.Reason` why this engine refuses ``spec`` here."""
    return device.refused() or constraints.refused(spec)


def build(spec):
    """``(forward, backward)`` Cells of ``spec``."""
    return Forward(spec), Backward(spec)


run = DifferentiableEngine(build)

ENGINE = Engine("aclnn", run, supports, order=20, note="Atlas A2/A3; from documentation only, not run on device")
