"""When each traced instruction runs: in-order pipes that overlap wherever addresses do not conflict.

The rule of TIK's automatic synchronisation: every pipe executes its instructions in program order; one starts when its
pipe is free and every earlier access of another pipe that conflicts with it (read after write, write after read, write
after write, on a common 32-byte block) is finished. The scalar unit hands all instructions out, so what follows a load
of a Scalar waits for it. How long the flags between pipes take is not published; they are free here.
"""

from typing import Dict, List, NamedTuple

import numpy as np

PIPES = ("MTE2", "MTE1", "M", "V", "MTE3", "S")
"""In the order in which data passes them: GM -> L1 -> L0A, L0B -> L0C -> UB -> GM; then scalars."""

_BLOCK = 32
"""Bytes conflicts are found at: the granularity of the Unified Buffer."""


class Schedule(NamedTuple):
    """One core's program on the time axis, in cycles.

    Attributes:
        cycles: when the last instruction ends.
        busy: pipe -> cycles it works.
        gm_bytes: bytes read from or written to global memory.
        intervals: (record, start, stop) in program order.
    """

    cycles: float
    busy: Dict[str, float]
    gm_bytes: int
    intervals: List


class _Memory:
    """When each 32-byte block of one memory was last written, and last touched at all."""

    def __init__(self):
        self._written, self._touched = np.zeros(0), np.zeros(0)

    def _blocks(self, span):
        stop = -(-span.stop // _BLOCK)
        if stop > len(self._written):
            grow = max(stop, 2 * len(self._written)) - len(self._written)
            self._written, self._touched = (np.pad(x, (0, grow), "constant") for x in (self._written, self._touched))
        return slice(span.start // _BLOCK, stop)

    def readable(self, span):
        """Time from which ``span`` may be read."""
        blocks = self._blocks(span)
        return self._written[blocks].max()

    def writable(self, span):
        """Time from which ``span`` may be overwritten."""
        blocks = self._blocks(span)
        return self._touched[blocks].max()

    def read(self, span, stop):
        """``span`` is read until ``stop``."""
        blocks = self._blocks(span)
        touched = self._touched[blocks]
        np.maximum(touched, stop, out=touched)

    def write(self, span, stop):
        """``span`` is written until ``stop``, after everything that touched it."""
        blocks = self._blocks(span)
        self._written[blocks] = self._touched[blocks] = stop


def schedule(records, issue=0):
    """The :class:`Schedule` of one core.

    Args:
        records: :class:`~flash_attention.ascend.simulator.trace.TraceRecord` of one core, in program order.
        issue: cycles each instruction occupies its pipe beyond those of its data; not published, 0 in the trace.
    """
    free, busy = dict.fromkeys(PIPES, 0.0), dict.fromkeys(PIPES, 0.0)
    memories, intervals, gm_bytes = {}, [], 0
    handed_out = before = 0.0  # end of the last scalar instruction; end of the record before
    for record in records:
        reads = [(_memory(memories, span), span) for span in record.reads if span.stop > span.start]
        writes = [(_memory(memories, span), span) for span in record.writes if span.stop > span.start]
        waits = [memory.readable(span) for memory, span in reads] + [memory.writable(span) for memory, span in writes]
        start = max([free[record.pipe], handed_out, before if record.part else 0.0] + waits)
        stop = before = start + record.cycles + issue
        free[record.pipe] = stop
        busy[record.pipe] += record.cycles + issue
        if record.pipe == "S":
            handed_out = stop
        if any(span.scope == "GM" for span in record.reads + record.writes):
            gm_bytes += record.bytes
        for memory, span in reads:
            memory.read(span, stop)
        for memory, span in writes:
            memory.write(span, stop)
        intervals.append((record, start, stop))
    return Schedule(max(free.values()), busy, gm_bytes, intervals)


def _memory(memories, span):
    """The memory a span lies in; addresses of global memory count from the start of each tensor."""
    key = (span.scope, span.name if span.scope == "GM" else "")
    if key not in memories:
        memories[key] = _Memory()
    return memories[key]
