"""The table of training steps inside model libraries, from the results of `bench --integration`.

Part of build_docs.py, as tables.py is.
"""

ATTENTIONS = ("eager", "portable", "jax")
"""The library's own attention, then our engines."""


def steps(reports):
    """Rows [library, model, time and memory of each attention] from the reports of docs/benchmarks."""
    rows = []
    for report in reports:
        if report["command"].endswith("--integration"):
            library = report["name"].partition("-")[0]
            name = "`{}` {}".format(library, report["versions"][library])
            for model, found in _by_model(report["rows"]).items():
                rows.append([name, model] + [_cell(found, attention) for attention in ATTENTIONS])
    return rows


def _by_model(rows):
    """{model: {(kind, attention): row}}; a job is called 'MODEL step'."""
    found = {}
    for row in rows:
        found.setdefault(row["job"].split()[0], {})[row["kind"], row["label"]] = row
    return found


def _cell(found, attention):
    seconds = found["time", attention].get("median_s")
    extra = found["memory", attention].get("extra_bytes")
    parts = ["-" if seconds is None else "{:.2f} s".format(seconds)]
    parts += ["-" if extra is None else "{:.2f} GB".format(extra / 1e9)]
    return ", ".join(parts)
