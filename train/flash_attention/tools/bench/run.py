"""`python -m flash_attention bench [NAME ...]`: run benchmarks, resume unfinished ones, print and save the tables."""

import datetime
import glob
import json
import os
import time

from flash_attention.tools import machine
from flash_attention.tools.bench import limits, registry, report
from flash_attention.tools.bench.distance import Cores
from flash_attention.tools.bench.measure import Pool, fresh_job, time_job
from flash_attention.tools.table import format_table, progress

_STOPPED = 3  # exit code: out of time, run the same command again to go on


def add_arguments(parser):
    """Names and where the results go."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all); see --list")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument(
        "--integration", action="store_true", help="run the benchmarks of the model library that is installed here"
    )
    out = os.path.join("docs", "benchmarks")
    parser.add_argument("--out", default=out, metavar="DIR", help="folder of the results (default {})".format(out))
    parser.add_argument("--minutes", type=float, default=20.0, help="start no job of a NAME after this (default 20)")
    parser.add_argument("--fresh", action="store_true", help="measure again what an interrupted run has finished")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two jobs a NAME: shows that it runs, no more")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS",
        help="how long a NAME may wait for a virtual machine's cores to share a cache again (default 0)",
    )  # fmt: skip
    parser.add_argument("--plot", action="store_true", help="also draw a PNG (matplotlib)")


def run(args):
    """Run the named benchmarks; returns 0, or 3 when one stopped for lack of time (run again to resume)."""
    benchmarks = registry.load()
    if args.list:
        print(format_table(["name", "what"], [[b.name, b.about] for b in benchmarks.values()]))
        return 0
    unknown = [name for name in args.names if name not in benchmarks]
    if unknown:
        args.parser.error("NAME must be one of {}, but got {}.".format(", ".join(benchmarks), ", ".join(unknown)))
    for name in args.names:
        lacks = benchmarks[name].refusal()
        if lacks:
            args.parser.error("'{}' needs {}.".format(name, lacks))
    if machine.idle_cores():
        print("This machine: {}".format(machine.idle_cores()))
    here = {name: benchmark for name, benchmark in benchmarks.items() if not benchmark.refusal()}
    names = args.names or [name for name, benchmark in here.items() if not benchmark.library]
    if args.integration:
        names = [name for name, benchmark in here.items() if benchmark.library]
        if args.names or not names:
            args.parser.error(
                "--integration needs a model library and no NAME; `bash build.sh bench --integration` installs them."
            )
    code = 0
    for name in names:
        code = max(code, run_one(benchmarks[name], args))
    return code


def run_one(benchmark, args):
    """Run one benchmark; prints its tables, writes its files."""
    jobs = quick_jobs(benchmark.jobs()) if args.quick else benchmark.jobs()
    suffix = "-quick" if args.quick else ""
    path = os.path.join(args.out, "{}-{}{}.json".format(benchmark.name, benchmark.place(), suffix))
    digest = machine.source_digest(benchmark.sources, benchmark.package)
    stamp = {"versions": benchmark.versions, "source": digest}
    partial = Partial(path + ".partial", stamp, fresh=args.fresh or args.quick)
    pool, cores = Pool(), Cores(nearest=nearest_round_trip(args.out), patience=args.wait)
    try:
        if "limits" not in partial.content:
            cores.wait()
            partial.keep("limits", limits.measure(pool, benchmark.frameworks))
        done = run_jobs(jobs, partial, pool, benchmark, args, cores)
    finally:
        pool.close()
    if cores.nearest is not None:
        partial.keep("limits", dict(partial.content["limits"], cores={"round_trip_ns": cores.nearest}))
    document = document_of(benchmark, jobs, partial.content)
    print("\n{} ({}), class {}".format(benchmark.name, document["date"], document["place"]))
    print(format_table(["limit"] + sorted(document["limits"]), _limit_rows(document["limits"])))
    print(report.table(document["rows"]))
    print(report.figures_table(document["figures"] + document["not_measured"]))
    if not done:
        print("stopped after {:g} minutes; run the same command again to go on".format(args.minutes))
        return _STOPPED
    if args.quick:  # tiny sizes say nothing about the bounds
        document.update(quick=True, figures=[])
    report.write(path, document)
    partial.remove()
    if args.plot:
        report.plot(os.path.splitext(path)[0] + ".png", document)
    print("written to {}".format(path))
    return 0


def run_jobs(jobs, partial, pool, benchmark, args, cores):
    """Measure the jobs that ``partial`` lacks; False when the time ran out before the last one.

    Jobs that were timed while the cores were far apart get a second chance at the end: the better result is kept.
    """
    end = time.monotonic() + 60 * args.minutes
    bar = progress(len(jobs), benchmark.name)

    def measure(job):
        bar.set_postfix_str(job.id)
        return measure_job(pool, job, benchmark.budget, cores, args.quick)

    try:
        for job in jobs:
            if job.id not in partial.content["jobs"]:
                if time.monotonic() > end:
                    return False
                partial.keep_job(job.id, measure(job))
            bar.update()
        for job in jobs:
            found = partial.content["jobs"][job.id]
            if shortcomings(found)[1] and time.monotonic() <= end:
                partial.keep_job(job.id, min(found, measure(job), key=shortcomings))
    finally:
        bar.close()
    return True


def shortcomings(results):
    """``(failed entries, rounds timed while the cores were far apart)`` of a job's result ``{label: ...}``."""
    failed = sum("failed" in result for result in results.values())
    return failed, max((result.get("far_rounds", 0) for result in results.values()), default=0)


