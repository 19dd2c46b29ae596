"""KVCache: what the caches of both frameworks share. A framework adds the tensors and the attention.

config -> table (who holds which block) -> **reserve / step** -> Step -> prefill and decode of a framework.
"""

import contextlib

from flash_attention.core.validation import is_int
from flash_attention_infer.core.config import CacheConfig
from flash_attention_infer.core.errors import CacheError
from flash_attention_infer.core.ring import Ring
from flash_attention_infer.core.sequences import SequenceTable


class KVCache:
    """Base of the caches; use one of the three classmethods below.

    Sequences are named by ids, which are never used again. Every method succeeds whole or raises and changes nothing.

    Args:
        config: :class:`CacheConfig`.
        on_shortage: eviction hook, see :class:`SequenceTable`.
    """

    def __init__(self, config, on_shortage=None):
        self.config = config
        self.table = SequenceTable(
            config.num_blocks, config.block_size, config.max_blocks, config.ring, on_shortage=on_shortage
        )

    @classmethod
    def paged(cls, layers, num_blocks, kv_heads, head_dim, block_size=16, dtype="float32", on_shortage=None):
        """Sequences of any length over one pool of blocks; forks share blocks until they write (Kwon et al., 2023)."""
        return cls(CacheConfig(layers, num_blocks, block_size, kv_heads, head_dim, dtype), on_shortage)

    @classmethod
    def contiguous(cls, layers, batch, max_length, kv_heads, head_dim, dtype="float32", on_shortage=None):
        """Up to ``batch`` sequences of at most ``max_length`` tokens, a row each. A step of all rows moves nothing."""
        return cls(CacheConfig(layers, batch, max_length, kv_heads, head_dim, dtype, max_blocks=1), on_shortage)

    @classmethod
    def sliding(
        cls, layers, batch, window, kv_heads, head_dim, sink_tokens=0, lookahead=0, dtype="float32", on_shortage=None
    ):
        """Up to ``batch`` sequences of any length; kept are the last ``window`` tokens and the first ``sink_tokens``.

        ``lookahead`` tokens can be taken back (speculative decoding).
        """
        ring = Ring(window, sink_tokens, lookahead)
        return cls(CacheConfig(layers, batch, ring.capacity, kv_heads, head_dim, dtype, 1, ring), on_shortage)

    # --- sequences --------------------------------------------------------------------------------
    def add(self, count=None):
        """A new, empty sequence: its id; with ``count`` a list of so many."""
        return self.table.add() if count is None else [self.table.add() for _ in range(count)]

    def fork(self, sequence):
        """A new sequence that begins with the same tokens, without a copy of them: its id."""
        return self.table.fork(sequence)

    def free(self, sequences):
        """End one sequence or several and give up their blocks."""
        self.table.free([sequences] if is_int(sequences) else sequences)

    def truncate(self, sequence, length):
        """Take back the last tokens of a sequence, so that ``length`` remain."""
        self.table.truncate(sequence, length)

    def length(self, sequence):
        """Tokens of a sequence."""
        return self.table.length(sequence)

    @property
    def free_blocks(self):
        """Blocks that nobody holds."""
        return self.table.free_blocks

    # --- steps ------------------------------------------------------------------------------------
    def reserve(self, sequences, counts, rows=None, tokens=None):
        """Room for ``counts[b]`` tokens more of ``sequences[b]``: the :class:`Step` for prefill and decode.

        The tokens count as present from now on; every layer must then write them. Prefer :meth:`step`.
        ``rows`` and ``tokens`` pad the step, see :meth:`SequenceTable.reserve`.

        Raises:
            OutOfBlocksError, StaleSequenceError, ValueError: nothing has changed.
        """
        step = self.table.reserve(sequences, counts, rows, tokens)
        if len(step.copies):
            self.copy_blocks(step.copies)
        return step

    @contextlib.contextmanager
    def step(self, sequences, counts, rows=None, tokens=None):
        """``with cache.step(...) as step:`` is :meth:`reserve`, and takes the tokens back when the block raises.

        A sequence of a ring whose window may be overwritten by then is freed instead.
        """
        step = self.reserve(sequences, counts, rows, tokens)
        try:
            yield step
        except BaseException:
            for sequence, start in zip(step.sequences, step.starts.tolist()):
                self._take_back(sequence, start)
            raise

    def _take_back(self, sequence, start):
        if sequence not in self.table.live or self.length(sequence) <= start:
            return
        try:
            self.truncate(sequence, start)
        except CacheError:
            self.free(sequence)

    # --- what a framework adds --------------------------------------------------------------------
    def copy_blocks(self, pairs):
        """Copy blocks (from, to) in every layer; int32 (c, 2)."""
        raise NotImplementedError

    def prefill(self, layer, step, query, key, value, **options):
        """Write the step's tokens into a layer and attend to all tokens up to each one's own."""
        raise NotImplementedError

    def decode(self, layer, step, query, key, value, **options):
        """:meth:`prefill` for a few tokens a sequence."""
        raise NotImplementedError

    def sample(self, logits, seeds, positions, **sampling):
        """The framework's ``sample`` for generation: logits (B, V), uint32 numpy (B,) twice -> int32 numpy (B,)."""
        raise NotImplementedError
