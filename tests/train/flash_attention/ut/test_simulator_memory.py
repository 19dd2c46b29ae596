"""Declarations, lifetime, indexing and undefined memory: what the simulator refuses, one test a misuse."""

import numpy as np
import pytest
from support.tik_misuse import F16, F32, S32, Kernel, expect_error

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.fixture
def k():
    return Kernel()


# --- declarations ----------------------------------------------------------------------------------
def test_more_ub_than_there_is(k):
    k.ub("first", (100000,))
    with expect_error(
        "capacity", "'second' must be at most the 62144 bytes left of 262144 in UB, but got 200000 bytes"
    ):
        k.ub("second", (100000,))


@pytest.mark.parametrize(
    "scope, bytes_", [("scope_cbuf", 1048576), ("scope_ca", 65536), ("scope_cb", 65536), ("scope_cc", 262144)]
)
def test_capacity_of_the_other_scopes(k, scope, bytes_):
    k.local(scope, "fits", (bytes_ // 2,))
    with expect_error("capacity", "must be at most the 0 bytes left"):
        k.local(scope, "too_much", (16,))


def test_l1out_and_l0c_are_one_memory(k):
    k.local("scope_cbuf_out", "c", (65536,), F32)
    with expect_error("capacity", "0 bytes left of 262144 in L0C"):
        k.local("scope_cc", "d", (256,), F32)


def test_sizes_are_rounded_up_to_the_alignment_of_the_scope(k):
    k.local("scope_cc", "small", (16,), F32)
    assert k.t.report["peak"]["L0C"] == 1024


def test_double_buffered_tensors_count_twice(k):
    with expect_error("capacity", "262144 in UB, but got 150000 bytes twice"):
        with k.t.for_range(0, 4, thread_num=2):
            k.ub("tile", (75000,))


def test_space_is_free_again_after_its_scope(k):
    for _ in range(3):
        with k.t.new_stmt_scope():
            k.ub("tile", (100000,))
    assert k.t.report["peak"]["UB"] == 200000


def test_ub_budget_is_a_warning(k):
    k.ub("tile", (125000,))
    assert k.t.report["warnings"] == {"capacity": 1}


def test_gm_tensor_inside_a_scope(k):
    with expect_error("lifetime", "'x' must be declared outside every loop, branch and scope"):
        with k.t.for_range(0, 2):
            k.gm("x")


@pytest.mark.parametrize("name", ["1st", "a-b", "", "a b"])
def test_bad_name(k, name):
    with expect_error("name", "letters, digits and _"):
        k.ub(name)


def test_reserved_and_repeated_gm_names(k):
    with expect_error("name", "a free name"):
        k.gm("__fake_tensor")
    k.gm("x")
    with expect_error("name", "unique among GM tensors"):
        k.gm("x")


@pytest.mark.parametrize(
    "shape, words", [((0,), "positive"), ((2.0,), "positive"), ((1,) * 9, "1..8 axes"), (16, "list or tuple")]
)
def test_bad_shape(k, shape, words):
    with expect_error("shape", words):
        k.ub("x", shape)


def test_bad_dtype_and_scope(k):
    with expect_error("dtype", "'dtype' must be one of int8"):
        k.ub("x", (16,), "bfloat16")
    with expect_error("scope", "TIK's scope constants"):
        k.t.Tensor(F16, (16,), name="x", scope="UB")


def test_workspace_and_atomic_outside_gm(k):
    for option, rule in (("is_workspace", "workspace"), ("is_atomic_add", "atomic")):
        with expect_error(rule, "'{}' must be False outside GM".format(option)):
            k.t.Tensor(F16, (16,), name="x", scope=k.tik.scope_ubuf, **{option: True})


def test_newer_tensor_options_are_not_ignored(k):
    with expect_error("unsupported", "'init_value' must be None"):
        k.t.Tensor(F16, (16,), name="x", scope=k.tik.scope_gm, init_value=0)


# --- lifetime and indexing -------------------------------------------------------------------------
def test_tensor_used_after_its_scope(k):
    with k.t.new_stmt_scope():
        dead = k.ub("dead")
    with expect_error("lifetime", "'vec_dup', 'dst' must be alive, but got 'dead', whose scope has ended"):
        k.t.vec_dup(128, dead, 0, 1, 8)


def test_scalar_and_loop_variable_used_after_their_scope(k):
    tile = k.ub()
    with k.t.for_range(0, 2) as i:
        scalar = k.t.Scalar("int32", "count", 1)
    with expect_error("lifetime", "'i', whose scope has ended"):
        k.t.vec_dup(16, tile[i * 16], 0, 1, 8)
    with expect_error("lifetime", "'count', whose scope has ended"):
        k.t.vec_dup(16, tile, 0, scalar, 8)
    with expect_error("lifetime", "'count'"):
        scalar.set_as(3)


def test_flat_index_into_a_slice(k):
    tile = k.ub("tile", (4, 64))
    with expect_error("index", "a whole tensor when it is indexed by one flat index"):
        tile[1:3, 0:16][5]


@pytest.mark.parametrize("index", [(4, 0), (0, 64), (slice(2, 2), 0), (-1, 0)])
def test_index_out_of_range(k, index):
    tile = k.ub("tile", (4, 64))
    with expect_error("index", "indexed inside its extent"):
        tile[index]


def test_reshape_of_a_two_dimensional_slice(k):
    tile = k.ub("tile", (4, 64))
    with expect_error("index", "to be reshaped"):
        tile[1:2, :].reshape((64,))
    with expect_error("index", "reshaped to 256 elements"):
        tile.reshape((255,))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_reinterpretation_as_a_dtype_that_tik_does_not_have(k, dtype):
    with expect_error("dtype", "reinterpreted as one of .*, but got '{}'".format(dtype)):
        k.ub("tile", (8,)).reinterpret_cast_to(dtype)


@pytest.mark.parametrize("scope", ["scope_gm", "scope_nowhere"])
def test_free_space_of_no_local_scope(k, scope):
    with expect_error("scope", "'get_available_buffer_size', 'scope' must be one of TIK's scope constants, not GM"):
        k.t.get_available_buffer_size(getattr(k.tik, scope, scope))


def test_reinterpretation_to_a_wider_type_needs_whole_elements(k):
    with expect_error("index", "a multiple of 2 elements"):
        k.ub("tile", (5,)).reinterpret_cast_to(F32)


def test_python_if_on_a_run_time_value(k):
    with k.t.for_range(0, 2) as i:
        with pytest.raises(TypeError, match="use if_scope, tik.all or tik.any"):
            if i > 0:
                pass


# --- uninitialised memory --------------------------------------------------------------------------
def test_read_of_a_fresh_tensor(k):
    a, b = k.ub("a"), k.ub("b")
    k.t.vec_abs(128, b, a, 8, 8, 8)
    with expect_error("uninitialized", "element \\(0, 0\\) of the part of 'a' it reads"):
        k.store(b)


def test_contents_do_not_survive_an_iteration(k):
    total = k.filled("total")
    with k.t.for_range(0, 2) as i:
        a = k.ub("a")
        with k.t.if_scope(i == 0):
            k.t.vec_dup(128, a, 1, 8, 8)
        k.t.vec_add(128, total, total, a, 8, 8, 8, 8)
    with expect_error("uninitialized", "'src1'"):
        k.store(total)


def test_copies_carry_the_mark(k):
    a, level1, b = k.ub("a"), k.local("scope_cbuf", "level1"), k.ub("b")
    k.t.vec_dup(128, a, 1, 4, 8)
    k.t.data_move(level1, a, 0, 1, 64, 0, 0)
    k.t.data_move(b, level1, 0, 1, 64, 0, 0)
    k.t.vec_abs(128, b, b, 4, 8, 8)
    k.t.vec_abs(128, b[512], b[512], 4, 8, 8)
    with expect_error("uninitialized", "part of 'b'"):
        k.store(b)


def test_output_not_written_in_full(k):
    out, a = k.gm("out", (1024,), output=True), k.filled()
    k.t.data_move(out, a, 0, 1, 63, 0, 0)
    with expect_error("uninitialized", "'out' must be written in full by the program, but got element 1008"):
        k.run()


def test_output_that_nothing_writes(k):
    k.gm("out", output=True)
    with expect_error("build", "'out' must be written by the program"):
        k.run()


def test_scalar_read_of_a_fresh_tensor(k):
    a = k.ub("a", dtype=S32)
    value = k.t.Scalar(S32, "value")
    value.set_as(a[3])
    with expect_error("uninitialized", "'load_scalar'"):
        k.store(k.filled("b"))


def test_nan_instead_of_an_error():
    k = Kernel(uninitialized="nan")
    a, b = k.ub("a"), k.ub("b")
    k.t.vec_abs(128, b, a, 8, 8, 8)
    assert np.isnan(k.store(b)[0]).all()


def test_an_undefined_copy_makes_a_defined_tensor_undefined(k):
    fresh, b = k.ub("fresh"), k.filled("b")
    for _ in range(4):  # by now the simulator knows that all of b is written
        k.t.vec_abs(128, b, b, 8, 8, 8)
    k.t.data_move(b[512:], fresh, 0, 1, 1, 0, 0)
    k.t.vec_abs(128, b, b, 4, 8, 8)
    k.t.vec_abs(128, b[512], b[512], 1, 8, 8)
    with expect_error("uninitialized", "element \\(0, 0\\) of the part of 'b'"):
        k.store(b)


def test_an_undefined_conversion_makes_a_defined_tensor_undefined(k):
    c, b = k.local("scope_cc", "c", (1024,), F32), k.filled("b")
    for _ in range(4):
        k.t.vec_abs(128, b, b, 8, 8, 8)
    k.t.tensor_mov(b, c, "m", 1, 2, 0, 0)
    k.t.vec_abs(128, b[512], b[512], 4, 8, 8)
    k.t.vec_abs(128, b, b, 4, 8, 8)
    with expect_error("uninitialized", "part of 'b'"):
        k.store(b)


def test_an_undefined_store_makes_an_output_undefined(k):
    out, a, fresh = k.gm("out", output=True), k.filled("a"), k.ub("fresh", (16,))
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    k.t.data_move(out[32], fresh, 0, 1, 1, 0, 0)
    with expect_error("uninitialized", "'out' must be written in full by the program, but got element 32"):
        k.run()


def test_undefined_rows_of_a_transposition_arrive_as_columns(k):
    a, b = k.ub("a", (256,)), k.ub("b", (256,))
    k.t.vec_dup(128, a, 1, 1, 8)  # rows 0..7 of 16
    rows = [[x[16 * i] for i in range(16)] for x in (b, a)]
    k.t.vec_trans_scatter(False, False, rows[0], rows[1], 1, 0, 0)
    k.t.vec_abs(8, b, b, 16, 1, 1)
    k.t.vec_abs([0, 0x100], b, b, 1, 1, 1)
    with expect_error("uninitialized", "'vec_abs'.*element \\(0, 0\\)"):
        k.store(b)


def test_the_tail_behind_gm_is_undefined(k):
    x, a = k.gm("x", (1000,)), k.filled("a")
    for _ in range(4):
        k.t.vec_abs(128, a, a, 8, 8, 8)
    k.t.data_move(a, x, 0, 1, 63, 0, 0)
    k.t.vec_abs(104, a[896], a[896], 1, 8, 8)  # elements up to 999
    k.t.vec_abs(112, a[896], a[896], 1, 8, 8)
    with expect_error("uninitialized", "element \\(0, 104\\)"):
        k.store(a)


def test_accumulation_onto_an_undefined_product(k):
    c, a, b = k.local("scope_cc", "c", (256,), F32), k.local("scope_cbuf", "a", (256,)), k.ub("b", (256,), F32)
    k.t.data_move(a, k.filled("ones", (256,)), 0, 1, 16, 0, 0)
    k.t.matmul(c, a, a, 16, 16, 16, init_l1out=False)
    k.t.tensor_mov(b, c, "m", 1, 1, 0, 0)
    with expect_error("uninitialized", "'matmul', 'dst'"):
        k.store(b)
