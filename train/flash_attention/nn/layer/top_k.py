"""The k largest of a row, the first of equal ones first: MindSpore's own top-k leaves open which of these it takes."""

from mindspore import dtype as mstype
from mindspore import ops
from mindspore.ops import operations as P

_cumulate = P.CumSum()  # a primitive: a graph cannot expand ops.cumsum inside a bprop


def top_k(scores, count):
    """Boolean like ``scores`` (.., S): the ``count`` largest along the last axis, those at lower indices on ties.

    The operator only finds the smallest score that is chosen. Chosen are those above it and, from the left, as many
    equal to it as there is room for.
    """
    least = ops.topk(scores, count)[0][..., count - 1 :]
    above, equal = scores > least, scores == least
    room = count - above.astype(mstype.int32).sum(-1, keepdims=True)
    return ops.logical_or(above, ops.logical_and(equal, _cumulate(equal.astype(mstype.int32), -1) <= room))
