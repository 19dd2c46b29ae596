"""Engine 'tik' on the CPU: kernels built by their entry function, run on the simulator, in place of ``ops.Custom``."""

from support.ascend_entry import build_by_entry

from flash_attention.ascend import host
from flash_attention.ops.host import HostFunction
from flash_attention.ops.tik import custom


class SimulatedKernel:
    """From framework arrays to framework arrays: the conversions the framework makes, around a built kernel."""

    def __init__(self, request):
        self.kernel = build_by_entry(request)
        self.inputs, self.outputs = request.signature()

    def __call__(self, *arrays):
        got = [(array.shape, str(array.dtype)) for array in arrays]
        assert got == [(custom.framework_shape(argument), argument.dtype) for argument in self.inputs]
        feed = {}
        for argument, array in zip(self.inputs, arrays):
            feed[argument.name] = array if argument.nd_shape is None else host.to_nz(array)
        results = host.run(self.kernel, feed)
        return tuple(
            array if argument.nd_shape is None else host.from_nz(array, *argument.nd_shape[-2:])
            for argument, array in zip(self.outputs, results)
        )


def simulated_operator(part, whole):
    """Stands for ``custom.custom_operator``: the same inputs, outputs and inference."""
    shapes, dtypes = custom.infer_functions(part, whole)
    return HostFunction(SimulatedKernel(part), len(part.signature()[0]), shapes, dtypes)
