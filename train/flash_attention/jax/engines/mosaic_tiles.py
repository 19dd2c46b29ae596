"""What the kernels of the `mosaic` engine share: operands, the order of visited tiles, the ring of stages, scores.

The plan and the rows' bounds are those of :mod:`pallas_tiles`, made outside of the kernels from ``core.ranges``. A
block has three warpgroups (Shah et al., "FlashAttention-3", 2024, section 3.1): the last copies the streamed tiles into
a ring of stages, by TMA, and the first two compute on them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention.jax.engines import mosaic_sizes as sizes
from flash_attention.jax.engines import pallas_tiles
from flash_attention.jax.engines.mosaic_operations import ROW, along
from flash_attention.jax.engines.pallas_arithmetic import units
from flash_attention.jax.engines.shared import padding_cleared
from flash_attention.jax.engines.xla_tiles import masked_inside


def operands_of(spec, ops, tiles, query, key, value, operands, plan, **more):
    """``{name: array}`` of what every kernel reads.

    Tensors of heads have the rows that :meth:`Hopper.padded` asks for, of zeros; vectors have whole tiles. Rows that do
    not exist see no key: their ``low`` is above their ``high``.

    Args:
        plan: int32 (1|B, tiles, 4), see :func:`pallas_tiles.plan_by_query`.
        more: ``d_out`` like the query, ``lse`` and ``delta`` float32 (B, N, Sq).
    """
    band, lengths = pallas_tiles.operands_of(spec, query, key, value, operands, plan), operands.q_lengths
    low, high = band["low"][0], band["high"][0]
    if lengths is not None:
        high = jnp.where(jnp.arange(spec.q_len) < jnp.asarray(lengths)[:, None], high, -1)
    # A length may cut into a tile: what lies beyond it must not reach 0 * NaN in a product.
    key, value = (padding_cleared(spec, x, operands.kv_lengths) for x in (key, value))
    query = padding_cleared(spec, query, lengths)
    found = {name: _padded_heads(spec, ops, x, tiles.keys) for name, x in (("key", key), ("value", value))}
    found["query"] = _padded_heads(spec, ops, query, tiles.rows)
    found.update(plan=plan, offset=band["counts"][0][:, :1])
    vectors = {"low": (low, tiles.rows, 0), "high": (high, tiles.rows, -1)}
    if "d_out" in more:
        found["d_out"] = _padded_heads(spec, ops, more["d_out"].astype(query.dtype), tiles.rows)
        vectors.update(lse=(more["lse"], tiles.rows, jnp.inf), delta=(more["delta"], tiles.rows, 0.0))
    if spec.segments:
        ids = operands.q_segment_ids, operands.kv_segment_ids
        vectors["q_segments"], vectors["kv_segments"] = (
            (x.astype(jnp.int32), tile, 0) for x, tile in zip(ids, (tiles.rows, tiles.keys))
        )
    for name, (x, tile, absent) in vectors.items():
        widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % tile)]
        found[name] = jnp.pad(x, widths, constant_values=absent)
    for name in ("slopes", "sinks"):
        if name in band:
            found[name] = band[name][0].reshape(-1, spec.heads)
    return found


def _padded_heads(spec, ops, x, tile):
    axis = 1 if spec.layout == "BSND" else 2
    widths = [(0, 0)] * 4
    widths[axis] = 0, ops.padded(x.shape[axis], tile) - x.shape[axis]
    return jnp.pad(x, widths) if widths[axis][1] else x


def cut(spec, x, length):
    """A tensor of heads without its padding."""
    return x[:, :length] if spec.layout == "BSND" else x[:, :, :length]


class Program:
    """What a block sees: where it stands, and the operands in global memory.

    Attributes:
        spec: the call; units: how the kernel computes, :class:`pallas_arithmetic.Units`.
        tile, head, batch: index of the resident tile, of its head (of keys for dK and dV) and batch row.
        own: rows of the resident tile that a warpgroup owns; start: the first of them; place: head, start and own.
    """

    def __init__(self, spec, tiles, ops, direction, refs):
        self.spec, self.tiles, self.ops, self.refs = spec, tiles, ops, refs
        self.units = units(spec, "mosaic")
        self.tile, self.head, self.batch, self.warpgroup = (lax.axis_index(name) for name in AXES)
        resident, self.streamed = sizes.sides(tiles, direction)
        self.own = resident // sizes.WARPGROUPS
        self.start = self.tile * resident + self.warpgroup * self.own
        self.place = self.head, self.start, self.own

    def __contains__(self, name):
        return name in self.refs

    def _row(self, ref):
        return self.batch if ref.shape[0] > 1 else 0

    def heads(self, ref, head, start, count):
        """``count`` rows of a head, (count, D), of an operand's name or of an output."""
        ref = self.refs[ref] if isinstance(ref, str) else ref
        part = pl.ds(start, count)
        return ref.at[self.batch, part, head] if self.spec.layout == "BSND" else ref.at[self.batch, head, part]

    def scalar(self, name, *index):
        """One value of a (1|B, ...) operand."""
        ref = self.refs[name]
        return ref[(self._row(ref),) + index]

    def values(self, name, start, count, head=None):
        """``count`` values of a (1|B, S), or of a head of a (B, N, S), operand."""
        ref = self.refs[name]
        return ref.at[(self._row(ref),) + (() if head is None else (head,)) + (pl.ds(start, count),)]

    def vector(self, *values, axis=ROW):
        """:meth:`values` in registers."""
        return self.ops.load(self.values(*values), axis)

    def visits(self):
        """:class:`Visits` of the resident tile."""
        first, stop, inner, end = (self.scalar("plan", self.tile, number) for number in range(4))
        count = stop - first
        if masked_inside(self.spec):
            return Visits(count, count, lambda n: first + n)
        if not pallas_tiles.has_edges(self.spec, self.tiles):
            return Visits(count, 0, lambda n: first + n)
        before = inner - first
        edges = before + stop - end

        def tile(n):
            edge = lax.select(n < before, first + n, end + n - before)
            return lax.select(n < edges, edge, inner + n - edges)

        return Visits(count, edges, tile)


