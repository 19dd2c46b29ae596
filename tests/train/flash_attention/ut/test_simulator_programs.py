"""Scalars, loops, cores, atomic add, synchronisation, building: what the simulator refuses, one test a misuse."""

import numpy as np
import pytest
from support.tik_misuse import F16, F32, S32, Kernel, cores, expect_error

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.fixture
def k():
    return Kernel()


# --- scalars ---------------------------------------------------------------------------------------
def test_scalars_of_different_kinds(k):
    value = k.t.Scalar(F32, "value", 1.5)
    with expect_error("dtype", "of the Scalar's kind \\(int32\\)"):
        k.t.Scalar(S32, "count").set_as(value)
    with expect_error("dtype", "of dtype float16"):
        k.t.Scalar(F16, "half").set_as(value)


def test_scalar_from_a_tensor_of_another_dtype(k):
    with expect_error("dtype", "of the Scalar's dtype int32"):
        k.t.Scalar(S32, "count").set_as(k.filled()[0])


def test_scalar_from_gm(k):
    with expect_error("scope", "reads and writes tensors in UB only"):
        k.t.Scalar(F16, "value").set_as(k.gm("x")[0])


def test_run_time_arguments_are_checked_when_they_occur(k):
    a = k.filled("a")
    count = k.t.Scalar(S32, "count", 255)
    count.set_as(count + 1)
    k.t.vec_abs(128, a, a, count, 8, 8)
    with expect_error("range", "'repeat_times' must be in 1..255, but got 256"):
        k.store(a)


def test_loop_from_below_zero_at_run_time(k):
    a, start = k.filled("a"), k.t.Scalar(S32, "start", -1)
    with k.t.for_range(start, 2):
        k.t.vec_abs(128, a, a, 1, 8, 8)
    with expect_error("loop", "'begint' must be in 0..2\\*\\*31-1, but got -1"):
        k.store(a)


def test_repeat_zero_at_run_time_does_nothing(k):
    a = k.filled("a")
    count = k.t.Scalar(S32, "count", 0)
    k.t.vec_muls(128, a, a, 3.0, count, 8, 8)
    assert (k.store(a)[0] == 1).all()


# --- loops and branches ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, rule, words",
    [
        (dict(begint=2, endt=1), "loop", "'endt' must be at least begint"),
        (dict(begint=0, endt=4, thread_num=3), "loop", "'thread_num' must be 1 or 2"),
        (dict(begint=0, endt=1, thread_num=2), "loop", "1 for a loop of one iteration"),
        (dict(begint=1, endt=4, block_num=4), "loop", "'block_num' must be endt, with begint 0"),
        (dict(begint=0, endt=8, block_num=4), "loop", "'block_num' must be endt, with begint 0"),
        (dict(begint=0, endt=4, block_num=4, thread_num=2), "loop", "'thread_num' must be 1 in a loop with block_num"),
        (dict(begint=0, endt=65536, block_num=65536), "loop", "in 1..65535"),
        (dict(begint=0, endt=4.0), "type", "'endt' must be an int"),
    ],
)
def test_for_range_arguments(k, arguments, rule, words):
    with expect_error(rule, words):
        with k.t.for_range(**arguments):
            pass


def test_one_multicore_loop_and_not_nested(k):
    with expect_error("loop", "outside every other scope"):
        with k.t.for_range(0, 2):
            with k.t.for_range(0, 2, block_num=2):
                pass
    with k.t.for_range(0, 2, block_num=2):
        pass
    with expect_error("loop", "used by one loop"):
        with k.t.for_range(0, 2, block_num=2):
            pass


def test_else_without_if(k):
    with expect_error("branch", "directly after if_scope or elif_scope"):
        with k.t.else_scope():
            pass
    with k.t.if_scope(True):
        pass
    with k.t.else_scope():
        pass
    with expect_error("branch", "directly after"):
        with k.t.elif_scope(True):
            pass


def test_condition_that_is_no_comparison(k):
    count = k.t.Scalar(S32, "count", 1)
    with expect_error("type", "a comparison of ints"):
        with k.t.if_scope(count):
            pass


def test_scopes_opened_and_not_entered(k):
    arms = k.t.if_scope(True)
    with expect_error(
        "scope", "'if_scope', 'scope' must be entered by `with` before the next call, but got elif_scope"
    ):
        k.t.elif_scope(True)
    with arms:
        pass
    k.t.for_range(0, 2)
    with expect_error("scope", "'for_range', 'scope'.*got another call before that"):
        k.ub()


