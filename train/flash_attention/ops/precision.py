"""Cells whose arithmetic a model's ``to_float`` leaves alone.

``model.to_float(mindspore.float16)`` casts the inputs of every operator in the model's Cells, in PyNative mode also
inside whatever they call, constants too. An attention engine rounds where it means to: its sums are float32 whatever
the dtype of query and output, and the -1e30 that hides a score would become -inf, and 0 * -inf is NaN.
"""

from mindspore import nn

try:
    from mindspore._c_expression import MixedPrecisionType

    _ITS_OWN = MixedPrecisionType.NOTSET
except ImportError:  # a MindSpore without this switch casts a Cell's inputs only
    _ITS_OWN = None
_FLAGS = ("fp16", "fp32", "bf16")


class OwnPrecision(nn.Cell):
    """A Cell to which no ``to_float`` comes, neither its own nor that of the Cells around it; nor to those inside.

    Args:
        auto_prefix (bool): of any Cell: whether names of its parameters, if it owns any, tell where it stands.
    """

    def __init__(self, auto_prefix=False):
        super().__init__(auto_prefix=auto_prefix)
        self.mixed_precision_type = _ITS_OWN

    def add_flags(self, **flags):
        """As of any Cell, without those of ``to_float``."""
        return super().add_flags(**_others(flags))

    def add_flags_recursive(self, **flags):
        """As of any Cell, without those of ``to_float``."""
        return super().add_flags_recursive(**_others(flags))


def _others(flags):
    return {name: flag for name, flag in flags.items() if name not in _FLAGS}
