"""Language-model head and cross-entropy in MindSpore, a chunk of tokens at a time; fused, no logits exist as a whole.

A graph asks a ``constexpr`` for the Cell of its chunk size; it has a gradient of its own, which forms a chunk's logits
again and adds up the head's gradient chunk by chunk. PyNative does the same.
"""

import functools

from mindspore import Tensor, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import blockwise as shared
from flash_attention.core.validation import check_bool, check_int
from flash_attention.nn.layer.blockwise import over_chunks
from flash_attention.nn.layer.projection import Projection
from flash_attention.ops.functional import computable
from flash_attention.ops.precision import OwnPrecision

HEAD = "Blockwise_LM_Head"
_depend = P.Depend()
_exp, _log = P.Exp(), P.Log()
_sum = P.ReduceSum(True)
_add_up = P.ReduceSum()
_gather = P.GatherD()
_arg_max = P.ArgMaxWithValue(-1, True)
_matmul, _matmul_nt, _matmul_tn = P.MatMul(), P.MatMul(transpose_b=True), P.MatMul(transpose_a=True)
_join = P.Concat(0)
_cast = P.Cast()
_slice = P.Slice()
_one_hot = P.OneHot()
_zeros_like = P.ZerosLike()


class Blockwise_LM_Head(Projection):  # noqa: N801  (its published name)
    r"""The projection to the vocabulary, ``chunk_size`` tokens at a time.

    Args:
        vocab_size (int): V.
        chunk_size (int): tokens of a chunk; None = all at once.
        policy (str): 'nothing_saveable' computes a chunk again in the backward pass, in graph mode; None and the other
            ``jax.checkpoint_policies`` keep what it needs. Default: 'nothing_saveable'.
        dtype: of the product and the logits; parameters are float32. Default: float32.
        prevent_cse (bool): JAX's; recomputed operators are always kept apart here. Default: False.
        return_probs (bool): keyword only; give the softmax of the logits instead. Default: False.
        hidden_size (int): keyword only; E. Must be given: a Cell's parameters exist before its first call.

    Inputs:
        - **hidden_states** (Tensor) - (B, N, E).

    Outputs:
        Tensor (B, N, V) in ``dtype``.

    Raises:
        KeyError: an unknown policy.
        ValueError, TypeError: bad argument.
    """

    def __init__(
        self, vocab_size, chunk_size, policy="nothing_saveable", dtype=mstype.float32, prevent_cse=False, *,
        return_probs=False, hidden_size=None
    ):  # fmt: skip
        check_int(HEAD, "vocab_size", vocab_size, 1)
        check_int(HEAD, "hidden_size", hidden_size, 1)
        shared.check_policy(HEAD, policy, prevent_cse)
        shared.check_chunk(HEAD, "chunk_size", chunk_size, 1)
        check_bool(HEAD, "return_probs", return_probs)
        super().__init__(hidden_size, vocab_size, dtype=dtype, std=hidden_size**-0.5)
        self.chunk_size, self.return_probs = chunk_size, return_probs
        if shared.recomputes(policy):
            self.recompute()

    def construct(self, hidden_states):
        """Project; shapes and meaning of the inputs are in the class's documentation."""
        size = _head_chunk(hidden_states.shape, self.n_in, self.chunk_size)
        return over_chunks(self.project, hidden_states, size)

    def project(self, chunk):
        """Logits, or probabilities, of one chunk."""
        logits = super().construct(chunk)
        if self.return_probs:
            return ops.softmax(logits.astype(mstype.float32), -1).astype(logits.dtype)
        return logits

    def loss(self, hidden_states, tokens, valid=None, reduction="token_mean"):
        """``(loss, accuracy)`` of the logits, which are never formed: see ``blockwise_fused_cross_entropy``."""
        return blockwise_fused_cross_entropy(
            hidden_states.astype(self.dtype), self.weight.astype(self.dtype), tokens, valid,
            bias=self.bias.astype(self.dtype), chunk_size=self.chunk_size, reduction=reduction,
        )  # fmt: skip


