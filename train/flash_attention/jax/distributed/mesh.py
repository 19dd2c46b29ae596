"""The mesh: which of its axes split what, and shard_map under one name for every JAX from 0.6 on."""

from typing import NamedTuple, Optional, Tuple, Union

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from flash_attention.core.errors import invalid_value

Axis = Optional[Union[str, Tuple[str, ...]]]


class Axes(NamedTuple):
    """Mesh axes by role; those that the mesh lacks count as size 1.

    Attributes:
        batch: data parallel (dp, fsdp). heads: tensor parallel. sequence: context parallel, a single axis.
    """

    batch: Axis = ("fsdp", "dp")
    heads: Axis = "tp"
    sequence: Axis = "sp"


def make_mesh(axis_dims, axis_names=("dp", "fsdp", "tp", "sp"), devices=None):
    """A mesh of ``axis_dims``, of which one may be -1 (what is left of ``devices``, default all).

    Raises:
        ValueError: sizes that do not fit the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices, dtype=object).reshape(-1)
    dims = list(axis_dims)
    known = int(np.prod([size for size in dims if size != -1]))
    good = len(dims) == len(axis_names) and dims.count(-1) <= 1 and all(size > 0 or size == -1 for size in dims)
    if good and -1 in dims:
        good = devices.size % known == 0
        dims[dims.index(-1)] = devices.size // known
    if not good or int(np.prod(dims)) != devices.size:
        need = "{} sizes with product {}, at most one of them -1".format(len(axis_names), devices.size)
        raise invalid_value("make_mesh", "axis_dims", need, tuple(axis_dims))
    return Mesh(devices.reshape(dims), tuple(axis_names))


def names_of(axis):
    """Mesh axes of one entry of a PartitionSpec as a tuple."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def size_of(axis, mesh):
    """Into how many parts ``axis`` splits."""
    return int(np.prod([mesh.shape.get(name, 1) for name in names_of(axis)]))


def fitting(axis, mesh, size):
    """The part of a PartitionSpec entry that ``mesh`` has and whose product divides ``size``; None when none is left.

    Axes are dropped from the end: a batch of 4 on ("fsdp": 4, "dp": 2) keeps "fsdp".
    """
    kept = [name for name in names_of(axis) if name in mesh.shape]
    while kept and size % size_of(tuple(kept), mesh):
        kept.pop()
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else tuple(kept)


def index_along(axis):
    """This device's index along ``axis`` (inside shard_map), int32; 0 where nothing is split."""
    return lax.axis_index(names_of(axis)) if names_of(axis) else np.int32(0)


def shard_map(function, mesh, in_specs, out_specs):
    """``jax.shard_map`` without its check of replication, which knows nothing of custom derivatives."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    from jax.experimental.shard_map import shard_map as experimental

    return experimental(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=False)
