"""The package's operators, read from the kernels' signatures: every argument of any call, and which all have."""

from dataclasses import replace
from typing import NamedTuple, Tuple

from flash_attention.ascend.entry.request import BACKWARD, FORWARD, INFERENCE, PREPROCESS, KernelRequest
from flash_attention.core.spec import AttentionSpec

REQUEST = "request"
"""The operators' attribute: the text of a :class:`~flash_attention.ascend.entry.request.KernelRequest`."""

# Whole tiles and no restriction: no argument that some calls do without. Sq and Sk differ, so that shapes tell them
# apart.
_LEAST = AttentionSpec(1, 2, 2, 256, 512, 64, "float16")
_MORE = {"causal": True, "mask_shape": (1, 1, 256, 512)}
_TERMS = {"bias_shape": (1, 2, 256, 512), "alibi_shape": (2,)}
_MOST = {
    INFERENCE: dict(_MORE, **_TERMS),
    FORWARD: dict(_MORE, dropout_rate=0.1, **_TERMS),
    PREPROCESS: {},
    BACKWARD: dict(_MORE, dropout_rate=0.1, **_TERMS),
}
_SHAPES = {
    "lse": ("RowsOf", "query"),
    "query_columns": ("ColumnsOf", "statistics"),
    "minus_delta": ("QueriesOf", "statistics"),
}
"""Outputs that have no input's shape: function of :mod:`cpp` that makes it, and the input it is made from."""


class Argument(NamedTuple):
    """One input or output of an operator.

    Attributes:
        name, dtype, format: as the kernel takes it.
        required: False for an input that some calls leave empty.
        function, like: of an output: its shape in the framework is that of input ``like``, or what the C++ ``function``
            makes of it.
    """

    name: str
    dtype: str
    format: str
    required: bool
    function: str = ""
    like: str = ""


class PackageOperator(NamedTuple):
    """One operator: ``kind`` of kernel, which is also its entry function's name, and its arguments in order."""

    kind: str
    inputs: Tuple[Argument, ...]
    outputs: Tuple[Argument, ...]

    @property
    def type(self):
        """The operator's type: the kind in camel case."""
        return "".join(word.capitalize() for word in self.kind.split("_"))


def package_operators():
    """The four operators of the package."""
    return [_operator(kind) for kind in _MOST]


def _operator(kind):
    # Gradients of bias and slopes would be outputs that only some calls have, and GE cannot leave an output out.
    specs = _LEAST, replace(_LEAST, **_MOST[kind])
    (least, _), (inputs, outputs) = (KernelRequest.of(kind, x, term_gradients=False).signature() for x in specs)
    least = {argument.name for argument in least}
    by_shape = {argument.nd_shape: argument.name for argument in reversed(inputs) if argument.nd_shape}
    return PackageOperator(
        kind,
        tuple(Argument(x.name, x.dtype, x.format, x.name in least) for x in inputs),
        tuple(
            Argument(x.name, x.dtype, x.format, True, *_SHAPES.get(x.name, ("", by_shape.get(x.nd_shape))))
            for x in outputs
        ),
    )
