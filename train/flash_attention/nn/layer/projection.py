"""The linear projection of the mechanisms, and weights by name: what a MindSpore layer and its JAX twin exchange."""

import math

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms.weights import flatten_params
from flash_attention.ops.functional import computable


class Projection(nn.Cell):
    """``x @ weight.T + bias`` computed in ``dtype`` whatever x is; parameters are float32.

    Args:
        n_in, n_out (int): sizes of the last axis.
        bias (bool): whether there is one. Default: True.
        dtype: of the computation and the output. Default: float32.
        std (float): normal weights with it and zero biases; None = uniform within ``1 / sqrt(n_in)``.
    """

    def __init__(self, n_in, n_out, bias=True, dtype=mstype.float32, std=None):
        super().__init__()
        self.n_in, self.n_out, self.dtype, self.has_bias = n_in, n_out, dtype, bias
        bound = 1.0 / math.sqrt(n_in)
        self.weight = Parameter(_drawn((n_out, n_in), bound, std), name="weight")
        self.bias = Parameter(_drawn((n_out,), bound, None if std is None else 0.0), name="bias") if bias else None
        self.product = P.MatMul(transpose_b=True)

    def construct(self, x):
        """(..., n_in) -> (..., n_out)."""
        weight = computable(self.weight.astype(self.dtype))
        out = self.product(computable(x.astype(self.dtype)).reshape((-1, self.n_in)), weight)
        if self.has_bias:
            out = out + computable(self.bias.astype(self.dtype))
        return out.reshape(x.shape[:-1] + (self.n_out,)).astype(self.dtype)


class Norm(nn.Cell):
    """LayerNorm over the last axis in float32; parameters 'weight' and 'bias', output in x's dtype."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(width, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(width, np.float32)), name="bias")
        self.norm = P.LayerNorm(-1, -1, epsilon)

    def construct(self, x):
        """Normalise."""
        return self.norm(x.astype(mstype.float32), self.weight, self.bias)[0].astype(x.dtype)


def normal(shape, std=1.0):
    """float32 Tensor of normal numbers from numpy's global generator."""
    return Tensor((std * np.random.standard_normal(shape)).astype(np.float32))


def _drawn(shape, bound, std):
    if std is None:
        return Tensor(np.random.uniform(-bound, bound, shape).astype(np.float32))
    return normal(shape, std)


def weights_of(cell):
    """``{dotted name: numpy array}`` of a Cell's trainable parameters; names and axes are those of the JAX twin.

    ``unflatten_params`` turns it into the JAX layer's ``params``.
    """
    return {name: x.asnumpy() for name, x in cell.parameters_and_names() if x.requires_grad}


def load_weights(cell, weights):
    """Set a Cell's trainable parameters.

    Args:
        cell: a mechanism's Cell.
        weights: ``{dotted name: array}``, or the nested ``params`` of the JAX layer.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    weights = flatten_params(weights)
    own = {name: x for name, x in cell.parameters_and_names() if x.requires_grad}
    if set(weights) != set(own):
        raise invalid_value("load_weights", "weights", "named {}".format(sorted(own)), sorted(weights))
    for name, parameter in own.items():
        array = np.array(weights[name], np.float32)
        if array.shape != tuple(parameter.shape):
            need = "of shape {} at '{}'".format(tuple(parameter.shape), name)
            raise invalid_value("load_weights", "weights", need, array.shape)
        parameter.set_data(Tensor(array))
