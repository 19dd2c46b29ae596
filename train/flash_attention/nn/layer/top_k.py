"""The k largest of a row, the first of equal ones first: MindSpore's own top-k leaves open which of these it takes."""

from mindspore import dtype as mstype
from mindspore import ops
from mindspore.ops import operations as P

# Primitives: a graph cannot expand the functions of these names inside a bprop.
_largest, _cumulate, _total = P.TopK(), P.CumSum(), P.ReduceSum(True)


def top_k(scores, count):
    """Boolean like ``scores`` (.., S): the ``count`` largest along the last axis, those at lower indices on ties.

    The operator only finds the smallest score that is chosen. Chosen are those above it and, from the left, as many
    equal to it as there is room for.
    """
    least = _largest(scores, count)[0][..., count - 1 :]
    above, equal = scores > least, scores == least
    room = count - _total(above.astype(mstype.int32), -1)
    return ops.logical_or(above, ops.logical_and(equal, _cumulate(equal.astype(mstype.int32), -1) <= room))
