"""The portable MindSpore engine: FlashAttention-2 in MindSpore operators, for every device that has them.

engine.py is the entry; geometry.py (numpy) cuts the plan into rows, scores.py makes a row's scores, forward.py and
backward.py are the two passes, dropout.py the hash of ``core.dropout`` in operators.
"""

from flash_attention.ops.portable.engine import ENGINE

__all__ = ["ENGINE"]
