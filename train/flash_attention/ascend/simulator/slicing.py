"""What a count without data must still execute: the statements that produce the values of Scalars.

Kernels read loop bounds and offsets from tables in GM. The buffers behind such Scalars are found backwards through
the program; the statements that write them are executed, all others only counted.
"""

from .program import Branch, Loop, Nested, Statement


def statements(block):
    """Every instruction of a block and the blocks inside it."""
    for item in block.statements:
        if isinstance(item, Statement):
            yield item
        elif isinstance(item, Branch):
            for _, body in item.arms:
                yield from statements(body)
        elif isinstance(item, (Loop, Nested)):
            yield from statements(item.body)


def scalar_sources(program):
    """The buffers that Scalars are loaded from, and all that those are made from."""
    everything = list(statements(program.root))
    needed = {buffer for item in everything if item.row.name == "load_scalar" for buffer in item.sources}
    while True:
        found = {
            buffer
            for item in everything
            if not needed.isdisjoint(item.targets)
            for buffer in item.sources
            if buffer not in needed
        }
        if not found:
            return frozenset(needed)
        needed |= found
