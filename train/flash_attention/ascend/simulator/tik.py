"""The facade: ``Tik`` with TIK's own names, argument order and keywords, so that kernel files run unmodified."""

import difflib
import functools
from contextlib import contextmanager

import numpy as np

from . import control, cube, highlevel, layout, move, precise, reduce, select, vector  # noqa: F401  (they fill the table)
from .chips import LOCAL_SCOPES, SCOPE_STRINGS
from .errors import SimulatorError, caller_line
from .expr import FLOATS, INTEGERS, Arithmetic, Expr, as_expr, convert_scalar, is_dynamic
from .isa import ABSENT, INSTRUCTIONS
from .machine import Machine
from .program import Assign, Branch, Jump, Loop, Nested, Program
from .slicing import scalar_sources
from .tensor import Tensor


class Scalar(Arithmetic):
    """A register of the scalar unit; lives until the scope that declares it ends."""

    def __init__(self, program, dtype, name):
        if dtype not in INTEGERS + FLOATS:
            program.violation("dtype", "Scalar", "dtype", "one of {}".format(", ".join(INTEGERS + FLOATS)), repr(dtype))
        self._program, self.dtype, self.name = program, dtype, name
        self.register = program.new_register(name, dtype)

    def to_expr(self):
        kind = "float" if self.dtype in FLOATS else "int"
        return Expr.atom("r[{}]".format(self.register.index), frozenset([self.register]), kind)

    def set_as(self, value, src_offset=None):
        """Take the value of an immediate, a Scalar, a one-element Tensor or an Expr."""
        program = self._program
        program.check_alive(self, "set_as", "dst")
        if isinstance(value, Tensor):
            source = value if src_offset is None else value[src_offset]
            program.emit("load_scalar", self.register, source)
            return
        if src_offset is not None:
            raise TypeError("For 'set_as', the 'src_offset' must be None unless the source is a Tensor.")
        expr = as_expr(value)
        if is_dynamic(value):
            program.check_alive(value, "set_as", "value")
        got, want = expr.kind == "float", self.dtype in FLOATS
        if got and not want or is_dynamic(value) and got != want and expr.kind != "bool":
            program.violation(
                "dtype", "set_as", "value", "of the Scalar's kind ({})".format(self.dtype),
                "a {} value".format(expr.kind), remedy="TIK does not convert between Scalars of different kinds.",
            )  # fmt: skip
        if isinstance(value, Scalar) and value.dtype != self.dtype and want:
            program.violation("dtype", "set_as", "value", "of dtype {}".format(self.dtype), value.dtype)
        program.append(Assign(self.register, value, caller_line()))

    def __repr__(self):
        return "Scalar({}, {})".format(self.name, self.dtype)


class Debugger:
    """``tik_instance.tikdb``."""

    def __init__(self, tik):
        self._tik = tik

    def start_debug(self, feed_dict, interactive=False):
        """Run the built program.

        Args:
            feed_dict: name of each input GM tensor (and InputScalar) -> numpy array (or number) of its shape and dtype.
            interactive: accepted for TIK's signature; there is no interactive debugger, so True is an error.

        Returns:
            list of numpy arrays, one for each output of BuildCCE in its order.
        """
        if interactive:
            raise SimulatorError(
                "For 'start_debug', the 'interactive' must be False on the simulator.", "usage", caller_line()
            )
        return self._tik.run(feed_dict)


class Scope:
    """What for_range, if_scope, ... return. TIK opens the scope at the call, so `with` must enter it at once."""

    def __init__(self, program, name, manager):
        program.check_entered(name)
        self._program, self._manager = program, manager
        program.unentered = name

    def __enter__(self):
        self._program.unentered = None
        return self._manager.__enter__()

    def __exit__(self, *exception):
        return self._manager.__exit__(*exception)


def scope(function):
    """Decorator of Tik's methods that open a scope, written as generators."""
    manager = contextmanager(function)

    @functools.wraps(function)
    def call(self, *args, **kwargs):
        return Scope(self.program, function.__name__, manager(self, *args, **kwargs))

    return call


