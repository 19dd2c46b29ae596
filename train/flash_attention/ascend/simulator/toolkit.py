"""One chip and one set of parameters behind the modules a TIK kernel imports; and their installation as ``tbe``."""

import functools
import sys
import types
from contextlib import contextmanager
from dataclasses import replace

from flash_attention.core.errors import invalid_value

from . import tik as facade
from .chips import SPEC_KEYS, TIK_SCOPES, chip_of
from .control import INTERNAL
from .expr import combine
from .isa import INSTRUCTIONS
from .params import SimulatorParams

_CALLS = frozenset(
    "Tensor Scalar InputScalar for_range if_scope elif_scope else_scope new_stmt_scope tik_break tik_continue "
    "tik_return get_available_buffer_size BuildCCE".split()
)
"""TIK's calls on an instance that are no instructions."""


class Toolkit:
    """What ``tbe`` is on a machine with CANN: ``toolkit.tik`` and ``toolkit.platform``, for one chip at a time.

    Args:
        params: :class:`SimulatorParams` for every program built from ``toolkit.tik``.
        soc: initial target, as given to ``set_current_compile_soc_info``.

    Attributes:
        tik: module with ``Tik``, the scope constants, ``all`` and ``any``.
        platform: module with ``set_current_compile_soc_info``, ``get_soc_spec``, ``api_check_support``, ...
        programs: every ``Tik`` made so far, newest last.
    """

    def __init__(self, params=None, soc="Ascend910A"):
        self.params = params or SimulatorParams()
        self.programs = []
        self.set_soc(soc)
        self.tik = self._tik_module()
        self.platform = self._platform_module()

    def set_soc(self, soc_version, core_type="AiCore", aicore_num=None, l1_fusion=None):
        """Choose the chip for programs made from now on.

        Args:
            soc_version: the product's name, see :func:`~flash_attention.ascend.simulator.chips.chip_of`.
            core_type: 'AiCore': vector cores alone are not simulated.
            aicore_num: what ``get_soc_spec("CORE_NUM")`` answers, at most the chip's cores; None = all of them.
            l1_fusion: CANN's, a hint to its graph compiler, which changes nothing here.

        Raises:
            ValueError: a chip, kind of core or number that is not simulated.
        """
        if core_type != "AiCore":
            raise invalid_value("set_current_compile_soc_info", "core_type", "'AiCore'", repr(core_type))
        chip = chip_of(soc_version)
        cores = chip.cores if aicore_num is None else int(aicore_num)
        if not 1 <= cores <= chip.cores:
            need = "in 1..{}".format(chip.cores)
            raise invalid_value("set_current_compile_soc_info", "aicore_num", need, aicore_num)
        self.chip, self.soc = replace(chip, cores=cores), soc_version

    def soc_spec(self, key):
        """A figure of the chip by one of the keys of chips.SPEC_KEYS.

        Raises:
            RuntimeError: unknown key.
        """
        if key not in SPEC_KEYS:
            raise RuntimeError("For 'get_soc_spec', the 'key' must be one of {}, but got {!r}.".format(SPEC_KEYS, key))
        return self.chip.spec(self.soc)[key]

    def api_check_support(self, name, dtype=""):
        """True when ``"tik.<name>"`` runs on the chip, for ``dtype`` as destination where one is given."""
        call = name.split(".", 1)[-1]
        row = INSTRUCTIONS.get(call)
        if row is None or call in INTERNAL:
            return call in _CALLS and not dtype
        rows = row.dtypes[self.chip.name]
        return not dtype or not rows or any(kinds[0] == dtype for kinds in rows)

    def intrinsic_check_support(self, name, dtype=""):
        """As :meth:`api_check_support`, for ``"Intrinsic_<name>"``."""
        return self.api_check_support(name.replace("Intrinsic_", "tik.", 1), dtype)

    def _tik_module(self):
        """The module that ``from tbe import tik`` gives."""
        module = types.ModuleType("tbe.tik", "TIK, executed by flash_attention's simulator.")
        module.Tik = functools.partial(facade.Tik, self)
        module.Dprofile = Dprofile
        module.all = lambda *conditions: combine("and", conditions)
        module.any = lambda *conditions: combine("or", conditions)
        for name, value in TIK_SCOPES.items():
            setattr(module, name, value)
        return module

    def _platform_module(self):
        """tbe.common.platform and its older names."""
        module = types.ModuleType("tbe.common.platform", "The target chip, as flash_attention's simulator knows it.")
        for name in ("set_current_compile_soc_info", "te_set_version"):
            setattr(module, name, self.set_soc)
        for name in ("get_soc_spec", "cce_get_spec"):
            setattr(module, name, self.soc_spec)
        module.api_check_support = self.api_check_support
        module.intrinsic_check_support = self.intrinsic_check_support
        for key in SPEC_KEYS:
            setattr(module, key, key)
        for name, value in TIK_SCOPES.items():
            setattr(module, name, value)
        return module


