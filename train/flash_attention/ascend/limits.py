"""What the Ascend 910 kernels take: one ``supports`` for the device and for the simulator."""

from flash_attention.ascend.backward_arguments import backward_signature
from flash_attention.ascend.geometry import SCALE_RANGE, Geometry
from flash_attention.ascend.signature import forward_signature
from flash_attention.ascend.tiles import candidate_tiles
from flash_attention.core.errors import Reason

HEAD_DIM_LIMIT = 256
ELEMENT_LIMIT = 2**31
"""Addresses are computed in int32 on the core."""
LENGTH_LIMIT = 2**21
"""Positions times ``masks.UNIT`` stay exact in fp32."""

_REMEDY = "Use engine='portable', or leave the choice to 'auto'."
_ABSENT = (
    ("segments", "q_segment_ids"),
    ("q_lengths", "query_seq_lengths"),
    ("kv_lengths", "key_value_seq_lengths"),
    ("sinks", "sinks"),
    ("dynamic_offset", "q_offset"),
)


def supports(spec):
    """None when the kernels take ``spec``, else the :class:`~flash_attention.core.errors.Reason`."""
    if spec.dtype != "float16":
        return Reason("dtype", spec.dtype, "float16", "Cast the inputs to float16, or use engine='portable'.")
    if spec.head_dim > HEAD_DIM_LIMIT:
        return Reason("head_dim", spec.head_dim, "at most {}".format(HEAD_DIM_LIMIT), _REMEDY)
    for field, argument in _ABSENT:
        if getattr(spec, field):
            need = "an int" if field == "dynamic_offset" else "None"
            return Reason(argument, "a tensor", need, _REMEDY)
    if not SCALE_RANGE[0] <= abs(spec.scale) <= SCALE_RANGE[1]:
        need = "of a magnitude between {} and {}".format(*SCALE_RANGE)
        return Reason("scale", spec.scale, need, _REMEDY)
    if spec.soft_cap is not None:
        return Reason("logits_soft_cap", spec.soft_cap, "None", _REMEDY)
    if min(spec.batch, spec.q_len, spec.kv_len) < 0:
        return Reason("query", "a dynamic shape", "of static shape", _REMEDY)
    return _sizes(spec)


def _sizes(spec):
    longest = max(spec.q_len, spec.kv_len, abs(spec.offset) + spec.q_len)
    if longest > LENGTH_LIMIT:
        return Reason("q_len and kv_len", longest, "at most {} tokens".format(LENGTH_LIMIT), _REMEDY)
    for argument in _possible_arguments(spec):
        elements = 1
        for size in argument.shape:
            elements *= size
        if elements >= ELEMENT_LIMIT:
            need = "of fewer than {} elements as the kernel takes it".format(ELEMENT_LIMIT)
            return Reason(argument.name, "{} elements".format(elements), need, _REMEDY)
    return None


def _possible_arguments(spec):
    """The arguments of both kernels, at every tile that they may get."""
    found = []
    for tiles in candidate_tiles(spec, "forward"):
        inputs, outputs = forward_signature(Geometry(spec, tiles), 1, True)
        found += inputs + outputs
    for tiles in candidate_tiles(spec, "backward"):
        inputs, outputs = backward_signature(Geometry(spec, tiles), 1)
        found += inputs + outputs
    return found
