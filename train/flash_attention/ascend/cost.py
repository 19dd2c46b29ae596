"""The cost model: cycles a pipe, time and what bounds it, of a whole call, from a few traced tasks of its own kernel.

The call's kernel is built as for the device and walked without data (``Tik.count``) for a few of its tasks, shortened
to a few key tiles, one alone and two in a row. Their schedules give, by least squares of relative errors, ``time of a
core = a0 + a1 * tasks + b * visited tile pairs + c * bounds in them``; the split of the tasks over the cores, the one
that the kernel is launched with, gives all three counts of each core. The line holds within 5% in calls
of thousands of tokens in whole tiles. In short calls, and where lengths end inside a tile, a single task is off by up
to 11%, the sum over a core by 4% at most (test_ascend_cost.py prints both).

The rates are those of :class:`~flash_attention.ascend.simulator.chips.Rates`, with their sources; :data:`SCENARIOS`
vary what is assumed.
Nothing here was measured on a device.
"""

from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, NamedTuple, Tuple

import numpy as np

from flash_attention.ascend import host, tasks
from flash_attention.ascend.backward import build_backward
from flash_attention.ascend.backward_arguments import pack_cores
from flash_attention.ascend.backward_budget import backward_buffers
from flash_attention.ascend.budget import Budget, forward_buffers
from flash_attention.ascend.chips import ASCEND_910A
from flash_attention.ascend.forward import build_forward
from flash_attention.ascend.geometry import Geometry
from flash_attention.ascend.limits import supports
from flash_attention.ascend.preprocess import build_preprocess
from flash_attention.ascend.preprocess_arguments import preprocess_buffers, preprocess_constants
from flash_attention.ascend.schedule import PIPES, Schedule, schedule
from flash_attention.ascend.simulator import SimulatorParams, Toolkit
from flash_attention.ascend.simulator.chips import Rates
from flash_attention.ascend.tiles import choose_tiles
from flash_attention.core.errors import invalid_value

SAMPLE_TILES = (2, 4, 8)
"""Tiles of the inner loop that the sampled tasks are shortened to."""
MOST_SAMPLED = 4
"""Sampled runs of tasks of a pass, a core each."""

FLOPS = {"forward": 4, "backward": 10}
"""Floating-point operations for a visible (query, key) pair and head dimension: two products, or five."""


class Scenario(NamedTuple):
    """What is assumed where no figure is published.

    Attributes:
        name: shown in reports.
        rates: from the chip's rates to those of the scenario.
        issue: cycles an instruction occupies its pipe beyond those of its data.
    """

    name: str
    rates: Callable[[Rates], Rates] = lambda rates: rates
    issue: int = 0


ASSUMED = Scenario("as assumed")
SCENARIOS = (
    ASSUMED,
    Scenario("exp, ln and division at the full vector rate", lambda rates: replace(rates, slow_vector=1)),
    Scenario("all reads from L2, none from HBM", lambda rates: replace(rates, gm_read=rates.l2_read)),
    Scenario("10 more cycles an instruction", issue=10),
)
"""A first line for the tables, then one for each assumption that matters."""


class Fit(NamedTuple):
    """``time of a core = core + task * tasks + pair * visited tile pairs + bound * bounds``, in cycles.

    Attributes:
        name: 'forward', or a pass of the others: 'pieces', or 'keys' and 'queries'.
        core, task, pair, bound: the coefficients; bounds that every sampled task has alike count as part of a task.
        residual: largest relative error over the samples.
        samples: (tasks, visited, bounds, cycles) of each.
    """

    name: str
    core: float
    task: float
    pair: float
    bound: float
    residual: float
    samples: Tuple


