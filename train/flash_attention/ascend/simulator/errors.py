"""The simulator's one exception, and the line of the kernel it names."""

import contextlib
import os
import sys

from flash_attention.core.errors import Reason

_OURS = (os.path.dirname(os.path.abspath(__file__)) + os.sep, contextlib.__file__)


class SimulatorError(RuntimeError):
    """A program that the device would refuse, or would run with an undefined result.

    Attributes:
        rule: a short fixed name of the broken rule, such as "capacity", "overlap", "uninitialized", "race".
        line: ``file:line`` of the kernel's call.
    """

    def __init__(self, message, rule, line):
        super().__init__(message)
        self.rule = rule
        self.line = line


def violation_text(instruction, operand, need, got, rule, line, remedy=""):
    """One sentence: instruction, operand, limit, value, rule and source line."""
    text = Reason(operand, got, need, remedy).message(instruction)
    return "{} [{}] at {}".format(text, rule, line)


def caller_line():
    """``file:line`` of the nearest caller outside the simulator."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return "{}:{}".format(frame.f_code.co_filename, frame.f_lineno) if frame is not None else "<unknown>"
