"""KernelRequest: all that a compile process needs to build one kernel, as an operator's name and a string attribute.

The two kernels have arguments that are only there when the spec needs them. An operator's name therefore lists these,
``flash_attention_forward__mask__bounds``: each operator has a fixed list of required arguments, in the kernel's order.
"""

import json
from dataclasses import asdict, dataclass, fields

from flash_attention.ascend.backward import build_backward
from flash_attention.ascend.backward_arguments import backward_constants, backward_signature
from flash_attention.ascend.chips import ASCEND_910A
from flash_attention.ascend.forward import build_forward
from flash_attention.ascend.geometry import Geometry, KernelTiles
from flash_attention.ascend.host import forward_constants
from flash_attention.ascend.preprocess import build_preprocess
from flash_attention.ascend.preprocess_arguments import preprocess_constants, preprocess_signature
from flash_attention.ascend.signature import forward_signature
from flash_attention.ascend.tiles import choose_tiles
from flash_attention.core.spec import AttentionSpec

FORWARD, INFERENCE, BACKWARD = "flash_attention_forward", "flash_attention_inference", "flash_attention_backward"
PREPROCESS = "flash_attention_preprocess"
KINDS = (FORWARD, INFERENCE, PREPROCESS, BACKWARD)
"""Training's forward kernel also writes the log-sum-exp; inference's does not. The backward kernel runs after the one
that prepares it, at the same tiles."""

# Arguments of every kernel of a kind; the others are named in the operator's name.
_ALWAYS = frozenset([
    "query", "key", "value", "tasks", "cores", "output", "lse",
    "d_out", "query_columns", "key_columns", "factors", "key_tasks", "tiles", "d_query", "d_key", "d_value",
])  # fmt: skip


@dataclass(frozen=True)
class KernelRequest:
    """One kernel to be built.

    Attributes:
        kind: one of :data:`KINDS`.
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`; its spec is one that ``limits.supports`` takes.
        cores: AI cores to run on: rows of the argument 'cores'.
    """

    kind: str
    geometry: Geometry
    cores: int

    @classmethod
    def of(cls, kind, spec, chip=ASCEND_910A, term_gradients=True):
        """The request for ``spec`` at the tiles that the kernel of this kind takes on ``chip``.

        ``term_gradients=False`` leaves out a backward kernel's gradients of bias and slopes.
        """
        direction = "backward" if kind in (PREPROCESS, BACKWARD) else "forward"
        return cls(kind, Geometry(spec, choose_tiles(spec, direction, chip), term_gradients), chip.cores)

    @classmethod
    def from_json(cls, text):
        """The request that :meth:`to_json` wrote."""
        content = json.loads(text)
        spec = {name: tuple(value) if isinstance(value, list) else value for name, value in content["spec"].items()}
        geometry = Geometry(AttentionSpec(**spec), KernelTiles(**content["tiles"]), content["term_gradients"])
        return cls(content["kind"], geometry, content["cores"])

    def to_json(self):
        """One line of JSON, the same for equal requests; fields of the spec at their defaults are left out."""
        spec = {
            field.name: getattr(self.geometry.spec, field.name)
            for field in fields(AttentionSpec)
            if getattr(self.geometry.spec, field.name) != field.default
        }
        content = {"kind": self.kind, "spec": spec, "tiles": asdict(self.geometry.tiles), "cores": self.cores}
        content["term_gradients"] = self.geometry.term_gradients
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def signature(self):
        """(inputs, outputs): lists of :class:`~flash_attention.ascend.program.GmTensor`."""
        if self.kind == BACKWARD:
            return backward_signature(self.geometry, self.cores)
        if self.kind == PREPROCESS:
            return preprocess_signature(self.geometry, self.cores)
        return forward_signature(self.geometry, self.cores, self.kind == FORWARD)

    def constants(self):
        """The inputs that depend on no tensor, arrays by name: tables, bounds, the key's extra columns."""
        make = {BACKWARD: backward_constants, PREPROCESS: preprocess_constants}.get(self.kind, forward_constants)
        return make(self.geometry, self.cores)

    @property
    def operator(self):
        """The kind and the arguments, of those not always there, that this kernel has."""
        if self.kind == PREPROCESS:
            return self.kind
        inputs, outputs = self.signature()
        names = [argument.name for argument in inputs + outputs if argument.name not in _ALWAYS]
        return "__".join([self.kind] + names)

    def build(self, tik, kernel_name, disable_debug=False):
        """Build the kernel with the module ``tik``; returns its TIK instance."""
        if self.kind == BACKWARD:
            return build_backward(tik, self.geometry, self.cores, kernel_name, disable_debug)
        if self.kind == PREPROCESS:
            return build_preprocess(tik, self.geometry, self.cores, kernel_name, disable_debug)
        with_lse = self.kind == FORWARD
        return build_forward(tik, self.geometry, self.cores, kernel_name, with_lse, disable_debug)


def build_operator(operator, tensors, request, kernel_name, disable_debug):
    """What an entry function does: check what the framework is going to pass, then build.

    Args:
        operator: the operator's name, or only its kind where arguments may be absent.
        tensors: the framework's descriptions of inputs and outputs in order, dicts with 'shape' (in the kernel's
            format) and 'dtype'.
        request: text from :meth:`KernelRequest.to_json`.
        kernel_name: of the compiled function.
        disable_debug: False keeps what ``tikdb.start_debug`` needs.

    Raises:
        ValueError: the request is for another operator, or a tensor is not what the kernel takes.
    """
    wanted = KernelRequest.from_json(request)
    if operator not in (wanted.operator, wanted.kind):
        text = "For '{}', the 'request' must be for it, but got one for '{}'."
        raise ValueError(text.format(operator, wanted.operator))
    inputs, outputs = wanted.signature()
    given = [(str(tensor["dtype"]), _elements(tensor["shape"])) for tensor in tensors]
    needed = [(argument.dtype, _elements(argument.shape)) for argument in inputs + outputs]
    if given != needed:
        names = ", ".join(argument.name for argument in inputs + outputs)
        text = "For '{}', dtypes and elements of ({}) must be {}, but got {}."
        raise ValueError(text.format(operator, names, needed, given))
    from tbe import tik

    return wanted.build(tik, kernel_name, disable_debug)


def _elements(shape):
    count = 1
    for size in shape:
        count *= size
    return count
