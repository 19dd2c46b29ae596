"""Attention over the ranks of a communication group, each with its own share of the sequence.

call.py (checks, plan) -> moves.py (placement, trade of heads) -> ring.py, or one core call -> back. Which tokens meet
where is ``core.context``; messages are ``ops.collectives``.
"""

from flash_attention.ops.context.call import STRATEGIES, context_attention

__all__ = ["STRATEGIES", "context_attention"]