def nearest_round_trip(folder):
    """The shortest round trip between two cores in earlier results from this processor, or None."""
    found = []
    for path in glob.glob(os.path.join(folder, "*-{}.json".format(machine.cpu_class()))):
        with open(path, encoding="utf-8") as stream:
            document = json.load(stream)
        if document.get("cpu") == machine.cpu_name() and "cores" in document["limits"]:
            found.append(document["limits"]["cores"]["round_trip_ns"])
    return min(found, default=None)


def measure_job(pool, job, budget, cores, quick=False):
    """``{label: result}`` of one job."""
    if job.kind == "time":
        return time_job(pool, job, budget=0.0 if quick else budget, cores=cores)
    return fresh_job(job, job.kind)


def quick_jobs(jobs):
    """The first and the last job, on small cases."""
    return [
        job._replace(entries=tuple(entry._replace(case=entry.case.shrunk()) for entry in job.entries))
        for job in (jobs[:1] + jobs[1:][-1:])
    ]


def document_of(benchmark, jobs, content):
    """What is saved: name, date, versions, CPU, limits, rows, figures and the command that made them."""
    where = {"cpu_class": machine.cpu_class(), "limits": content["limits"]}
    figures = benchmark.figures(registry.Results(content["jobs"]), where)
    return {
        "name": benchmark.name,
        "date": datetime.date.today().isoformat(),
        "versions": content["stamp"]["versions"],
        "source": content["stamp"]["source"],
        "cpu": machine.cpu_name(),
        "cpu_class": where["cpu_class"],
        "place": benchmark.place(),
        "idle_cores": machine.idle_cores(),
        "limits": content["limits"],
        "rows": report.rows_of(jobs, content["jobs"]),
        "figures": [figure for figure in figures if figure["value"] is not None],
        "not_measured": [figure for figure in figures if figure["value"] is None],
        "command": "bash build.sh bench {}".format("--integration" if benchmark.library else benchmark.name),
    }


def _limit_rows(measured):
    names = list(dict.fromkeys(name for limit in measured.values() for name in limit))
    columns = sorted(measured)
    return [[name] + [_number(measured[column].get(name, "")) for column in columns] for name in names]


def _number(value):
    return "{:.3g}".format(value) if isinstance(value, float) else str(value)[:40]


class Partial:
    """Finished jobs of an unfinished run, on disk. Those of other versions or other code are not mixed in."""

    def __init__(self, path, stamp, fresh=False):
        self.path = path
        self.content = {"stamp": stamp, "jobs": {}}
        if not fresh and os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                found = json.load(stream)
            if found["stamp"] == stamp:
                self.content = found
            else:
                print("{}: measured with other code or versions, measuring again".format(path))

    def keep(self, name, value):
        """Store one entry and save."""
        self.content[name] = value
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path + ".tmp", "w", encoding="utf-8") as stream:
            json.dump(self.content, stream)
        os.replace(self.path + ".tmp", self.path)

    def keep_job(self, key, result):
        """Store a finished job and save."""
        self.keep("jobs", dict(self.content["jobs"], **{key: result}))

    def remove(self):
        """Forget: the final file is written."""
        if os.path.exists(self.path):
            os.remove(self.path)