class Tik:
    """A program container with TIK's interface. Instructions of the table are methods too.

    Args:
        toolkit: the ambient chip and parameters; bound by :class:`~flash_attention.ascend.simulator.Toolkit`.
        profiling: legacy, ignored by TIK itself.
        disable_debug: True: ``tikdb.start_debug`` raises, as in TIK.
        err_msg_level: 0 user, 1 developer: accepted for TIK's signature, messages are the same.
    """

    def __init__(self, toolkit, profiling=None, disable_debug=False, err_msg_level=0):
        self.params, self.disable_debug = toolkit.params, disable_debug
        self.program = Program(toolkit.chip, toolkit.params)
        self.tikdb = Debugger(self)
        self.trace = None
        self.instructions = 0  # executed in the last run
        self._scalars = []
        toolkit.programs.append(self)

    def __getattr__(self, name):
        """Reached for names TIK does not have here: say why, or what was probably meant."""
        if name in ABSENT:
            need, got = "one that has it", self.program.chip.name
            self.program.violation("absent", name, "chip", need, got, remedy=ABSENT[name] + ".")
        near = difflib.get_close_matches(name, [key for key in dir(type(self)) if not key.startswith("_")], 3)
        hint = ": did you mean {}?".format(", ".join(near)) if near else ""
        raise AttributeError("'Tik' has no '{}' on the simulator{}".format(name, hint))

    # --- declarations ---------------------------------------------------------------------------
    def Tensor(self, dtype, shape, scope=None, name=None, enable_buffer_reuse=False, no_reuse_list=None,
               reuse_list=None, is_workspace=False, is_atomic_add=False, max_mem_size=None, init_value=None,
               start_addr=None):  # fmt: skip
        """Declare a tensor. Buffer-reuse hints change nothing here; the last three are of newer TIK and refused."""
        for argument, value in (("max_mem_size", max_mem_size), ("init_value", init_value), ("start_addr", start_addr)):
            if value is not None:
                self.program.violation("unsupported", "Tensor", argument, "None on the simulator", repr(value))
        return self.program.declare(dtype, shape, scope, name, is_workspace, is_atomic_add)

    def Scalar(self, dtype="int64", name="reg_buf", init_value=None):
        """Declare a scalar register."""
        scalar = Scalar(self.program, dtype, name)
        if init_value is not None:
            scalar.set_as(init_value)
        return scalar

    def InputScalar(self, dtype="int64", name="input_scalar"):
        """A scalar kernel argument; it follows the tensors in ``inputs``."""
        if self.program.block is not self.program.root:
            self.program.violation("lifetime", "InputScalar", name, "declared outside every scope", "inside one")
        scalar = Scalar(self.program, dtype, name)
        self._scalars.append(scalar)
        return scalar

    def get_available_buffer_size(self, scope):
        """Bytes left in a local scope by the front end's accounting."""
        place = SCOPE_STRINGS.get(scope)
        if place not in LOCAL_SCOPES:
            need = "one of TIK's scope constants, not GM"
            self.program.violation("scope", "get_available_buffer_size", "scope", need, repr(scope))
        return self.program.allocator.available(place)

    # --- control flow ---------------------------------------------------------------------------
    @scope
    def for_range(self, begint, endt, name="i", thread_num=1, thread_type="whole", block_num=1, dtype="int32",
                  for_type="serial"):  # fmt: skip
        """Loop; ``block_num`` > 1 runs each iteration on a core of its own, ``thread_num=2`` double-buffers.

        ``thread_type`` and ``for_type`` are hints to the vendor's compiler and change nothing here.
        """
        cores = control.check_for_range(self.program, begint, endt, thread_num, block_num)
        static = not is_dynamic(begint) and not is_dynamic(endt)
        program = self.program
        certain = program.block.certain and static and endt > begint
        block = program.open_block("for", certain=certain, copies=program.block.copies * thread_num,
                                   multicore=program.block.multicore or bool(cores))  # fmt: skip
        register = program.new_register(name, dtype, begint if static else None)
        if thread_num == 2:
            block.thread_loop = register
        loop = Loop(register, begint, endt, block, cores, caller_line())
        try:
            yield Expr.atom("r[{}]".format(register.index), frozenset([register]))
        finally:
            program.close_block()
        program.append(loop)

    def _arm(self, condition, branch):
        program = self.program
        block = program.open_block("if", certain=False)
        branch.arms.append((condition, block))
        return block

    @scope
    def if_scope(self, cond):
        """Branch on a run-time comparison."""
        control.check_condition(self.program, "if_scope", cond)
        branch = Branch()
        self._arm(cond, branch)
        try:
            yield
        finally:
            self.program.close_block()
        self.program.append(branch)

    @scope
    def elif_scope(self, cond):
        """Directly after an if_scope or elif_scope."""
        branch = control.previous_branch(self.program, "elif_scope")
        control.check_condition(self.program, "elif_scope", cond)
        self._arm(cond, branch)
        try:
            yield
        finally:
            self.program.close_block()

    @scope
    def else_scope(self):
        """Directly after an if_scope or elif_scope."""
        branch = control.previous_branch(self.program, "else_scope")
        self._arm(None, branch)
        try:
            yield
        finally:
            self.program.close_block()

    @scope
    def new_stmt_scope(self, disable_sync=False):
        """What is declared inside dies at its end; with ``disable_sync`` no synchronisation is inserted inside."""
        program = self.program
        if program.block.no_sync:
            program.violation("sync", "new_stmt_scope", "scope", "outside another one with disable_sync=True", "inside")
        block = program.open_block("scope", no_sync=bool(disable_sync))
        try:
            yield
        finally:
            program.close_block()
        program.append(Nested(block))

    def _jump(self, kind):
        control.check_jump(self.program, kind)
        self.program.append(Jump(kind))
        block = self.program.block
        while block is not None:  # what follows is not certain to execute
            block.certain = False
            block = None if block.kind == "for" and kind != "return" else block.parent

    def tik_break(self):
        """Leave the innermost for_range."""
        self._jump("break")

    def tik_continue(self):
        """Go on with the next iteration of the innermost for_range."""
        self._jump("continue")

    def tik_return(self):
        """End the kernel on this core."""
        self._jump("return")

    # --- building and running -------------------------------------------------------------------
    def BuildCCE(self, kernel_name, inputs, outputs, output_files_path=None, enable_l2=False, config=None,
                 flowtable=None, **options):  # fmt: skip
        """Finish the program. No file is written; ``output_files_path``, ``enable_l2`` and ``config`` steer the
        vendor's compiler and change nothing here; further options may not be given."""
        for option, value in options.items():
            self.program.violation("unsupported", "BuildCCE", option, "left out", repr(value), hazard=True)
        control.check_build(self.program, self._scalars, kernel_name, inputs, outputs, flowtable)
        self.program.built = (list(inputs), list(outputs))
        return self

    def run(self, feed_dict):
        """What ``tikdb.start_debug`` does."""
        program = self.program
        control.check_run(program, self.disable_debug)
        inputs, outputs = program.built
        control.check_feed(program, inputs, feed_dict)
        machine = Machine(program, trace=self.params.trace)
        self._feed(machine, feed_dict)
        for buffer in program.buffers:
            if buffer.is_atomic_add and self.params.network_launch:
                machine.feed(buffer, np.zeros(buffer.size, np.uint8))
        machine.run()
        self.trace, self.instructions = machine.trace, machine.instructions
        results = [self._result(tensor) for tensor in outputs]
        machine.release()
        return results

    def _feed(self, machine, feed_dict):
        """Put the given inputs into the registers and the memory that the machine has."""
        for item in self.program.built[0]:
            if item.name in feed_dict and isinstance(item, Scalar):
                machine.registers[item.register.index] = convert_scalar(feed_dict[item.name], item.dtype)
            elif item.name in feed_dict and machine.holds(item.buffer):
                machine.feed(item.buffer, feed_dict[item.name])

    def _result(self, tensor):
        buffer = tensor.buffer
        written = buffer.shadow[: buffer.size]
        if not written.all():
            first = int(np.argmax(written != 0xFF)) // np.dtype(tensor.dtype).itemsize
            self.program.violation(
                "uninitialized", "BuildCCE", buffer.name, "written in full by the program",
                "element {} (and {} bytes in all) undefined".format(first, int((written != 0xFF).sum())),
                buffer.line, hazard=True,
            )  # fmt: skip
        return buffer.data[: buffer.size].view(tensor.dtype).reshape(tensor.origin_shape).copy()

    def count(self, feed_dict=None, cores=None):
        """Walk the built program without data: the Trace a run would leave, for shapes too large to run.

        Args:
            feed_dict: values of the InputScalars, and arrays of the inputs from which Scalars are loaded (tables of
                loop bounds and offsets); only what leads to Scalars is executed.
            cores: numbers of the cores to walk; None = all.
        """
        program = self.program
        control.check_built(program, "count")
        only = scalar_sources(program)
        inputs, feed_dict = program.built[0], feed_dict or {}
        needed = [item for item in inputs if isinstance(item, Scalar) or item.buffer in only]
        control.check_feed(program, needed, feed_dict, "count")
        machine = Machine(program, trace=True, only=only, cores=cores)
        self._feed(machine, feed_dict)
        machine.run()
        return machine.trace

    @property
    def report(self):
        """Counted warnings and figures: warnings, messages, saturations, ir, peak (scope -> bytes), instructions."""
        program = self.program
        return {
            "warnings": dict(program.warnings),
            "messages": list(program.messages),
            "saturations": program.saturations,
            "ir": program.ir,
            "peak": dict(program.allocator.peak),
            "instructions": self.instructions,
        }


def _method(row):
    def call(self, *args, **kwargs):
        return self.program.emit(row.name, *args, **kwargs)

    call.__name__ = row.name
    call.__doc__ = "{}{}: pipe {}; {}; {}.".format(row.name, row.parameters, row.unit, row.limits, row.cost)
    return call


for _row in INSTRUCTIONS.values():
    if _row.name not in control.INTERNAL:
        setattr(Tik, _row.name, _method(_row))
