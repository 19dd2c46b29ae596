"""Attention over many devices: batch (dp, fsdp), heads (tp) and sequence (sp) of one mesh."""

from flash_attention.jax.distributed.call import attention, explain
from flash_attention.jax.distributed.mesh import Axes, make_mesh
from flash_attention.jax.distributed.plan import STRATEGIES, Plan
from flash_attention.jax.distributed.processes import initialize

__all__ = ["STRATEGIES", "Axes", "Plan", "attention", "explain", "initialize", "make_mesh"]