AXES = ("tile", "head", "batch", "warpgroup")
"""The first varies fastest: what runs at the same time are tiles of one head, which read the same tiles of another."""


class Visits(NamedTuple):
    """The streamed tiles of a block: so many, those with a predicate first, and the index of the n-th."""

    count: jax.Array
    edges: jax.Array
    tile: object

    def sweep(self, visit, carry):
        """``carry = visit(n, tile, edge, carry)`` over them."""
        if not isinstance(self.edges, int):
            carry = lax.fori_loop(0, self.edges, lambda n, carry: visit(n, self.tile(n), True, carry), carry)
        return lax.fori_loop(self.edges, self.count, lambda n, carry: visit(n, self.tile(n), False, carry), carry)


class Ring(NamedTuple):
    """Stages of one streamed operand: (stages, rows, D) in shared memory, and a barrier a stage for each direction."""

    buffer: object
    filled: object  # by the copies
    consumed: object  # by both warpgroups that compute
    values: object = None  # (stages, rows) float32 that come with it

    def copy(self, step, source, values=None):
        """Copy a tile into the stage of ``step`` once its predecessor there was consumed."""
        stages = self.buffer.shape[0]
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(self.consumed.at[slot])

        plgpu.copy_gmem_to_smem(source, self.buffer.at[slot], self.filled.at[slot])
        if values is not None:
            plgpu.copy_gmem_to_smem(values, self.values.at[slot], self.filled.at[slot])

    def wait(self, step):
        """The tile of ``step``, when it has arrived."""
        slot = lax.rem(step, jnp.int32(self.buffer.shape[0]))
        plgpu.barrier_wait(self.filled.at[slot])
        return self.buffer.at[slot]

    def values_of(self, step):
        """What came with the tile of ``step``, after :meth:`wait`."""
        return self.values.at[lax.rem(step, jnp.int32(self.buffer.shape[0]))]

    def release(self, step):
        """This warpgroup has read the tile of ``step``."""
        if self.values is not None:  # by ordinary loads: TMA may write there again only after a fence
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.consumed.at[lax.rem(step, jnp.int32(self.buffer.shape[0]))])

    def drain(self, count):
        """Wait until all of ``count`` tiles were consumed."""
        stages = self.buffer.shape[0]

        def last(step, carry):
            plgpu.barrier_wait(self.consumed.at[lax.rem(step, jnp.int32(stages))])
            return carry

        lax.fori_loop(jnp.maximum(count - stages, 0), count, last, None)


def scratch(spec, ops, tiles, direction, dtype):
    """Scratch of a kernel by name: ``resident`` buffers, ``row`` values on their way out, two ``rings``."""
    resident, streamed = sizes.sides(tiles, direction)
    own = resident // sizes.WARPGROUPS

    def heads(*shape):
        return plgpu.SMEM(shape + (spec.head_dim,), dtype, transforms=ops.transforms)

    with_values = direction == "key"  # the LSE and delta of the streamed queries
    ring = Ring(
        heads(tiles.stages, streamed),
        plgpu.Barrier(num_arrivals=1 + with_values, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=sizes.WARPGROUPS, num_barriers=tiles.stages),
        plgpu.SMEM((tiles.stages, streamed), jnp.float32) if with_values else None,
    )
    operands = 1 if direction == "forward" else 2
    return {
        "resident": [heads(sizes.WARPGROUPS, own) for _ in range(operands)],
        "arrived": plgpu.Barrier(num_arrivals=operands, num_barriers=sizes.WARPGROUPS),
        "row": plgpu.SMEM((sizes.WARPGROUPS, own), jnp.float32),
        "rings": [ring, ring],
    }


