"""Rules of control flow, building and feeding; and the scalar pipe's instructions."""

import numpy as np

from .binding import require_written
from .chips import GM
from .errors import caller_line
from .expr import FLOATS, as_expr, is_dynamic
from .isa import Cost, Plan, instruction
from .memory import Access
from .program import Branch
from .tensor import Address, Tensor

INTERNAL = ("set_as", "load_scalar")  # reached through Tensor and Scalar, not methods of Tik
MAX_TENSORS = 64
MAX_BLOCKS = 65535
MAX_TRIPS = 2**31 - 1


# --- the scalar pipe ------------------------------------------------------------------------------
def _element(call, operand, address):
    call.tensor(operand, address, "UB", "GM")
    if address.scope == GM:
        call.fail("scope", operand, "in UB", address, "The scalar unit reads and writes tensors in UB only.")
    access = Access(operand, address.buffer, address.dtype, [(address.offset, (), ())])
    return call.bounded(access)


@instruction(
    "load_scalar", "dst src", "S", limits="one element of UB; same dtype", cost="scalar_access [U]", source="D"
)
def load_scalar(call, dst, src):
    """Scalar.set_as(tensor element)."""
    access = _element(call, "src", src)
    if dst.dtype != src.dtype:
        call.fail("dtype", "src", "of the Scalar's dtype {}".format(dst.dtype), src.dtype)
    index, number = dst.index, float if src.dtype in FLOATS else int

    def effect(machine, statement, view):
        require_written(machine, call, [view])
        machine.registers[index] = number(view.data[()])

    return Plan([access], [], effect=effect, costs=[Cost("S", call.rates.scalar_access, access.dtype.itemsize)])


@instruction("set_as", "dst value", "S", limits="one element of UB; same kind", cost="scalar_access [U]", source="D")
def set_as(call, dst, value):
    """tensor[i] = value."""
    target = _element(call, "dst", dst)
    costs = [Cost("S", call.rates.scalar_access, target.dtype.itemsize)]
    if isinstance(value, Address):
        source = _element(call, "value", value)
        if value.dtype != dst.dtype:
            call.fail("dtype", "value", "of dtype {}".format(dst.dtype), value.dtype)
        return Plan([source], [target], lambda out, data: np.copyto(out, data), costs)
    number = call.scalar("value", value, dst.dtype)

    def store(out):
        out[...] = number

    return Plan([], [target], store, costs)


@instruction(
    "set_atomic_add", "mode", "S", limits="mode 0 or 1; only UB->GM fp32; off at the end", cost="none", source="C"
)
def set_atomic_add(call, mode):
    """Mode 1: every UB->GM data_move adds in fp32; mode 0: off. Modes 2 and 3 (fp16) exist on other chips only."""
    if call.static("mode", mode, 0, 3) not in (0, 1):
        call.fail("atomic", "mode", "0 (off) or 1 (float32) on {}".format(call.program.chip.name), mode)

    def effect(machine, statement):
        machine.atomic, machine.atomic_line = mode, call.line

    return Plan([], [], effect=effect)


# --- loops and branches ---------------------------------------------------------------------------
def check_for_range(program, begin, end, thread_num, block_num):
    """Check for_range's arguments; the number of cores of a multi-core loop, else 0."""

    def refuse(operand, need, got, rule="loop"):
        program.violation(rule, "for_range", operand, need, got)

    for operand, value in (("begint", begin), ("endt", end)):
        if is_dynamic(value):
            program.check_alive(value, "for_range", operand)
            if as_expr(value).kind != "int":
                refuse(operand, "an integer", "a {} expression".format(as_expr(value).kind), "type")
        elif isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            refuse(operand, "an int, an int Scalar or an int Expr", repr(value), "type")
        elif not 0 <= value <= MAX_TRIPS:
            refuse(operand, "in 0..2**31-1", value)
    static = not is_dynamic(begin) and not is_dynamic(end)
    if static and end < begin:
        refuse("endt", "at least begint", "{} < {}".format(end, begin))
    if thread_num not in (1, 2):
        refuse("thread_num", "1 or 2", thread_num)
    if isinstance(block_num, bool) or not isinstance(block_num, (int, np.integer)) or not 1 <= block_num <= MAX_BLOCKS:
        refuse("block_num", "a Python int in 1..{}".format(MAX_BLOCKS), repr(block_num))
    if thread_num == 2 and static and end - begin == 1:
        refuse("thread_num", "1 for a loop of one iteration", 2)
    if block_num == 1:
        return 0
    if thread_num == 2:
        refuse("thread_num", "1 in a loop with block_num > 1", 2)
    if not static or begin != 0 or end != block_num:
        refuse(
            "block_num",
            "endt, with begint 0 and Python ints",
            "range ({}, {}) and block_num {}".format(begin, end, block_num),
        )
    if program.multicore_line is not None:
        refuse(
            "block_num", "used by one loop of the program", "a second one (first at {})".format(program.multicore_line)
        )
    if program.block is not program.root:
        refuse("block_num", "used outside every other scope", "inside '{}'".format(program.block.kind))
    program.multicore_line = caller_line()
    return int(block_num)


def check_condition(program, name, cond):
    """A comparison Expr, tik.all / tik.any of such, or a Python bool."""
    if is_dynamic(cond):
        program.check_alive(cond, name, "cond")
        if as_expr(cond).kind == "bool":
            return
    elif isinstance(cond, (bool, np.bool_)):
        return
    program.violation("type", name, "cond", "a comparison of ints, combined by tik.all or tik.any", repr(cond))


