"""Running: statements are compiled once into closures over numpy views, then executed in program order.

The device runs pipes in parallel and the compiler orders them by address dependence, so program order gives the same
result. Inside ``new_stmt_scope(disable_sync=True)`` it does not: SyncCheck reports dependences between pipes there.
"""

import numpy as np

from .binding import SyncCheck, bind
from .chips import GM
from .expr import compile_values, convert_scalar, is_dynamic
from .memory import RaceDetector, Storage
from .program import Assign, Branch, Declare, Jump, Loop, Nested, Statement
from .trace import Trace

KEPT_PLANS = 1024  # plans of run-time arguments kept for each statement
POISON = 0xFF


class _Break(Exception):
    """A taken tik_break."""


class _Continue(Exception):
    """A taken tik_continue."""


class _Return(Exception):
    """A taken tik_return."""


_JUMPS = {"break": _Break, "continue": _Continue, "return": _Return}


class Machine:
    """One run of a program.

    Args:
        trace: record a Trace.
        only: frozenset of buffers; statements that write none of them are recorded, not executed. None = execute all.
        cores: numbers of the cores to run; None = all.
    """

    def __init__(self, program, trace=False, only=None, cores=None):
        self.program, self.params, self.only = program, program.params, only
        self.registers = [0] * len(program.registers)
        self.trace = Trace() if trace else None
        self.cores = None if cores is None else frozenset(cores)
        self.records = None  # the current core's list
        self.core = 0  # 1-based while several cores run
        self.atomic, self.atomic_line = 0, None  # the mode, and the line that set it
        self.instructions = 0
        self.races = RaceDetector()
        self.sync = SyncCheck()
        self.floating = set()  # numpy's floating-point events of the current instruction
        self.random = np.random.RandomState(self.params.random_seed)
        self._allocate()
        self.run_body = self.block(program.root)

    # --- memory ---------------------------------------------------------------------------------
    def _allocate(self):
        self.fill = POISON
        if self.params.uninitialized == "random":
            largest = max([buffer.size for buffer in self.program.buffers] + [0])
            self.fill = self.random.randint(0, 255, largest + 64).astype(np.uint8)
        storage = Storage(self.program.chip.capacity, self.fill)
        for buffer in self.program.buffers:
            if not self.holds(buffer):
                continue
            if buffer.scope == GM:
                storage.attach_global(buffer)
                buffer.tracked = buffer in self.program.written and self.program.multicore_line is not None
            else:
                storage.attach_local(buffer)

    def holds(self, buffer):
        """The run has this buffer's memory."""
        return self.only is None or buffer in self.only

    def release(self):
        """Give up the memory: programs are kept and run again."""
        for buffer in self.program.buffers:
            buffer.attach(None, None)

    def executes(self, statement):
        """False for a statement that a count only records."""
        return self.only is None or not statement.targets or not self.only.isdisjoint(statement.targets)

    def feed(self, buffer, value):
        """The contents of a GM tensor before the run."""
        buffer.data[: buffer.size] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        buffer.shadow[: buffer.size] = 0xFF
        buffer.clean = True

    # --- whole runs -----------------------------------------------------------------------------
    def run(self):
        self._select_core(0)
        handler = np.seterrcall(lambda kind, flag: self.floating.add(kind))
        try:
            with np.errstate(over="call", invalid="call", divide="call", under="ignore"):
                self.run_body()
        except _Return:
            pass
        finally:
            np.seterrcall(handler)
        self._finish_core()
        if self.trace is not None:
            self.trace.drop_idle()

    def _select_core(self, number):
        if self.trace is not None:
            self.records = self.trace.cores.setdefault(number, [])

    def _finish_core(self):
        if self.atomic:
            self.program.violation(
                "atomic", "set_atomic_add", "mode", "0 at the end of the program", self.atomic,
                self.atomic_line, "The next kernel on this core would add instead of write.",
            )  # fmt: skip

    # --- statements -> closures -----------------------------------------------------------------
    def block(self, block):
        """The closure that executes a block's statements."""
        compilers = {
            Statement: self.statement, Declare: self.declare, Assign: self.assign, Loop: self.loop,
            Branch: self.branch, Nested: self.nested, Jump: self.jump,
        }  # fmt: skip
        steps = [compilers[type(item)](item) for item in block.statements]
        steps = [step for step in steps if step is not None]

        def run():
            for step in steps:
                step()

        return run

    def declare(self, item):
        if not self.holds(item.buffer):
            return None
        poison, fill = item.buffer.poison, self.fill
        return lambda: poison(fill)

    def assign(self, item):
        registers, index, dtype = self.registers, item.register.index, item.register.dtype
        if not is_dynamic(item.value):
            value = convert_scalar(item.value, dtype)

            def run():
                registers[index] = value

            return run
        evaluate = compile_values([item.value])

        def run_dynamic():
            registers[index] = convert_scalar(evaluate(registers)[0], dtype)

        return run_dynamic

    def loop(self, item):
        if item.cores:
            return self.core_loop(item)
        body, registers, index = self.block(item.body), self.registers, item.register.index
        bounds = compile_values([item.begin, item.end])
        program, line = self.program, item.line

        def run():
            begin, end = bounds(registers)
            if begin < 0:
                program.violation("loop", "for_range", "begint", "in 0..2**31-1", begin, line)
            if end < begin:
                program.warn("loop", "for_range({}, {}) runs zero times at {}".format(begin, end, line))
            try:
                for value in range(begin, end):
                    registers[index] = value
                    try:
                        body()
                    except _Continue:
                        pass
            except _Break:
                pass

        return run

    def core_loop(self, item):
        body, registers, index = self.block(item.body), self.registers, item.register.index

        def run():
            order = np.arange(item.cores)
            if self.params.core_order_seed is not None:
                np.random.RandomState(self.params.core_order_seed).shuffle(order)
            shared = self._shared_local_memory()
            before, atomic = list(registers), self.atomic
            for core in order.tolist():
                if self.cores is not None and core not in self.cores:
                    continue
                registers[:] = before
                self.atomic = atomic
                for buffer, data, shadow in shared:
                    buffer.data[...], buffer.shadow[...], buffer.clean = data, shadow, False
                registers[index], self.core = core, core + 1
                self._select_core(core)
                try:
                    body()
                except _Return:
                    pass
                self._finish_core()
            self.core = 0

        return run

    def _shared_local_memory(self):
        """Copies of local tensors declared before the core loop: each core has memory of its own."""
        alive = [buffer for buffer in self.program.buffers
                 if buffer.scope != GM and not buffer.block.multicore and self.holds(buffer)]  # fmt: skip
        return [(buffer, buffer.data.copy(), buffer.shadow.copy()) for buffer in alive]

    def branch(self, item):
        conditions = [condition for condition, _ in item.arms if condition is not None]
        evaluate = compile_values(conditions)
        bodies = [self.block(body) for _, body in item.arms]
        registers = self.registers
        otherwise = bodies[-1] if len(bodies) > len(conditions) else None

        def run():
            for holds, body in zip(evaluate(registers), bodies):
                if holds:
                    body()
                    return
            if otherwise is not None:
                otherwise()

        return run

    def nested(self, item):
        body = self.block(item.body)
        if not item.body.no_sync:
            return body

        def run():
            self.sync.reset()
            body()
            self.sync.reset()

        return run

    def jump(self, item):
        exception = _JUMPS[item.kind]

        def run():
            raise exception()

        return run

    # --- instructions ---------------------------------------------------------------------------
    def statement(self, item):
        """A closure that executes ``item``; plans of run-time values are bound when they first occur."""
        doubled = item.doubled if self.trace is not None or item.block.no_sync else ()
        if item.plan is not None and not doubled:
            return bind(self, item, item.plan, {})
        registers, values = self.registers, compile_values(item.values)
        kept = {}

        def run():
            key = values(registers)
            bits = tuple([registers[index] & 1 for index in doubled])
            bound = kept.get((key, bits))
            if bound is None:
                if len(kept) >= KEPT_PLANS:
                    kept.clear()
                plan = item.plan or item.make_plan(key)
                bound = kept[key, bits] = bind(self, item, plan, dict(zip(doubled, bits)))
            bound()

        return run

    def floating_point(self, item, plan):
        """Report numpy's floating-point events of the instruction just executed."""
        events = sorted(self.floating.intersection(plan.undefined))
        self.floating.clear()
        if events:
            item.call.fail(
                "undefined", "src", "in the range where the result is defined", ", ".join(events), hazard=True
            )
