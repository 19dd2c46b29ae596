"""Finished jobs as rows, table, JSON, CSV and a plot."""

import csv
import json
import os

from flash_attention.tools.bench.cases import same_pairs
from flash_attention.tools.bench.measure import ratio
from flash_attention.tools.bench.registry import FRAMEWORKS
from flash_attention.tools.table import format_table

_FIELDS = (
    "job", "kind", "direction", "label", "framework", "candidate", "case", "median_s", "ratio", "base", "gflops",
    "error", "first_s", "peak_bytes", "extra_bytes", "seconds", "failed", "times", "far_rounds",
)  # fmt: skip


def rows_of(jobs, finished):
    """One dict an entry of each finished job, ready for JSON."""
    rows = []
    for job in jobs:
        results = finished.get(job.id)
        if results is None:
            continue
        for entry in job.entries:
            result = dict(results[entry.label])
            base = results.get(job.base, {}) if job.base else {}
            row = dict(job=job.key, kind=job.kind, direction=job.direction, label=entry.label)
            row.update(framework=entry.framework, candidate=entry.candidate, case=entry.case.label(), **result)
            if "times" in result:
                framework = entry.framework.partition("/")[0]
                if framework in FRAMEWORKS and same_pairs(entry.candidate):  # a whole model has other work
                    factor = 3.5 if job.direction == "fwd+bwd" else 1.0  # the backward adds five products to two
                    row["gflops"] = entry.case.forward_flops() * factor / result["median_s"] / 1e9
                if base.get("times"):
                    row.update(base=job.base, ratio=ratio(result["times"], base["times"]))
            rows.append(row)
    return rows


def table(rows):
    """The rows as text, a blank left column where the job repeats."""
    header = ["job", "direction", "what", "time", "x base", "GFLOP/s", "error", "memory"]
    lines, last = [], None
    for row in rows:
        group = (row["kind"], row["job"], row["direction"])
        first = ["{}{}".format("" if row["kind"] == "time" else row["kind"] + " ", row["job"]), row["direction"]]
        lines.append((first if group != last else ["", ""]) + [row["label"]] + _cells(row))
        last = group
    return format_table(header, lines)


def _cells(row):
    if "failed" in row:
        return [row["failed"][:60], "", "", "", ""]
    error = max(row.get("error", {}).values(), default=None)
    return [
        _seconds(row.get("median_s", row.get("seconds"))),
        "{:.2f}".format(row["ratio"]) if "ratio" in row else "",
        "{:.0f}".format(row["gflops"]) if "gflops" in row else "",
        "" if error is None else "{:.0e}".format(error),
        "+{:.0f} MB, peak {:.0f} MB".format(row["extra_bytes"] / 1e6, row["peak_bytes"] / 1e6)
        if "extra_bytes" in row
        else "",
    ]


def _seconds(value):
    if value is None:
        return ""
    return "{:.3g} s".format(value) if value >= 1 else "{:.3g} ms".format(value * 1e3)


def figures_table(figures):
    """Each figure with its bound and whether it is met."""
    verdict = {True: "ok", False: "MISSED", None: "-"}
    lines = []
    for figure in figures:
        value = "not measured" if figure["value"] is None else "{:g} {}".format(figure["value"], figure["unit"])
        sign = ">=" if figure["at_least"] else "<="
        bound = "" if figure["bound"] is None else "{} {:g}".format(sign, figure["bound"])
        lines.append([figure["name"], value, bound, verdict[figure["ok"]]])
    return format_table(["figure", "value", "bound", ""], lines)


def write(path, document):
    """Write ``document`` to ``path`` (JSON) and its rows beside it (CSV). A crash leaves the old file whole."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=1)
        stream.write("\n")
    os.replace(path + ".tmp", path)
    with open(os.path.splitext(path)[0] + ".csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, _FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in document["rows"]:
            cells = dict(row, error=max(row.get("error", {}).values(), default=""))
            cells["times"] = " ".join(map(str, row.get("times", ())))
            writer.writerow(cells)


def plot(path, document):
    """Bars of time (or memory, or compile time) a job, one colour a label, to ``path`` (PNG).

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row["kind"], row["direction"]) for row in document["rows"]})
    figure, axes = pyplot.subplots(len(panels), 1, squeeze=False, figsize=(12, 4 * len(panels)))
    for axis, (kind, direction) in zip(axes[:, 0], panels):
        field = {"time": "median_s", "memory": "extra_bytes", "compile": "seconds"}[kind]
        rows = [r for r in document["rows"] if (r["kind"], r["direction"]) == (kind, direction) and r.get(field)]
        jobs = list(dict.fromkeys(row["job"] for row in rows))
        labels = list(dict.fromkeys(row["label"] for row in rows))
        width = 0.8 / max(len(labels), 1)
        for number, label in enumerate(labels):
            mine = {row["job"]: row[field] for row in rows if row["label"] == label}
            places = [i + number * width for i, job in enumerate(jobs) if job in mine]
            axis.bar(places, [mine[job] for job in jobs if job in mine], width, label=label)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(jobs))])
        axis.set_xticklabels(jobs, rotation=30, ha="right", fontsize=7)
        axis.set_yscale("log")
        axis.set_ylabel({"time": "seconds", "memory": "bytes beyond inputs", "compile": "seconds to compile"}[kind])
        axis.set_title("{}, {} {}, CPU class {}".format(document["name"], kind, direction, document["cpu_class"]))
        if labels:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