def test_break_out_of_the_core_loop(k):
    with k.t.for_range(0, 2, block_num=2):
        with expect_error("loop", "'position' must be inside a loop that runs on one core.*Use tik_return"):
            k.t.tik_break()


def test_break_outside_a_loop(k):
    with expect_error("loop", "'position' must be inside for_range"):
        k.t.tik_break()


def test_too_many_statements(k):
    a = k.filled("a", (128,))
    statement = k.t.program.append
    for _ in range(59980):
        statement(None)
    assert "ir" not in k.t.report["warnings"]
    with k.t.for_range(0, 2, thread_num=2):
        for _ in range(10):
            k.t.vec_abs(128, a, a, 1, 8, 8)  # counts twice
    assert k.t.report["warnings"]["ir"] == 1
    for _ in range(80000 - k.t.report["ir"]):
        statement(None)
    with expect_error("ir", "at most 80000, but got 80001"):
        k.t.vec_abs(128, a, a, 1, 8, 8)


# --- several cores ---------------------------------------------------------------------------------
def test_two_cores_write_one_byte(k):
    out = k.gm("out", (64,), output=True)

    def body(core):
        a = k.filled("a", (48,))
        k.t.data_move(out[core * 16], a, 0, 1, 3, 0, 0)

    with expect_error(
        "race", "'dst' must be in GM bytes that no other core has used, but got core . and core . on 'out'"
    ):
        cores(k, 2, body)


@pytest.mark.parametrize("seed", [0, 1, 2, None])
def test_one_core_reads_what_another_writes_in_any_order(seed):
    k = Kernel(core_order_seed=seed)
    out = k.gm("out", (64,), output=True)

    def body(core):
        a, b = k.filled("a", (16,)), k.ub("b", (16,))
        k.t.data_move(out[core * 16], a, 0, 1, 1, 0, 0)
        with k.t.if_scope(core == 3):
            k.t.data_move(b, out, 0, 1, 1, 0, 0)

    with expect_error("race", "on 'out'"):
        cores(k, 4, body)


def test_disjoint_writes_are_no_race(k):
    out = k.gm("out", (64,), output=True)

    def body(core):
        a = k.filled("a", (16,))
        k.t.data_move(out[core * 16], a, 0, 1, 1, 0, 0)

    assert (cores(k, 4, body)[0] == 1).all()


def test_atomic_adds_of_several_cores(k):
    out = k.gm("out", (64,), F32, output=True, is_atomic_add=True)

    def body(core):
        a = k.filled("a", (64,), F32)
        k.t.set_atomic_add(1)
        k.t.data_move(out, a, 0, 1, 8, 0, 0)
        k.t.set_atomic_add(0)

    assert (cores(k, 4, body)[0] == 4).all()


def test_atomic_add_after_one_core_cleared():
    """In ascending order core 0 clears before core 1 adds; on the device nothing orders them."""
    k = Kernel(core_order_seed=None)
    out = k.gm("out", (64,), F32, output=True)

    def body(core):
        a = k.filled("a", (64,), F32)
        with k.t.if_scope(core == 0):
            k.t.data_move(out, a, 0, 1, 8, 0, 0)
        k.t.set_atomic_add(1)
        k.t.data_move(out, a, 0, 1, 8, 0, 0)
        k.t.set_atomic_add(0)

    with expect_error("race", "core 1 and core 0 on 'out'"):
        cores(k, 2, body)


def test_local_tensor_declared_outside_the_core_loop(k):
    a = k.filled("a")
    with expect_error("multicore", "'a' declared outside"):
        with k.t.for_range(0, 2, block_num=2):
            k.t.vec_abs(128, a, a, 8, 8, 8)


def test_store_outside_the_core_loop(k):
    out, a = k.gm("out", (1024,), output=True), k.filled()
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    with expect_error("race", "written by every core"):
        cores(k, 2, lambda core: None)


# --- atomic add ------------------------------------------------------------------------------------
def test_atomic_mode_of_another_chip(k):
    with expect_error("atomic", "'mode' must be 0 \\(off\\) or 1 \\(float32\\) on 910A, but got 2"):
        k.t.set_atomic_add(2)


