"""Building: lexical blocks, declarations and statements, with every check that needs no run-time value."""

import re
from collections import Counter

import numpy as np

from . import chips
from .chips import GM, SCOPE_STRINGS
from .errors import SimulatorError, caller_line, violation_text
from .expr import FLOATS, INTEGERS, Arithmetic, Register, as_expr, compile_values, is_dynamic
from .isa import INSTRUCTIONS, Call
from .memory import Allocator, Buffer
from .tensor import MAX_RANK, Tensor

DTYPES = INTEGERS + FLOATS
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")


class Block:
    """A lexical block: the program, a loop body, a branch or a statement scope.

    Attributes:
        kind: "program", "for", "if" or "scope".
        statements: what it executes, in order.
        open: still being built; what was declared in it dies when it closes.

    Inherited from the parent unless given to the constructor:
        no_sync: inside new_stmt_scope(disable_sync=True).
        thread_loop: register of the innermost enclosing thread_num=2 loop.
        multicore: this or an enclosing block is the body of a block_num loop.
        certain: executes at least once for the first values of its loops, whatever the data.
        copies: how often a statement in it counts for the IR limit.
    """

    no_sync, thread_loop, multicore, certain, copies = False, None, False, True, 1

    def __init__(self, kind, parent=None, **given):
        self.kind, self.parent, self.statements, self.open = kind, parent, [], True
        for name in ("no_sync", "thread_loop", "multicore", "certain", "copies"):
            setattr(self, name, given.get(name, getattr(parent or Block, name)))


class Declare:
    """Run time of a declaration: the memory's contents become undefined."""

    def __init__(self, buffer):
        self.buffer = buffer


class Assign:
    """A Scalar takes the value of an immediate, Scalar or Expr."""

    def __init__(self, register, value, line):
        self.register, self.value, self.line = register, value, line


class Loop:
    """for_range. ``cores``: the body of each iteration runs on a core of its own."""

    def __init__(self, register, begin, end, body, cores, line):
        self.register, self.begin, self.end, self.body, self.cores, self.line = register, begin, end, body, cores, line


class Branch:
    """if_scope with the elif_scopes and else_scope that follow: list of (condition or None, Block)."""

    def __init__(self):
        self.arms = []


class Nested:
    """new_stmt_scope."""

    def __init__(self, body):
        self.body = body


class Jump:
    """tik_break, tik_continue, tik_return."""

    def __init__(self, kind):
        self.kind = kind


class Statement:
    """One instruction: its row, its arguments, and the plan where all of them are static.

    Attributes:
        values: Exprs evaluated each time, in the order ``make_plan`` takes them.
        targets, sources: sets of the buffers behind destination and other arguments.
        doubled: registers of thread_num=2 loops whose parity selects the copy a buffer uses.
    """

    def __init__(self, row, arguments, block, line, program):
        self.row, self.block, self.line = row, block, line
        self.values, self._makers = [], {}
        for name, value in arguments.items():
            self._makers[name] = self._maker(value)
        dynamic = frozenset(name for name, value in arguments.items() if _mentions_run_time(value))
        self.call = Call(row, line, program, dynamic)
        self.targets, self.sources = set(), set()
        for name, value in arguments.items():
            side = self.targets if name.startswith("dst") else self.sources
            side.update(leaf.buffer for leaf in _leaves(value) if isinstance(leaf, Tensor))
        loops = {buffer.thread_loop for buffer in self.targets | self.sources if buffer.thread_loop is not None}
        self.doubled = sorted(register.index for register in loops)
        self.plan = None
        if not self.values:
            self.plan = self.make_plan(())

    def _maker(self, value):
        """A constant, or a function of the evaluated ``values`` that gives the concrete argument."""
        if isinstance(value, Tensor):
            entries = [self._entry(entry) for entry in value.run_time_values()]
            if not any(callable(entry) for entry in entries):
                return value.address(entries)
            return lambda key: value.address([entry(key) if callable(entry) else entry for entry in entries])
        if isinstance(value, (list, tuple)):
            makers = [self._maker(item) for item in value]
            if not any(callable(maker) for maker in makers):
                return makers
            return lambda key: [maker(key) if callable(maker) else maker for maker in makers]
        return self._entry(value)

    def _entry(self, value):
        if not is_dynamic(value):
            return value
        position = len(self.values)
        self.values.append(value)
        return lambda key: key[position]

    def make_plan(self, key):
        """The plan for concrete run-time values."""
        concrete = {name: maker(key) if callable(maker) else maker for name, maker in self._makers.items()}
        return self.row.plan(self.call, **concrete)


