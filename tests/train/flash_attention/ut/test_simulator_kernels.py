"""The simulator as a whole: kernels from the public pages, recipes, control flow, installation as `tbe`, trace."""

import importlib
import linecache
import sys
import time

import numpy as np
import pytest
from support import tik_kernels, tik_programs, tik_programs_moves

from flash_attention.ascend.simulator import SimulatorError, SimulatorParams, Toolkit, installed_as_tbe
from flash_attention.ascend.simulator.chips import CHIPS, Rates

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

KERNELS = [
    pytest.param(tik_kernels.check_vector_add, (64,), id="vector_add-blocks"),
    pytest.param(tik_kernels.check_vector_add, (1000,), id="vector_add-tail"),
    pytest.param(tik_kernels.check_vector_add, (33000,), id="vector_add-chunks"),
    pytest.param(tik_kernels.check_softmax, (), id="softmax"),
    pytest.param(tik_kernels.check_matmul_chain, (), id="matmul_chain"),
]


@pytest.mark.parametrize("check, arguments", KERNELS)
@pytest.mark.parametrize("uninitialized", ["raise", "nan", "random"])
def test_kernel_from_the_public_pages(check, arguments, uninitialized):
    toolkit = Toolkit(SimulatorParams(uninitialized=uninitialized))
    check(toolkit.tik, *arguments)
    assert toolkit.programs[-1].report["warnings"] == {}


@pytest.mark.cann
@pytest.mark.parametrize("check, arguments", KERNELS)
def test_kernel_on_the_vendors_debugger(check, arguments):
    from tbe import tik
    from tbe.common.platform import set_current_compile_soc_info

    set_current_compile_soc_info("Ascend910A")
    check(tik, *arguments)


@pytest.mark.parametrize("m, k, n", [(16, 16, 16), (32, 48, 64), (64, 16, 32)])
@pytest.mark.parametrize("right", [False, True], ids=["B", "BT"])
@pytest.mark.parametrize("left", [False, True], ids=["A", "AT"])
def test_recipe_from_l1_to_l0(left, right, m, k, n):
    """The four ways a product reads zN tiles of L1."""
    tik_programs.check(tik_programs_moves.product(left, right, m, k, n), Toolkit().tik)


def test_recipe_without_its_transposition_is_noticed():
    program = tik_programs_moves.product(False, True)
    program.inputs["b"] = program.inputs["b"][:, ::-1].copy()
    with pytest.raises(AssertionError):
        tik_programs.check(program, Toolkit().tik)


