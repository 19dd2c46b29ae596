"""BlockAllocator: which blocks of a pool are free, and how many holders each of the others has."""

import numpy as np

from flash_attention.core.errors import invalid_value
from flash_attention.core.validation import check_int
from flash_attention_infer.core.errors import DoubleFreeError, OutOfBlocksError


class BlockAllocator:
    """Reference counts of ``num_blocks`` blocks. Every method succeeds whole or raises and changes nothing.

    Costs 8 bytes a block: its count, and its place on the stack of free blocks.

    Args:
        num_blocks: blocks of the pool, named 0 .. num_blocks - 1.
    """

    def __init__(self, num_blocks):
        self.num_blocks = check_int("BlockAllocator", "num_blocks", num_blocks, 1)
        self._holders = np.zeros(self.num_blocks, np.int32)
        self._free = np.arange(self.num_blocks - 1, -1, -1, dtype=np.int32)  # a stack: the last entry goes first
        self.free_blocks = self.num_blocks

    def holders(self, block):
        """How many hold ``block``; 0 when it is free."""
        return int(self._holders[block])

    def allocate(self, count):
        """``count`` free blocks as a list, each with one holder.

        Raises:
            OutOfBlocksError: fewer are free.
        """
        if count > self.free_blocks:
            raise OutOfBlocksError(
                "For 'BlockAllocator', {} blocks are needed, but {} of {} are free.".format(
                    count, self.free_blocks, self.num_blocks
                )
            )
        top = self.free_blocks
        blocks = self._free[top - count : top][::-1]
        self._holders[blocks] = 1
        self.free_blocks -= count
        return blocks.tolist()

    def retain(self, blocks):
        """One more holder for each of ``blocks``, which must be held already."""
        blocks, times = self._counted(blocks)
        lost = blocks[self._holders[blocks] == 0]
        if lost.size:
            raise invalid_value("BlockAllocator", "blocks", "held by somebody", "free block {}".format(lost[0]))
        self._holders[blocks] += times

    def release(self, blocks):
        """One holder less for each of ``blocks``; those without any are free again.

        Raises:
            DoubleFreeError: a block has fewer holders than it is named here.
        """
        blocks, times = self._counted(blocks)
        left = self._holders[blocks] - times
        if (left < 0).any():
            block = int(blocks[left < 0][0])
            raise DoubleFreeError(
                "For 'BlockAllocator', block {} is to be released {} times, but it has {} holders.".format(
                    block, int(times[left < 0][0]), self.holders(block)
                )
            )
        self._holders[blocks] = left
        freed = blocks[left == 0]
        self._free[self.free_blocks : self.free_blocks + freed.size] = freed[::-1]
        self.free_blocks += freed.size

    def _counted(self, blocks):
        """Distinct blocks and how often each is named, both int32."""
        blocks, times = np.unique(np.asarray(blocks, np.int32), return_counts=True)
        if blocks.size and not (0 <= blocks[0] and blocks[-1] < self.num_blocks):
            need = "in [0, {})".format(self.num_blocks)
            raise invalid_value("BlockAllocator", "blocks", need, blocks[0] if blocks[0] < 0 else blocks[-1])
        return blocks, times.astype(np.int32)
