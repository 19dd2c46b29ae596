"""Importing this gives MindSpore's CPU what mindone's models ask of it: operators of `mint` that have no kernel there.

Each stand-in is the same function made of operators that do have one. On Ascend it changes nothing.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops


def _arange(start=0, end=None, step=1, *, dtype=None):
    bounds = (0, start, step) if end is None else (start, end, step)
    bounds = [int(x) if isinstance(x, Tensor) else x for x in bounds]
    return Tensor(np.arange(*bounds), dtype or ms.int64)


def _full(size, fill_value, *, dtype=None):
    return ops.full(tuple(size), fill_value, dtype=dtype)


def _pad(x, pad, mode="constant", value=0.0):
    return ops.pad(x, tuple(pad), mode, value)


def _embedding(self, ids):
    return ops.gather(self.weight, ids, 0)


def _cross_entropy(x, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    assert weight is None and label_smoothing == 0.0, "the language models of the tests use neither"
    kept = target != ignore_index
    x = x - x.max(-1, keepdims=True)  # ops.cross_entropy takes the logarithm of a probability, which is 0 in float16
    chosen = ops.gather_elements(x, 1, (target * kept).astype(ms.int32).expand_dims(1)).reshape((-1,))
    losses = (ops.log(ops.exp(x).sum(-1)) - chosen) * kept
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


def _cross_entropy_layer(self, x, target):
    return _cross_entropy(x, target, None, self.ignore_index, self.reduction)


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(x.ndim - len(tuple(normalized_shape)), x.ndim))
    centred = x - x.mean(axes, keep_dims=True)
    y = centred * ops.rsqrt((centred * centred).mean(axes, keep_dims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _layer_norm_layer(self, x):
    return _layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _dropout(x, p=0.5, training=True):
    return ops.dropout(x, p, training) if training and p else x


def _gelu(x, *, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1 + ops.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + ops.erf(x / 2**0.5))


def _tril(x, diagonal=0):
    return ops.tril(x, diagonal)


def _cumsum(x, dim, *, dtype=None):
    x = x.astype(ms.int32) if x.dtype in (ms.int64, ms.bool_) else x
    x = ops.cumsum(x, dim)
    return x if dtype is None else x.astype(dtype)


def _addmm(x, mat1, mat2, *, beta=1, alpha=1):
    return beta * x + alpha * ops.matmul(mat1, mat2.astype(mat1.dtype))  # float16 in a graph: mat2 is float32


def _rms_norm(x, gamma, epsilon=1e-6):
    scale = ops.rsqrt((x * x).mean(-1, keep_dims=True) + epsilon)
    return x * scale * gamma, scale


def _filled(make):
    """An in-place method: the tensor gets what ``make(shape, *arguments)`` says."""

    def method(self, *arguments, **keywords):
        self.assign_value(Tensor(make(self.shape, *arguments, **keywords), self.dtype))
        return self

    return method


def _argmax(x, dim=None, keepdim=False):
    return ops.argmax(x, dim, keepdim)


def _masked_fill_(self, mask, value):
    self.assign_value(ops.masked_fill(self.astype(ms.float32), mask, float(value)).astype(self.dtype))
    return self


def install():
    """Put the stand-ins in place."""
    Tensor.zero_ = _filled(np.zeros)
    Tensor.fill_ = _filled(np.full)
    Tensor.normal_ = _filled(lambda shape, mean=0, std=1: np.random.normal(mean, std, shape))
    Tensor.masked_fill_ = _masked_fill_
    ops.rms_norm = _rms_norm
    Tensor.clone = lambda self: self + 0
    functional = mint.nn.functional
    for name, function in (
        ("arange", _arange),
        ("full", _full),
        ("tril", _tril),
        ("cumsum", _cumsum),
        ("addmm", _addmm),
        ("argmax", _argmax),
    ):
        setattr(mint, name, function)
    for name, function in (
        ("pad", _pad), ("cross_entropy", _cross_entropy), ("layer_norm", _layer_norm), ("dropout", _dropout),
        ("gelu", _gelu),
    ):  # fmt: skip
        setattr(functional, name, function)
    mint.nn.Embedding.construct = _embedding
    mint.nn.CrossEntropyLoss.construct = _cross_entropy_layer
    mint.nn.LayerNorm.construct = _layer_norm_layer
    mint.nn.Dropout.construct = lambda self, x: _dropout(x, self.p, self.training)


def mend_bloom():
    """BLOOM's GELU calls an ``apply`` that MindSpore's Cells have not: an error of the library, on every device."""
    from mindone.transformers.models.bloom import modeling_bloom

    modeling_bloom.BloomGelu.construct = lambda self, x: modeling_bloom.bloom_gelu_forward(x)


if ms.get_context("device_target") == "CPU":
    install()
mend_bloom()
