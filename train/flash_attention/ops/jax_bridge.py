"""Engine 'jax': the JAX twin's blockwise engine inside a MindSpore graph on the CPU.

The one file where MindSpore and JAX meet. ``ops.host`` hands numpy arrays over, forward and backward, in PyNative and
graph mode; it costs one memory copy a tensor. JAX is imported when the engine is first used.
"""

import importlib.util
import sys

import mindspore as ms
import numpy as np
from mindspore import dtype as mstype

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.core.spec import Operands
from flash_attention.ops.autograd import DifferentiableEngine
from flash_attention.ops.host import HostFunction

_REMEDY = "Use engine='portable'."
_FIELDS = ("query", "key", "value") + Operands._fields
_DIFFERENTIABLE = ("query", "key", "value", "bias", "slopes", "sinks")


def supports(spec):
    """None where JAX can serve ``spec`` on this computer, else the :class:`Reason`."""
    if sys.version_info < (3, 10):
        return Reason("engine", "Python {}.{}".format(*sys.version_info[:2]), "used with Python >= 3.10", _REMEDY)
    if importlib.util.find_spec("jax") is None:
        return Reason("engine", "no Python package 'jax'", "used where JAX is installed", _REMEDY)
    if ms.get_context("device_target") != "CPU":
        return Reason("engine", ms.get_context("device_target"), "used on the CPU", _REMEDY)
    if spec.batch < 0:
        return Reason("batch", "a dynamic size", "known when the graph is compiled", _REMEDY)
    from flash_attention.jax.engines import xla

    reason = xla.supports(spec)
    return reason and Reason(reason.argument, reason.value, reason.need, "Cast the inputs to float32.")


def _present(spec):
    """Indices into ``_FIELDS`` of the tensors that ``spec`` has; None cannot be handed over."""
    has = {
        "bias": spec.bias_shape is not None,
        "mask": spec.mask_shape is not None,
        "slopes": spec.alibi_shape is not None,
        "sinks": spec.sinks,
        "q_segment_ids": spec.segments,
        "kv_segment_ids": spec.segments,
        "q_lengths": spec.q_lengths,
        "kv_lengths": spec.kv_lengths,
        "q_offset": spec.dynamic_offset,
        "dropout_seed": spec.dropout_rate > 0,
        "origin": False,  # a call from MindSpore is a whole one
    }
    return tuple(index for index, name in enumerate(_FIELDS) if has.get(name, True))


class _Host:
    """The numpy side: forward and backward of one spec. JAX compiles each at its first call."""

    def __init__(self, spec):
        self._spec = spec
        self._present = _present(spec)

    def _split(self, tensors):
        slots = [None] * len(_FIELDS)
        for index, tensor in zip(self._present, tensors):
            slots[index] = _from_mindspore(tensor)
        return slots[0], slots[1], slots[2], Operands(*slots[3:])

    def forward(self, *tensors):
        """numpy tensors -> (out, lse)."""
        from flash_attention.jax.engines import xla

        return _to_numpy(xla.forward_pass(self._spec, *self._split(tensors)))

    def backward(self, *tensors):
        """numpy tensors, out, lse, d_out, d_lse -> gradients of the differentiable ones."""
        from flash_attention.jax.engines import xla

        out, lse, d_out, d_lse = map(_from_mindspore, tensors[-4:])
        saved = self._split(tensors[:-4]) + (out, lse)
        return _to_numpy(grad for grad in xla.backward_pass(self._spec, saved, (d_out, d_lse)) if grad is not None)


def _from_mindspore(array):
    """MindSpore hands scalars over as Python ints, and bfloat16 in a dtype of its own with the bits of JAX's."""
    if not isinstance(array, np.ndarray):
        return np.uint32(array) if array >= 2**31 else np.int32(array)
    if str(array.dtype) == "bfloat16":
        import ml_dtypes

        return array.view(np.uint16).view(ml_dtypes.bfloat16)
    return array


def _to_numpy(arrays):
    """C-contiguous numpy arrays; bfloat16 leaves as float32, because a pyfunc cannot return it."""
    arrays = [np.asarray(array) for array in arrays]
    return tuple(
        np.ascontiguousarray(array, np.float32 if str(array.dtype) == "bfloat16" else array.dtype) for array in arrays
    )


def _build(spec):
    """``(forward, backward)`` for ``ops.autograd`` around the two host functions."""
    host = _Host(spec)
    present = _present(spec)
    places = tuple(present.index(_FIELDS.index(name)) for name in _DIFFERENTIABLE if _FIELDS.index(name) in present)
    absent = tuple(_FIELDS.index(name) not in present for name in _DIFFERENTIABLE)
    call_forward = HostFunction(host.forward, len(present), _forward_shapes, _forward_dtypes)
    call_backward = HostFunction(
        host.backward,
        len(present) + 4,
        lambda *shapes: tuple(shapes[place] for place in places),
        lambda *dtypes: tuple(_hosted(dtypes[place]) for place in places),
    )

    def forward(*tensors):
        inputs = ()
        for index in present:
            inputs = inputs + (tensors[index],)
        out, lse = call_forward(*inputs)
        return out.astype(tensors[0].dtype), lse

    def backward(*tensors):
        inputs = ()
        for index in present:
            inputs = inputs + (tensors[index],)
        grads = call_backward(*inputs, tensors[-4], tensors[-3], tensors[-2], tensors[-1])
        results = ()
        taken = 0
        for position in range(6):
            if absent[position]:
                results = results + (None,)
            else:
                results = results + (grads[taken].astype(inputs[places[taken]].dtype),)
                taken = taken + 1
        return results

    return forward, backward


def _hosted(dtype):
    """What the host returns for a tensor of ``dtype``; inference names it BFloat16 or Tensor[BFloat16] by mode."""
    return mstype.float32 if "bfloat16" in str(dtype).lower() else dtype


def _forward_shapes(query, *rest):
    del rest
    return query, query[:-1]


def _forward_dtypes(query, *rest):
    del rest
    return _hosted(query), mstype.float32


ENGINE = Engine(
    "jax", DifferentiableEngine(_build), supports, order=30, note="the JAX twin's engine on the CPU, through ops.Custom"
)