# --- control flow ---------------------------------------------------------------------------------
def run_scalar_program(body, inputs=(), scalars=None, size=16):
    """body(t, tik, cell): cell(i) = value writes element i of an int32 output of zeros."""
    tik = Toolkit().tik
    t = tik.Tik()
    out = t.Tensor("int32", (size,), name="out", scope=tik.scope_gm)
    arguments = {name: t.InputScalar("int32", name) for name in (scalars or {})}
    cells = t.Tensor("int32", (size,), name="cells", scope=tik.scope_ubuf)
    t.vec_dup(size, cells, 0, 1, 8)
    body(t, tik, cells, **arguments)
    t.data_move(out, cells, 0, 1, size // 8, 0, 0)
    t.BuildCCE("scalars", list(arguments.values()), [out])
    return t.tikdb.start_debug(dict(scalars or {}))[0].tolist()


def test_branches():
    def body(t, tik, cells):
        with t.for_range(0, 6) as i:
            with t.if_scope(tik.all(i >= 1, i < 3, True)):
                cells[i].set_as(10)
            with t.elif_scope(tik.any(i == 4, False)):
                cells[i].set_as(20)
            with t.else_scope():
                cells[i].set_as(30)

    assert run_scalar_program(body)[:6] == [30, 10, 10, 30, 20, 30]


def test_break_continue_and_return():
    def body(t, tik, cells):
        with t.for_range(0, 8) as i:
            with t.if_scope(i == 2):
                t.tik_continue()
            with t.if_scope(i == 5):
                t.tik_break()
            cells[i].set_as(1)
        with t.for_range(0, 0) as i:
            cells[15].set_as(1)

    assert run_scalar_program(body) == [1, 1, 0, 1, 1] + [0] * 11


def test_what_follows_a_jump_is_checked_when_it_executes():
    """The first iteration leaves before the statement that would be out of bounds in it."""

    def body(t, tik, cells):
        with t.for_range(0, 3) as i:
            with t.if_scope(i == 0):
                t.tik_continue()
            t.vec_dup(8, cells[i * 8 - 8], 1, 1, 8)

    assert run_scalar_program(body) == [1] * 16


def test_return_ends_one_core_only():
    tik = Toolkit().tik
    t = tik.Tik()
    out = t.Tensor("int32", (4, 8), name="out", scope=tik.scope_gm)
    with t.for_range(0, 4, block_num=4) as core:
        local = t.Tensor("int32", (8,), name="local", scope=tik.scope_ubuf)
        t.vec_dup(8, local, 1, 1, 8)
        t.data_move(out[core, 0], local, 0, 1, 1, 0, 0)
        with t.if_scope(core % 2 == 0):
            t.tik_return()
        t.vec_dup(8, local, 2, 1, 8)
        t.data_move(out[core, 0], local, 0, 1, 1, 0, 0)
    t.BuildCCE("early", [], [out])
    assert t.tikdb.start_debug({})[0][:, 0].tolist() == [1, 2, 1, 2]


def test_scalar_arithmetic():
    def body(t, tik, cells, n, m):
        total = t.Scalar("int32", "total", 0)
        with t.for_range(m, n) as i:
            total.set_as(total + i * i)
        for position, value in enumerate(
            (total, n // 2, n % 3, n << 2, n >> 1, n & 6, -n, n - m * 2, m - n, (m - n) // 2)
        ):
            cells[position].set_as(value)
        small = t.Scalar("int8", "small")
        small.set_as(n * 20)
        cells[10].set_as(small + 0)

    got = run_scalar_program(body, scalars={"n": 7, "m": 3})
    assert got[:11] == [9 + 16 + 25 + 36, 3, 1, 28, 3, 6, -7, 1, -4, -2, 140 - 256]


def test_extents_of_run_time_slices_fold():
    tik = Toolkit().tik
    t = tik.Tik()
    tile = t.Tensor("float16", (8, 64), name="tile", scope=tik.scope_ubuf)
    with t.for_range(0, 4) as i:
        cut = tile[i * 2 : (i + 1) * 2, i * 16 : i * 16 + 16]
        assert cut.shape == (2, 16) and cut[0, 0].shape == (1, 1)
        assert cut[1:2, 4:].shape == (1, 12)
        assert (tile[i, 0].offset - i * 64) == 0


def test_views():
    tik = Toolkit().tik
    t = tik.Tik()
    tile = t.Tensor("float16", (8, 64), name="tile", scope=tik.scope_ubuf)
    assert tile[100:].shape == (412,) and tile[100].shape == (1,) and tile[100:300].offset == 100
    assert tile[2:4, 16:32][1:2, 8:16].offset == 3 * 64 + 24
    assert tile.reshape((4, 128))[1, 2].offset == 130
    assert tile[128:].reshape((6, 64))[1, 0].offset == 192
    assert tile.reinterpret_cast_to("float32").shape == (8, 32)
    assert tile[64:128].reinterpret_cast_to("int8").offset == 128


def test_cores_have_memory_of_their_own():
    """Without strict, what a core writes into a tensor declared before the core loop is invisible to the next."""
    tik = Toolkit(SimulatorParams(strict=False)).tik
    t = tik.Tik()
    out = t.Tensor("float16", (4, 16), name="out", scope=tik.scope_gm)
    shared = t.Tensor("float16", (16,), name="shared", scope=tik.scope_ubuf)
    t.vec_dup(16, shared, 1, 1, 8)
    with t.for_range(0, 4, block_num=4) as core:
        t.vec_muls(16, shared, shared, 2.0, 1, 8, 8)
        t.data_move(out[core, 0], shared, 0, 1, 1, 0, 0)
    t.BuildCCE("shared", [], [out])
    assert (t.tikdb.start_debug({})[0] == 2).all()
    assert t.report["warnings"]["multicore"] >= 2


def test_cores_have_registers_of_their_own():
    tik = Toolkit().tik
    t = tik.Tik()
    out = t.Tensor("int32", (4, 8), name="out", scope=tik.scope_gm)
    count = t.Scalar("int32", "count", 5)
    with t.for_range(0, 4, block_num=4) as core:
        local = t.Tensor("int32", (8,), name="local", scope=tik.scope_ubuf)
        t.vec_dup(8, local, 0, 1, 8)
        count.set_as(count + core)
        local[0].set_as(count)
        t.data_move(out[core, 0], local, 0, 1, 1, 0, 0)
    t.BuildCCE("registers", [], [out])
    assert t.tikdb.start_debug({})[0][:, 0].tolist() == [5, 6, 7, 8]


# --- the modules ----------------------------------------------------------------------------------
THIRD_PARTY = '''
"""An operator as third parties write them."""
from tbe import tik
from te import platform as cce
import te.platform.cce_conf
from tbe.common.platform import get_soc_spec, set_current_compile_soc_info, api_check_support
from tbe.common.register import register_op_compute
from tbe.common.utils import para_check


@register_op_compute("double")
@para_check.check_op_params(para_check.REQUIRED_ATTR_STR, para_check.KERNEL_NAME)
def double(dtype, kernel_name="double"):
    set_current_compile_soc_info("Ascend910")
    instance = tik.Tik(tik.Dprofile())
    x = instance.Tensor(dtype, (128,), name="x", scope=tik.scope_gm)
    y = instance.Tensor(dtype, (128,), name="y", scope=tik.scope_gm)
    local = instance.Tensor(dtype, (128,), name="local", scope=tik.scope_ubuf)
    instance.data_move(local, x, 0, 1, 8, 0, 0)
    instance.vec_add(128, local, local, local, 1, 8, 8, 8)
    instance.data_move(y, local, 0, 1, 8, 0, 0)
    instance.BuildCCE(kernel_name=kernel_name, inputs=[x], outputs=[y], config={"dump_cce_code": False})
    return instance, get_soc_spec(cce.UB_SIZE), api_check_support("tik.data_move_pad")
'''


def test_installed_as_tbe(tmp_path, monkeypatch):
    (tmp_path / "third_party_double.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: sys.modules.get(name) for name in ("tbe", "te", "tbe.tik")}
    with installed_as_tbe(SimulatorParams(trace=True)) as toolkit:
        operator = importlib.import_module("third_party_double")
        instance, ub_size, padded = operator.double("float16")
        assert ub_size == 262144 and padded is False
        x = np.arange(128).astype(np.float16)
        assert (instance.tikdb.start_debug({"x": x})[0] == 2 * x).all()
        assert toolkit.programs == [instance]
    assert {name: sys.modules.get(name) for name in before} == before
    monkeypatch.delitem(sys.modules, "third_party_double")


def test_platform_queries():
    platform = Toolkit().platform
    assert platform.get_soc_spec("CORE_NUM") == 32 and platform.get_soc_spec("L1_SIZE") == 1048576
    assert platform.get_soc_spec("CUBE_SIZE") == [16, 16, 16]
    with pytest.raises(RuntimeError, match="'key' must be one of"):
        platform.get_soc_spec("MAGIC")
    platform.set_current_compile_soc_info("Ascend310P3")
    assert platform.get_soc_spec("CORE_NUM") == 8 and platform.get_soc_spec("SOC_VERSION") == "Ascend310P3"
    for unknown in ("Ascend910B1", "Ascend910_9391", "Ascend950"):
        with pytest.raises(ValueError, match="simulated chip"):
            platform.set_current_compile_soc_info(unknown)
    platform.set_current_compile_soc_info("Ascend910", aicore_num=30)
    assert platform.get_soc_spec("CORE_NUM") == 30
    with pytest.raises(ValueError, match="'aicore_num' must be in 1..32, but got 33"):
        platform.set_current_compile_soc_info("Ascend910", aicore_num=33)
    with pytest.raises(ValueError, match="'core_type' must be 'AiCore', but got 'VectorCore'"):
        platform.set_current_compile_soc_info("Ascend310P3", "VectorCore")
    assert platform.api_check_support("tik.vec_add", "float16")
    assert not platform.api_check_support("tik.vcgmax", "float32")
    assert platform.api_check_support("tik.for_range") and not platform.api_check_support("tik.vec_magic")
    assert not platform.api_check_support("tik.load_scalar") and not platform.api_check_support("tik.count")
    assert platform.intrinsic_check_support("Intrinsic_vexp", "float32")
    tik = Toolkit().tik
    t = tik.Tik()
    t.Tensor("float16", (1024,), name="x", scope=tik.scope_ubuf)
    assert t.get_available_buffer_size(tik.scope_ubuf) == 262144 - 2048


@pytest.mark.parametrize("arguments, words", [({"uninitialized": "zero"}, "raise, nan, random"),
                                              ({"reciprocal_error": 1.0}, "in \\[0, 0.5\\)")])  # fmt: skip
def test_parameters_are_validated(arguments, words):
    with pytest.raises(ValueError, match=words):
        SimulatorParams(**arguments)


# --- the trace ------------------------------------------------------------------------------------
def traced_softmax():
    toolkit = Toolkit(SimulatorParams(trace=True))
    tik_kernels.check_softmax(toolkit.tik, 8, 512, 2)
    return toolkit.programs[-1].trace


def test_trace_records():
    trace = traced_softmax()
    assert sorted(trace.cores) == [0, 1]
    records = trace.cores[1]
    load = records[0]
    assert (load.name, load.pipe, load.bytes, load.cycles) == ("data_move", "MTE2", 1024, -(-1024 // Rates().gm_read))
    assert load.reads[0][:3] == ("GM", 4 * 1024, 5 * 1024) and load.reads[0].name == "x"
    path, number = load.line.rsplit(":", 1)
    assert "t.data_move(row, x[" in linecache.getline(path, int(number))
    exp = [record for record in records if record.name == "vec_exp"][0]
    assert (exp.pipe, exp.cycles, exp.bytes) == ("V", 4 * 4, 1024) and exp.reads == exp.writes
    assert {record.pipe for record in records} == {"MTE2", "V", "S", "MTE3"}
    assert trace.cycles(1)["S"] == 8 * Rates().scalar_access
    assert len(trace) == 2 * len(records) and len(list(trace)) == len(trace)


def test_double_buffers_alternate_in_the_trace():
    loads = [record for record in traced_softmax().cores[0] if record.pipe == "MTE2"]
    starts = [record.writes[0].start for record in loads]
    assert starts[0] == starts[2] != starts[1] == starts[3]
    assert abs(starts[1] - starts[0]) == 1024


def test_counting_gives_the_trace_of_a_run():
    toolkit = Toolkit(SimulatorParams(trace=True))
    tik_kernels.check_matmul_chain(toolkit.tik)
    program = toolkit.programs[-1]
    assert list(program.count()) == list(program.trace)
    cube = [record for record in program.trace if record.pipe == "M"]
    assert [record.cycles for record in cube] == [2 * 4 * 3, 2 * 3 * 5]
    first = [record for record in program.trace if record.line == cube[0].line]
    assert [(record.pipe, record.part) for record in first] == [("MTE1", 0), ("MTE1", 1), ("M", 2)]
    assert [[span.name for span in record.reads + record.writes] for record in first] == [["a_l1"], ["b_l1"], ["first"]]


def test_counting_one_core_of_a_shape_too_large_to_simulate():
    tik = Toolkit(SimulatorParams(execute=False)).tik
    t = tik.Tik()
    x, y = [t.Tensor("float16", (32, 1 << 20), name=name, scope=tik.scope_gm) for name in "xy"]
    with t.for_range(0, 32, block_num=32) as core:
        with t.for_range(0, 64, thread_num=2) as i:
            tile = t.Tensor("float16", (1 << 14,), name="tile", scope=tik.scope_ubuf)
            t.data_move(tile, x[core, i * (1 << 14)], 0, 1, 1 << 10, 0, 0)
            t.data_move(y[core, i * (1 << 14)], tile, 0, 1, 1 << 10, 0, 0)
    t.BuildCCE("copy", [x], [y])
    trace = t.count(cores=[5])
    assert list(trace.cores) == [5] and len(trace) == 128
    assert trace.cycles()["MTE2"] == 64 * -(-(1 << 15) // CHIPS[0].rates.gm_read)


def test_counting_executes_what_leads_to_scalars():
    """Loop bounds from a table in GM, moved to UB and added up there; the data itself is never needed."""
    tik = Toolkit().tik
    t = tik.Tik()
    table = t.Tensor("int32", (4, 8), name="table", scope=tik.scope_gm)
    x = t.Tensor("float16", (16,), name="x", scope=tik.scope_gm)
    y = t.Tensor("float16", (16,), name="y", scope=tik.scope_gm)
    rows = t.InputScalar("int32", "rows")
    local = t.Tensor("int32", (8,), name="local", scope=tik.scope_ubuf)
    tile = t.Tensor("float16", (16,), name="tile", scope=tik.scope_ubuf)
    stop = t.Scalar("int32", "stop")
    t.data_move(tile, x, 0, 1, 1, 0, 0)
    with t.for_range(0, rows) as row:
        t.data_move(local, table[row, 0], 0, 1, 1, 0, 0)
        t.vec_add(8, local, local, local, 1, 8, 8, 8)
        stop.set_as(local[1])
        with t.for_range(0, stop):
            t.vec_adds(16, tile, tile, 1.0, 1, 8, 8)
    t.data_move(y, tile, 0, 1, 1, 0, 0)
    t.BuildCCE("bounds", [table, x, rows], [y])
    bounds = np.arange(32, dtype=np.int32).reshape(4, 8) // 8
    trace = t.count({"table": bounds, "rows": 3})
    assert [record.name for record in trace].count("vec_adds") == 2 * (0 + 1 + 2)
    with pytest.raises(
        SimulatorError, match="'count', 'feed_dict' must be of keys \\['rows', 'table'\\], but got \\['rows'\\]"
    ):
        t.count({"rows": 3})


# --- speed ----------------------------------------------------------------------------------------
def test_the_interpreter_is_not_the_bottleneck():
    """Small instructions only, so that the time is the interpreter's: our largest case has about 100,000."""
    tik = Toolkit().tik
    t = tik.Tik()
    out = t.Tensor("float32", (64,), name="out", scope=tik.scope_gm)
    tile = t.Tensor("float32", (1024,), name="tile", scope=tik.scope_ubuf)
    t.vec_dup(64, tile, 0.0, 16, 8)
    with t.for_range(0, 2000) as i:
        t.vec_adds(64, tile, tile, 1.0, 1, 8, 8)
        t.vec_max(64, tile[64], tile[64], tile, 8, 8, 8, 0)
        t.vec_muls(64, tile[(i % 8) * 64 + 64], tile, 0.5, 1, 8, 8)
    t.data_move(out, tile, 0, 1, 8, 0, 0)
    t.BuildCCE("loop", [], [out])
    start = time.process_time()
    result = t.tikdb.start_debug({})[0]
    rate = t.instructions / (time.process_time() - start)
    assert (result == 2000).all() and t.instructions == 6002
    assert rate > 5000, "{:.0f} instructions a second".format(rate)
