"""How one attention call is spread over a mesh: the strategy, who holds which tokens, and which hops are needed.

AttentionSpec, Mesh -> **Plan** -> call.py. Everything here is Python integers, known before anything runs.

The sequence axis has ``parts`` devices: ``ring`` groups of ``ulysses`` neighbours. A group holds one shard of the
sequence, placed as :mod:`flash_attention.core.context` says; the all-to-all inside it trades tokens for heads, the ring
sends keys and values from group to group.
"""

import math
from dataclasses import dataclass
from typing import Optional, Tuple

from flash_attention.core.context import Placement, heads_needed, key_unit, needed_hops, takes_zigzag
from flash_attention.core.errors import Reason, invalid_value
from flash_attention.core.spec import AttentionSpec
from flash_attention.jax.distributed import volume
from flash_attention.jax.distributed.mesh import Axis, fitting, size_of

STRATEGIES = ("ring", "ulysses", "ring+ulysses", "gather", "merge")


@dataclass(frozen=True)
class Plan(Placement):
    """The static plan of one call; ``print`` explains it.

    Attributes:
        spec: the whole call.
        strategy: one of ``STRATEGIES``, or 'local' where the sequence is not split.
        batch, heads, sequence: mesh axes that split them (None = not split); kv_heads: those of key and value heads.
        batch_parts, head_parts, parts: devices along batch, heads and sequence.
        ring, ulysses: groups, and neighbours in a group; both 1 for 'gather', 'merge' and 'local'.
        zigzag: a shard is two mirrored chunks instead of one.
        q_pad, kv_pad: tokens added at the end, so that every chunk has the same length.
        hops: ((direction, groups), ...): keys travel so many groups up (1) or down (-1) the ring.
        notes: what is replicated, and why.
    """

    spec: AttentionSpec
    strategy: str
    batch: Axis
    heads: Axis
    kv_heads: Axis
    sequence: Optional[str]
    batch_parts: int
    head_parts: int
    parts: int
    ring: int = 1
    ulysses: int = 1
    zigzag: bool = False
    q_pad: int = 0
    kv_pad: int = 0
    hops: Tuple[Tuple[int, int], ...] = ((1, 0),)
    notes: Tuple[str, ...] = ()

    @property
    def q_chunk(self):
        """Queries of a chunk."""
        return (self.spec.q_len + self.q_pad) // (self.parts if self.strategy == "gather" else self.ring * self.chunks)

    @property
    def kv_chunk(self):
        """Keys of a chunk."""
        return (self.spec.kv_len + self.kv_pad) // (self.parts if self.strategy == "merge" else self.ring * self.chunks)

    @property
    def local_heads(self):
        """Query heads of a device before the all-to-all."""
        return self.spec.heads // self.head_parts

    @property
    def local_kv_heads(self):
        """Key/value heads of a device before the all-to-all."""
        if self.head_parts == 1:
            return self.spec.kv_heads
        if self.kv_heads is not None:
            return self.spec.kv_heads // self.head_parts
        return heads_needed(self.local_heads, self.spec.group)

    @property
    def ring_heads(self):
        """Query heads of a device after the all-to-all."""
        return self.local_heads // self.ulysses

    @property
    def ring_kv_heads(self):
        """Key/value heads of a device after the all-to-all."""
        if self.local_kv_heads % self.ulysses == 0:
            return self.local_kv_heads // self.ulysses
        return heads_needed(self.ring_heads, self.local_heads // self.local_kv_heads)

    def __str__(self):
        lines = ["{}: {} device(s) along the sequence".format(self.strategy, self.parts)]
        if self.ring > 1 or self.ulysses > 1:
            kind = "zig-zag" if self.zigzag else "contiguous"
            hops = " and ".join("{} {}".format(count, "up" if way > 0 else "down") for way, count in self.hops)
            lines.append("{} group(s) of {}, {} chunks, hops: {}".format(self.ring, self.ulysses, kind, hops))
        lines.append("a device sends {:,} B forward".format(volume.forward(self)))
        return "\n".join(lines + list(self.notes))


def make_plan(layer, spec, mesh, axes, strategy=None, ulysses=None):
    """The :class:`Plan` of a call.

    Args:
        layer: name used in error messages.
        mesh, axes: ``jax.sharding.Mesh`` and :class:`~flash_attention.jax.distributed.mesh.Axes`.
        strategy: one of ``STRATEGIES``; None = 'merge' for fewer queries than devices, else what is sent soonest.
        ulysses: neighbours that trade heads, for 'ring+ulysses'.

    Raises:
        UnsupportedError: the strategy cannot run this call, with the reason.
    """
    if strategy is not None and strategy not in STRATEGIES:
        names = ", ".join(map(repr, STRATEGIES))
        raise invalid_value(layer, "strategy", "None or one of {}".format(names), repr(strategy))
    if (ulysses is not None) != (strategy == "ring+ulysses"):
        raise invalid_value(layer, "ulysses", "given with strategy='ring+ulysses', and only then", ulysses)
    base = _base(layer, spec, mesh, axes)
    parts = base["parts"]
    if parts == 1:
        return Plan(spec, "local", **base)

    def plan(name):
        neighbours = {"ulysses": parts, "ring+ulysses": ulysses}.get(name, 1)
        return _laid_out(spec, name, neighbours, base)

    if strategy is not None:
        reason = _refusal(spec, strategy, ulysses, base)
        if reason is not None:
            raise reason.error(layer)
        return plan(strategy)
    if spec.q_len < parts:
        return plan("merge")
    return min(
        (plan(name) for name in ("ring", "ulysses", "gather") if not _refusal(spec, name, None, base)), key=volume.cost
    )


def _base(layer, spec, mesh, axes):
    """The fields of a Plan that do not depend on the strategy."""
    if axes.sequence is not None and not isinstance(axes.sequence, str):
        raise invalid_value(layer, "axes", "with a single mesh axis for the sequence", axes.sequence)
    batch, heads = fitting(axes.batch, mesh, spec.batch), fitting(axes.heads, mesh, spec.heads)
    parts, head_parts = size_of(axes.sequence, mesh), size_of(heads, mesh)
    split_kv = head_parts > 1 and spec.kv_heads % head_parts == 0
    notes = []
    for name, size, wanted, kept in (
        ("batch", spec.batch, axes.batch, batch),
        ("heads", spec.heads, axes.heads, heads),
    ):
        if size_of(wanted, mesh) != size_of(kept, mesh):
            notes.append("{} {} is not split by all of {}: replicated over the rest".format(name, size, wanted))
    if head_parts > 1 and not split_kv:
        notes.append("{} kv heads do not divide by {} = {}: replicated".format(spec.kv_heads, heads, head_parts))
    return {
        "batch": batch,
        "heads": heads if head_parts > 1 else None,
        "kv_heads": heads if split_kv else None,
        "sequence": axes.sequence if parts > 1 else None,
        "batch_parts": size_of(batch, mesh),
        "head_parts": head_parts,
        "parts": parts,
        "notes": tuple(notes),
    }


def _refusal(spec, strategy, ulysses, base):
    """Why a strategy cannot run a call, or None."""
    parts, heads = base["parts"], spec.heads // base["head_parts"]
    neighbours = {"ulysses": parts, "ring+ulysses": ulysses}.get(strategy, 1)
    if parts % neighbours:
        return Reason("ulysses", neighbours, "a divisor of the {} devices of the sequence axis".format(parts))
    if heads % neighbours:
        need = "a multiple of {} on a device (they are traded for tokens)".format(neighbours)
        return Reason("heads", heads, need, "Use strategy='ring'.")
    return None


def _laid_out(spec, strategy, ulysses, base):
    """The plan of one strategy: groups, padding, placement, hops."""
    parts = base["parts"]
    ring = parts // ulysses if strategy in ("ring", "ulysses", "ring+ulysses") else 1
    zigzag = takes_zigzag(spec, ring)
    block = key_unit(spec) if ring > 1 or strategy == "merge" else 1
    pieces = ring * (2 if zigzag else 1)
    q_unit, kv_unit = {
        "gather": (parts, parts),
        "merge": (1, parts * block),
    }.get(strategy, (pieces * ulysses, pieces * math.lcm(ulysses, block)))
    q_pad, kv_pad = -spec.q_len % q_unit, -spec.kv_len % kv_unit
    hops = ((1, ring - 1),)
    if ring > 1 and not zigzag:
        hops = needed_hops(spec, ring, (spec.q_len + q_pad) // ring, (spec.kv_len + kv_pad) // ring)
    return Plan(
        spec, strategy, ring=ring, ulysses=ulysses, zigzag=zigzag, q_pad=q_pad, kv_pad=kv_pad, hops=hops, **base
    )
