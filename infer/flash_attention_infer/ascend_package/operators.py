"""The package's operators, read from the kernels' signatures: every argument of any call, and which all have."""

from dataclasses import replace
from typing import NamedTuple, Tuple

from flash_attention.ascend.entry.request import BACKWARD, FORWARD, INFERENCE, KernelRequest
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
    BACKWARD: dict(_MORE, dropout_rate=0.1, **_TERMS),
}


class Argument(NamedTuple):
    """One input or output of an operator.

    Attributes:
        name, dtype, format: as the kernel takes it.
        required: False for an input that some calls leave empty.
        like: of an output: the input whose shape it has in the framework, None when its shape is the log-sum-exp's.
    """

    name: str
    dtype: str
    format: str
    required: bool
    like: object = None


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
    """The three operators of the package."""
    return [_operator(kind) for kind in (INFERENCE, FORWARD, BACKWARD)]


def _operator(kind):
    # Gradients of bias and slopes would be outputs that only some calls have, and GE cannot leave an output out.
    specs = _LEAST, replace(_LEAST, **_MOST[kind])
    (least, _), (inputs, outputs) = (KernelRequest.of(kind, x, term_gradients=False).signature() for x in specs)
    least = {argument.name for argument in least}
    by_shape = {argument.nd_shape: argument.name for argument in reversed(inputs) if argument.nd_shape}
    return PackageOperator(
        kind,
        tuple(Argument(x.name, x.dtype, x.format, x.name in least) for x in inputs),
        tuple(Argument(x.name, x.dtype, x.format, True, by_shape.get(x.nd_shape)) for x in outputs),
    )
