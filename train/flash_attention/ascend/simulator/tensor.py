"""Tensors as TIK indexes, slices, reshapes and reinterprets them; and the concrete address an instruction gets.

A tensor is (buffer, dtype, base, origin shape, one slice an axis). Starts and extents are ints or run-time Exprs.
"""

import numpy as np

from .errors import SimulatorError, caller_line, violation_text
from .expr import FLOATS, INTEGERS, Arithmetic, is_dynamic

MAX_RANK = 8


class Address:
    """A tensor argument with run-time values filled in.

    Attributes:
        buffer, dtype, itemsize: the memory behind it and the element type.
        offset: bytes from the start of the buffer to the first element.
        shape, strides: of the slice; strides in bytes.
    """

    __slots__ = ("buffer", "dtype", "itemsize", "offset", "shape", "strides")

    def __init__(self, buffer, dtype, offset, shape, strides):
        self.buffer, self.dtype, self.offset, self.shape, self.strides = buffer, dtype, offset, shape, strides
        self.itemsize = np.dtype(dtype).itemsize

    @property
    def scope(self):
        return self.buffer.scope

    def __repr__(self):
        return "{} ({} in {}, byte offset {})".format(self.buffer.name, self.dtype, self.scope, self.offset)


def _row_major(shape):
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class Tensor:
    """What ``Tik.Tensor`` returns and indexing yields. Public: dtype, shape, scope, name, offset, size."""

    def __init__(self, program, buffer, dtype, shape, scope_name, base=0, slices=None):
        self._program, self.buffer, self.dtype, self.scope = program, buffer, dtype, scope_name
        self._origin_shape, self._base = tuple(shape), base  # base in elements
        self._slices = tuple(slices) if slices is not None else tuple((0, extent) for extent in self._origin_shape)

    __hash__ = object.__hash__

    @property
    def name(self):
        return self.buffer.name

    @property
    def shape(self):
        """Extents of the slice; an entry is an Expr where a bound is."""
        return tuple(extent for _, extent in self._slices)

    @property
    def origin_shape(self):
        return self._origin_shape

    @property
    def size(self):
        """Number of elements of the slice."""
        count = 1
        for extent in self.shape:
            count = count * extent
        return count

    @property
    def offset(self):
        """Elements from the start of the buffer to the first element of the slice."""
        offset = self._base
        for (start, _), stride in zip(self._slices, _row_major(self._origin_shape)):
            offset = offset + start * stride
        return offset

    def _fail(self, need, got, remedy="", rule="index"):
        line = caller_line()
        raise SimulatorError(violation_text("Tensor", self.name, need, got, rule, line, remedy), rule, line)

    def _is_sliced(self):
        return any(is_dynamic(start) or start != 0 or is_dynamic(extent) or extent != full
                   for (start, extent), full in zip(self._slices, self._origin_shape))  # fmt: skip

    def _view(self, shape, base, slices=None, dtype=None):
        return Tensor(self._program, self.buffer, dtype or self.dtype, shape, self.scope, base, slices)

    # --- indexing -------------------------------------------------------------------------------
    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        rank = len(self._origin_shape)
        if len(index) == 1 and rank > 1:
            if self._is_sliced():
                self._fail(
                    "a whole tensor when it is indexed by one flat index", "a slice of shape {}".format(self.shape),
                    "TIK counts a flat index from the start of the buffer: give one index an axis.",
                )  # fmt: skip
            total = int(np.prod(self._origin_shape))
            return self._view((total,), self._base)[index[0]]
        if len(index) != rank:
            self._fail("indexed by 1 or {} indices".format(rank), len(index))
        return self._view(self._origin_shape, self._base, [self._slice(*pair) for pair in zip(self._slices, index)])

    def _slice(self, axis, item):
        start, extent = axis
        if isinstance(item, slice):
            if item.step not in (None, 1):
                self._fail("sliced with step 1", item.step)
            first = 0 if item.start is None else self._checked(item.start)
            last = extent if item.stop is None else self._checked(item.stop)
        else:
            first = self._checked(item)
            last = first + 1
        if not is_dynamic(last) and not is_dynamic(extent):
            last = min(last, extent)
        length = last - first
        if not is_dynamic(first) and first < 0 or not is_dynamic(length) and length <= 0:
            self._fail("indexed inside its extent {}".format(extent), "{}:{}".format(first, last))
        return (start + first, length)

    def _checked(self, value):
        if isinstance(value, Tensor):
            self._fail("indexed by ints, Scalars or Exprs", "a Tensor", "Load it into a Scalar first.")
        if not isinstance(value, (int, np.integer, Arithmetic)) or isinstance(value, bool):
            self._fail("indexed by ints, Scalars or Exprs", repr(value))
        if is_dynamic(value):
            self._program.check_alive(value, "Tensor", "index")
            expr = value.to_expr()
            if expr.kind != "int":
                self._fail("indexed by an integer", "a {} expression".format(expr.kind))
            return expr
        return int(value)

    # --- views ----------------------------------------------------------------------------------
    def reshape(self, new_shape):
        """View of equal element count; a slice of several axes cannot be reshaped."""
        if self._is_sliced() and len(self._origin_shape) > 1:
            self._fail("whole, or one-dimensional, to be reshaped", "a slice of shape {}".format(self.shape))
        new_shape = tuple(new_shape) if isinstance(new_shape, (list, tuple)) else (new_shape,)
        if any(is_dynamic(extent) for extent in new_shape + self.shape):
            self._fail("reshaped with static extents", new_shape)
        if int(np.prod(new_shape)) != self.size or min(new_shape) <= 0:
            self._fail("reshaped to {} elements".format(self.size), new_shape)
        return self._view(tuple(int(extent) for extent in new_shape), self.offset)

    def reinterpret_cast_to(self, dtype):
        """The same bytes as another dtype; the last axis scales by the ratio of widths."""
        if dtype not in INTEGERS + FLOATS:
            self._fail("reinterpreted as one of {}".format(", ".join(INTEGERS + FLOATS)), repr(dtype), rule="dtype")
        old, new = np.dtype(self.dtype).itemsize, np.dtype(dtype).itemsize
        if self._is_sliced() and len(self._origin_shape) > 1:
            self._fail("whole, or one-dimensional, to be reinterpreted", "a slice of shape {}".format(self.shape))
        start, extent = (self.offset, self.shape[-1])
        if old >= new:
            base, last = start * (old // new), extent * (old // new)
        else:
            ratio = new // old
            if is_dynamic(start) or is_dynamic(extent) or start % ratio or extent % ratio:
                self._fail("a multiple of {} elements in its last axis and start".format(ratio), (start, extent))
            base, last = start // ratio, extent // ratio
        return self._view(self.shape[:-1] + (last,), base, dtype=dtype)

    # --- single elements ------------------------------------------------------------------------
    def set_as(self, value):
        """Write one element through the scalar pipe."""
        self._program.emit("set_as", self, value)

    def __setitem__(self, index, value):
        self[index].set_as(value)

    # --- run time -------------------------------------------------------------------------------
    def run_time_values(self):
        """(offset in elements, extents): the values an instruction needs, each an int or an Expr."""
        return (self.offset,) + self.shape

    def address(self, values):
        """The :class:`Address` for concrete ``run_time_values``."""
        itemsize = np.dtype(self.dtype).itemsize
        strides = tuple(itemsize * stride for stride in _row_major(self._origin_shape))
        return Address(self.buffer, self.dtype, itemsize * values[0], tuple(values[1:]), strides)

    def __repr__(self):
        return "Tensor({}, {}, shape={}, scope={})".format(self.name, self.dtype, self.shape, self.scope)
