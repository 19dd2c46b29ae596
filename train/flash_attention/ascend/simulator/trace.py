"""The record of what a program did, for cost models: which pipe, how long, which bytes."""

from typing import NamedTuple, Tuple


class Span(NamedTuple):
    """Bytes [start, stop) of a scope. In GM, addresses count from the start of the named tensor."""

    scope: str
    start: int
    stop: int
    name: str


class TraceRecord(NamedTuple):
    """One executed instruction on one pipe. A composite call (matmul, h_*) gives one record for each pipe it uses.

    Attributes:
        name: TIK's name of the instruction.
        pipe: MTE1, MTE2, MTE3, M, V or S.
        cycles: busy cycles of that pipe, by the instruction's cost function.
        bytes: bytes moved or processed.
        line: ``file:line`` of the kernel.
        part: 0, or the step of a composite call: it starts after the step before it.
        reads, writes: address ranges; those of tensors in a thread_num=2 loop alternate between their two copies.
            Instructions depend on each other exactly where such ranges overlap, in program order.
    """

    name: str
    pipe: str
    cycles: int
    bytes: int
    line: str
    part: int
    reads: Tuple[Span, ...]
    writes: Tuple[Span, ...]


def span(access, parity):
    """The range an access touches; ``parity`` selects the copy of a doubled buffer."""
    buffer = access.buffer
    base = buffer.address + (buffer.stride if parity else 0)
    return Span(buffer.scope, base + access.start, base + access.stop, buffer.name)


def overlap(left, right):
    """True when two spans share a byte."""
    same = left.scope == right.scope and (left.scope != "GM" or left.name == right.name)
    return same and left.start < right.stop and right.start < left.stop


class Trace:
    """Records of one run, by core: ``trace.cores[core]`` is a list of :class:`TraceRecord` in program order.

    What precedes a block_num loop runs on every core and is recorded once, for core 0.
    """

    def __init__(self):
        self.cores = {}

    def drop_idle(self):
        """Forget cores without records."""
        self.cores = {number: records for number, records in self.cores.items() if records}

    def __iter__(self):
        """All records, core after core."""
        for number in sorted(self.cores):
            yield from self.cores[number]

    def __len__(self):
        return sum(len(records) for records in self.cores.values())

    def cycles(self, core=None):
        """pipe -> busy cycles, of one core or of the busiest core on each pipe."""
        totals = []
        for number, records in self.cores.items():
            if core in (None, number):
                total = {}
                for record in records:
                    total[record.pipe] = total.get(record.pipe, 0) + record.cycles
                totals.append(total)
        pipes = sorted({pipe for total in totals for pipe in total})
        return {pipe: max(total.get(pipe, 0) for total in totals) for pipe in pipes}
