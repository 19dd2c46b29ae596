"""From a kernel's request to a MindSpore operator: registration information and ``ops.Custom`` of type 'tbe'.

Everything here is read from the kernel's own list of arguments: names, order, dtypes, formats and shapes.
"""

from mindspore import dtype as mstype
from mindspore import ops
from mindspore.ops import TBERegOp

from flash_attention.ascend.entry.flash_attention_tik import entry_function

REQUEST = "request"
"""The operator's attribute: the text of its :class:`~flash_attention.ascend.entry.request.KernelRequest`."""

_FORMATS = {"ND": "DefaultFormat", "FRACTAL_NZ": "FRACTAL_NZ"}
_registrations = {}  # operator name -> its entry function; MindSpore keeps the registration as attributes of that


def registration(request):
    """The registration information of a request's operator, as ``TBERegOp`` makes it."""
    inputs, outputs = request.signature()
    name = request.operator
    info = TBERegOp(name).fusion_type("OPAQUE").async_flag(False).binfile_name(name + ".so").compute_cost(10)
    info = info.kernel_name(name).partial_flag(True).attr(REQUEST, "required", "str", "all")
    for index, argument in enumerate(inputs):
        info = info.input(index, argument.name, False, "required", "all")
    for index, argument in enumerate(outputs):
        info = info.output(index, argument.name, False, "required", "all")
    row = [(argument.dtype, _FORMATS[argument.format]) for argument in inputs + outputs]
    return info.dtype_format(*row).get_op_info()


def framework_shape(argument):
    """The shape MindSpore gives an argument; it converts one in FRACTAL_NZ itself, and pads it with zeros."""
    return argument.shape if argument.nd_shape is None else argument.nd_shape


def infer_functions(request):
    """``(out_shape, out_dtype)`` for ``ops.Custom``: functions of the inputs' shapes and dtypes."""
    outputs = request.signature()[1]
    shapes = tuple(framework_shape(argument) for argument in outputs)
    dtypes = tuple(getattr(mstype, argument.dtype) for argument in outputs)

    def unwrapped(values):
        return values if len(values) > 1 else values[0]

    return lambda *inputs: unwrapped(shapes), lambda *inputs: unwrapped(dtypes)


def custom_operator(request):
    """The operator that runs the kernel of ``request``: framework tensors in the kernel's order in and out."""
    name = request.operator
    entry = _registrations.setdefault(name, entry_function(name))
    out_shape, out_dtype = infer_functions(request)
    operator = ops.Custom(entry, out_shape, out_dtype, func_type="tbe", reg_info=registration(request))
    operator.add_prim_attr(REQUEST, request.to_json())
    operator.add_prim_attr("primitive_target", "Ascend")
    inputs, outputs = request.signature()
    operator.init_prim_io_names(
        inputs=[argument.name for argument in inputs], outputs=[argument.name for argument in outputs]
    )
    return operator
