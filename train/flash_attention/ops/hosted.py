"""An engine that computes in numpy on the host, forward and backward, as steps of a MindSpore computation on the CPU.

``hosted_engine(forward, backward)`` gives ``Engine.run``. ``ops.host`` hands numpy arrays over, in both modes,
for one memory copy a tensor.
"""

import numpy as np
from mindspore import dtype as mstype

from flash_attention.core.spec import Operands
from flash_attention.ops.autograd import DifferentiableEngine
from flash_attention.ops.host import HostFunction

_FIELDS = ("query", "key", "value") + Operands._fields
_DIFFERENTIABLE = ("query", "key", "value", "bias", "slopes", "sinks")


def hosted_engine(forward, backward):
    """:class:`~flash_attention.ops.autograd.DifferentiableEngine` from two numpy functions.

    Args:
        forward: ``forward(spec, query, key, value, operands) -> (out, lse)``; arrays, BNSD, None where absent.
        backward: ``backward(spec, (query, key, value, operands, out, lse), (d_out, d_lse)) ->`` gradients of query,
            key, value, bias, slopes and sinks, None for an absent one.
    """
    return DifferentiableEngine(lambda spec: _build(spec, forward, backward))


def _present(spec):
    """Indices into ``_FIELDS`` of the tensors that ``spec`` has; None cannot be handed over."""
    has = {
        "query": True,
        "key": True,
        "value": True,
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
    }
    return tuple(index for index, name in enumerate(_FIELDS) if has.get(name))


class _Host:
    """The numpy side of one spec."""

    def __init__(self, spec, forward, backward):
        self._spec, self._forward, self._backward = spec, forward, backward
        self._present = _present(spec)

    def _split(self, tensors):
        slots = [None] * len(_FIELDS)
        for index, tensor in zip(self._present, tensors):
            slots[index] = _from_mindspore(tensor)
        return slots[0], slots[1], slots[2], Operands(*slots[3:])

    def forward(self, *tensors):
        """numpy tensors -> (out, lse)."""
        return _to_numpy(self._forward(self._spec, *self._split(tensors)))

    def backward(self, *tensors):
        """numpy tensors, out, lse, d_out, d_lse -> gradients of the differentiable ones."""
        out, lse, d_out, d_lse = map(_from_mindspore, tensors[-4:])
        saved = self._split(tensors[:-4]) + (out, lse)
        return _to_numpy(grad for grad in self._backward(self._spec, saved, (d_out, d_lse)) if grad is not None)


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


def _build(spec, forward_pass, backward_pass):
    """``(forward, backward)`` for ``ops.autograd`` around the two host functions."""
    host = _Host(spec, forward_pass, backward_pass)
    present = _present(spec)
    places = tuple(present.index(_FIELDS.index(field)) for field in _DIFFERENTIABLE if _FIELDS.index(field) in present)
    absent = tuple(_FIELDS.index(field) not in present for field in _DIFFERENTIABLE)
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
