"""The instruction table: one :class:`Instruction` a TIK call, joined by one decorated function or one table line.

An instruction's ``plan`` turns concrete arguments into a :class:`Plan`: it checks every limit and says which bytes are
read and written, what numpy does with them, and what that costs. Plans of static arguments are made once, when the
program is built; plans of run-time arguments are made when those values first occur, and kept.
"""

import ast
import inspect
from collections import namedtuple
from typing import Callable, Dict, NamedTuple, Tuple

import numpy as np

from .expr import INTEGERS
from .memory import BLOCK
from .tensor import Address

# pipe: M cube, V vector, MTE1 out of L1, MTE2 out of GM, MTE3 out of UB, S scalar.
# operands: names of those it touches, for one step of a composite call; None = all.
Cost = namedtuple("Cost", "pipe cycles bytes operands")
Cost.__new__.__defaults__ = (None,)


class Instruction(NamedTuple):
    """One row of the table.

    Attributes:
        name: TIK's name.
        unit: pipe, or "path" where source and destination decide.
        parameters: ``inspect.Signature`` of TIK's arguments in TIK's order.
        plan: ``plan(call, **arguments) -> Plan``.
        dtypes: chip name -> tuple of accepted dtype tuples (destination first); () where the plan decides.
        limits: what is checked, in words.
        cost: what it costs, in words.
        source: D documented, C read from code, U unsettled: the semantics' weakest tag.
        sync: False for composite calls that new_stmt_scope(disable_sync=True) refuses.
        ir: statements it counts for.
    """

    name: str
    unit: str
    parameters: inspect.Signature
    plan: Callable
    dtypes: Dict[str, Tuple]
    limits: str
    cost: str
    source: str
    sync: bool
    ir: int


INSTRUCTIONS: Dict[str, Instruction] = {}


def signature(text):
    """The signature behind ``"dst src repeat_times=1"``; defaults are Python literals."""
    names = [word.partition("=") for word in text.split()]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(name, kind, default=ast.literal_eval(default) if equals else inspect.Parameter.empty)
            for name, equals, default in names
        ]
    )


def register(name, plan, parameters, unit, dtypes=(), limits="", cost="", source="D", sync=True, ir=1):
    """Add one row; ``dtypes`` is a tuple for every chip, or a dict by chip."""
    if name in INSTRUCTIONS:
        raise ValueError("instruction '{}' is in the table already".format(name))
    if not isinstance(dtypes, dict):
        dtypes = {"910A": tuple(dtypes), "310P": tuple(dtypes)}
    row = Instruction(name, unit, signature(parameters), plan, dtypes, limits, cost, source, sync, ir)
    INSTRUCTIONS[name] = row
    return row


def instruction(name, parameters, unit, **row):
    """Decorator form of :func:`register`: the function decorated is the plan."""

    def join(plan):
        register(name, plan, parameters, unit, **row)
        return plan

    return join


INVALID = ("invalid value", "divide by zero")  # numpy's names of floating-point events


# Calls of newer or older chips, and why a program for 910A or 310P cannot use them.
ABSENT = {
    "data_move_pad": "byte-granular moves exist on 910B and 310B; write whole 32-byte blocks",
    "load2dv2": "it exists on later chips; use load2dv1 for each run of fractals",
    "vec_ln_high_preci": "it exists on 310 only; use vec_ln",
    "vec_gather": "there is no gather of elements on these chips",
    "vbrcb": "there is no broadcast of single elements on these chips; use broadcast_ub_to_l0c or a Scalar",
}


class Plan:
    """What one instruction does with concrete arguments.

    Attributes:
        reads, writes: lists of Access.
        kernel: called once for each piece with the arrays of writes, then reads; None when ``effect`` is given.
        effect: ``effect(machine, *views)`` instead of ``kernel``, for what reaches beyond arrays.
        costs: tuple of :class:`Cost`.
        shadow: "compute": reads must be written, writes become written. "move": marks travel with the data, by
            running ``kernel`` on the shadows. Otherwise ``shadow(*views)``, called after the kernel with the views of
            writes, then reads; it updates marks and returns the View of an operand that must not be read, or None.
        undefined: numpy's names of floating-point events after which the result is undefined.
    """

    __slots__ = ("reads", "writes", "kernel", "effect", "costs", "shadow", "undefined")

    def __init__(self, reads, writes, kernel=None, costs=(), shadow="compute", effect=None, undefined=INVALID):
        self.reads, self.writes, self.kernel, self.effect = list(reads), list(writes), kernel, effect
        self.costs, self.shadow, self.undefined = tuple(costs), shadow, undefined


NOTHING = Plan((), ())


