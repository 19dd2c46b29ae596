"""Flexible attention: one factory over many mechanisms, and the registry that they join with one decorated class."""

from flash_attention.jax.distributed.mesh import make_mesh
from flash_attention.jax.flexible import entries  # noqa: F401  (registers the mechanisms)
from flash_attention.jax.flexible.benchmark import BenchmarkTable, run_attention_benchmarks
from flash_attention.jax.flexible.cache import FlaxAttentionModule, KVCache
from flash_attention.jax.flexible.config import AttentionBaseConfig
from flash_attention.jax.flexible.metadata import AttentionMetadata
from flash_attention.jax.flexible.module import FlexibleAttentionModule
from flash_attention.jax.flexible.output import AttentionOutput
from flash_attention.jax.flexible.partition import PartitionAxis, create_stable_sharding
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry

__all__ = [
    "AttentionBaseConfig",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionOutput",
    "AttentionRegistry",
    "BenchmarkTable",
    "FlaxAttentionModule",
    "FlexibleAttentionModule",
    "KVCache",
    "PartitionAxis",
    "create_stable_sharding",
    "make_mesh",
    "run_attention_benchmarks",
]
