"""CoLT5's router in MindSpore: soft top-k by coordinate descent, and the choice of the tokens of the heavy branch."""

import functools

import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import colt5 as shared
from flash_attention.nn.layer.projection import normal
from flash_attention.nn.layer.top_k import top_k
from flash_attention.ops.functional import check_not_additive, computable, counted
from flash_attention.ops.host import is_eager
from flash_attention.ops.precision import OwnPrecision

ROUTER = "CoordinateDescentRouter"
_gather = P.GatherD()
_lowest = -3e38  # below every score, and finite: it is only compared


def coor_descent(s, n_iters, k, eps=0.1, eps_init=None, eps_decay=1.0, mask=None):
    """Soft top-k by coordinate descent (Wright, 2015; CoLT5): scores in [0, 1] whose sum tends to ``k``.

    Args:
        s (Tensor): (..., n) scores; differentiable. Computed in float32.
        n_iters (int): iterations.
        k (float): how many are wanted, > 0.
        eps (float): smallest temperature: lower = harder.
        eps_init, eps_decay (float): temperature of the first iteration (None = eps), and its factor from one to the
            next.
        mask (Tensor): (..., n), keep where True or > 0; the others give 0.

    Returns:
        Tensor (..., n), float32, non-decreasing in ``s``.
    """
    descent = _descent(s.shape, None if mask is None else mask.shape, n_iters, k, eps, eps_init, eps_decay)
    return descent(s, mask)


@constexpr
def _descent(shape, mask, n_iters, k, eps, eps_init, eps_decay):
    shared.check_descent("coor_descent", n_iters, k, eps, eps_init, eps_decay)
    shared.check_descent_shapes("coor_descent", shape, mask)
    schedule, final = shared.epsilons(n_iters, eps, eps_init, eps_decay)
    return _build(tuple(schedule), final, float(np.log(k)))


@functools.lru_cache(maxsize=64)
def _build(schedule, final, log_k):
    return _Descent(schedule, final, log_k)


class _Descent(OwnPrecision):
    """The iterations, float32."""

    def __init__(self, schedule, final, log_k):
        super().__init__()
        self.schedule, self.final, self.log_k = schedule, final, log_k
        self.peak, self.total = Tensor(-1e30, mstype.float32), Tensor(1e-30, mstype.float32)

    def construct(self, s, mask):
        s = s.astype(mstype.float32)
        kept = ops.ones_like(s) if mask is None else (mask.astype(mstype.float32) > 0).astype(mstype.float32)
        s = s * kept
        hidden = (1.0 - kept) * _lowest
        a, b = 0.0, -s
        for current in self.schedule:
            scaled = (s + b) / current
            peak = ops.stop_gradient(ops.maximum((scaled + hidden).max(-1, keepdims=True), self.peak))
            total = (ops.exp((scaled - peak) * kept) * kept).sum(-1, keepdims=True)
            total = ops.maximum(total, self.total)  # nothing is kept: whatever a is, the result is 0
            a = current * (self.log_k - peak - ops.log(total))
            b = -ops.relu(s + a)
        return ops.exp((s + a + b) * kept / self.final) * kept


