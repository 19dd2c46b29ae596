"""A numpy function as a step of a MindSpore computation on the CPU, in both modes.

Compiled graphs call it through ``ops.Custom(func_type="pyfunc")``. PyNative calls it directly: there, a second graph of
the same operator (recompute, another batch size) fails inside MindSpore.
"""

import inspect

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import PrimitiveWithInfer, constexpr


class HostFunction(nn.Cell):
    """``cell(*tensors) -> tensor or tuple``, computed by ``function`` on numpy arrays. Has no gradient of its own.

    bfloat16 inputs arrive in MindSpore's or ml_dtypes' bfloat16; outputs must be of a dtype that numpy has.

    Args:
        function: numpy arrays in (scalars may come as Python ints), array or tuple of arrays out.
        count: number of inputs.
        shapes, dtypes: the outputs' shapes and dtypes from the inputs', as ``ops.Custom`` wants them.
    """

    def __init__(self, function, count, shapes, dtypes):
        super().__init__(auto_prefix=False)
        self.eager = constexpr(_on_tensors(function), check=False)  # hides the Python inside from the graph's parser
        self.custom = ops.Custom(_with_arity(function, count), shapes, dtypes, func_type="pyfunc")

    def construct(self, *tensors):
        """The outputs of ``function``."""
        if is_eager():
            return self.eager(*tensors)
        return self.custom(*tensors)


def _on_tensors(function):
    """``function`` from and to Tensors, without ``ops.Custom``."""

    def eager(*tensors):
        outputs = function(*[_to_numpy(tensor) for tensor in tensors])
        if isinstance(outputs, tuple):
            return tuple(Tensor(output) for output in outputs)
        return Tensor(outputs)

    return eager


class _IsEager(PrimitiveWithInfer):
    """``is_eager()``: a constant, False while a graph is compiled and True in PyNative mode."""

    def __init__(self):
        super().__init__("IsEager")
        self.set_const_prim(True)
        self.add_prim_attr("constexpr_prim", True)

    def __infer__(self, *args):
        return {"dtype": None, "shape": None, "value": False}

    def __call__(self, *args):
        return True


is_eager = _IsEager()


def _to_numpy(tensor):
    if tensor.dtype != mstype.bfloat16:
        return tensor.asnumpy()
    import ml_dtypes  # comes with JAX, the only host function that takes bfloat16

    return tensor.astype(mstype.float32).asnumpy().astype(ml_dtypes.bfloat16)


def _with_arity(function, count):
    """``function`` with a signature of ``count`` inputs: ``ops.Custom`` reads the number of inputs from it."""

    def call(*arrays):
        return function(*arrays)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature([inspect.Parameter("x{}".format(n), kind) for n in range(count)])
    return call


for _dtype in (np.float16, np.float32, np.float64):
    np.finfo(_dtype)  # numpy keeps it; MindSpore's threads flush denormals, and numpy would warn of that there
