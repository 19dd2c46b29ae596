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


def infer_functions(part, whole):
    """``(out_shape, out_dtype)`` for ``ops.Custom``: functions of the inputs' shapes and dtypes.

    Args:
        part: request of one device's kernel. whole: of the call before it is split; MindSpore asks for both.
    """
    query = framework_shape(part.signature()[0][0])
    part_shapes, whole_shapes = (
        tuple(framework_shape(argument) for argument in request.signature()[1]) for request in (part, whole)
    )
    dtypes = tuple(getattr(mstype, argument.dtype) for argument in part.signature()[1])

    def out_shape(*inputs):
        return part_shapes if tuple(inputs[0]) == query else whole_shapes

    return out_shape, lambda *inputs: dtypes


def custom_operator(part, whole):
    """The operator that runs the kernel of request ``part``: framework tensors in the kernel's order in and out.

    Args:
        part, whole: as for :func:`infer_functions`.
    """
    name = part.operator
    entry = _registrations.setdefault(name, entry_function(name))
    out_shape, out_dtype = infer_functions(part, whole)
    operator = ops.Custom(entry, out_shape, out_dtype, func_type="tbe", reg_info=registration(part))
    operator.add_prim_attr(REQUEST, part.to_json())
    operator.add_prim_attr("primitive_target", "Ascend")
    inputs, outputs = part.signature()
    operator.init_prim_io_names(
        inputs=[argument.name for argument in inputs], outputs=[argument.name for argument in outputs]
    )
    return operator