def blockwise_cross_entropy(
    logits, tokens, valid=None, chunk_size=None, policy=None, prevent_cse=None, *, reduction="token_mean"
):
    """Mean cross-entropy and accuracy over the valid tokens, computed in float32.

    Args:
        logits (Tensor): (B, N, V), any float dtype; differentiable.
        tokens (Tensor): (B, N) integers in [0, V); ignored where ``valid`` is not > 0.
        valid (Tensor): (B, N), > 0 counts; None = all.
        chunk_size (int): tokens of a chunk, counted over B * N; None = all at once.
        policy (str), prevent_cse (bool): as in the JAX function; the backward pass needs the logits alone, whatever
            they say.
        reduction (str): 'token_mean': over all valid tokens, whatever the chunks; 'chunk_mean': within each chunk, then
            over the chunks with equal weight, as published.

    Returns:
        ``(loss, accuracy)``, float32 scalars; 0 where nothing is valid. The accuracy has no gradient.

    Raises:
        KeyError: an unknown policy.
        ValueError, TypeError: shapes that do not fit, tokens that are not integers.
    """
    layer = "blockwise_cross_entropy"
    valid_shape = None if valid is None else valid.shape
    _check(layer, logits.shape, tokens.shape, tokens.dtype, valid_shape, chunk_size, reduction, policy, prevent_cse)
    cell = _plain(chunk_size)
    labels, weights = _labelled(tokens, valid, chunk_size, reduction)
    return cell(computable(logits).reshape((-1, logits.shape[-1])), labels, weights)


def blockwise_fused_cross_entropy(
    hidden_states, weight, tokens, valid=None, *, bias=None, chunk_size=1024, policy="nothing_saveable",
    prevent_cse=None, reduction="token_mean"
):  # fmt: skip
    """``blockwise_cross_entropy`` of ``hidden_states @ weight.T + bias`` without ever forming those logits.

    A chunk's logits are formed, reduced and forgotten; the backward pass forms them again, whatever the policy.

    Args:
        hidden_states (Tensor): (B, N, E); differentiable.
        weight (Tensor): (V, E), the head's; bias (Tensor): (V,) or None; both differentiable.
        tokens, valid, chunk_size, policy, prevent_cse, reduction: as in ``blockwise_cross_entropy``. Memory is
            ``chunk_size * V``, with chunk_size=None ``B * N * V``.

    Returns:
        ``(loss, accuracy)``, float32 scalars.
    """
    layer = "blockwise_fused_cross_entropy"
    valid_shape = None if valid is None else valid.shape
    _check_head(layer, hidden_states.shape, weight.shape, None if bias is None else bias.shape)
    _check(
        layer, hidden_states.shape, tokens.shape, tokens.dtype, valid_shape, chunk_size, reduction, policy, prevent_cse
    )  # fmt: skip
    cell = _fused(chunk_size)
    labels, weights = _labelled(tokens, valid, chunk_size, reduction)
    flat = computable(hidden_states).reshape((-1, hidden_states.shape[-1]))
    if bias is None:
        bias = ops.zeros((weight.shape[0],), weight.dtype)
    return cell(flat, computable(weight.astype(hidden_states.dtype)), computable(bias), labels, weights)


def _labelled(tokens, valid, chunk_size, reduction):
    """``(labels (T,) int32, weights (T,) float32)``: 1 / count of what the token is averaged over, 0 where invalid."""
    labels = tokens.reshape((-1,)).astype(mstype.int32)
    if valid is None:
        counted = ops.ones(labels.shape, mstype.float32)
    else:
        counted = (valid.astype(mstype.float32) > 0).astype(mstype.float32).reshape((-1,))
    labels = labels * counted.astype(mstype.int32)
    if reduction == "token_mean":
        return labels, counted / ops.maximum(counted.sum(), Tensor(1.0, mstype.float32))
    weights, total = (), labels.shape[0]
    size = total if chunk_size is None else chunk_size
    for start in range(0, total, size):
        part = counted[start : min(start + size, total)]
        weights = weights + (part / ops.maximum(part.sum(), Tensor(1.0, mstype.float32)),)
    return labels, ops.concat(weights, 0) / len(weights)