class Call:
    """One call site: what plans check against and how they complain.

    Attributes:
        name: the instruction.
        line: source line of the kernel.
        program: the program it belongs to.
        dynamic: names of the arguments known only at run time.
        row: the instruction's :class:`Instruction`.
    """

    __slots__ = ("name", "line", "program", "dynamic", "row")

    def __init__(self, row, line, program, dynamic):
        self.name, self.row, self.line, self.program, self.dynamic = row.name, row, line, program, dynamic

    def fail(self, rule, operand, need, got, remedy="", hazard=False):
        """Report a violation; returns only for a hazard in a program that is not strict."""
        self.program.violation(rule, self.name, operand, need, got, self.line, remedy, hazard)

    @property
    def rates(self):
        """The chip's :class:`~flash_attention.ascend.simulator.chips.Rates`."""
        return self.program.chip.rates

    def in_range(self, operand, value, low, high, zero_at_run_time=False):
        """``value`` is an int within [low, high]; a run-time value may be 0 where the device then does nothing."""
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            self.fail("type", operand, "an int, an int Scalar or an int Expr", repr(value))
        lowest = 0 if zero_at_run_time and operand in self.dynamic else low
        if not lowest <= value <= high:
            self.fail("range", operand, "in {}..{}".format(low, high), value)
        return int(value)

    def static(self, operand, value, low, high):
        """``value`` is a Python int within [low, high]."""
        if operand in self.dynamic:
            self.fail("type", operand, "a Python int", "a run-time value")
        return self.in_range(operand, value, low, high)

    def tensor(self, operand, address, *scopes):
        """``address`` is a tensor in one of ``scopes`` (any when none is given)."""
        if not isinstance(address, Address):
            self.fail("type", operand, "a Tensor", repr(address))
        if scopes and address.scope not in scopes:
            self.fail("scope", operand, "in {}".format(" or ".join(scopes)), address)
        return address

    def typed(self, operands, *addresses):
        """The dtypes of ``addresses`` together are a row of the instruction's table for this chip."""
        got = tuple(address.dtype for address in addresses)
        rows = self.row.dtypes[self.program.chip.name]
        if got not in rows:
            need = " or ".join("({})".format(", ".join(row)) for row in rows) or "supported"
            where = "{} on {}".format(need, self.program.chip.name)
            self.fail("dtype", operands, "of dtypes {}".format(where), "({})".format(", ".join(got)))
        return got

    def aligned(self, operand, address, unit=BLOCK):
        """The address is a multiple of ``unit`` bytes within its scope."""
        start = address.buffer.address + address.offset
        if start % unit:
            need = "at a multiple of {} bytes".format(unit)
            self.fail(
                "alignment", operand, need, "byte {} of {} ({})".format(start, address.scope, address.buffer.name)
            )

    def bounded(self, access, slack=0):
        """The access stays inside its buffer (plus ``slack`` bytes); returns it."""
        if access.start < 0 or access.stop > access.buffer.size + slack:
            need = "inside '{}' of {} bytes".format(access.buffer.name, access.buffer.size)
            self.fail("bounds", access.operand, need, "bytes {}..{}".format(access.start, access.stop - 1))
        return access

    def disjoint(self, *accesses, or_same=False):
        """No two accesses share a byte of their ranges; ``or_same``: unless they are the same elements."""
        for number, left in enumerate(accesses):
            for right in accesses[number + 1 :]:
                same = left.pieces == right.pieces and left.dtype == right.dtype
                if left.meets(right) and not (or_same and same):
                    need = "clear of '{}'{}".format(left.operand, ", or identical to it" if or_same else "")
                    got = "a part of '{}' that overlaps it".format(left.buffer.name)
                    self.fail("overlap", right.operand, need, got, hazard=True)

    def scalar(self, operand, value, dtype):
        """An immediate or Scalar as a number of ``dtype``."""
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
            self.fail("type", operand, "an immediate or a Scalar", repr(value))
        if dtype in INTEGERS:
            info = np.iinfo(dtype)
            if value != int(value) or not info.min <= value <= info.max:
                self.fail("type", operand, "a value of {}".format(dtype), value)
            return np.dtype(dtype).type(int(value))
        with np.errstate(over="ignore"):
            number = np.dtype(dtype).type(value)
        if np.isinf(number) and not np.isinf(value):
            self.fail("range", operand, "within the range of {}".format(dtype), value, hazard=True)
        return number


def table(chip=None):
    """The table in Markdown, one line a row: name, unit, dtypes (of ``chip``, or of each), limits, cost, source."""
    lines = ["| call | pipe | dtypes (dst<-src) | limits | cost | source |", "|---|---|---|---|---|---|"]
    for name in sorted(INSTRUCTIONS):
        row = INSTRUCTIONS[name]
        by_chip = {
            key: ", ".join("<-".join(short(dtype) for dtype in kinds) for kinds in rows) or "any"
            for key, rows in row.dtypes.items()
            if chip in (None, key)
        }
        same = len(set(by_chip.values())) == 1
        dtypes = "; ".join(sorted(set(by_chip.values()) if same else map(": ".join, by_chip.items())))
        lines.append("| {} |".format(" | ".join((name, row.unit, dtypes, row.limits, row.cost, row.source))))
    return lines


def short(dtype):
    """f16 for float16, and so on."""
    return dtype.replace("float", "f").replace("uint", "u").replace("int", "s")