def _mentions_run_time(value):
    if isinstance(value, Tensor):
        return any(is_dynamic(entry) for entry in value.run_time_values())
    if isinstance(value, (list, tuple)):
        return any(_mentions_run_time(item) for item in value)
    return is_dynamic(value)


def _leaves(value):
    """Tensors and run-time values inside an argument."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (Tensor, Arithmetic)):
        yield value


class Program:
    """The intermediate representation of one kernel and the rules of its construction."""

    def __init__(self, chip, params):
        self.chip, self.params = chip, params
        self.root = self.block = Block("program")
        self.allocator = Allocator(chip.capacity)
        self.buffers = []
        self.registers = []
        self.first_values = []  # the register file in the first iteration of all loops; None = unknown
        self.written = set()  # GM buffers some statement writes
        self.warnings = Counter()
        self.messages = []
        self.saturations = 0
        self.ir = 0
        self.multicore_line = None
        self.built = None
        self.unentered = None  # name of the call whose scope `with` has not entered yet

    # --- complaints -----------------------------------------------------------------------------
    def violation(self, rule, instruction, operand, need, got, line=None, remedy="", hazard=False):
        """Raise, or count a warning when it is a hazard and the program is not strict."""
        text = violation_text(instruction, operand, need, got, rule, line or caller_line(), remedy)
        if self.params.strict or not hazard:
            raise SimulatorError(text, rule, line or caller_line())
        self.warn(rule, text)

    def warn(self, rule, text):
        """Count a warning; the first text of each kind of message is kept."""
        self.warnings[rule] += 1
        if self.warnings[rule] <= 10:
            self.messages.append(text)

    def check_alive(self, value, instruction, operand):
        """Tensors and registers may be used only while the block that declares them is open."""
        owners = [value.buffer] if isinstance(value, Tensor) else as_expr(value).registers
        if isinstance(value, Tensor):
            for entry in value.run_time_values():
                if is_dynamic(entry):
                    self.check_alive(entry, instruction, operand)
        for owner in owners:
            if not owner.block.open:
                self.violation(
                    "lifetime", instruction, operand, "alive", "'{}', whose scope has ended".format(owner.name)
                )

    # --- blocks ---------------------------------------------------------------------------------
    def open_block(self, kind, **changes):
        self.block = Block(kind, self.block, **changes)
        self.block.allocation = self.allocator.mark()
        return self.block

    def close_block(self):
        self.allocator.release(self.block.allocation)
        self.block.open = False
        self.block = self.block.parent

    def check_entered(self, name):
        """No scope has been opened without being entered."""
        if self.unentered is not None:
            need = "entered by `with` before the next call"
            self.violation("scope", self.unentered, "scope", need, "{} before that".format(name))

    def append(self, statement, count=1):
        """Record a statement of the current block; ``count``: what it counts for the IR limit."""
        name = getattr(getattr(statement, "row", None), "name", "another call")
        self.check_entered(name)
        if self.built is not None:
            self.violation("build", "BuildCCE", "position", "the last call of the program", "{} after it".format(name))
        self.block.statements.append(statement)
        before, self.ir = self.ir, self.ir + count * self.block.copies
        if self.ir > chips.IR_LIMIT:
            self.violation(
                "ir", "Tik", "number of statements", "at most {}".format(chips.IR_LIMIT), self.ir,
                remedy="Use for_range instead of unrolling in Python.",
            )  # fmt: skip
        if before <= chips.IR_WARNING < self.ir:
            self.warn("ir", "the program exceeds {} statements at {}".format(chips.IR_WARNING, caller_line()))

    # --- declarations ---------------------------------------------------------------------------
    def declare(self, dtype, shape, scope, name, is_workspace, is_atomic_add):
        """A new :class:`Tensor`, after all checks of its declaration."""
        place = self._check_declaration(dtype, shape, scope, name, is_workspace, is_atomic_add)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        copies = 2 if self.block.thread_loop is not None and place != GM else 1
        address = 0
        if place != GM:
            available = self.allocator.available(place)
            address = self.allocator.take(place, size, copies)
            if address is None:
                need = "at most the {} bytes left of {} in {}".format(available, self.chip.capacity[place], place)
                got = "{} bytes{}".format(size, " twice (declared in a thread_num=2 loop)" if copies == 2 else "")
                self.violation("capacity", "Tensor", name, need, got)
            if place == chips.UB and self.allocator.top[place] > chips.UB_BUDGET:
                self.warn("capacity", "more than {} bytes of UB are live at {}".format(chips.UB_BUDGET, caller_line()))
        buffer = Buffer(name, place, dtype, size, address, self.block, caller_line())
        buffer.is_workspace, buffer.is_atomic_add = is_workspace, is_atomic_add
        if copies == 2:
            buffer.thread_loop, buffer.stride = self.block.thread_loop, (self.allocator.top[place] - address) // 2
        self.buffers.append(buffer)
        if place != GM:
            self.append(Declare(buffer))
        return Tensor(self, buffer, dtype, shape, scope)

    def _check_declaration(self, dtype, shape, scope, name, is_workspace, is_atomic_add):
        def check(ok, rule, operand, need, got, remedy=""):
            if not ok:
                self.violation(rule, "Tensor", operand, need, got, remedy=remedy)

        check(dtype in DTYPES, "dtype", "dtype", "one of {}".format(", ".join(DTYPES)), repr(dtype))
        check(scope in SCOPE_STRINGS, "scope", "scope", "one of TIK's scope constants", repr(scope))
        valid = isinstance(name, str) and _NAME.match(name)
        check(valid, "name", "name", "letters, digits and _ with no leading digit", repr(name))
        check(isinstance(shape, (list, tuple)), "shape", "shape", "a list or tuple", repr(shape))
        ints = all(isinstance(extent, (int, np.integer)) and not isinstance(extent, bool) for extent in shape)
        check(ints and all(extent > 0 for extent in shape), "shape", "shape", "positive Python ints", tuple(shape))
        check(1 <= len(shape) <= MAX_RANK, "shape", "shape", "of 1..{} axes".format(MAX_RANK), tuple(shape))
        place = SCOPE_STRINGS[scope]
        if place == GM:
            check(self.block is self.root, "lifetime", name, "declared outside every loop, branch and scope",
                  "a GM tensor declared inside '{}'".format(self.block.kind))  # fmt: skip
            check(name != "__fake_tensor", "name", "name", "a free name", repr(name))
            taken = any(buffer.scope == GM and buffer.name == name for buffer in self.buffers)
            check(not taken, "name", "name", "unique among GM tensors", repr(name))
        else:
            check(not is_workspace, "workspace", "is_workspace", "False outside GM", True)
            check(not is_atomic_add, "atomic", "is_atomic_add", "False outside GM", True)
        return place

    def new_register(self, name, dtype, first=None):
        """A register of the current block; ``first``: its value in the first iteration, where known."""
        register = Register(len(self.registers), name, dtype, self.block)
        self.registers.append(register)
        self.first_values.append(first)
        return register

    # --- statements -----------------------------------------------------------------------------
    def emit(self, name, *args, **kwargs):
        """Record one instruction of the table."""
        row = INSTRUCTIONS[name]
        try:
            bound = row.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError("For '{}': {}. Signature: {}{}".format(name, error, name, row.parameters)) from None
        bound.apply_defaults()
        if not row.sync and self.block.no_sync:
            self.violation("sync", name, "scope", "synchronised automatically", "new_stmt_scope(disable_sync=True)")
        for operand, value in bound.arguments.items():
            for leaf in _leaves(value):
                self.check_alive(leaf, name, operand)
                if isinstance(leaf, Tensor):
                    self._check_multicore(leaf.buffer, name, operand)
        statement = Statement(row, bound.arguments, self.block, caller_line(), self)
        self.written.update(buffer for buffer in statement.targets if buffer.scope == GM)
        if statement.plan is None:
            self._check_first_iteration(statement)
        self.append(statement, row.ir)

    def _check_multicore(self, buffer, name, operand):
        if buffer.scope != GM and self.block.multicore and not buffer.block.multicore:
            self.violation(
                "multicore", name, operand, "declared inside the block_num loop that uses it",
                "'{}' declared outside".format(buffer.name), hazard=True,
            )  # fmt: skip

    def _check_first_iteration(self, statement):
        """Check a statement at the values of the first iteration, where it is certain to execute with them."""
        registers = frozenset().union(*(as_expr(value).registers for value in statement.values))
        if self.block.certain and all(self.first_values[register.index] is not None for register in registers):
            statement.make_plan(compile_values(statement.values)(self.first_values))
