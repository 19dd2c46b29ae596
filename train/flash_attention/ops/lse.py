"""``core.lse`` in MindSpore's operators: sums of softmax denominators by their logarithms."""

from mindspore import ops
from mindspore.ops import operations as P

_DEAD = -3e38
_select, _exp = P.Select(), P.Exp()
_zeros_like, _ones_like = P.ZerosLike(), P.OnesLike()  # a graph cannot expand the functions of these names in a bprop


def known(lse):
    """``lse`` with 0 in place of -inf, so that a difference with it is never NaN."""
    return _select(lse > _DEAD, lse, _zeros_like(lse))


def log_sum_exp(parts):
    """``(total, total with 0 for -inf)`` of a tuple of LSEs of one shape; gradient 0 where all are -inf."""
    peak = parts[0]
    for part in parts[1:]:
        peak = ops.maximum(peak, part)
    peak = ops.stop_gradient(peak)
    alive = peak > _DEAD
    peak = known(peak)
    total = _zeros_like(peak)
    for part in parts:
        total = total + _exp(part - peak)
    finite = peak + ops.log(_select(alive, total, _ones_like(total)))
    return _select(alive, finite, _zeros_like(finite) - float("inf")), finite
