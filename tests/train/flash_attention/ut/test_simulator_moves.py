"""Moves and the cube: what the simulator refuses, one test a misuse."""

import pytest
from support.tik_misuse import F32, Kernel, expect_error

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.fixture
def k():
    return Kernel()


# --- moves -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0, 0, 1, 0, 0), "'nburst' must be in 1..4095"),
        ((0, 4096, 1, 0, 0), "'nburst' must be in 1..4095"),
        ((0, 1, 0, 0, 0), "'burst' must be in 1..65535"),
        ((0, 1, 65536, 0, 0), "'burst' must be in 1..65535"),
        ((0, 1, 1, 65536, 0), "'src_stride' must be in 0..65535"),
        ((0, 1, 1, 0, -1), "'dst_stride' must be in 0..65535"),
        ((16, 1, 1, 0, 0), "'sid' must be in 0..15"),
        ((0, 1, 1.0, 0, 0), "'burst' must be an int"),
    ],
)
def test_burst_arguments(k, arguments, words):
    x, a = k.gm("x"), k.ub()
    rule = "type" if "an int" in words else "range"
    with expect_error(rule, words):
        k.t.data_move(a, x, *arguments)


def test_move_beyond_gm_and_its_32_byte_tail(k):
    x, a = k.gm("x", (1000,)), k.ub()
    k.t.data_move(a, x, 0, 1, 63, 0, 0)  # 1008 elements: up to the next 32-byte boundary
    with expect_error("bounds", "'src' must be inside 'x' of 2000 bytes"):
        k.t.data_move(a, x, 0, 1, 64, 0, 0)


def test_store_beyond_gm(k):
    x, a = k.gm("x", (1000,), output=True), k.filled()
    with expect_error("bounds", "'dst' must be inside 'x' of 2000 bytes, but got bytes 0..2015"):
        k.t.data_move(x, a, 0, 1, 63, 0, 0)


def test_stride_beyond_the_tensor_at_run_time(k):
    x, a = k.gm("x"), k.ub()
    with k.t.for_range(0, 5) as i:
        k.t.data_move(a, x[i * 256], 0, 1, 16, 0, 0)
    with expect_error("bounds", "'src' must be inside 'x' of 2048 bytes, but got bytes 2048..2559"):
        k.store(k.filled("b"))


@pytest.mark.parametrize(
    "dst, src",
    [("scope_gm", "scope_gm"), ("scope_gm", "scope_cbuf"), ("scope_cbuf", "scope_cbuf"), ("scope_ubuf", "scope_ca"),
     ("scope_cb", "scope_ubuf"), ("scope_gm", "scope_cc"), ("scope_cbuf", "scope_cc")],
)  # fmt: skip
def test_path_that_does_not_exist(k, dst, src):
    a, b = k.local(dst, "a"), k.local(src, "b")
    with expect_error("path", "'src' must be moved on one of the paths GM->UB"):
        k.t.data_move(a, b, 0, 1, 1, 0, 0)


def test_move_between_dtypes(k):
    with expect_error("dtype", "data_move does not convert"):
        k.t.data_move(k.ub("a", dtype=F32), k.filled("b"), 0, 1, 1, 0, 0)


def test_move_to_an_unaligned_address(k):
    with expect_error("alignment", "'dst' must be at a multiple of 32 bytes"):
        k.t.data_move(k.ub("a")[8], k.gm("x"), 0, 1, 1, 0, 0)


def test_l0c_address_inside_a_fractal(k):
    c, a = k.local("scope_cc", "c", (1024,), F32), k.ub("a", dtype=F32)
    with expect_error("alignment", "'src' must be at a multiple of 1024 bytes"):
        k.t.tensor_mov(a, c[16], "m", 1, 1, 0, 0)


def test_load_of_an_unaligned_fractal(k):
    left, x = k.local("scope_ca", "left"), k.local("scope_cbuf", "x")
    with expect_error("alignment", "'src' must be at a multiple of 512 bytes"):
        k.t.load2dv1(left, x[16], 0, 1, 1, 0)


def test_load_limits(k):
    left, x = k.local("scope_ca", "left"), k.local("scope_cbuf", "x")
    with expect_error("range", "'repeat_times' must be in 1..255"):
        k.t.load2dv1(left, x, 0, 256, 1, 0)
    with expect_error("range", "'src_stride' must be in 0..65535"):
        k.t.load2dv1(left, x, 0, 1, 65536, 0)
    with expect_error("bounds", "'src' must be inside 'x'"):
        k.t.load2dv1(left, x, 3, 2, 1, 0)
    with expect_error("path", "L1->L0A"):
        k.t.load2dv1(k.ub(), x, 0, 1, 1, 0)
    with expect_error("path", "'if_transpose' must be False"):
        k.t.load2dv1(x, k.gm("g"), 0, 1, 1, 0, if_transpose=True)
    with expect_error("dtype", "on 910A"):
        k.t.load2dv1(k.local("scope_ca", "w", dtype=F32), k.local("scope_cbuf", "v", dtype=F32), 0, 1, 1, 0)


