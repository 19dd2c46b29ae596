"""Buffers, the addresses they get, which of their bytes were written, and who touched which byte of global memory.

Local memory is one arena of bytes a scope, global memory one array a tensor. A shadow of the same size holds 0xFF for
every byte that was written since its tensor was declared, so that a view of the shadow has the layout of the data view
and copies carry the mark along. ``Buffer.clean`` says that the whole shadow is 0xFF, which spares the look-up.
"""

import numpy as np

from .chips import ALLOCATION, LOCAL_SCOPES

BLOCK = 32  # bytes: the unit of vector and DMA addresses
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def round_up(value, unit):
    return -(-value // unit) * unit


class Buffer:
    """A declared tensor's memory.

    Attributes:
        name, scope, dtype, size: as declared; size in bytes.
        address: first byte within the scope; 0 for GM, which has one array a tensor.
        block: the lexical block that declares it.
        thread_loop: the register of the enclosing ``thread_num=2`` loop, whose iterations alternate between two
            copies ``stride`` bytes apart; None outside.
        data, shadow: bytes, attached for a run.
        clean: the whole shadow is set.
        tracked: GM written by the program while several cores run: accesses are checked for races.
    """

    def __init__(self, name, scope, dtype, size, address, block, line):
        self.name, self.scope, self.dtype, self.size = name, scope, dtype, size
        self.address, self.block, self.line = address, block, line
        self.thread_loop, self.stride = None, 0
        self.is_workspace = self.is_atomic_add = False
        self.data = self.shadow = None
        self.clean = self.tracked = False
        self._looks = 0

    def attach(self, data, shadow):
        self.data, self.shadow, self.clean = data, shadow, False

    def poison(self, fill):
        """Forget the contents; ``fill`` is a byte or an array of bytes at least as long."""
        if isinstance(fill, int):
            self.data.fill(fill)
        else:
            self.data[...] = fill[: self.data.size]
        self.shadow.fill(0)
        self.clean = False
        self._looks = 0

    def look(self):
        """Called when a partial check succeeded: now and then see whether everything is written."""
        self._looks += 1
        if self._looks % 2 == 0:
            self.clean = bool(self.shadow[: self.size].all())


class Access:
    """One operand of one instruction: typed, strided pieces of a buffer.

    Attributes:
        operand: the argument's name.
        pieces: list of (offset in bytes from the start of the buffer, shape, strides in bytes).
    """

    __slots__ = ("operand", "buffer", "dtype", "pieces", "start", "stop")

    def __init__(self, operand, buffer, dtype, pieces):
        self.operand, self.buffer, self.dtype, self.pieces = operand, buffer, np.dtype(dtype), pieces
        ranges = [_range(piece) for piece in pieces]
        self.start = min(first for first, _ in ranges)
        self.stop = max(last for _, last in ranges) + self.dtype.itemsize

    def meets(self, other):
        """True when the ranges of the two share a byte."""
        return self.buffer is other.buffer and self.start < other.stop and other.start < self.stop

    def views(self):
        """A :class:`View` for each piece, on attached memory."""
        return [View(self, offset, shape, strides) for offset, shape, strides in self.pieces]


def _range(piece):
    """Offsets of the first and the last element of a piece; strides may be negative."""
    first = last = piece[0]
    for extent, stride in zip(piece[1], piece[2]):
        reach = (extent - 1) * stride
        first, last = (first, last + reach) if reach >= 0 else (first + reach, last)
    return first, last


class View:
    """numpy views of data and shadow for one piece of an :class:`Access`; ``inside``: not in the slack behind GM."""

    __slots__ = ("operand", "buffer", "data", "shadow", "full", "piece", "inside")

    def __init__(self, access, offset, shape, strides):
        self.operand, self.buffer, self.piece = access.operand, access.buffer, (offset, shape, strides)
        self.inside = access.stop <= access.buffer.size
        unsigned = _UNSIGNED[access.dtype.itemsize]
        self.data = np.ndarray(shape, access.dtype, self.buffer.data, offset, strides)
        self.shadow = np.ndarray(shape, unsigned, self.buffer.shadow, offset, strides)
        self.full = np.iinfo(unsigned).max

    def written(self):
        """True when every byte was written."""
        if self.buffer.clean:
            return True
        if not self.shadow.size or np.minimum.reduce(self.shadow, axis=None) == self.full:
            self.buffer.look()
            return True
        return False

    def mark(self):
        """Every byte is written now."""
        if not self.buffer.clean:
            self.shadow[...] = self.full

    def first_unwritten(self):
        """Index of the first element with an unwritten byte, for messages."""
        flat = int(np.argmax(self.shadow.ravel() != self.full))
        return tuple(int(i) for i in np.unravel_index(flat, self.shadow.shape))


class Allocator:
    """Addresses within the scopes: blocks nest, so each scope is a stack."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.top = {scope: 0 for scope in LOCAL_SCOPES}
        self.peak = dict(self.top)

    def available(self, scope):
        return self.capacity[scope] - self.top[scope]

    def take(self, scope, size, copies):
        """Address of ``copies`` times ``size`` bytes, or None when the scope is full."""
        need = copies * round_up(size, ALLOCATION[scope])
        if need > self.available(scope):
            return None
        address = self.top[scope]
        self.top[scope] += need
        self.peak[scope] = max(self.peak[scope], self.top[scope])
        return address

    def mark(self):
        return dict(self.top)

    def release(self, mark):
        self.top = mark


class Storage:
    """All memory of one run."""

    def __init__(self, capacity, fill):
        self.fill = fill
        self.arenas = {scope: (np.zeros(capacity[scope], np.uint8), np.zeros(capacity[scope], np.uint8))
                       for scope in LOCAL_SCOPES}  # fmt: skip

    def attach_local(self, buffer):
        data, shadow = self.arenas[buffer.scope]
        buffer.attach(*(arena[buffer.address : buffer.address + buffer.size] for arena in (data, shadow)))

    def attach_global(self, buffer):
        """GM is readable up to the next 32-byte boundary, as in the vendor's debugger, with undefined contents."""
        size = round_up(buffer.size, BLOCK)
        buffer.attach(np.zeros(size, np.uint8), np.zeros(size, np.uint8))
        buffer.poison(self.fill)


class RaceDetector:
    """Who read and wrote each byte of the GM buffers that several cores may touch.

    Cores are numbered from 1. ``writer``: 0 nobody, c core c, -c core c by atomic add only, ``SHARED`` several cores
    by atomic add only. ``reader``: 0 nobody, c core c, ``SHARED`` several. Cores run one after the other, but as both
    sides are recorded the verdict does not depend on their order.
    """

    SHARED = -(1 << 30)

    def __init__(self):
        self._state = {}

    def _arrays(self, view):
        buffer = view.buffer
        if buffer not in self._state:
            self._state[buffer] = (np.zeros(buffer.data.size, np.int32), np.zeros(buffer.data.size, np.int32))
        offset, shape, strides = view.piece
        itemsize = view.data.itemsize
        shape, strides = tuple(shape) + (itemsize,), tuple(4 * stride for stride in strides) + (4,)
        return [np.ndarray(shape, np.int32, array, 4 * offset, strides) for array in self._state[buffer]]

    def read(self, view, core):
        """Record a read; the number of another core that writes one of the bytes, or None."""
        writer, reader = self._arrays(view)
        foreign = writer[(writer != 0) & (np.abs(writer) != core)]
        reader[...] = np.where((reader == 0) | (reader == core), core, self.SHARED)
        return self._name(foreign)

    def write(self, view, core, atomic):
        """Record a write; the number of another core that reads or writes one of the bytes, or None."""
        writer, reader = self._arrays(view)
        foreign = reader[(reader != 0) & (reader != core)]
        others = (writer != 0) & (np.abs(writer) != core)
        if atomic:
            adds = writer <= 0
            foreign = np.concatenate([foreign.ravel(), writer[others & ~adds].ravel()])
            writer[...] = np.where(writer == 0, -core, np.where(others & adds, self.SHARED, writer))
        else:
            foreign = np.concatenate([foreign.ravel(), writer[others].ravel()])
            writer[...] = core
        return self._name(foreign)

    def _name(self, foreign):
        if not foreign.size:
            return None
        core = abs(int(foreign.ravel()[0]))
        return "several cores" if core == -self.SHARED else "core {}".format(core - 1)