class Dprofile:
    """Legacy first argument of Tik; ignored there."""

    def __init__(self, *args):
        self.args = args


@contextmanager
def installed_as_tbe(params=None, soc="Ascend910A"):
    """Make ``from tbe import tik`` give the simulator, and all else an operator's module imports from CANN importable.

    That is tbe, te, their ``tik`` and ``platform``, and tbe.common.register and tbe.common.utils.para_check, whose
    decorators change nothing.

    Args:
        params, soc: as for :class:`Toolkit`.

    Yields:
        the :class:`Toolkit`; its ``programs`` hold what third-party code built. Modules that were importable before
        come back at the end. Kernel modules imported inside keep their reference to this toolkit.
    """
    toolkit = Toolkit(params, soc)
    modules = _modules(toolkit)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield toolkit
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


# Parameter kinds of tbe.common.utils.para_check that operators name in decorators.
_PARAMETER_KINDS = tuple(
    "{}_{}".format(need, kind)
    for need in ("REQUIRED", "OPTION", "DYNAMIC")
    for kind in ("INPUT", "OUTPUT") + tuple("ATTR_" + kind for kind in (
        "INT", "FLOAT", "STR", "BOOL", "TYPE", "LIST_INT", "LIST_FLOAT", "LIST_BOOL", "LIST_LIST_INT"))
) + ("KERNEL_NAME",)  # fmt: skip


def _pass_through(*_arguments, **_keywords):
    """A decorator factory whose decorators change nothing: what registration means is the vendor's compiler's."""
    return lambda function: function


def _registration_modules():
    """tbe.common.register and tbe.common.utils, as far as an operator's entry function names them."""
    register = types.ModuleType("tbe.common.register", "Registration decorators that change nothing.")
    register.register_op_compute = register.register_operator = _pass_through
    para_check = types.ModuleType("tbe.common.utils.para_check", "Parameter checks that accept everything.")
    para_check.check_op_params = _pass_through
    for kind in _PARAMETER_KINDS:
        setattr(para_check, kind, kind.lower())
    return {"tbe.common.register": register, "tbe.common.utils.para_check": para_check}


def _modules(toolkit):
    """name -> module of everything installed."""
    modules = {"tbe.tik": toolkit.tik, "te.tik": toolkit.tik}
    modules.update({"tbe.common.platform": toolkit.platform, "te.platform": toolkit.platform})
    for name in ("tbe.common.platform.platform_info", "te.platform.cce_conf", "te.platform.cce_params"):
        modules[name] = toolkit.platform
    modules.update(_registration_modules())
    packages = (
        ("tbe.common.utils", ("para_check",)),
        ("tbe.common", ("platform", "register", "utils")),
        ("tbe", ("tik", "common")),
        ("te", ("tik", "platform")),
    )
    for name, children in packages:
        package = types.ModuleType(name, "Stand-in of flash_attention's simulator.")
        package.__path__ = []  # a package, so that submodules can be imported from it
        for child in children:
            setattr(package, child, modules["{}.{}".format(name, child)])
        modules[name] = package
    return modules