@dataclass(frozen=True)
class Prediction:
    """What the model says of one call.

    Attributes:
        geometry: sizes and tiles of the kernel. direction: 'forward', 'preprocess' or 'backward'.
        budget: :class:`~flash_attention.ascend.budget.Budget` of its buffers.
        clock: cycles a second. peak: the cube's operations a second, all cores.
        cycles: of the core that ends last. busy: pipe -> cycles it works on that core.
        gm_bytes: read and written by all cores; what hits L2 is counted too.
        pairs: visited tile pairs of the busiest core.
        fits: one :class:`Fit` a pass.
        timeline: :class:`~flash_attention.ascend.schedule.Schedule` of a sampled task.
    """

    geometry: Geometry
    direction: str
    budget: Budget
    clock: float
    peak: float
    cycles: float
    busy: Dict[str, float]
    gm_bytes: float
    pairs: int
    fits: List[Fit]
    timeline: Schedule = field(repr=False)

    @property
    def seconds(self):
        """Time of the call, launch not included."""
        return self.cycles / self.clock

    @property
    def bound(self):
        """The pipe that works longest."""
        return max(PIPES, key=lambda pipe: self.busy[pipe])

    @property
    def residual(self):
        """The largest relative error of the fits."""
        return max(fit.residual for fit in self.fits)

    @property
    def cube_utilisation(self):
        """Share of the time in which the cube works, 0..1."""
        return self.busy["M"] / self.cycles

    @property
    def flops(self):
        """Useful operations: those of the pairs that are visible, not of whole tiles; 'preprocess' has no pairs."""
        spec = self.geometry.spec
        if self.direction not in FLOPS:
            return 2 * spec.head_dim * spec.q_len * spec.batch * spec.heads
        first, last = tasks.visible_keys(self.geometry.plan())
        visible = int(np.maximum(last - first + 1, 0).sum())
        return FLOPS[self.direction] * spec.head_dim * visible * spec.batch * spec.heads

    @property
    def tflops(self):
        """Useful operations a second, in 10**12."""
        return self.flops / self.seconds / 1e12

    @property
    def efficiency(self):
        """Useful operations a second over the cube's peak, 0..1."""
        return self.flops / self.seconds / self.peak


def predict(spec, direction="forward", chip=ASCEND_910A, scenario=ASSUMED, tiles=None):
    """The :class:`Prediction` of one call; takes about a second.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec` in float16.
        direction: 'forward' (with the log-sum-exp, as in training), 'backward', or 'preprocess': the kernel in front of
            the backward one.
        chip: :class:`~flash_attention.ascend.chips.Chip`.
        scenario: :class:`Scenario`.
        tiles: :class:`~flash_attention.ascend.geometry.KernelTiles`; None = the kernel's choice.

    Raises:
        UnsupportedError: the kernels do not take ``spec``.
        ValueError: no such direction.
    """
    if direction not in _KERNELS:
        raise invalid_value("predict", "direction", "'forward', 'preprocess' or 'backward'", repr(direction))
    reason = supports(spec)
    if reason is not None:
        raise reason.error(engine="tik")
    kernel = _KERNELS[direction]
    geometry = Geometry(spec, tiles or choose_tiles(spec, kernel.tiles, chip))
    toolkit = Toolkit(SimulatorParams(execute=False), soc=chip.soc)
    rates = scenario.rates(toolkit.chip.rates)
    toolkit.chip = replace(toolkit.chip, rates=rates)
    passes = kernel.passes(geometry, chip.cores)
    built = kernel.build(toolkit.tik, geometry, MOST_SAMPLED)
    clock = 1e6 * rates.clock_mhz
    whole = _whole_call([_measure(built, one, scenario.issue) for one in passes], passes)
    return Prediction(
        geometry=geometry,
        direction=direction,
        budget=Budget(kernel.buffers(geometry), chip),
        clock=clock,
        peak=2 * 16**3 * rates.cube_fractals * clock * chip.cores,
        **whole,
    )


