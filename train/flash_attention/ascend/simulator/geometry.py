"""Addresses of vector instructions: masks, repeats, block and repeat strides, and the rules of overlap.

One repeat processes 256 bytes of the widest operand: 8 blocks of 32 bytes. With L = 32 / itemsize lanes a block, the
element of repeat r and lane l lies at byte ``r * rep_stride * 32 + l // L * blk_stride * 32 + l % L * itemsize``.
A mask becomes runs of lanes, runs become the pieces of an Access: numpy views of shape (repeats, lanes) where block
strides are 1, else (repeats, blocks, lanes of a block).
"""

import functools

import numpy as np

from .memory import BLOCK, Access

REPEAT_BYTES = 256
MAX_REPEAT = 255
MAX_STRIDE = 255


class Operand:
    """One vector operand: its argument's name, address, block stride and repeat stride (in blocks)."""

    __slots__ = ("name", "address", "block", "repeat")

    def __init__(self, name, address, block, repeat):
        self.name, self.address, self.block, self.repeat = name, address, block, repeat


def lanes_of(*addresses):
    """Lanes a repeat processes: 256 bytes of the widest operand."""
    return REPEAT_BYTES // max(max(address.itemsize for address in addresses), 2)


def lane_runs(call, mask, lanes):
    """The mask as a tuple of (first lane, lanes)."""
    if isinstance(mask, (list, tuple)):
        if len(mask) != 2 or not all(isinstance(part, (int, np.integer)) for part in mask):
            call.fail("range", "mask", "an int or a list [high, low] of two 64-bit ints", mask)
        high, low = (int(part) & (2**64 - 1) for part in mask)
        if not high | low:
            call.fail("range", "mask", "set in at least one bit", mask)
        if lanes <= 64 and (high or low >> lanes):
            call.fail("range", "mask", "within {} lanes ([0, low] for 32-bit operands)".format(lanes), mask)
        return _bit_runs(high << 64 | low)
    return ((0, call.in_range("mask", mask, 1, lanes)),)


@functools.lru_cache(maxsize=256)
def _bit_runs(bits):
    runs, lane = [], 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        ones = ((bits + 1) & ~bits).bit_length() - 1
        runs.append((lane + zeros, ones))
        bits >>= ones
        lane += zeros + ones
    return tuple(runs)


def repeat_count(call, repeat_times, highest=MAX_REPEAT):
    return call.in_range("repeat_times", repeat_times, 1, highest, zero_at_run_time=True)


def pieces(operands, runs, repeats):
    """For each operand the list of its (offset, shape, strides), piece k of all operands having one shape."""
    sizes = {operand.address.itemsize for operand in operands}
    if all(operand.block == 1 for operand in operands):
        return [[_flat(operand, run, repeats) for run in runs] for operand in operands]
    if len(sizes) == 1:
        per_block = BLOCK // max(sizes)
        parts = [part for run in runs for part in _whole_blocks(run, per_block)]
        return [[_blocked(operand, part, repeats) for part in parts] for operand in operands]
    fewest = BLOCK // max(sizes)
    parts = [part for run in runs for part in _single_blocks(run, fewest)]
    return [[_flat(operand, part, repeats) for part in parts] for operand in operands]


def _lane_offset(operand, lane):
    per_block = BLOCK // operand.address.itemsize
    return lane // per_block * operand.block * BLOCK + lane % per_block * operand.address.itemsize


def _flat(operand, run, repeats):
    lane, count = run
    offset = operand.address.offset + _lane_offset(operand, lane)
    return offset, (repeats, count), (operand.repeat * BLOCK, operand.address.itemsize)


def _blocked(operand, part, repeats):
    lane, blocks, count = part
    offset = operand.address.offset + _lane_offset(operand, lane)
    strides = (operand.repeat * BLOCK, operand.block * BLOCK, operand.address.itemsize)
    return offset, (repeats, blocks, count), strides


def _single_blocks(run, per_block):
    """A run cut at block boundaries."""
    lane, count = run
    while count > 0:
        part = min(count, per_block - lane % per_block)
        yield lane, part
        lane, count = lane + part, count - part


