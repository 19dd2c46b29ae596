"""What the demo says at its end: the two trainings side by side, a plot, and the bounds that decide its exit code."""

import os

import numpy as np
from training import has

CURVE_STEPS = 50
CURVE_BOUND = 1e-3
TWIN_BOUND = 1e-4
CACHE_BOUND = 1e-4  # logits with a cache and without


def curve_difference(ours, naive):
    """Largest difference of two loss curves over their first 50 steps; NaN when one of them is not finite."""
    return float(np.abs(np.subtract(ours[:CURVE_STEPS], naive[:CURVE_STEPS])).max())


def step_seconds(seconds):
    """Median time of a step after the first three, which compile and warm up."""
    return float(np.median(seconds[3:] or seconds))


def comparison(ours, naive):
    """The table of the two trainings, as text."""
    ratio = step_seconds(naive["seconds"]) / step_seconds(ours["seconds"])
    rows = [("", "FlashAttention ({})".format(ours["engine"]), "naive attention")]
    rows += [
        (name, form.format(of(ours)), form.format(of(naive)))
        for name, form, of in (
            ("time per step", "{:.3f} s", lambda run: step_seconds(run["seconds"])),
            ("first step (with compilation)", "{:.1f} s", lambda run: run["seconds"][0]),
            ("whole training", "{:.0f} s", lambda run: sum(run["seconds"])),
            ("peak memory", "{:.0f} MiB", lambda run: run["memory"]),
            ("  of which training", "{:.0f} MiB", lambda run: run["memory"] - run["memory_before"]),
            ("last training loss", "{:.4f}", lambda run: run["losses"][-1]),
            ("held-out loss, nats a byte", "{:.4f}", lambda run: run["held_out"]),
        )
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  {:<{}}  {:>{}}  {:>{}}".format(*sum(zip(row, widths), ())) for row in rows]
    faster = "{:.2f} times as fast as".format(ratio) if ratio >= 1 else "{:.2f} times slower than".format(1 / ratio)
    return "\n".join(lines) + "\n  A step with FlashAttention is {} one with naive attention here.".format(faster)


def generation_table(runs):
    """Tokens a second of each framework, with the paged cache and without, as text."""
    rows = [("", "prefill, tokens/s", "decode, tokens/s")]
    for run in runs:
        for way, name in (("with cache", "with the paged cache"), ("without", "without a cache")):
            rows.append(("{}, {}".format(run["framework"], name),) + tuple("{:.0f}".format(x) for x in run[way]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  {:<{}}  {:>{}}  {:>{}}".format(*sum(zip(row, widths), ())) for row in rows)


def judge(checks):
    """(text, all held) of checks [(name, value, bound)]; a value must be a number below its bound."""
    lines, held = [], True
    for name, value, bound in checks:
        good = value < bound  # False for NaN
        held = held and good
        lines.append("  {:<6} {}: {:.3g} (bound {:g})".format("ok" if good else "FAILED", name, value, bound))
    return "\n".join(lines), held


def plot(ours, naive, path):
    """Write the loss curves as PNG; what was done, as text."""
    if not has("matplotlib"):
        return "no loss curve drawn: matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot(naive["losses"], label="naive attention", linewidth=3, alpha=0.4)
    left.plot(ours["losses"], label="FlashAttention ({})".format(ours["engine"]), linewidth=1)
    left.set(xlabel="step", ylabel="training loss, nats a byte")
    left.legend()
    right.semilogy(np.abs(np.subtract(ours["losses"], naive["losses"])) + 1e-12)
    right.axhline(CURVE_BOUND, linestyle=":", color="black")
    right.set(xlabel="step", ylabel="difference of the two curves")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return "loss curves: " + os.path.relpath(path)