def test_atomic_add_left_on(k):
    out, a = k.gm("out", (512,), F32, output=True, is_atomic_add=True), k.filled("a", (512,), F32)
    k.t.set_atomic_add(1)
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    with expect_error("atomic", "0 at the end of the program"):
        k.run()


def test_atomic_add_of_float16(k):
    out, a = k.gm("out", (1024,), output=True, is_atomic_add=True), k.filled()
    k.t.set_atomic_add(1)
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    with expect_error("atomic", "'dst' must be float32 while atomic add is on"):
        k.run()


def test_atomic_add_onto_undefined_memory():
    for options, network in ((dict(), True), (dict(is_atomic_add=True), False)):
        k = Kernel(network_launch=network)
        out, a = k.gm("out", (512,), F32, output=True, **options), k.filled("a", (512,), F32)
        k.t.set_atomic_add(1)
        k.t.data_move(out, a, 0, 1, 64, 0, 0)
        k.t.set_atomic_add(0)
        with expect_error("uninitialized", "'dst' must be cleared before the first atomic add"):
            k.run()


# --- synchronisation -------------------------------------------------------------------------------
def test_dependence_between_pipes_without_synchronisation(k):
    x, a = k.gm("x"), k.ub()
    with k.t.new_stmt_scope(disable_sync=True):
        k.t.data_move(a, x, 0, 1, 64, 0, 0)
        k.t.vec_abs(128, a, a, 8, 8, 8)
    with expect_error("sync", "'vec_abs', 'a|ub' must be synchronised.*vec_abs on V after data_move on MTE2"):
        k.store(a)


def test_one_pipe_and_disjoint_ranges_need_no_synchronisation(k):
    x, a, b, c = k.gm("x"), k.filled("a"), k.ub("b"), k.filled("c")
    work = k.t.Tensor(F16, (1024,), name="work", scope=k.tik.scope_gm, is_workspace=True)
    with k.t.new_stmt_scope(disable_sync=True):
        k.t.data_move(b, x, 0, 1, 64, 0, 0)
        k.t.data_move(work, c, 0, 1, 64, 0, 0)
        k.t.vec_abs(128, a, a, 8, 8, 8)
        k.t.vec_abs(128, a, a, 8, 8, 8)
    k.t.vec_add(128, a, a, b, 8, 8, 8, 8)
    assert (k.store(a)[0] == 2).all()


def test_composite_call_and_nested_scope_without_synchronisation(k):
    a, b = k.filled("a"), k.ub("b")
    with k.t.new_stmt_scope(disable_sync=True):
        with expect_error("sync", "'vec_reduce_add', 'scope' must be synchronised automatically"):
            k.t.vec_reduce_add(128, b, a, b, 1, 8)
        with expect_error("sync", "outside another one with disable_sync=True"):
            with k.t.new_stmt_scope():
                pass


# --- building and feeding --------------------------------------------------------------------------
def test_gm_tensor_that_is_no_argument(k):
    a = k.filled()
    k.t.Tensor(F16, (16,), name="stray", scope=k.tik.scope_gm)
    with expect_error("build", "'stray' must be an input, an output or a workspace"):
        k.store(a)


def test_workspace_listed_as_output(k):
    work = k.t.Tensor(F16, (1024,), name="work", scope=k.tik.scope_gm, is_workspace=True)
    k.t.data_move(work, k.filled(), 0, 1, 64, 0, 0)
    with expect_error("workspace", "neither input nor output"):
        k.t.BuildCCE("kernel", [], [work])


def test_tensor_that_is_input_and_output(k):
    x = k.gm("x")
    with expect_error("build", "'x' must be listed once"):
        k.t.BuildCCE("kernel", [x], [x])


def test_local_tensor_as_argument(k):
    with expect_error("scope", "'ub' must be in GM"):
        k.t.BuildCCE("kernel", [], [k.filled()])


def test_bad_kernel_name(k):
    with expect_error("name", "'kernel_name' must be an identifier"):
        k.t.BuildCCE("a-b", [], [])


def test_input_scalars_are_listed_once_under_names_of_their_own(k):
    x, first = k.gm("x"), k.t.InputScalar(S32, "x")
    with expect_error("build", "'x' must be an InputScalar that is listed once in 'inputs', but got listed 0 times"):
        k.t.BuildCCE("kernel", [x], [])
    with expect_error("name", "'x' must be unique among the inputs"):
        k.t.BuildCCE("kernel", [x, first], [])


