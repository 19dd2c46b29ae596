"""The table that closes `bash build.sh test all`: each "Must show" figure, its bound, when and by what it was measured.

Figures come from two places: tests record theirs through the `figure` fixture (kept in .flash/figures.json), benchmarks
keep theirs in docs/benchmarks/*.json:

    {"name": ..., "date": "YYYY-MM-DD", "versions": {...}, "cpu_class": "A", "command": "bash build.sh bench NAME",
     "figures": [{"name": ..., "value": 1.2, "bound": 1.5 or null, "unit": "x", "at_least": false}]}

    python tests/must_show.py [--since EPOCH]     figures at least as new as EPOCH count as 'measured now'
"""

import argparse
import ast
import datetime
import json
import os
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STORE = os.path.join(ROOT, ".flash", "figures.json")
BENCHMARKS = os.path.join(ROOT, "docs", "benchmarks")


def load(path=STORE):
    """Recorded figures, {name: entry}; empty before the first test has recorded one."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


def entry(name, value, bound=None, unit="", at_least=False, largest=False):
    """One figure of a test, measured now. ``largest``: of all values of one run the largest counts."""
    return {
        "name": name,
        "value": float(value),
        "bound": None if bound is None else float(bound),
        "unit": unit,
        "at_least": bool(at_least),
        "largest": bool(largest),
        "time": time.time(),
        "command": os.environ.get("FLASH_COMMAND", "pytest"),
    }


RUN_START = float(os.environ.get("FLASH_RUN_START") or time.time())


def keep(entries, path=STORE):
    """Put the entries into the store; the newest of a name wins, or the largest of this run."""
    if not entries:
        return
    figures = load(path)
    for new in entries:
        old = figures.get(new["name"])
        if not (new["largest"] and old and old["time"] >= RUN_START and old["value"] > new["value"]):
            figures[new["name"]] = new
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w", encoding="utf-8") as stream:
        json.dump(figures, stream, indent=1)
    os.replace(path + ".new", path)  # a run that is stopped here leaves the old file whole


def holds(entry):
    """True when the value is within the bound, or there is none. NaN is never within one."""
    if entry.get("bound") is None:
        return True
    if entry.get("at_least"):
        return entry["value"] >= entry["bound"]
    return entry["value"] <= entry["bound"]


def value_text(entry):
    return "{:.4g} {}".format(entry["value"], entry.get("unit") or "").strip()


def bound_text(entry):
    """'<= 5 x', '>= 3', or '-' for a figure that is only reported."""
    if entry.get("bound") is None:
        return "-"
    return "{} {:.4g} {}".format(
        ">=" if entry.get("at_least") else "<=", entry["bound"], entry.get("unit") or ""
    ).strip()


def declared(folder=None):
    """Names that the tests pass to `figure(...)` as literals, so that a figure no test has recorded is still listed."""
    names = []
    for where, _, files in os.walk(folder or os.path.join(ROOT, "tests")):
        for name in sorted(files):
            if name.startswith("test_") and name.endswith(".py"):
                with open(os.path.join(where, name), encoding="utf-8") as stream:
                    names += _figure_names(ast.parse(stream.read()))
    return names


def _figure_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "figure" and node.args:
            try:
                name = ast.literal_eval(node.args[0])
            except ValueError:  # built at run time: listed once it has been recorded
                continue
            if isinstance(name, str):
                yield name


def benchmark_figures(folder=BENCHMARKS):
    """Entries of docs/benchmarks/*.json, each with its file's date and command."""
    entries = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".json"):
            with open(os.path.join(folder, name), encoding="utf-8") as stream:
                report = json.load(stream)
            for figure in report.get("figures", []):
                entries.append(dict(figure, date=report["date"], command=report["command"]))
    return entries


def rows(figures, benchmarks, names, since):
    """Rows (name, value, bound, verdict, when) of `figures` {name: entry}, `benchmarks` entries and other `names`."""
    table = []
    for entry in list(figures.values()) + benchmarks:
        if entry.get("time", 0) >= since:
            when = "measured now"
        else:
            date = entry.get("date") or datetime.date.fromtimestamp(entry["time"]).isoformat()
            when = "measured {} by `{}`".format(date, entry["command"])
        verdict = "-" if entry.get("bound") is None else "ok" if holds(entry) else "MISSED"
        table.append((entry["name"], value_text(entry), bound_text(entry), verdict, when))
    known = {row[0] for row in table}
    table += [(name, "", "", "", "not measured") for name in sorted(set(names) - known)]
    return table


def draw(table):
    """The rows as aligned text."""
    table = [("figure", "value", "bound", "", "when")] + table
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[4] for row in table]
    return "\n".join([lines[0], "-" * max(map(len, lines))] + lines[1:])


def main():
    parser = argparse.ArgumentParser(description="print every 'Must show' figure")
    parser.add_argument("--since", type=float, default=float("inf"), metavar="EPOCH", help="what counts as 'now'")
    args = parser.parse_args()
    print("\nMust show")
    print(draw(rows(load(), benchmark_figures(), declared(), args.since)))


if __name__ == "__main__":
    main()