class CoordinateDescentRouter(OwnPrecision):
    r"""Chooses the tokens with the largest products with a learned vector; its gates carry the gradient to that vector.

    Args:
        dim (int): width of the tokens.
        straight_through (bool): gates are exactly 1 in the forward and have the soft score's gradient in the backward
            pass; False: the soft score itself. Default: True.
        n_iters (int), eps (float), eps_decay (float), eps_init (float): of ``coor_descent``.
            Default: 20, 0.03, 0.7, 4.0.
        fetch_k_ratio (float): the soft top-k aims at ``num_tokens * fetch_k_ratio``. Default: 9 / 8.
        num_routing_tokens (int): R learned vectors, each with a choice of its own. Default: 1.

    Inputs:
        - **x** (Tensor) - (B, N, dim).
        - **num_tokens** (int) - how many are chosen, valid ones first; all, with gates of 1, where there are no more.
        - **mask** (Tensor) - (B, N), keep where True or > 0. Default: None.

    Outputs:
        Tuple of the tokens (B, R, m, dim), their indices, int32 (B, R, m), in increasing order, or None where all
        were taken, their gates, float32 (B, R, m), and the mask at them, bool (B, R, m), or None.
    """

    def __init__(
        self, dim, straight_through=True, n_iters=20, fetch_k_ratio=9 / 8, eps=0.03, eps_decay=0.7, eps_init=4.0,
        num_routing_tokens=1
    ):  # fmt: skip
        super().__init__(auto_prefix=True)
        shared.check_router(
            ROUTER, dim, straight_through, n_iters, fetch_k_ratio, eps, eps_decay, eps_init, num_routing_tokens
        )
        self.dim, self.straight_through, self.sets = dim, straight_through, num_routing_tokens
        self.ratio, self.descent = fetch_k_ratio, (n_iters, eps, eps_init, eps_decay)
        self.weight = Parameter(normal((num_routing_tokens, dim)), name="weight")
        self.product = P.MatMul(transpose_b=True)

    def construct(self, x, num_tokens, mask=None):
        """Choose; shapes and meaning of the inputs are in the class's documentation."""
        _check(x.shape, None if mask is None else mask.shape, self.dim, num_tokens)
        batch, length = x.shape[0], x.shape[1]
        x = computable(x)
        if mask is not None:
            if is_eager():
                check_not_additive(ROUTER, mask)
            kept = ops.expand_dims((mask.astype(mstype.float32) > 0).astype(mstype.float32), 1)
            mask = ops.tile(kept, (1, self.sets, 1))
        if length <= num_tokens:
            tokens = ops.tile(ops.expand_dims(x, 1), (1, self.sets, 1, 1))
            gates = ops.ones((batch, self.sets, length), mstype.float32)
            return tokens, None, gates, None if mask is None else mask > 0
        scores = self.product(x.astype(mstype.float32).reshape((-1, self.dim)), self.weight)
        scores = scores.reshape((batch, length, self.sets)).swapaxes(1, 2)
        n_iters, eps, eps_init, eps_decay = self.descent
        aim = num_tokens * self.ratio if num_tokens * self.ratio < length else length
        soft = coor_descent(scores, n_iters, aim, eps, eps_init, eps_decay, mask)
        ranked = ops.stop_gradient(scores)
        if mask is not None:
            ranked = ops.where(mask > 0, ranked, ops.full_like(ranked, _lowest))
        indices = _largest(ranked, num_tokens)
        gates = _gather(soft, 2, indices)
        if self.straight_through:
            gates = 1.0 + (gates - ops.stop_gradient(gates))
        if mask is not None:
            mask = _gather(mask, 2, indices)
            gates = gates * mask
            mask = mask > 0
        tokens = take_rows(x, indices.reshape((batch, -1))).reshape((batch, self.sets, num_tokens, self.dim))
        return tokens, indices, gates, mask


def _largest(scores, count):
    """Indices of the ``count`` largest along the last axis, lower ones of equals; int32, in increasing order."""
    length = scores.shape[-1]
    first = top_k(scores, count).astype(mstype.float32) * _places(length)
    return length - ops.topk(first, count)[0].astype(mstype.int32)


def take_rows(x, indices):
    """``x[b, indices[b]]`` of (B, N, E) and (B, m)."""
    spread = ops.tile(ops.expand_dims(indices, -1), (1, 1, x.shape[2]))
    return _gather(x, 1, spread)


def put_back(rows, indices, fallback, length):
    """(B, m, E) rows at their ``indices`` (B, m) of ``length`` tokens, the row ``fallback`` (E,) everywhere else.

    A gather by the inverse index: where nothing was routed it points to one more row, the fallback.
    """
    if indices is None:
        return rows
    count = rows.shape[1]
    order = ops.zeros_like(indices) + counted(count)
    nowhere = ops.zeros((rows.shape[0], length), mstype.int32) + count
    inverse = ops.tensor_scatter_elements(nowhere, indices, order, 1)
    last = ops.zeros_like(rows[:, :1]) + fallback.astype(rows.dtype)
    return take_rows(ops.concat((rows, last), 1), inverse)


@constexpr
def _places(length):
    """``length - index``: distinct and above 0, so that the largest are the first."""
    return Tensor((length - np.arange(length)).astype(np.float32))


@constexpr
def _check(x, mask, dim, num_tokens):
    shared.check_sizes(ROUTER, {"num_tokens": num_tokens})
    shared.check_inputs(ROUTER, x, mask, dim)
