"""How attention tensors lie on a mesh: axis names by role, and PartitionSpecs made from them."""

import dataclasses

from jax.sharding import PartitionSpec

from flash_attention.core.errors import invalid_value
from flash_attention.jax.distributed.mesh import Axis, fitting
from flash_attention.jax.flexible.record import Record

TRAIN, PREFILL = "__train__", "__prefill__"
AUTOREGRESSIVE, INSERT = "__autoregressive__", "__insert__"
MODES = (TRAIN, PREFILL, AUTOREGRESSIVE, INSERT)


@dataclasses.dataclass(frozen=True)
class PartitionAxis(Record):
    """Mesh axes of each tensor axis; None = not sharded. The ``generation_*`` ones hold for queries of length 1.

    Attributes:
        batch_axis: the batch of every tensor.
        sequence_axis: the sequence of activations outside attention; attention takes the next two.
        query_sequence_axis, key_sequence_axis: sequence of query and output; of key and value.
        head_axis: heads. hidden_state_axis: the features of activations outside attention.
        attention_dim_axis: head_dim.
        bias_head_sequence_axis, bias_key_sequence_axis: heads and keys of a bias or mask.
        generation_query_sequence_axis, generation_head_axis, generation_key_sequence_axis,
        generation_attention_dim_axis: the same when decoding.
    """

    batch_axis: Axis = ("fsdp", "dp")
    sequence_axis: Axis = "sp"
    query_sequence_axis: Axis = "sp"
    head_axis: Axis = "tp"
    key_sequence_axis: Axis = "sp"
    hidden_state_axis: Axis = "tp"
    attention_dim_axis: Axis = None
    bias_head_sequence_axis: Axis = None
    bias_key_sequence_axis: Axis = None
    generation_query_sequence_axis: Axis = None
    generation_head_axis: Axis = "tp"
    generation_key_sequence_axis: Axis = "sp"
    generation_attention_dim_axis: Axis = None

    def specs(self, mode, bias_heads=False):
        """PartitionSpecs ``(query, key and value, bias and mask)`` of BTHD tensors in a mode.

        Args:
            mode: one of the four modes; the length-1 query of decode and insert is not sharded along the sequence.
            bias_heads: the bias has a value a head, to be sharded as the heads are.
        """
        check_mode(mode)
        if mode in (AUTOREGRESSIVE, INSERT):
            head, dim = self.generation_head_axis, self.generation_attention_dim_axis
            query_axis, key_axis = self.generation_query_sequence_axis, self.generation_key_sequence_axis
            bias = PartitionSpec(self.batch_axis, head if bias_heads else None, None, None)
        else:
            head, dim = self.head_axis, self.attention_dim_axis
            query_axis, key_axis = self.query_sequence_axis, self.key_sequence_axis
            bias_head = head if bias_heads else self.bias_head_sequence_axis
            bias = PartitionSpec(self.batch_axis, bias_head, query_axis, self.bias_key_sequence_axis)
        query = PartitionSpec(self.batch_axis, query_axis, head, dim)
        return query, PartitionSpec(self.batch_axis, key_axis, head, dim), bias


def check_mode(mode):
    """Raise ValueError unless ``mode`` is one of the four; returns it."""
    if mode not in MODES:
        raise invalid_value("attention", "mode", "one of {}".format(", ".join(map(repr, MODES))), repr(mode))
    return mode


def swapped(spec):
    """A spec of BTHD tensors as one of BHTD tensors."""
    batch, sequence, head, dim = spec
    return PartitionSpec(batch, head, sequence, dim)


def create_stable_sharding(state_ps, preserved_indices=None, clone_ps=None, dep=True, tensor=None, mesh=None):
    """A PartitionSpec reduced to what can be kept.

    Args:
        state_ps: PartitionSpec or None (gives None).
        preserved_indices: axes to keep, negative ones count from the end; None = all. The others become None.
        clone_ps: takes the kept axes from this spec instead.
        dep: None gives None: the tensor that the spec is for does not exist.
        tensor: array or shape; the spec is cut to its rank, and axes that are not in ``mesh`` or do not divide its
            dimension are dropped. Needs ``mesh``.

    Raises:
        IndexError: an index outside of the spec.
    """
    if dep is None or state_ps is None:
        return None
    entries = list(state_ps)
    if preserved_indices is not None:
        source, kept = list(clone_ps or state_ps), [None] * len(entries)
        for index in preserved_indices:
            if not -len(entries) <= index < len(entries):
                raise IndexError("index {} is outside of {}".format(index, state_ps))
            kept[index] = source[index]
        entries = kept
    if tensor is not None:
        if mesh is None:
            raise invalid_value("create_stable_sharding", "mesh", "given with tensor", None)
        shape = getattr(tensor, "shape", tensor)
        entries = [fitting(axis, mesh, size) for axis, size in zip(entries, shape)]
    return PartitionSpec(*entries)
