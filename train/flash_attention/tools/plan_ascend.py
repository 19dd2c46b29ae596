"""`plan --ascend`: buffers, cycles and time of the Ascend 910 kernels for a call, by the cost model; and their picture.

Predicted from the instruction trace of the simulator, not measured on a device.
"""

import importlib

from flash_attention.ascend import cost
from flash_attention.ascend.chips import ASCEND_310P, ASCEND_910A
from flash_attention.ascend.schedule import PIPES
from flash_attention.ascend.tiles import candidate_seconds, candidate_tiles

CHIPS = {"910A": ASCEND_910A, "310P": ASCEND_310P}


def describe(args, spec):
    """The report as text; writes the picture of the forward kernel when ``args.plot`` names a file."""
    chip = CHIPS[args.ascend]
    predictions = [cost.predict(spec, direction, chip) for direction in cost.FLOPS]
    if args.plot:
        draw(predictions[0], args.plot)
    parts = ["Predicted for Ascend {} by the cost model, not measured on a device.".format(args.ascend)]
    for got in predictions:
        parts += ["", "{} kernel".format(got.direction), str(got.budget), ""] + choice(got, chip) + timing(got)
    front, form = cost.predict(spec, "preprocess", chip), "kernel in front of the backward one: {:.3f} ms, {:.2f} GB"
    parts += ["", form.format(1e3 * front.seconds, front.gm_bytes / 1e9)]
    parts += ["", "forward, by assumption"]
    for scenario in cost.SCENARIOS:
        got = predictions[0] if scenario is cost.ASSUMED else cost.predict(spec, "forward", chip, scenario)
        line = "  {:<48} {:>9.3f} ms, {} {:.0%} busy, cube {:.0%}"
        share = got.busy[got.bound] / got.cycles
        parts.append(line.format(scenario.name, 1e3 * got.seconds, got.bound, share, got.cube_utilisation))
    return "\n".join(parts)


def choice(got, chip):
    """A line on the tiles that the strategy chose from, where it had a choice."""
    spec = got.geometry.spec
    if len(candidate_tiles(spec, got.direction, chip)) == 1:
        return []
    times = candidate_seconds(spec, got.direction, chip)
    fastest_first = sorted(times, key=times.get)
    listed = ["{} x {} {:.3f} ms".format(tiles.q, tiles.kv, 1e3 * times[tiles]) for tiles in fastest_first]
    return ["strategy '{}' chose the first of {}".format(spec.tiling, ", ".join(listed))]


def timing(got):
    """Lines on time, what bounds it, and each pipe of the core that ends last."""
    tiles = got.geometry.tiles
    lines = [
        "tiles of {} x {}, {} resident; {} visited on the busiest core".format(
            tiles.q, tiles.kv, tiles.resident, got.pairs
        ),
        "{:.3f} ms, {:.0f} TFLOPS, {:.0%} of the cube's peak; bound by {}".format(
            1e3 * got.seconds, got.tflops, got.efficiency, got.bound
        ),
        "{:.2f} GB to and from global memory, hits in L2 included".format(got.gm_bytes / 1e9),
    ]
    lines += ["  {:<5} {:>12,.0f} cycles  {:>4.0%}".format(p, got.busy[p], got.busy[p] / got.cycles) for p in PIPES]
    form = (
        "cycles of a core, {}: {:,.0f} + {:,.0f} x tasks + {:,.0f} x tiles + {:,.0f} x bounds (off by at most {:.1%})"
    )
    return lines + [form.format(fit.name, fit.core, fit.task, fit.pair, fit.bound, fit.residual) for fit in got.fits]


def draw(got, path):
    """PNG: occupancy of each memory by its buffers, and when each pipe works during a short task."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (buffers, pipes) = pyplot.subplots(2, 1, figsize=(12, 7), constrained_layout=True)
    for scope, capacity in got.budget.chip.capacity:
        left = 0.0
        for buffer in got.budget.buffers:
            if buffer.scope == scope:
                width = 100.0 * buffer.bytes / capacity
                buffers.barh(scope, width, left=left, edgecolor="white")
                if width > 5:
                    buffers.text(left + width / 2, scope, buffer.name, ha="center", va="center", fontsize=7)
                left += width
    buffers.set(
        title="buffers of the {} kernel".format(got.direction), xlabel="% of what a kernel may use", xlim=(0, 100)
    )
    for pipe in PIPES:
        spans = [(start, stop - start) for record, start, stop in got.timeline.intervals if record.pipe == pipe]
        pipes.broken_barh(spans, (PIPES.index(pipe) - 0.4, 0.8))
    pipes.set(
        title="a core's first tasks, shortened; predicted", xlabel="cycles", yticks=range(len(PIPES)), yticklabels=PIPES
    )
    pipes.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
