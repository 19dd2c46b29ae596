"""Step: the index arrays of one forward pass over a cache, made by SequenceTable, followed by the frameworks."""

from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np


@dataclass(frozen=True)
class Step:
    """``counts[b]`` new tokens of sequence ``b`` of the batch, padded to T >= max(counts).

    The batch may be padded too, by rows without tokens. A *slot* is ``block * block_size + offset``, the place of one
    token in every layer's pool.

    Attributes:
        starts: int32 (B,), tokens in the cache before the step: the position of the first new one.
        counts: int32 (B,), new tokens; 0 in a row of padding.
        slots: int32 (B, T), where each new token goes; -1 = nowhere (padding, or overwritten within this step).
        tables: int32 (B, n), blocks of each sequence in order, padded with its last one.
        history: int32 (B, window), rings only: slots of the tokens just before ``starts``, oldest first; those that
            do not exist or are sink tokens are the row's first slot.
        sinks: int32 (B, sink_tokens), rings only: slots of the sink tokens.
        copies: int32 (c, 2), blocks (from, to) to copy before anything is written; None once that is done.
        sequences: ids, without the padding.
        fresh: True when no sequence has earlier tokens.
        whole: True when ``tables`` is 0 .. num_blocks - 1, one block a sequence: the pool itself is the batch.
    """

    starts: np.ndarray
    counts: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    history: Optional[np.ndarray] = None
    sinks: Optional[np.ndarray] = None
    copies: Optional[np.ndarray] = None
    sequences: Tuple[int, ...] = ()
    fresh: bool = False
    whole: bool = False

    @property
    def lengths(self):
        """int32 (B,), tokens in the cache after the step."""
        return self.starts + self.counts

    @property
    def batch(self):
        """B, rows of the step."""
        return self.slots.shape[0]

    @property
    def tokens(self):
        """T, places for new tokens in a row."""
        return self.slots.shape[1]

    @property
    def last(self):
        """int32 (B,): which of the B * T places has a sequence's last new token, whose logits choose the next one."""
        return np.arange(self.batch, dtype=np.int32) * self.tokens + self.counts - (self.counts > 0)