def test_inputs_with_scalars_are_counted(k):
    scalars = [k.t.InputScalar(S32, "s{}".format(number)) for number in range(64)]
    with expect_error("build", "at most 64 inputs, and 64 outputs with workspaces, but got \\(65, 0\\)"):
        k.t.BuildCCE("kernel", [k.gm("x")] + scalars, [])


def test_option_of_the_compiler_that_is_not_known(k):
    with expect_error("unsupported", "'BuildCCE', 'extend_params' must be left out"):
        k.t.BuildCCE("kernel", [], [], extend_params={"build_multi_kernels": {}})


def test_nothing_follows_the_build(k):
    a = k.filled()
    k.store(a)
    with expect_error("build", "'position' must be the last call of the program, but got vec_abs after it"):
        k.t.vec_abs(128, a, a, 1, 8, 8)
    with expect_error("build", "'position' must be called once"):
        k.t.BuildCCE("kernel", k.inputs, k.outputs)


def test_scope_opened_and_not_entered_before_the_build(k):
    k.t.for_range(0, 2)
    with expect_error("scope", "entered by `with` before the next call, but got BuildCCE before that"):
        k.t.BuildCCE("kernel", [], [])


@pytest.mark.parametrize(
    "feed, words",
    [
        ({}, "of keys \\['x'\\]"),
        ({"x": np.ones(1024, F16), "y": 1}, "of keys"),
        ({"x": np.ones(1024, F32)}, "of shape \\(1024,\\) and dtype float16"),
        ({"x": np.ones((2, 512), F16)}, "of shape"),
    ],
)
def test_feed_dict(k, feed, words):
    x, out, a = k.gm("x"), k.gm("out", output=True), k.ub()
    k.t.data_move(a, x, 0, 1, 64, 0, 0)
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    k.t.BuildCCE("kernel", [x], [out])
    with expect_error("feed", words):
        k.t.tikdb.start_debug(feed)


def test_debugging_what_was_built_without_it(k):
    with expect_error("build", "'program' must be built by BuildCCE"):
        k.t.tikdb.start_debug({})
    t = k.tik.Tik(disable_debug=True)
    out = t.Tensor(F16, (16,), name="out", scope=k.tik.scope_gm)
    local = t.Tensor(F16, (16,), name="local", scope=k.tik.scope_ubuf)
    t.vec_dup(16, local, 0, 1, 8)
    t.data_move(out, local, 0, 1, 1, 0, 0)
    t.BuildCCE("kernel", [], [out])
    with expect_error("build", "'disable_debug' must be False"):
        t.tikdb.start_debug({})


def test_build_only():
    k = Kernel(execute=False)
    a = k.filled()
    with expect_error("build", "'SimulatorParams.execute' must be True"):
        k.store(a)


# --- strict=False ----------------------------------------------------------------------------------
def test_hazards_become_warnings():
    k = Kernel(strict=False)
    a, fresh = k.filled("a"), k.ub("fresh")
    k.t.vec_abs(128, a[128], a, 3, 8, 8)  # overlap
    k.t.vec_add(128, fresh, fresh, a, 8, 8, 8, 8)  # uninitialised
    k.store(a)
    assert k.t.report["warnings"] == {"overlap": 1, "uninitialized": 1}
    assert "vec_abs" in k.t.report["messages"][0] and "test_simulator_programs.py" in k.t.report["messages"][0]


def test_errors_stay_errors_without_strict():
    k = Kernel(strict=False)
    a = k.ub("a", (128,))
    with expect_error("bounds", "inside 'a'"):
        k.t.vec_dup(128, a, 0, 2, 8)
    with expect_error("capacity", "bytes left"):
        k.ub("b", (200000,))
    with k.t.new_stmt_scope():
        dead = k.ub("dead")
    with expect_error("lifetime", "'dead'"):
        k.t.vec_dup(128, dead, 0, 1, 8)
    out = k.gm("out", (64,), output=True)

    def body(core):
        b = k.filled("b", (64,))
        k.t.data_move(out, b, 0, 1, 4, 0, 0)

    with expect_error("race", "on 'out'"):
        cores(k, 2, body)
