"""Binding: a plan becomes one closure over numpy views that checks marks, computes, marks and leaves a record."""

from .trace import TraceRecord, overlap, span


class SyncCheck:
    """Accesses since the last synchronisation, for scopes in which the compiler inserts none."""

    def __init__(self):
        self.recent = []

    def reset(self):
        self.recent = []

    def access(self, call, record):
        """Report when ``record`` depends on an earlier one of another pipe."""
        for old in self.recent:
            if old.pipe != record.pipe:
                for mine, theirs in (
                    (record.reads, old.writes),
                    (record.writes, old.writes),
                    (record.writes, old.reads),
                ):
                    for left in mine:
                        if any(overlap(left, right) for right in theirs):
                            call.fail(
                                "sync", left.name, "synchronised between the pipes that use it",
                                "{} on {} after {} on {} with disable_sync=True".format(
                                    record.name, record.pipe, old.name, old.pipe),
                            )  # fmt: skip
        self.recent.append(record)


def bind(machine, statement, plan, parities):
    """The closure that executes ``plan``; ``parities``: register index -> copy used by doubled buffers."""
    steps = [_execution(machine, statement, plan)] if machine.executes(statement) else []
    wanted = machine.trace is not None or statement.block.no_sync
    if wanted and plan.costs:
        steps.append(_recording(machine, statement, plan, parities))
    if len(steps) == 1:
        return steps[0]

    def run():
        for step in steps:
            step()

    return run


def _recording(machine, statement, plan, parities):
    def spans(accesses, operands):
        return tuple(
            span(access, parities.get(getattr(access.buffer.thread_loop, "index", None)))
            for access in accesses
            if operands is None or access.operand in operands
        )

    records = [
        TraceRecord(
            statement.row.name, cost.pipe, cost.cycles, cost.bytes, statement.line, part,
            spans(plan.reads, cost.operands), spans(plan.writes, cost.operands),
        )
        for part, cost in enumerate(plan.costs)
    ]  # fmt: skip

    def run():
        if statement.block.no_sync:
            for record in records:
                machine.sync.access(statement.call, record)
        if machine.records is not None:
            machine.records.extend(records)

    return run


def _execution(machine, statement, plan):
    writes = [access.views() for access in plan.writes]
    reads = [access.views() for access in plan.reads]
    if plan.effect is not None:
        views = [view for pieces in writes + reads for view in pieces]
        step = _effect(machine, statement, plan.effect, views)
    elif plan.kernel is None:
        return lambda: None
    else:
        pieces = list(zip(*(writes + reads)))
        maker = {"compute": _compute, "move": _move}.get(plan.shadow, _special)
        steps = [maker(machine, statement, plan, piece[: len(writes)], piece[len(writes) :]) for piece in pieces]
        step = steps[0] if len(steps) == 1 else _sequence(steps)
    races = _races(machine, statement, writes, reads) if plan.effect is None else None
    floating = machine.floating

    def run():
        machine.instructions += 1
        step()
        if races is not None:
            races()
        if floating:
            machine.floating_point(statement, plan)

    return run


def _sequence(steps):
    def run():
        for step in steps:
            step()

    return run


def unwritten(call, view):
    """Report that an operand holds bytes nobody wrote."""
    call.fail(
        "uninitialized", view.operand, "written before it is read",
        "element {} of the part of '{}' it reads, which nobody wrote".format(view.first_unwritten(), view.buffer.name),
        hazard=True,
    )  # fmt: skip


def require_written(machine, call, views):
    """For effects: what :func:`_compute` does before a kernel."""
    if machine.params.uninitialized == "raise":
        for view in views:
            if not view.written():
                unwritten(call, view)


def _compute(machine, statement, plan, writes, reads):
    kernel, arrays = plan.kernel, [view.data for view in writes + reads]
    checked = reads if machine.params.uninitialized == "raise" else ()

    def run():
        for view in checked:
            if not view.buffer.clean and not view.written():
                unwritten(statement.call, view)
        kernel(*arrays)
        for view in writes:
            if not view.buffer.clean:
                view.mark()

    return run


def _move(machine, statement, plan, writes, reads):
    kernel = plan.kernel
    arrays, shadows = [view.data for view in writes + reads], [view.shadow for view in writes + reads]
    target = writes[0].buffer

    def run():
        kernel(*arrays)
        source_clean = all([view.buffer.clean and view.inside for view in reads])
        if not (target.clean and source_clean):
            kernel(*shadows)
            if not source_clean:
                target.clean = False

    return run


def _special(machine, statement, plan, writes, reads):
    kernel, shadow = plan.kernel, plan.shadow
    views = writes + reads
    arrays = [view.data for view in views]
    checked = machine.params.uninitialized == "raise"

    def run():
        kernel(*arrays)
        wrong = shadow(*views)
        if wrong is not None and checked:
            unwritten(statement.call, wrong)

    return run


def _effect(machine, statement, effect, views):
    def run():
        effect(machine, statement, *views)

    return run


def _races(machine, statement, writes, reads):
    """Checks of GM accesses against those of other cores, or None when no operand can be involved in a race."""
    tracked_writes = [view for views in writes for view in views if view.buffer.tracked]
    tracked_reads = [view for views in reads for view in views if view.buffer.tracked]
    if not tracked_writes and not tracked_reads:
        return None

    def run():
        if not machine.core:
            outside_cores(statement, tracked_writes)
            return
        for view in tracked_reads:
            report_race(statement, view, "written", machine.races.read(view, machine.core), machine.core)
        for view in tracked_writes:
            report_race(statement, view, "used", machine.races.write(view, machine.core, False), machine.core)

    return run


def outside_cores(statement, writes):
    """Report writes to GM outside the block_num loop of a program that has one: every core executes them."""
    for view in writes:
        statement.call.fail(
            "race", view.operand, "in local memory, or inside the block_num loop",
            "'{}' in GM, written by every core".format(view.buffer.name), hazard=True,
        )  # fmt: skip


def report_race(statement, view, how, other, core):
    """Report a race of ``core`` (1-based) with ``other`` when that is not None."""
    if other is not None:
        statement.call.fail(
            "race", view.operand, "in GM bytes that no other core has {}".format(how),
            "core {} and {} on '{}'".format(core - 1, other, view.buffer.name),
        )  # fmt: skip
