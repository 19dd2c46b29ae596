"""Adapter: a MindSpore Cell of tensors and its gradients, as numpy, in either mode. The JAX one is `in_jax.py`."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from support.mindspore_engines import Functions

FUNCTIONS = Functions
MODES = {"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}


class mode:
    """`with mode("graph"):` compiles; "pynative" does not."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = ms.get_context("mode")
        ms.set_context(mode=MODES[self.name])

    def __exit__(self, *_):
        ms.set_context(mode=self.before)


def run(call, arrays, d_out=None, dtype="float32"):
    """`(out, gradients)` of the Cell `call` on numpy arrays (or None, or ints); float64 numpy.

    Float arrays are cast to `dtype` and have gradients, in order; `d_out=None` asks for none.
    """
    tensors = [_to(x, dtype) for x in arrays]
    if d_out is None:
        return _wide(call(*tensors)), []
    floats = [n for n, x in enumerate(tensors) if isinstance(x, Tensor) and "Float" in str(x.dtype)]
    out = call(*tensors)
    grads = _Gradient(call, tuple(floats))(*tensors, Tensor(np.asarray(d_out, np.float32)).astype(out.dtype))
    grads = (grads,) if isinstance(grads, Tensor) else grads
    for n, grad in zip(floats, grads):
        assert grad.dtype == tensors[n].dtype, "a gradient has the dtype of its input"
    return _wide(out), [_wide(grad) for grad in grads]


def run_layer(cell, arrays, d_out, dtype="float32"):
    """`(out, input gradients, {name: gradient of a parameter})` of a Cell whose inputs are all float; float64 numpy."""
    tensors = [_to(x, dtype) for x in arrays]
    names, weights = zip(*((name, x) for name, x in cell.parameters_and_names() if x.requires_grad))
    weights = ms.ParameterTuple(weights)
    out = cell(*tensors)
    step = _WeightGradient(cell, tuple(range(len(tensors))), weights)
    grads, d_weights = step(*tensors, Tensor(np.asarray(d_out, np.float32)).astype(out.dtype))
    grads = (grads,) if isinstance(grads, Tensor) else grads
    named = {name: _wide(grad) for name, grad in zip(names, d_weights)}
    return _wide(out), [_wide(grad) for grad in grads], named


def check_training(cell, x, target):
    """Four steps of Adam lower the loss."""
    step = nn.TrainOneStepCell(nn.WithLossCell(cell, nn.MSELoss()), nn.Adam(cell.trainable_params(), 1e-2))
    losses = [float(step.set_train()(x, target).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]


def check_checkpoint(cell, other, x, folder):
    """Outside training `other` gives what `cell` does, once it has loaded the checkpoint of `cell`."""
    path = str(folder / "cell.ckpt")
    ms.save_checkpoint(cell, path)
    ms.load_param_into_net(other, ms.load_checkpoint(path))
    want = cell.set_train(False)(x).asnumpy()
    np.testing.assert_allclose(other.set_train(False)(x).asnumpy(), want, atol=1e-6)


class _WeightGradient(nn.Cell):
    def __init__(self, cell, positions, weights):
        super().__init__()
        self.call, self.weights = cell, weights
        self.of = ops.grad(_Weighted(cell), positions or None, weights)

    def construct(self, *tensors):
        return self.of(*tensors)


class _Gradient(nn.Cell):
    def __init__(self, call, floats):
        super().__init__()
        self.call = call
        self.of = ops.grad(_Weighted(call), floats)

    def construct(self, *tensors):
        return self.of(*tensors)


class _Weighted(nn.Cell):
    """<out, cotangent>: its gradient is the vector-Jacobian product."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def construct(self, *tensors):
        return (self.call(*tensors[:-1]).astype(ms.float32) * tensors[-1].astype(ms.float32)).sum()


def _to(x, dtype):
    if x is None or isinstance(x, int):
        return x
    x = np.asarray(x)
    if np.issubdtype(x.dtype, np.floating):
        return Tensor(np.ascontiguousarray(x, np.float32)).astype(getattr(ms, dtype))
    return Tensor(x)


def _wide(x):
    return x.astype(ms.float32).asnumpy().astype(np.float64)
