"""A TIK program while it is being written: the injected module, its instance, and buffers by name."""

from typing import NamedTuple, Optional, Tuple

BYTES = {"uint8": 1, "float16": 2, "float32": 4, "int32": 4}
ALIGNMENT = {"UB": 32, "L1": 512, "L0A": 512, "L0B": 512, "L0C": 1024}
"""Start alignment of a buffer in each scope, bytes."""


class Buffer(NamedTuple):
    """One local buffer of a kernel.

    Attributes:
        name: unique in the kernel.
        scope: 'UB', 'L1', 'L0A', 'L0B' or 'L0C'.
        dtype: 'float16', 'float32', 'int32' or 'uint8'.
        elements: flat size; local buffers are one-dimensional, so that an index is always an address.
        content: what it holds, for the budget's table.
        copies: 2 inside a double-buffered loop.
    """

    name: str
    scope: str
    dtype: str
    elements: int
    content: str
    copies: int = 1

    @property
    def bytes(self):
        """Size of all copies, each rounded up to the scope's alignment."""
        unit = ALIGNMENT[self.scope]
        return self.copies * (-(-self.elements * BYTES[self.dtype] // unit) * unit)


class GmTensor(NamedTuple):
    """One kernel argument in global memory: ``content`` says what it holds and in which order.

    ``nd_shape`` is the framework's shape of a tensor that the kernel takes in FRACTAL_NZ, None for a plain one.
    """

    name: str
    dtype: str
    shape: Tuple[int, ...]
    content: str
    nd_shape: Optional[Tuple[int, ...]] = None

    @property
    def format(self):
        """The framework's name of the layout: 'FRACTAL_NZ' or 'ND'."""
        return "ND" if self.nd_shape is None else "FRACTAL_NZ"


class Program:
    """The module ``tik`` and an instance of it; ``program.api`` issues instructions.

    Args:
        tik: module with the interface of ``tbe.tik``: CANN's own or the simulator's.
        disable_debug: True leaves out what ``tikdb.start_debug`` needs, for builds that run on a device.
    """

    def __init__(self, tik, disable_debug=False):
        self.tik = tik
        self.api = tik.Tik(disable_debug=disable_debug)
        self._scopes = {
            "UB": tik.scope_ubuf,
            "L1": tik.scope_cbuf,
            "L0A": tik.scope_ca,
            "L0B": tik.scope_cb,
            "L0C": tik.scope_cc,
        }

    def gm(self, argument):
        """Declare a :class:`GmTensor`; must not be called inside a loop or branch."""
        return self.api.Tensor(argument.dtype, argument.shape, name=argument.name, scope=self.tik.scope_gm)

    def local(self, buffer):
        """Declare a :class:`Buffer` in the current loop or branch, with undefined contents."""
        return self.api.Tensor(buffer.dtype, (buffer.elements,), name=buffer.name, scope=self._scopes[buffer.scope])

    def integer(self, value, name="index"):
        """An int32 Scalar that holds ``value``: an int, an expression or one element of a tensor."""
        return self.api.Scalar("int32", name=name, init_value=value)

    def with_tail(self, tile, tiles, rows, tail, action):
        """``action(rows)``, or ``action(tail)`` for the last of ``tiles`` tiles; a branch only where they differ."""
        if tail == rows:
            action(rows)
            return
        with self.api.if_scope(tile == tiles - 1):
            action(tail)
        if tiles > 1:
            with self.api.else_scope():
                action(rows)
