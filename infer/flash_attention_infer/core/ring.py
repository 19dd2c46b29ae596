"""Ring: where the tokens of a sliding window lie in a row of fixed length, with the first tokens kept for good.

Keeping the first tokens ("attention sinks") keeps a model fluent after its window has moved on: Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", ICLR 2024.
"""

from dataclasses import dataclass

from flash_attention.core.validation import check_int


@dataclass(frozen=True)
class Ring:
    """``sink_tokens`` fixed places, then a ring. Methods use operators only: ints, numpy and traced arrays all work.

    Attributes:
        window: tokens before a query that it sees, beside itself and the sink tokens.
        sink_tokens: first tokens of a sequence that every later one sees.
        lookahead: tokens that ``truncate`` can take back once the ring has gone round (speculative decoding).
    """

    window: int
    sink_tokens: int = 0
    lookahead: int = 0

    def __post_init__(self):
        check_int("Ring", "window", self.window, 1)
        check_int("Ring", "sink_tokens", self.sink_tokens, 0)
        check_int("Ring", "lookahead", self.lookahead, 0)

    @property
    def size(self):
        """Places in the ring: what the next query sees, and what may be taken back."""
        return self.window + self.lookahead

    @property
    def capacity(self):
        """Places of a row."""
        return self.sink_tokens + self.size

    def place(self, position):
        """Place in the row of the token at ``position``."""
        past = position >= self.sink_tokens
        return past * (self.sink_tokens + (position - self.sink_tokens) % self.size) + (1 - past) * position

    def keeps(self, position, length):
        """Whether the token at ``position`` is still there when ``length`` tokens have been written."""
        return (position < self.sink_tokens) | (position >= length - self.size)
