"""AttentionBaseConfig: the model-wide defaults that modules and metadata fill their unset arguments from."""

import dataclasses
from typing import Any, Optional, Tuple

import jax.numpy as jnp

from flash_attention.jax.distributed.mesh import make_mesh
from flash_attention.jax.flexible.partition import PartitionAxis
from flash_attention.jax.flexible.record import Record


@dataclasses.dataclass(frozen=True)
class AttentionBaseConfig(Record):
    """Defaults of a model. Any object with some of these attributes serves as ``base_config`` too.

    Attributes:
        axis_dims, axis_names: the mesh; one size may be -1: what is left of the devices.
        block_q, block_k, block_b: compute tile and batch rows a step.
        attn_mechanism: name of the mechanism, None = the module's default.
        attn_dtype: dtype that attention computes in.
        attn_softmax_dtype: of its softmax, must be float32.
        attention_axis_name: the mesh axis of the sequence.
        partition_axis: mesh axes by role.
        shard_attention_computation: compute each device's part of a mesh by itself (shard_map).
        scan_ring_attention: the ring's hops in one loop (compiles once) instead of one after the other.
        scan_attention_layers: must be False, see FlexibleAttentionModule.
        use_sharding_constraint: pin the layout of query, key, value and output.
        use_sharded_kv_caching: the keys of a cache stay sharded along the sequence when decoding.
        platform, backend: see FlexibleAttentionModule.
    """

    axis_dims: Tuple[int, ...] = (1, -1, 1, 1)
    axis_names: Tuple[str, ...] = ("dp", "fsdp", "tp", "sp")
    block_q: int = 128
    block_k: int = 128
    block_b: int = 1
    attn_mechanism: Optional[str] = None
    attn_dtype: Any = jnp.float32
    attn_softmax_dtype: Any = jnp.float32
    attention_axis_name: str = "sp"
    partition_axis: PartitionAxis = PartitionAxis()
    shard_attention_computation: bool = True
    scan_ring_attention: bool = True
    scan_attention_layers: bool = False
    use_sharding_constraint: bool = False
    use_sharded_kv_caching: bool = True
    platform: Optional[str] = None
    backend: Optional[str] = None

    def __post_init__(self):
        for name in ("attn_dtype", "attn_softmax_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))

    @property
    def mesh(self):
        """The mesh of all devices in the shape of ``axis_dims``."""
        return make_mesh(self.axis_dims, self.axis_names)


# Attribute of a base config for an argument whose name differs.
_ATTRIBUTES = {
    "blocksize_q": ("blocksize_q", "block_q"),
    "blocksize_k": ("blocksize_k", "block_k"),
    "blocksize_b": ("blocksize_b", "block_b"),
    "dtype": ("attn_dtype", "dtype"),
    "runtime_dtype": ("attn_dtype", "dtype"),
    "runtime_softmax_dtype": ("attn_softmax_dtype",),
    "axis_name": ("attention_axis_name",),
    "sequence_axis_name": ("attention_axis_name",),
    "softmax_scale": ("softmax_scale",),
}


def pick(config, name, default):
    """``config``'s value for the argument ``name``, or ``default`` where it has none (or None)."""
    if config is not None:
        for attribute in _ATTRIBUTES.get(name, (name,)):
            value = getattr(config, attribute, None)
            if value is not None and value is not ...:
                return value
    return default
