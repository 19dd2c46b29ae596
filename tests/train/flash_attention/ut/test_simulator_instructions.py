"""Every row of the simulator's instruction table runs a tiny program whose result was computed without it."""

import pytest
from support import tik_programs, tik_programs_high, tik_programs_lanes, tik_programs_moves  # noqa: F401

from flash_attention.ascend.simulator import INSTRUCTIONS, Toolkit, table
from flash_attention.ascend.simulator.isa import Call

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

PROGRAMS = tik_programs.PROGRAMS  # importing the other three has filled it
CASES = [
    pytest.param(program, id="{}-{}-{}".format(name, number, program.label))
    for name, programs in sorted(PROGRAMS.items())
    for number, program in enumerate(programs)
]


def test_every_row_has_a_program():
    assert sorted(PROGRAMS) == sorted(INSTRUCTIONS)


@pytest.mark.parametrize("program", CASES)
@pytest.mark.parametrize("soc", ["Ascend910A", "Ascend310P3"])
def test_program(program, soc):
    tik_programs.check(program, Toolkit(soc=soc).tik)


@pytest.mark.cann
@pytest.mark.parametrize("program", CASES)
def test_program_on_the_vendors_debugger(program):
    """The same programs on CANN's own functional simulator."""
    from tbe import tik
    from tbe.common.platform import set_current_compile_soc_info

    set_current_compile_soc_info("Ascend910A")
    tik_programs.check(program, tik)


def test_every_accepted_dtype_is_shown(monkeypatch):
    """Each dtype tuple that a row accepts on 910A occurs in a program of that row."""
    seen = {}
    typed = Call.typed

    def record(call, operands, *addresses):
        got = typed(call, operands, *addresses)
        seen.setdefault(call.name, set()).add(got)
        return got

    monkeypatch.setattr(Call, "typed", record)
    tik = Toolkit().tik
    for programs in PROGRAMS.values():
        for program in programs:
            tik_programs.run(program, tik)
    missing = {
        name: sorted(set(row.dtypes["910A"]) - seen.get(name, set()))
        for name, row in INSTRUCTIONS.items()
        if set(row.dtypes["910A"]) - seen.get(name, set())
    }
    assert missing == {}


def test_the_table_prints_every_row():
    lines = table()
    assert len(lines) == len(INSTRUCTIONS) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert any("vec_exp" in line and "f16<-f16, f32<-f32" in line and line.endswith("| D |") for line in lines)
