"""Bookkeeping of KV caches, numpy and the standard library only: which token of which sequence lies where.

**BlockAllocator** (reference counts) <- **SequenceTable** (sequences as lists of blocks; forks share them) -> **Step**
(index arrays of one forward pass) -> the caches of a framework, which hold the tensors and follow the indices.
On top, and the same for both frameworks: **Scheduler** (continuous batching) and ``generation``.
"""

from flash_attention_infer.core.allocator import BlockAllocator
from flash_attention_infer.core.errors import CacheError, DoubleFreeError, OutOfBlocksError, StaleSequenceError
from flash_attention_infer.core.ring import Ring
from flash_attention_infer.core.scheduler import Request, Scheduler
from flash_attention_infer.core.sequences import SequenceTable
from flash_attention_infer.core.step import Step

__all__ = [
    "BlockAllocator",
    "CacheError",
    "DoubleFreeError",
    "OutOfBlocksError",
    "Request",
    "Ring",
    "Scheduler",
    "SequenceTable",
    "StaleSequenceError",
    "Step",
]