def call(spec, ops, tiles, direction, kernel, name, grid, found, outs):
    """Run ``kernel(program, out_refs, resident, arrived, row, rings)`` on a grid of (tiles, heads, batch)."""

    def body(refs, *out_refs_and_scratch, **scratch):
        kernel(Program(spec, tiles, ops, direction, refs), out_refs_and_scratch, **scratch)

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=outs,
        scratch_types=scratch(spec, ops, tiles, direction, found["query"].dtype),
        grid=grid[::-1],
        grid_names=AXES[2::-1],
        num_threads=sizes.WARPGROUPS + 1,
        thread_name=AXES[3],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **ops.options,
    )(found)


def fetch(program, names, resident, arrived):
    """Start copying what a warpgroup owns of the operands ``names``: ``(its buffers, the barrier to wait at)``."""
    buffers, barrier = [buffer.at[program.warpgroup] for buffer in resident], arrived.at[program.warpgroup]
    for name, buffer in zip(names, buffers):
        plgpu.copy_gmem_to_smem(program.heads(name, *program.place), buffer, barrier)
    return buffers, barrier


def by_role(program, compute, copy):
    """Give the warpgroups their registers and their work."""

    @pl.when(program.warpgroup < sizes.WARPGROUPS)
    def _():
        plgpu.set_max_registers(sizes.COMPUTING_REGISTERS, action="increase")
        compute()

    @pl.when(program.warpgroup == sizes.WARPGROUPS)
    def _():
        plgpu.set_max_registers(sizes.COPYING_REGISTERS, action="decrease")
        copy()


class Rows:
    """Queries of a tile: what its scores depend on beside q and k.

    Attributes:
        start, count: the first and how many; axis: the one of the tile along which they lie; head: theirs.
    """

    NAMES = ("low", "high", "q_segments")

    def __init__(self, program, start, count, axis, head, held=False):
        """``held``: their vectors stay in registers, for all tiles; else they are read where a tile needs them."""
        self.program, self.start, self.count, self.axis, self.head = program, start, count, axis, head
        self._held = {}
        if held:
            self._held = {name: self[name] for name in self.NAMES if name in program}

    def __getitem__(self, name):
        """One of :attr:`NAMES`, the first and last key that each sees and its segment."""
        if name in self._held:
            return self._held[name]
        return self.program.vector(name, self.start, self.count, axis=self.axis)


def distance(rows, key_start, shape):
    """|p - j| of a tile in float32, measured from the first query: exact wherever it is below 2**24."""
    program, base = rows.program, key_start - rows.start - rows.program.scalar("offset", 0)
    query, key = program.ops.iota(shape, rows.axis), program.ops.iota(shape, 1 - rows.axis)
    return jnp.abs(query.astype(jnp.float32) - (key + base).astype(jnp.float32))


def scores(s, rows, key_start, edge):
    """Scores of a tile from its products, hidden ones -inf, and tanh's value (None without a soft cap).

    As :func:`xla_tiles.scores`; here a warpgroup's registers hold whole tiles, so that vectors are repeated to them.

    Args:
        s: Q K^T, (queries, keys), or its transpose.
        edge: whether the tile needs a predicate.
    """
    program, axis, shape = rows.program, rows.axis, s.shape
    spec, factor, by = program.units
    s, squashed = s * spec.scale, None
    if spec.soft_cap is not None:
        squashed = by.tanh(s * (1.0 / spec.soft_cap))
        s = squashed * spec.soft_cap
    if "slopes" in program:
        s = s - program.scalar("slopes", rows.head) * factor * distance(rows, key_start, shape)
    if edge:
        key = program.ops.iota(shape, 1 - axis) + key_start
        s = jnp.where(key >= along(rows["low"], shape, axis), s, -jnp.inf)
        s = jnp.where(key <= along(rows["high"], shape, axis), s, -jnp.inf)
        if spec.segments:
            own = program.vector("kv_segments", key_start, shape[1 - axis], axis=1 - axis)
            same = along(rows["q_segments"], shape, axis) == along(own, shape, 1 - axis)
            s = jnp.where(same, s, -jnp.inf)
    return s, squashed
