"""Entry of the portable engine: what it supports, and the two passes of a spec."""

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.ops.autograd import DifferentiableEngine
from flash_attention.ops.portable.backward import Backward
from flash_attention.ops.portable.forward import Forward
from flash_attention.ops.portable.geometry import make_rows
from flash_attention.ops.portable.scores import Constants


def supports(spec):
    """None, or the :class:`Reason` why this engine refuses ``spec``."""
    if spec.dtype == "float64":
        return Reason("dtype", spec.dtype, "float16, bfloat16 or float32", "Cast the inputs to float32.")
    if spec.q_len < 0 or spec.kv_len < 0:
        need = "known when the graph is compiled"
        return Reason("sequence length", "a dynamic one", need, "Only the batch may be dynamic; pad the sequences.")
    if spec.compact_mask and spec.dynamic_offset:
        return Reason("q_offset", "a tensor", "an int or None with a compact mask", "Give the full mask instead.")
    return None


def build(spec):
    """``(forward, backward)`` Cells of ``spec``; they share the constants."""
    constants, rows = Constants(spec), make_rows(spec)
    return Forward(spec, constants, rows), Backward(spec, constants, rows)


run = DifferentiableEngine(build)

ENGINE = Engine("portable", run, supports, order=100, note="CPU: tested; GPU: same code, not run")