# --- tasks of a kernel ------------------------------------------------------------------------------------------------
class _Pass(NamedTuple):
    """The tasks of one outer loop of a kernel.

    Attributes:
        name: of the pass.
        counts: (tasks of a head, 2), visited tile pairs and bounds of each, see :func:`_counts`.
        shares: (cores, 2), [start, stop) of each core's part of the (head, task) sequence.
        column: where 'cores' holds those shares.
        tables: ``tables(most) -> (tables by name, counts)`` with at most ``most`` tiles in a task's inner loop.
    """

    name: str
    counts: np.ndarray
    shares: np.ndarray
    column: int
    tables: Callable

    @property
    def sampled(self):
        """[start, stop) of at most MOST_SAMPLED runs: the tasks with the fewest and the most visited tiles, each alone
        and with the next one."""
        firsts = np.unique(self.counts[:, 0], return_index=True)[1]
        last = int(self.shares.max())
        return sorted(
            {(task, min(task + count, last)) for task in (int(firsts[0]), int(firsts[-1])) for count in (1, 2)}
        )


def _features(shares, counts):
    """(shares, 4): 1, tasks, visited pairs and bounds of each [start, stop) of the (head, task) sequence."""
    total = np.cumsum(counts[np.arange(np.max(shares)) % len(counts)], axis=0)
    total = np.concatenate([np.zeros_like(total[:1]), total])
    start, stop = np.asarray(shares).T
    return np.column_stack([np.ones(len(start)), stop - start, total[stop] - total[start]])


def _counts(first, stop, costly):
    """(tasks, 2): tiles of [first, stop), and how many of them lie in a range of ``costly``, once for each range."""
    inside = [np.maximum(np.clip(high, first, stop) - np.clip(low, first, stop), 0) for low, high in costly]
    return np.stack([stop - first, sum(inside, np.zeros_like(first))], axis=1)


def _costly_keys(tile, spec, bounded):
    """Ranges of key tiles whose scores take more passes, from a table's :data:`tasks.TILE_FIELDS`.

    Those with a lower and those with an upper bound, and those that ALiBi's diagonal crosses.
    """
    below, above = bounded
    ranges = [(tile["first"], tile["low_stop"])] if below else []
    ranges += [(tile["high_first"], tile["stop"])] if above else []
    return ranges + ([(tile["before_stop"], tile["after_first"])] if spec.alibi_shape is not None else [])


def _fields(table):
    """The columns of a table of :data:`tasks.TILE_FIELDS`, by name."""
    return dict(zip(tasks.TILE_FIELDS, table.T))


class _Kernel(NamedTuple):
    """How one direction is built, whose tiles it takes, and what its tasks are."""

    tiles: str
    build: Callable
    buffers: Callable
    passes: Callable


def _forward_passes(geometry, cores):
    plan, resident = geometry.plan(), geometry.tiles.resident
    table, width = tasks.query_tasks(plan, resident), len(tasks.TILE_FIELDS)
    firsts = [tasks.TASK_HEAD + slot * width for slot in range(resident)]
    bounded = geometry.bounded_below, geometry.bounded_above

    def tables(most):
        short = table.copy()
        start = table[:, 1] - most
        for column in [0] + firsts:
            short[:, column] = np.clip(start, short[:, column], short[:, column + 1])
        tiles = [_fields(short[:, column : column + width]) for column in firsts]
        counts = [_counts(tile["first"], tile["stop"], _costly_keys(tile, geometry.spec, bounded)) for tile in tiles]
        return {"tasks": short}, sum(counts)

    shares = tasks.split(host.task_loads(plan, resident), geometry.heads, cores)[:, :2]
    return [_Pass("forward", tables(geometry.kv_tiles)[1], shares, 0, tables)]


def _backward_passes(geometry, cores):
    plan, spec = geometry.plan(), geometry.spec
    by_key, by_query = tasks.key_tasks(plan), tasks.query_tiles(plan)
    bounded = spec.band.bounded_below, spec.band.bounded_above  # keys that do not exist cost nothing here

    def key_tables(most):
        short = by_key.copy()
        short[:, 1] = np.minimum(short[:, 1], short[:, 0] + most)
        first, stop, low_first, high_stop = short[:, :4].T
        costly = [(low_first, stop)] if bounded[0] else []
        costly += [(first, high_stop)] if bounded[1] else []
        if spec.alibi_shape is not None:
            key, tile = np.arange(len(short)), _fields(by_query)
            crossed = (np.searchsorted(tile[name], key, side="right") for name in ("after_first", "before_stop"))
            costly.append(tuple(crossed))
        return {"key_tasks": short, "tiles": by_query}, _counts(first, stop, costly) * spec.group

    def query_tables(most):
        short = by_query.copy()
        short[:, 0] = np.maximum(short[:, 0], short[:, 1] - most)
        tile = _fields(short)
        counts = _counts(tile["first"], tile["stop"], _costly_keys(tile, spec, bounded))
        return {"key_tasks": by_key, "tiles": short}, counts

    shares = pack_cores(geometry, cores)
    return [
        _Pass("keys", key_tables(geometry.q_tiles)[1], shares[:, :2], 0, key_tables),
        _Pass("queries", query_tables(geometry.kv_tiles)[1], shares[:, 2:4], 2, query_tables),
    ]