def previous_branch(program, name):
    """The if_scope that the statement just recorded is."""
    statements = program.block.statements
    if not statements or not isinstance(statements[-1], Branch) or statements[-1].arms[-1][0] is None:
        program.violation("branch", name, "position", "directly after if_scope or elif_scope", "elsewhere")
    return statements[-1]


def check_jump(program, kind):
    """tik_break and tik_continue are inside a loop that runs on one core."""
    if kind == "return":
        return
    block = program.block
    while block is not None and block.kind != "for":
        block = block.parent
    if block is None:
        program.violation("loop", "tik_" + kind, "position", "inside for_range", "outside every loop")
    if block.multicore and not block.parent.multicore:
        need = "inside a loop that runs on one core"
        program.violation("loop", "tik_" + kind, "position", need, "the block_num loop", remedy="Use tik_return.")


# --- building and running -------------------------------------------------------------------------
def check_build(program, scalars, kernel_name, inputs, outputs, flowtable):
    """Everything BuildCCE refuses."""

    def refuse(operand, need, got, rule="build"):
        program.violation(rule, "BuildCCE", operand, need, got)

    program.check_entered("BuildCCE")
    if program.block is not program.root:
        refuse("position", "after every scope has ended", "inside '{}'".format(program.block.kind))
    if program.built is not None:
        refuse("position", "called once", "a second call")
    if not isinstance(kernel_name, str) or not kernel_name.isidentifier():
        refuse("kernel_name", "an identifier", repr(kernel_name), "name")
    for operand, items in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(items, (list, tuple)):
            refuse(operand, "a list of GM tensors", repr(items))
    tensors = [item for item in inputs if isinstance(item, Tensor)]
    if any(item is not tensor for item, tensor in zip(inputs, tensors)):
        refuse("inputs", "tensors first, then InputScalars", "another order")
    others = [item for item in list(inputs)[len(tensors) :] if not any(item is scalar for scalar in scalars)]
    if others or not all(isinstance(item, Tensor) for item in outputs):
        refuse("inputs", "GM tensors and InputScalars", repr(others or outputs))
    if flowtable:
        refuse("flowtable", "None on the simulator", repr(flowtable), "unsupported")
    _check_scalars(refuse, scalars, list(inputs)[len(tensors) :], [tensor.name for tensor in tensors])
    _check_arguments(program, refuse, tensors, list(outputs), len(inputs))


def _check_scalars(refuse, declared, listed, taken):
    """Every InputScalar is listed, once, under a name of its own."""
    for scalar in declared:
        count = sum(item is scalar for item in listed)
        if count != 1:
            refuse(scalar.name, "an InputScalar that is listed once in 'inputs'", "listed {} times".format(count))
        if taken.count(scalar.name) or sum(other.name == scalar.name for other in declared) > 1:
            refuse(scalar.name, "unique among the inputs", "a name that occurs twice", "name")


def _check_arguments(program, refuse, tensors, outputs, inputs):
    """GM tensors: listed where they belong, once; ``inputs``: how many inputs there are, InputScalars included."""
    listed = [tensor.buffer for tensor in tensors + outputs]
    for tensor in tensors + outputs:
        if tensor.buffer.scope != GM:
            refuse(tensor.name, "in GM", tensor.buffer.scope, "scope")
        if tensor.buffer.is_workspace:
            refuse(tensor.name, "neither input nor output, being a workspace", "listed", "workspace")
        if listed.count(tensor.buffer) > 1:
            refuse(tensor.name, "listed once", "listed {} times".format(listed.count(tensor.buffer)))
    workspaces = 0
    for buffer in program.buffers:
        workspaces += buffer.is_workspace
        if buffer.scope == GM and not buffer.is_workspace and buffer not in listed:
            refuse(buffer.name, "an input, an output or a workspace", "a GM tensor that is none of them")
    if inputs > MAX_TENSORS or len(outputs) + workspaces > MAX_TENSORS:
        need = "at most {0} inputs, and {0} outputs with workspaces".format(MAX_TENSORS)
        refuse("inputs, outputs", need, (inputs, len(outputs) + workspaces))
    for tensor in outputs:
        if tensor.buffer not in program.written:
            refuse(tensor.name, "written by the program", "an output that nothing writes")


def check_built(program, call):
    """``call`` needs a program that is complete."""
    if program.built is None:
        program.violation("build", call, "program", "built by BuildCCE", "a program that is not")


def check_run(program, disable_debug):
    """start_debug may run the program."""
    check_built(program, "start_debug")
    if disable_debug:
        program.violation("build", "start_debug", "disable_debug", "False", True)
    if not program.params.execute:
        program.violation("build", "start_debug", "SimulatorParams.execute", "True", False)


def check_feed(program, inputs, feed_dict, call="start_debug"):
    """Keys, shapes and dtypes of what start_debug is given."""
    names = {item.name for item in inputs}
    if set(feed_dict) != names:
        program.violation("feed", call, "feed_dict", "of keys {}".format(sorted(names)), sorted(feed_dict))
    for item in inputs:
        if isinstance(item, Tensor):
            value = feed_dict[item.name]
            got = (getattr(value, "shape", None), str(getattr(value, "dtype", None)))
            if got != (item.origin_shape, item.dtype):
                need = "of shape {} and dtype {}".format(item.origin_shape, item.dtype)
                program.violation("feed", call, item.name, need, "{} {}".format(*got))
