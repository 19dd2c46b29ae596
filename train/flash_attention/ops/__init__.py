"""MindSpore: the functional call and the engines below it (tik, aclnn, jax, portable)."""

from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import flash_attention

__all__ = ["ENGINES", "flash_attention"]