def _preprocess_passes(geometry, cores):
    """Pieces of a head are the tasks, all alike: they visit no tile pair."""
    shares = preprocess_constants(geometry, cores)["cores"][:, :2]
    counts = np.zeros((int(shares.max()) // geometry.heads, 2), int)
    return [_Pass("pieces", counts, shares, 0, lambda most: ({}, counts))]


_KERNELS = {
    "forward": _Kernel("forward", build_forward, forward_buffers, _forward_passes),
    "preprocess": _Kernel("backward", build_preprocess, preprocess_buffers, _preprocess_passes),
    "backward": _Kernel("backward", build_backward, backward_buffers, _backward_passes),
}


# --- samples, and the whole call --------------------------------------------------------------------------------------
def _measure(built, one, issue):
    """(features, Schedule) of every sample, each on a core of its own."""
    shares = np.zeros((MOST_SAMPLED, tasks.CORE_FIELDS), np.int32)
    shares[: len(one.sampled), one.column : one.column + 2] = one.sampled
    measured, before = [], np.full(len(one.sampled), -1)
    for most in SAMPLE_TILES:
        feed, counts = one.tables(most)
        features = _features(one.sampled, counts)
        longer = np.flatnonzero(features[:, 2] > before).tolist()
        trace = built.count(dict(feed, cores=shares), longer)
        measured += [(features[core], schedule(trace.cores[core], issue)) for core in longer]
        before = features[:, 2]
    return measured


def _whole_call(measured, passes):
    """The fields of :class:`Prediction` that the samples of each pass give."""
    fits, totals, pairs = [], 0, 0
    for one, samples in zip(passes, measured):
        features = np.array([row for row, _ in samples])
        values = np.array([[s.cycles] + [s.busy[pipe] for pipe in PIPES] + [s.gm_bytes] for _, s in samples])
        factors = _least_squares(features, values)
        error = np.abs((features @ factors)[:, 0] / values[:, 0] - 1)
        points = [
            tuple(row) + (cycles,) for row, cycles in zip(features[:, 1:].astype(int).tolist(), values[:, 0].tolist())
        ]
        fits.append(Fit(one.name, *factors[:, 0].tolist(), float(error.max()), tuple(points)))
        work = _features(one.shares, one.counts)
        totals, pairs = totals + work @ factors, pairs + work[:, 2]
    last = int(np.argmax(totals[:, 0]))
    return {
        "cycles": float(totals[last, 0]),
        "busy": dict(zip(PIPES, totals[last, 1:-1].tolist())),
        "gm_bytes": float(totals[:, -1].sum()),
        "pairs": int(pairs[last]),
        "fits": fits,
        "timeline": measured[0][-1][1],
    }


def _least_squares(features, values):
    """Factors of each feature, one column a value. Errors relative to the first value count, of short samples as of
    long ones. Bounds that do not vary apart from tasks and pairs get none: what they cost is in the others' factors."""
    weights = 1.0 / values[:, :1]
    rank = np.linalg.matrix_rank
    used = 4 if rank(weights * features) > rank(weights * features[:, :3]) else 3
    factors = np.linalg.lstsq(weights * features[:, :used], weights * values, rcond=None)[0]
    return np.pad(factors, ((0, 4 - used), (0, 0)), "constant")