def test_scatter_lists_and_strides(k):
    a, b = k.filled("a"), k.ub("b")
    rows = [b[16 * i] for i in range(16)]
    with expect_error("range", "'src_list' must be a list of 16 tensors, but got 15"):
        k.t.vec_trans_scatter(False, False, rows, [a[16 * i] for i in range(15)], 1, 0, 0)
    with expect_error("range", "'src_rep_stride' must be 0 when repeat_times is 1"):
        k.t.vec_trans_scatter(False, False, rows, [a[16 * i] for i in range(16)], 1, 0, 16)


# --- the cube --------------------------------------------------------------------------------------
def cube_operands(k, dst=F32):
    return (k.local("scope_cc", "c", (4096,), dst), k.local("scope_ca", "a"), k.local("scope_cb", "b"))


def test_mmad_limits(k):
    c, a, b = cube_operands(k)
    with expect_error("range", "'m' must be in 0..4095"):
        k.t.mmad(c, a, b, 4096, 16, 16, 0)
    with expect_error("gemv", "'m' must be rounded up to 16"):
        k.t.mmad(c, a, b, 1, 16, 16, 0)
    with expect_error("bounds", "'a' must be inside 'a'"):
        k.t.mmad(c, a, b, 48, 32, 16, 0)
    with expect_error("scope", "'a' must be in L0A"):
        k.t.mmad(c, b, a, 16, 16, 16, 0)
    with expect_error("unsupported", "'smask' must be None on 910A"):
        k.t.mmad(c, a, b, 16, 16, 16, 0, smask=c)


def test_matmul_limits(k):
    c, a, b = k.local("scope_cc", "c", (4096,), F32), k.local("scope_cbuf", "a"), k.local("scope_cbuf", "b")
    with expect_error("range", "'m' must be in 1..4096"):
        k.t.matmul(c, a, b, 4097, 16, 16)
    with expect_error("range", "'k' must be in 1..16384"):
        k.t.matmul(c, a, b, 16, 16385, 16)
    with expect_error("bounds", "'a' must be a slice of at least 1536 elements"):
        k.t.matmul(c, a, b, 48, 32, 16)
    with expect_error("bounds", "t\\[k:\\], not t\\[k\\]"):
        k.t.matmul(c, a[256], b, 16, 16, 16)
    with k.t.for_range(1, 3) as i:
        with expect_error("type", "'m' must be a Python int, but got a run-time value"):
            k.t.matmul(c, a, b, i * 16, 16, 16)


def test_fixpipe_limits(k):
    c, out = k.local("scope_cc", "c", (4096,), F32), k.ub("out", (4096,), F32)
    with expect_error("alignment", "'src' must be at a multiple of 1024 bytes"):
        k.t.fixpipe(out, c[128:], 1, 32, 0, 0)
    with expect_error("alignment", "'dst' must be at a multiple of 32 bytes"):
        k.t.fixpipe(out[4:], c, 1, 32, 0, 0)
    with expect_error("range", "'src_stride, burst_len' must be 0 and even"):
        k.t.fixpipe(out, c, 1, 32, 0, 1)


def test_mode_of_a_move_from_l0c(k):
    c, out = k.local("scope_cc", "c", (4096,), F32), k.ub("out", (4096,), F32)
    with expect_error("range", "'sid_store_mode' must be in 0..15"):
        k.t.tensor_mov(out, c, "m", 1, 1, 0, 0, sid_store_mode=16)


def test_matmul_without_room_in_l0(k):
    k.local("scope_ca", "left", (32768,))
    c, a, b = k.local("scope_cc", "c", (4096,), F32), k.local("scope_cbuf", "a"), k.local("scope_cbuf", "b")
    with expect_error("capacity", "at least 1024 bytes of L0A free, but got 0"):
        k.t.matmul(c, a, b, 16, 16, 16)


def test_padded_rows_of_a_product_are_undefined(k):
    x, y = k.gm("x", (1, 32, 16)), k.gm("y", (1, 16, 16))
    a, b = k.local("scope_cbuf", "a", (1, 32, 16)), k.local("scope_cbuf", "b", (1, 16, 16))
    k.t.data_move(a, x, 0, 1, 32, 0, 0)
    k.t.data_move(b, y, 0, 1, 16, 0, 0)
    c, u = k.local("scope_cc", "c", (1, 32, 16), F32), k.ub("u", (1, 32, 16), F32)
    k.t.matmul(c, a, b, 20, 16, 16)
    k.t.tensor_mov(u, c, "m", 1, 2, 0, 0)
    k.t.vec_abs(64, u, u, 5, 8, 8)  # 20 rows
    k.t.vec_abs(16, u[320], u[320], 1, 8, 8)  # row 20
    with expect_error(
        "uninitialized", "'vec_abs', 'src' must be written before it is read, but got element \\(0, 0\\)"
    ):
        k.store(u)
