"""Values that exist when the program runs: loop variables, Scalars and expressions of them.

An integer :class:`Expr` is kept as a linear form (constant + sum of coefficient * atom), so that the extent of a slice
such as ``t[i * 16:(i + 1) * 16]`` folds to the plain number 16. Everything else is an atom with its own text. All
expressions of a statement are compiled together into one Python function of the register file.
"""

import numpy as np

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32")
_EMPTY = frozenset()


class Register:
    """One slot of the scalar register file, alive while ``block`` is open.

    Attributes:
        index: position in the register file.
        name: for messages.
        dtype: TIK's name of the type.
        block: the lexical block it was declared in.
    """

    __slots__ = ("index", "name", "dtype", "block")

    def __init__(self, index, name, dtype, block):
        self.index, self.name, self.dtype, self.block = index, name, dtype, block


class Arithmetic:
    """Operators shared by :class:`Expr` and Scalar; each returns an Expr, or a number where all registers cancel."""

    def to_expr(self):
        raise NotImplementedError

    def __add__(self, other):
        return _linear(self, other, 1)

    def __radd__(self, other):
        return _linear(other, self, 1)

    def __sub__(self, other):
        return _linear(self, other, -1)

    def __rsub__(self, other):
        return _linear(other, self, -1)

    def __mul__(self, other):
        return _product(self, other)

    __rmul__ = __mul__

    def __neg__(self):
        return _product(self, -1)

    def __bool__(self):
        raise TypeError(
            "A run-time TIK expression has no value while the program is built: use if_scope, tik.all or tik.any "
            "instead of Python's if, and, or, not."
        )

    __hash__ = object.__hash__


def _binary(name, template, boolean=False):
    def forward(self, other):
        return _opaque(template, self, other, boolean)

    def backward(self, other):
        return _opaque(template, other, self, boolean)

    setattr(Arithmetic, "__{}__".format(name), forward)
    if not boolean:
        setattr(Arithmetic, "__r{}__".format(name), backward)


for _name, _symbol in (("floordiv", "//"), ("mod", "%"), ("lshift", "<<"), ("rshift", ">>"), ("and", "&"), ("or", "|")):
    _binary(_name, "({} " + _symbol + " {})")
_binary("truediv", "divide({}, {})")
for _name, _symbol in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    _binary(_name, "({} " + _symbol + " {})", boolean=True)


class Expr(Arithmetic):
    """An expression of registers.

    Attributes:
        terms: dict atom text -> integer coefficient.
        const: the constant part.
        registers: frozenset of the :class:`Register` it reads.
        kind: "int", "float" or "bool".
    """

    __slots__ = ("terms", "const", "registers", "kind")

    def __init__(self, terms, const, registers, kind="int"):
        self.terms, self.const, self.registers, self.kind = terms, const, registers, kind

    @classmethod
    def atom(cls, text, registers, kind="int"):
        return cls({text: 1}, 0, registers, kind)

    def to_expr(self):
        return self

    def code(self):
        """Python text over the register file ``r``."""
        parts = [text if factor == 1 else "{}*{}".format(factor, text) for text, factor in self.terms.items()]
        if self.const or not parts:
            parts.append(repr(self.const))
        return parts[0] if len(parts) == 1 else "({})".format(" + ".join(parts))

    def __repr__(self):
        return "Expr({})".format(self.code())


def is_dynamic(value):
    """True for a value known only at run time."""
    return isinstance(value, Arithmetic)


def as_expr(value):
    """Number, Scalar or Expr as an Expr."""
    if isinstance(value, Arithmetic):
        return value.to_expr()
    if isinstance(value, (bool, np.bool_)):
        return Expr({}, int(value), _EMPTY, "bool")
    if isinstance(value, (int, np.integer)):
        return Expr({}, int(value), _EMPTY, "int")
    if isinstance(value, (float, np.floating)):
        return Expr({}, float(value), _EMPTY, "float")
    raise TypeError("For 'Expr', the operand must be a number, Scalar or Expr, but got {!r}.".format(value))


def _folded(expr):
    return expr if expr.terms else expr.const


def _linear(left, right, sign):
    left, right = as_expr(left), as_expr(right)
    registers = left.registers | right.registers
    if left.kind == "float" or right.kind == "float":
        text = "({} {} {})".format(left.code(), "+" if sign > 0 else "-", right.code())
        return Expr.atom(text, registers, "float")
    terms = dict(left.terms)
    for text, factor in right.terms.items():
        terms[text] = terms.get(text, 0) + sign * factor
    terms = {text: factor for text, factor in terms.items() if factor}
    return _folded(Expr(terms, left.const + sign * right.const, registers if terms else _EMPTY))


def _product(left, right):
    left, right = as_expr(left), as_expr(right)
    registers = left.registers | right.registers
    if left.kind == "float" or right.kind == "float":
        return Expr.atom("({} * {})".format(left.code(), right.code()), registers, "float")
    if not left.terms:
        left, right = right, left
    if not right.terms:
        factor = right.const
        terms = {text: factor * old for text, old in left.terms.items()} if factor else {}
        return _folded(Expr(terms, factor * left.const, registers if terms else _EMPTY))
    return Expr.atom("({} * {})".format(left.code(), right.code()), registers)


def _opaque(template, left, right, boolean=False):
    left, right = as_expr(left), as_expr(right)
    kind = "bool" if boolean else "float" if "float" in (left.kind, right.kind) else "int"
    return Expr.atom(template.format(left.code(), right.code()), left.registers | right.registers, kind)


def combine(word, conditions):
    """``tik.all`` (word "and") and ``tik.any`` (word "or") over Exprs and Python bools."""
    if not conditions:
        raise TypeError("For 'tik.{}', at least one condition is needed.".format("all" if word == "and" else "any"))
    exprs = [as_expr(condition) for condition in conditions]
    registers = frozenset().union(*(expr.registers for expr in exprs))
    text = "({})".format(" {} ".format(word).join(expr.code() for expr in exprs))
    return Expr.atom(text, registers, "bool")


def divide(left, right):
    """TIK's ``/``: truncates for integers, as the C code generated from it does [U]."""
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


def compile_values(values):
    """One function ``f(registers) -> tuple`` that evaluates all of ``values`` (Exprs or Scalars)."""
    text = "lambda r: ({})".format("".join(as_expr(value).code() + ", " for value in values))
    return eval(text, {"divide": divide})  # the text comes from Expr alone: indices, numbers and operators


def convert_scalar(value, dtype):
    """``value`` as a register of type ``dtype`` holds it: floats rounded, integers wrapped to their width."""
    if dtype in FLOATS:
        return float(np.dtype(dtype).type(value))
    bits = 8 * np.dtype(dtype).itemsize
    value = int(value) & ((1 << bits) - 1)
    return value - (1 << bits) if dtype.startswith("int") and value >> (bits - 1) else value