def _whole_blocks(run, per_block):
    """A run as (first lane, blocks, lanes of a block): a partial head, whole blocks together, a partial tail."""
    whole = None
    for lane, part in _single_blocks(run, per_block):
        if part == per_block:
            whole = (lane, 1, part) if whole is None else (whole[0], whole[1] + 1, part)
        else:
            if whole is not None:
                yield whole
                whole = None
            yield lane, 1, part
    if whole is not None:
        yield whole


def accesses(call, operands, runs, repeats, sequential=False):
    """An Access for each operand, bounds checked; ``sequential`` cuts them into one piece a repeat."""
    result = []
    for operand, parts in zip(operands, pieces(operands, runs, repeats)):
        if sequential:
            parts = [
                (offset + repeat * strides[0], shape[1:], strides[1:])
                for repeat in range(repeats)
                for offset, shape, strides in parts
            ]
        result.append(call.bounded(Access(operand.name, operand.address.buffer, operand.address.dtype, parts)))
    return result


def slots(access, runs):
    """(first lane, lanes) of each piece of the access: pieces follow the runs in order."""
    slots, queue = [], list(runs)
    for _, shape, _ in access.pieces:
        count = int(np.prod(shape[1:]))
        lane, left = queue[0]
        slots.append((lane, count))
        queue[:1] = [(lane + count, left - count)] if left > count else []
    return slots


def _reach(operand, lanes):
    """(blocks of one repeat, blocks from the first to the last of them)."""
    blocks = -(-lanes * operand.address.itemsize // BLOCK)
    return blocks, (blocks - 1) * operand.block + 1


def _footprint(operand, lanes, repeats):
    """Byte offset of each block: array (repeats, blocks)."""
    blocks = _reach(operand, lanes)[0]
    steps = np.arange(repeats)[:, None] * operand.repeat + np.arange(blocks) * operand.block
    return operand.address.offset + steps * BLOCK


def _share(left, right):
    """True when row i of ``left`` and row i of ``right`` have blocks that share a byte, for any i."""
    return bool((np.abs(left[:, :, None] - right[:, None, :]) < BLOCK).any())


def check_overlap(call, destination, sources, lanes, repeats, accumulates=False, updates=False):
    """The rules of overlapping operands; True when repeats must be executed one by one.

    One repeat: the same address and block stride, or no common byte. More: the destination of repeat i must not share
    bytes with a source of repeat i + 1. ``accumulates``: destination and last source may be one row of blocks that all
    repeats add to (both repeat strides 0). ``updates``: the destination is a source too. Destination repeats that fall
    onto each other are otherwise executed in order.
    """
    target = None
    sequential = False
    if repeats > 1 and destination.repeat < _reach(destination, lanes)[1]:
        target = _footprint(destination, lanes, repeats)
        sequential = len(np.unique(target)) < target.size
        if sequential and updates:
            _refuse_overlap(call, destination, destination, "the next repeat")
    for position, source in enumerate(sources):
        if source.address.buffer is not destination.address.buffer:
            continue
        same = (source.address.offset, source.block) == (destination.address.offset, destination.block)
        same = same and source.address.itemsize == destination.address.itemsize
        if same and source.repeat == destination.repeat:
            accumulator = accumulates and position == len(sources) - 1 and source.repeat == 0
            if sequential and not accumulator:
                _refuse_overlap(call, source, destination, "the next repeat")
            continue
        target = _footprint(destination, lanes, repeats) if target is None else target
        footprint = _footprint(source, lanes, repeats)
        if footprint.max() + BLOCK <= target.min() or target.max() + BLOCK <= footprint.min():
            continue
        if not same and _share(target[:1], footprint[:1]):
            _refuse_overlap(call, source, destination, "the same repeat")
        if repeats > 1:
            if _share(target[:-1], footprint[1:]):
                _refuse_overlap(call, source, destination, "the next repeat")
            sequential = True
    return sequential


def _refuse_overlap(call, source, destination, where):
    call.fail(
        "overlap", source.name, "clear of '{}', or identical to it".format(destination.name),
        "a part of '{}' that '{}' writes in {}".format(source.address.buffer.name, destination.name, where),
        hazard=True,
    )  # fmt: skip
