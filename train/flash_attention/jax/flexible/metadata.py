"""AttentionMetadata: the static half of a mechanism: where it runs, its scale, dropout, blocks and sharding."""

import dataclasses
from typing import Any, Optional

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import check_bool, check_int, check_rate, check_scale
from flash_attention.jax.flexible.config import pick
from flash_attention.jax.flexible.partition import AUTOREGRESSIVE, TRAIN, PartitionAxis, check_mode, swapped
from flash_attention.jax.flexible.record import Record

LAYER = "AttentionMetadata"
PLATFORMS = (None, "jax")
BACKENDS = (None, "cpu", "gpu", "cuda", "rocm", "tpu", "tt")


@dataclasses.dataclass(frozen=True)
class AttentionMetadata(Record):
    """Hashable, so that it can be a static argument of ``jax.jit``. ``...`` = from ``base_config``, else the default.

    Attributes:
        runtime_dtype: dtype of the computation and its output; default the query's.
        runtime_softmax_dtype: must be float32 (None or ``...`` become it): softmax statistics are float32 here.
        sequence_axis_name: mesh axis of the sequence, default 'sp'.
        mesh: ``jax.sharding.Mesh``; default ``base_config.mesh``. One of the two must be given.
        platform: family of the kernels: None or 'jax'.
        backend: 'cpu', 'gpu', 'cuda', 'rocm', 'tpu', 'tt', or None = where JAX computes; picks ``forward_*``.
        partition_axis: :class:`PartitionAxis`.
        partition_manager: not used; kept for callers that carry one.
        base_config: source of defaults.
        scan_ring_attention: the ring's hops in one loop, default True.
        shard_attention_computation: on a mesh of several devices each computes its own part (default); False leaves the
            partitioning to XLA, which gathers what a blockwise program slices.
        softmax_scale: factor on the scores; None = ``head_dim ** -0.5``.
        dropout_prob: probability of dropping a weight in training, default 0.
        blocksize_q, blocksize_k: compute tile of 'blockwise', default 512 and 1024; never changes a result.
        blocksize_b: batch rows a step, must be 1.
        segment_size, dilation_rate: of 'dilated', see FlexibleAttentionModule; None (default) for all others.
    """

    runtime_dtype: Any = ...
    runtime_softmax_dtype: Any = ...
    sequence_axis_name: Any = ...
    mesh: Any = ...
    platform: Optional[str] = ...
    backend: Optional[str] = ...
    partition_axis: Any = ...
    partition_manager: Any = None
    base_config: Any = None
    scan_ring_attention: bool = ...
    shard_attention_computation: bool = ...
    softmax_scale: Optional[float] = ...
    dropout_prob: float = ...
    blocksize_q: int = ...
    blocksize_k: int = ...
    blocksize_b: int = ...
    segment_size: Any = None
    dilation_rate: Any = None

    def __post_init__(self):
        if self.base_config is None and (self.mesh is None or self.mesh is ...):
            raise invalid_value(LAYER, "mesh", "given when there is no base_config", None)
        for name, default in _DEFAULTS.items():
            self.set_attrs_carefully(name, default)
        for name, default in (("runtime_dtype", None), ("runtime_softmax_dtype", jnp.float32)):
            value = getattr(self, name) or default
            object.__setattr__(self, name, None if value is None else jnp.dtype(value))
        for name in ("segment_size", "dilation_rate"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        self._check()

    def _check(self):
        if self.runtime_softmax_dtype != jnp.float32:
            raise invalid_value(LAYER, "runtime_softmax_dtype", "float32", self.runtime_softmax_dtype.name)
        if self.platform not in PLATFORMS:
            need, remedy = "None or 'jax'", "The kernels of this package are JAX programs on every platform."
            raise invalid_value(LAYER, "platform", need, repr(self.platform), remedy)
        if self.backend not in BACKENDS:
            raise invalid_value(LAYER, "backend", "one of {}".format(BACKENDS), repr(self.backend))
        if not isinstance(self.partition_axis, PartitionAxis):
            raise invalid_type(LAYER, "partition_axis", "a PartitionAxis", repr(self.partition_axis))
        for name in ("scan_ring_attention", "shard_attention_computation"):
            check_bool(LAYER, name, getattr(self, name))
        check_scale(LAYER, self.softmax_scale)
        check_rate(LAYER, "dropout_prob", self.dropout_prob)
        for name in ("blocksize_q", "blocksize_k"):
            check_int(LAYER, name, getattr(self, name), 1)
        check_int(LAYER, "blocksize_b", self.blocksize_b, 1, 1, "Engines compute one batch row at a time.")

    def set_attrs_carefully(self, attr, default, pickup_name=None, use_base_config=True):
        """Set an unset (``...``) attribute from ``base_config``'s ``pickup_name or attr``, else from ``default``.

        For construction (``__post_init__`` of subclasses too): afterwards a record does not change.
        """
        if getattr(self, attr, ...) is not ...:
            return
        config = self.base_config if use_base_config else None
        object.__setattr__(self, attr, pick(config, pickup_name or attr, default))

    @classmethod
    def from_config(cls, config, softmax_scale=None, dropout_prob=0.0):
        """Metadata with every default from ``config`` (an :class:`AttentionBaseConfig` or an object like it)."""
        return cls(base_config=config, softmax_scale=softmax_scale, dropout_prob=dropout_prob)

    def get_mode(self, q, BTHD=True):
        """'__autoregressive__' for a query of one token, else '__train__'; prefill and insert are given explicitly."""
        return AUTOREGRESSIVE if q.shape[1 if BTHD else 2] == 1 else TRAIN

    def get_shardings(self, mode, BTHD=True, qkv_mni_sharding=False):
        """PartitionSpecs of (query, key, value, bias, mask, output).

        Args:
            mode: '__train__', '__prefill__', '__autoregressive__' or '__insert__'; another is a ValueError.
            BTHD: the tensors' layout, else BHTD.
            qkv_mni_sharding: key and value are sharded over heads too; else their heads are replicated.
        """
        query, key, bias = self.partition_axis.specs(check_mode(mode))
        if not qkv_mni_sharding:
            key = PartitionSpec(key[0], key[1], None, None)
        if mode not in (TRAIN, "__prefill__") and not pick(self.base_config, "use_sharded_kv_caching", True):
            key = PartitionSpec(key[0], None, *key[2:])
        if not BTHD:
            query, key = swapped(query), swapped(key)
        return query, key, key, bias, bias, query


_DEFAULTS = {
    "runtime_dtype": None,
    "runtime_softmax_dtype": jnp.float32,
    "sequence_axis_name": "sp",
    "mesh": None,
    "platform": None,
    "backend": None,
    "partition_axis": PartitionAxis(),
    "scan_ring_attention": True,
    "shard_attention_computation": True,
    "softmax_scale": None,
    "dropout_prob": 0.0,
    "blocksize_q": 512,
    "blocksize_k": 1024,
    "blocksize_b": 1,
}
