"""The cost model: cycles a pipe, time and what bounds it, of a whole call, from a few traced tasks of its own kernel.

The call's kernel is built as for the device and walked without data (``Tik.count``) for a few of its tasks, shortened
to a few key tiles, one alone and two in a row. Their schedules give, by least squares of relative errors, ``time of a
core = a0 + a1 * tasks + b * visited tile pairs``; the split of the tasks over the cores, the one that the kernel is
launched with, gives tasks and pairs of each core. The line holds within 5% where tasks are alike, as in calls of
thousands of tokens in whole tiles. In short calls, and where lengths end inside a tile, a tile with a bound is a large
share of a short sample: there a single task is off by up to 15%, but the sum over a core by 4% at most
(test_ascend_cost.py prints both).

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
    """``time of a core = core + task * tasks + pair * visited tile pairs``, in cycles.

    Attributes:
        name: 'forward', or the backward kernel's pass, 'keys' or 'queries'.
        core, task, pair: the coefficients.
        residual: largest relative error over the samples.
        samples: (tasks, visited, cycles) of each.
    """

    name: str
    core: float
    task: float
    pair: float
    residual: float
    samples: Tuple


@dataclass(frozen=True)
class Prediction:
    """What the model says of one call.

    Attributes:
        geometry: sizes and tiles of the kernel. direction: 'forward' or 'backward'.
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
        """Useful operations: those of the pairs that are visible, not of whole tiles."""
        spec = self.geometry.spec
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
        direction: 'forward' (with the log-sum-exp, as in training) or 'backward'.
        chip: :class:`~flash_attention.ascend.chips.Chip`.
        scenario: :class:`Scenario`.
        tiles: :class:`~flash_attention.ascend.geometry.KernelTiles`; None = the kernel's choice.

    Raises:
        UnsupportedError: the kernels do not take ``spec``.
        ValueError: no such direction.
    """
    if direction not in FLOPS:
        raise invalid_value("predict", "direction", "'forward' or 'backward'", repr(direction))
    reason = supports(spec)
    if reason is not None:
        raise reason.error(engine="tik")
    kernel = _KERNELS[direction]
    geometry = Geometry(spec, tiles or choose_tiles(spec, direction, chip))
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
        visited: visited tile pairs of each task of a head.
        shares: (cores, 2), [start, stop) of each core's part of the (head, task) sequence.
        column: where 'cores' holds those shares.
        tables: ``tables(most) -> (tables by name, visited)`` with at most ``most`` tiles in a task's inner loop.
    """

    name: str
    visited: np.ndarray
    shares: np.ndarray
    column: int
    tables: Callable

    @property
    def sampled(self):
        """[start, stop) of at most MOST_SAMPLED runs: the tasks with the fewest and the most visited tiles, each alone
        and with the next one."""
        firsts = np.unique(self.visited, return_index=True)[1]
        last = int(self.shares.max())
        return sorted(
            {(task, min(task + count, last)) for task in (int(firsts[0]), int(firsts[-1])) for count in (1, 2)}
        )


def _features(shares, visited):
    """(shares, 3): 1, tasks, and visited pairs of each [start, stop) of the (head, task) sequence."""
    total = np.concatenate([[0], np.cumsum(visited[np.arange(np.max(shares)) % len(visited)])])
    start, stop = np.asarray(shares).T
    return np.stack([np.ones(len(start)), stop - start, total[stop] - total[start]], axis=1)


class _Kernel(NamedTuple):
    """How one direction is built and what its tasks are."""

    build: Callable
    buffers: Callable
    passes: Callable


def _forward_passes(geometry, cores):
    plan, resident = geometry.plan(), geometry.tiles.resident
    table = tasks.query_tasks(plan, resident)
    firsts = [tasks.TASK_HEAD + slot * len(tasks.TILE_FIELDS) for slot in range(resident)]

    def tables(most):
        short = table.copy()
        start = table[:, 1] - most
        for column in [0] + firsts:
            short[:, column] = np.clip(start, short[:, column], short[:, column + 1])
        return {"tasks": short}, sum(short[:, column + 1] - short[:, column] for column in firsts)

    shares = tasks.split(host.task_loads(plan, resident), geometry.heads, cores)[:, :2]
    return [_Pass("forward", tables(geometry.kv_tiles)[1], shares, 0, tables)]


def _backward_passes(geometry, cores):
    plan, group = geometry.plan(), geometry.spec.group
    by_key, by_query = tasks.key_tasks(plan), tasks.query_tiles(plan)

    def key_tables(most):
        short = by_key.copy()
        short[:, 1] = np.minimum(short[:, 1], short[:, 0] + most)
        return {"key_tasks": short, "tiles": by_query}, (short[:, 1] - short[:, 0]) * group

    def query_tables(most):
        short = by_query.copy()
        short[:, 0] = np.maximum(short[:, 0], short[:, 1] - most)
        return {"key_tasks": by_key, "tiles": short}, short[:, 1] - short[:, 0]

    shares = pack_cores(geometry, cores)
    return [
        _Pass("keys", key_tables(geometry.q_tiles)[1], shares[:, :2], 0, key_tables),
        _Pass("queries", query_tables(geometry.kv_tiles)[1], shares[:, 2:4], 2, query_tables),
    ]


_KERNELS = {
    "forward": _Kernel(build_forward, forward_buffers, _forward_passes),
    "backward": _Kernel(build_backward, backward_buffers, _backward_passes),
}


# --- samples, and the whole call --------------------------------------------------------------------------------------
def _measure(built, one, issue):
    """(features, Schedule) of every sample, each on a core of its own."""
    shares = np.zeros((MOST_SAMPLED, tasks.CORE_FIELDS), np.int32)
    shares[: len(one.sampled), one.column : one.column + 2] = one.sampled
    measured, before = [], np.full(len(one.sampled), -1)
    for most in SAMPLE_TILES:
        feed, visited = one.tables(most)
        features = _features(one.sampled, visited)
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
        weights = 1.0 / values[:, :1]  # relative errors count, of short samples as of long ones
        factors = np.linalg.lstsq(weights * features, weights * values, rcond=None)[0]
        error = np.abs((features @ factors)[:, 0] / values[:, 0] - 1)
        points = [(int(row[1]), int(row[2]), cycles) for row, cycles in zip(features, values[:, 0].tolist())]
        fits.append(Fit(one.name, *factors[:, 0].tolist(), float(error.max()), tuple(points)))
        work = _features(one.shares, one.visited)
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