class _Losses(OwnPrecision):
    """``(logits (T, V), labels (T,), weights (T,)) -> (loss, accuracy)``: weighted sums, chunk by chunk."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def construct(self, logits, labels, weights):
        loss, right = 0.0, 0.0
        for start, count in _extents(logits.shape[0], self.size):
            chunk = _cast(_rows(logits, start, count), mstype.float32)
            if start > 0:
                chunk = _depend(chunk, loss)
            part = _token_losses(chunk, labels[start : start + count], weights[start : start + count])
            loss, right = loss + part[0], right + part[1]
        return loss, right

    def bprop(self, logits, labels, weights, out, d_out):
        grads = ()
        for start, count in _extents(logits.shape[0], self.size):
            chunk = _cast(_rows(logits, start, count), mstype.float32)
            grad = _d_logits(chunk, labels[start : start + count], weights[start : start + count], d_out[0])
            grads = grads + (_cast(grad, logits.dtype),)
        return (grads[0] if len(grads) == 1 else _join(grads)), _zeros_like(labels), _zeros_like(weights)


class _FusedLosses(OwnPrecision):
    """``(hidden (T, E), weight (V, E), bias (V,), labels, weights) -> (loss, accuracy)``."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def construct(self, hidden, weight, bias, labels, weights):
        loss, right = 0.0, 0.0
        for start, count in _extents(hidden.shape[0], self.size):
            chunk = _rows(hidden, start, count)
            if start > 0:
                chunk = _depend(chunk, loss)  # else a graph runs breadth first and holds all chunks at once
            part = _token_losses(_logits(chunk, weight, bias), labels[start : start + count],
                                 weights[start : start + count])  # fmt: skip
            loss, right = loss + part[0], right + part[1]
        return loss, right

    def bprop(self, hidden, weight, bias, labels, weights, out, d_out):
        hidden = _depend(hidden, d_out[0])  # else a graph would keep the logits of the forward pass
        d_hidden, d_weight, d_bias = (), 0.0, 0.0
        for start, count in _extents(hidden.shape[0], self.size):
            chunk = _rows(hidden, start, count)
            if start > 0:
                chunk = _depend(chunk, d_weight)
            grad = _d_logits(_logits(chunk, weight, bias), labels[start : start + count],
                             weights[start : start + count], d_out[0])  # fmt: skip
            narrow = _cast(grad, weight.dtype)
            d_hidden = d_hidden + (_matmul(narrow, weight),)
            d_weight = d_weight + _cast(_matmul_tn(narrow, chunk), mstype.float32)
            d_bias = d_bias + _add_up(grad, 0)
        d_hidden = d_hidden[0] if len(d_hidden) == 1 else _join(d_hidden)
        return (
            _cast(d_hidden, hidden.dtype), _cast(d_weight, weight.dtype), _cast(d_bias, bias.dtype),
            _zeros_like(labels), _zeros_like(weights),
        )  # fmt: skip


def _rows(x, start, count):
    return _slice(x, (start, 0), (count, -1))


def _logits(hidden, weight, bias):
    return _cast(_matmul_nt(hidden, weight), mstype.float32) + _cast(bias, mstype.float32)


def _token_losses(logits, labels, weights):
    """Weighted sums of the negative log-likelihood and of the right guesses."""
    guess, peak = _arg_max(logits)
    total = _log(_sum(_exp(logits - peak), -1)) + peak
    nll = total - _gather(logits, 1, labels.reshape((-1, 1)))
    right = _cast(guess.reshape((-1,)) == labels, mstype.float32)
    return (nll.reshape((-1,)) * weights).sum(), (right * weights).sum()


def _d_logits(logits, labels, weights, d_loss):
    """``(softmax - one hot) * weight * d_loss``, float32."""
    _, peak = _arg_max(logits)
    raised = _exp(logits - peak)
    hot = _one_hot(labels, logits.shape[1], Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32))
    return (raised / _sum(raised, -1) - hot) * (weights * d_loss).reshape((-1, 1))


@constexpr
def _extents(length, size):
    size = length if size is None else size
    return tuple((start, min(size, length - start)) for start in range(0, length, size))


@constexpr
@functools.lru_cache(maxsize=16)
def _plain(size):
    return _Losses(size)


@constexpr
@functools.lru_cache(maxsize=16)
def _fused(size):
    return _FusedLosses(size)


@constexpr
def _check(layer, logits, tokens, dtype, valid, chunk_size, reduction, policy, prevent_cse):
    shared.check_policy(layer, policy, False if prevent_cse is None else prevent_cse)
    shared.check_integers(layer, str(dtype).lower())
    shared.check_loss(layer, logits, tokens, valid, chunk_size, reduction)


@constexpr
def _check_head(layer, hidden, weight, bias):
    shared.check_head(layer, hidden, weight, bias)


@constexpr
def _head_chunk(shape, width, size):
    shared.check_hidden(HEAD, shape, width)
    return shared.check_chunk(HEAD, "chunk_size", size, shape[1])
