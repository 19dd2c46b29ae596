"""What the simulator must refuse: one test a misuse, each asserting the rule, the words and the kernel's own line."""

import re

import numpy as np
import pytest

from flash_attention.ascend.simulator import SimulatorError, SimulatorParams, Toolkit

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

F16, F32, S32 = "float16", "float32", "int32"


class Kernel:
    """A program under construction: short names for tensors of each scope, and `run`."""

    def __init__(self, soc="Ascend910A", **params):
        self.toolkit = Toolkit(SimulatorParams(**params), soc=soc)
        self.tik = self.toolkit.tik
        self.t = self.tik.Tik()
        self.inputs, self.outputs, self.feed = [], [], {}

    def gm(self, name, shape=(1024,), dtype=F16, output=False, **options):
        tensor = self.t.Tensor(dtype, shape, name=name, scope=self.tik.scope_gm, **options)
        (self.outputs if output else self.inputs).append(tensor)
        if not output:
            self.feed[name] = np.ones(shape, dtype)
        return tensor

    def ub(self, name="ub", shape=(1024,), dtype=F16):
        return self.t.Tensor(dtype, shape, name=name, scope=self.tik.scope_ubuf)

    def local(self, scope, name="local", shape=(1024,), dtype=F16):
        return self.t.Tensor(dtype, shape, name=name, scope=getattr(self.tik, scope))

    def filled(self, name="ub", shape=(1024,), dtype=F16):
        """A UB tensor full of ones."""
        tensor = self.ub(name, shape, dtype)
        lanes = 256 // np.dtype(dtype).itemsize
        for start in range(0, shape[0], lanes):
            self.t.vec_dup(min(lanes, shape[0] - start), tensor[start], 1, 1, 8)
        return tensor

    def run(self, **feed):
        self.t.BuildCCE("kernel", self.inputs, self.outputs)
        return self.t.tikdb.start_debug(dict(self.feed, **feed))

    def store(self, local):
        """Make a whole UB tensor the program's output, build and run."""
        out = self.gm("out", local.shape, local.dtype, output=True)
        self.t.data_move(out, local, 0, 1, local.size * np.dtype(local.dtype).itemsize // 32, 0, 0)
        return self.run()


@pytest.fixture
def k():
    return Kernel()


def refused(rule, words):
    """Expect a SimulatorError of `rule` whose text matches `words` and which names this file."""

    class Refused:
        def __enter__(self):
            self.context = pytest.raises(SimulatorError, match=words)
            self.info = self.context.__enter__()

        def __exit__(self, *exception):
            done = self.context.__exit__(*exception)
            if done:
                assert self.info.value.rule == rule, str(self.info.value)
                assert re.search(r"test_simulator_misuse\.py:\d+$", self.info.value.line)
                assert self.info.value.line in str(self.info.value)
            return done

    return Refused()


# --- declarations ---------------------------------------------------------------------------------
def test_more_ub_than_there_is(k):
    k.ub("first", (100000,))
    with refused("capacity", "'second' must be at most the 62144 bytes left of 262144 in UB, but got 200000 bytes"):
        k.ub("second", (100000,))


@pytest.mark.parametrize(
    "scope, bytes_", [("scope_cbuf", 1048576), ("scope_ca", 65536), ("scope_cb", 65536), ("scope_cc", 262144)]
)
def test_capacity_of_the_other_scopes(k, scope, bytes_):
    k.local(scope, "fits", (bytes_ // 2,))
    with refused("capacity", "must be at most the 0 bytes left"):
        k.local(scope, "too_much", (16,))


def test_l1out_and_l0c_are_one_memory(k):
    k.local("scope_cbuf_out", "c", (65536,), F32)
    with refused("capacity", "0 bytes left of 262144 in L0C"):
        k.local("scope_cc", "d", (256,), F32)


def test_sizes_are_rounded_up_to_the_alignment_of_the_scope(k):
    k.local("scope_cc", "small", (16,), F32)
    assert k.t.report["peak"]["L0C"] == 1024


def test_double_buffered_tensors_count_twice(k):
    with refused("capacity", "262144 in UB, but got 150000 bytes twice"):
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
    with refused("lifetime", "'x' must be declared outside every loop, branch and scope"):
        with k.t.for_range(0, 2):
            k.gm("x")


@pytest.mark.parametrize("name", ["1st", "a-b", "", "a b"])
def test_bad_name(k, name):
    with refused("name", "letters, digits and _"):
        k.ub(name)


def test_reserved_and_repeated_gm_names(k):
    with refused("name", "a free name"):
        k.gm("__fake_tensor")
    k.gm("x")
    with refused("name", "unique among GM tensors"):
        k.gm("x")


@pytest.mark.parametrize(
    "shape, words", [((0,), "positive"), ((2.0,), "positive"), ((1,) * 9, "1..8 axes"), (16, "list or tuple")]
)
def test_bad_shape(k, shape, words):
    with refused("shape", words):
        k.ub("x", shape)


def test_bad_dtype_and_scope(k):
    with refused("dtype", "'dtype' must be one of int8"):
        k.ub("x", (16,), "bfloat16")
    with refused("scope", "TIK's scope constants"):
        k.t.Tensor(F16, (16,), name="x", scope="UB")


def test_workspace_and_atomic_outside_gm(k):
    for option, rule in (("is_workspace", "workspace"), ("is_atomic_add", "atomic")):
        with refused(rule, "'{}' must be False outside GM".format(option)):
            k.t.Tensor(F16, (16,), name="x", scope=k.tik.scope_ubuf, **{option: True})


def test_newer_tensor_options_are_not_ignored(k):
    with refused("unsupported", "'init_value' must be None"):
        k.t.Tensor(F16, (16,), name="x", scope=k.tik.scope_gm, init_value=0)


# --- lifetime and indexing ------------------------------------------------------------------------
def test_tensor_used_after_its_scope(k):
    with k.t.new_stmt_scope():
        dead = k.ub("dead")
    with refused("lifetime", "'vec_dup', 'dst' must be alive, but got 'dead', whose scope has ended"):
        k.t.vec_dup(128, dead, 0, 1, 8)


def test_scalar_and_loop_variable_used_after_their_scope(k):
    tile = k.ub()
    with k.t.for_range(0, 2) as i:
        scalar = k.t.Scalar("int32", "count", 1)
    with refused("lifetime", "'i', whose scope has ended"):
        k.t.vec_dup(16, tile[i * 16], 0, 1, 8)
    with refused("lifetime", "'count', whose scope has ended"):
        k.t.vec_dup(16, tile, 0, scalar, 8)
    with refused("lifetime", "'count'"):
        scalar.set_as(3)


def test_flat_index_into_a_slice(k):
    tile = k.ub("tile", (4, 64))
    with refused("index", "a whole tensor when it is indexed by one flat index"):
        tile[1:3, 0:16][5]


@pytest.mark.parametrize("index", [(4, 0), (0, 64), (slice(2, 2), 0), (-1, 0)])
def test_index_out_of_range(k, index):
    tile = k.ub("tile", (4, 64))
    with refused("index", "indexed inside its extent"):
        tile[index]


def test_reshape_of_a_two_dimensional_slice(k):
    tile = k.ub("tile", (4, 64))
    with refused("index", "to be reshaped"):
        tile[1:2, :].reshape((64,))
    with refused("index", "reshaped to 256 elements"):
        tile.reshape((255,))


def test_reinterpretation_to_a_wider_type_needs_whole_elements(k):
    with refused("index", "a multiple of 2 elements"):
        k.ub("tile", (5,)).reinterpret_cast_to(F32)


def test_python_if_on_a_run_time_value(k):
    with k.t.for_range(0, 2) as i:
        with pytest.raises(TypeError, match="use if_scope, tik.all or tik.any"):
            if i > 0:
                pass


# --- vector arguments -----------------------------------------------------------------------------
@pytest.mark.parametrize("repeat", [0, 256])
def test_repeat_times_out_of_range(k, repeat):
    a = k.filled()
    with refused("range", "'vec_add', 'repeat_times' must be in 1..255, but got {}".format(repeat)):
        k.t.vec_add(128, a, a, a, repeat, 8, 8, 8)


@pytest.mark.parametrize("dtype, mask", [(F16, 129), (F16, 0), (F32, 65)])
def test_mask_out_of_range(k, dtype, mask):
    a = k.filled(dtype=dtype)
    with refused("range", "'mask' must be in 1..{}".format(128 if dtype == F16 else 64)):
        k.t.vec_abs(mask, a, a, 1, 8, 8)


def test_mask_of_a_conversion_follows_the_wider_type(k):
    a, b = k.filled("a"), k.ub("b", dtype=F32)
    with refused("range", "'mask' must be in 1..64"):
        k.t.vec_conv(128, "none", b, a, 1, 8, 4)


def test_bit_mask_of_zeros_and_beyond_the_lanes(k):
    a = k.filled(dtype=F32)
    with refused("range", "set in at least one bit"):
        k.t.vec_abs([0, 0], a, a, 1, 8, 8)
    with refused("range", "within 64 lanes"):
        k.t.vec_abs([1, 0], a, a, 1, 8, 8)


def test_stride_out_of_range(k):
    a = k.filled()
    with refused("range", "'src0_rep_stride' must be in 0..255, but got 256"):
        k.t.vec_add(128, a, a, a, 1, 8, 256, 8)


def test_unaligned_start(k):
    a = k.filled()
    with refused("alignment", "'src' must be at a multiple of 32 bytes, but got byte 16 of UB"):
        k.t.vec_abs(16, a, a[8], 1, 8, 8)


def test_operand_outside_ub(k):
    a, c = k.filled(), k.local("scope_cbuf")
    with refused("scope", "'dst' must be in UB"):
        k.t.vec_abs(16, c, a, 1, 8, 8)


def test_access_beyond_the_tensor(k):
    a, b = k.filled(), k.ub("b", (256,))
    with refused("bounds", "'dst' must be inside 'b' of 512 bytes, but got bytes 0..767"):
        k.t.vec_abs(128, b, a, 3, 8, 8)


def test_the_mask_cuts_the_last_repeat(k):
    """The last repeat may end at the mask, inside the tensor."""
    a, b = k.filled(), k.ub("b", (2 * 128 + 16,))
    k.t.vec_abs(16, b, a, 3, 8, 8)
    with refused("bounds", "inside 'b'"):
        k.t.vec_abs(32, b, a, 3, 8, 8)


@pytest.mark.parametrize("call, dtype", [("vec_relu", F32), ("vec_not", F16), ("vec_abs", S32), ("vec_exp", S32)])
def test_dtype_the_chip_does_not_have(k, call, dtype):
    a = k.ub(dtype=dtype)
    with refused("dtype", "on 910A, but got \\({0}, {0}\\)".format(dtype)):
        getattr(k.t, call)(16, a, a, 1, 8, 8)


@pytest.mark.parametrize("soc", ["Ascend910A", "Ascend310P3"])
def test_row_maximum_of_float32_blocks(soc):
    k = Kernel(soc)
    a, b = k.filled("a", dtype=F32), k.ub("b", dtype=F32)
    with refused("dtype", "'vcgmax', 'dst, src' must be of dtypes \\(float16, float16\\)"):
        k.t.vcgmax(64, b, a, 1, 1, 1, 8)


def test_round_mode_the_pair_does_not_have(k):
    a, b = k.ub("a", dtype=F32), k.ub("b")
    with refused("dtype", "'round_mode' must be one of"):
        k.t.vec_conv(64, "round", b, a, 1, 4, 8)


def test_call_of_another_chip(k):
    with refused("absent", "'data_move_pad', 'chip' must be one that has it"):
        k.t.data_move_pad(None, None, 1, 1, 0, 0)


def test_unknown_call_names_the_nearest(k):
    with pytest.raises(AttributeError, match="no 'vec_addd' on the simulator: did you mean vec_add"):
        k.t.vec_addd()


def test_wrong_arguments_show_the_signature(k):
    with pytest.raises(TypeError, match=r"'vec_abs'.*Signature: vec_abs\(mask, dst, src, repeat_times"):
        k.t.vec_abs(128)


# --- overlap --------------------------------------------------------------------------------------
def test_partial_overlap_in_one_repeat(k):
    a = k.filled()
    with refused("overlap", "'src' must be clear of 'dst', or identical to it, but got a part of 'ub'"):
        k.t.vec_abs(128, a[64], a, 1, 8, 8)


def test_destination_feeds_the_next_repeat(k):
    a = k.filled()
    with refused("overlap", "that 'dst' writes in the next repeat"):
        k.t.vec_abs(128, a[128], a, 3, 8, 8)


def test_shrinking_in_place_is_allowed(k):
    """Results that fall behind the reading position are fine: here every second repeat is kept."""
    a = k.filled()
    k.t.vec_abs(64, a, a[128], 3, 4, 8)
    assert (k.store(a)[0] == 1).all()


def test_accumulation_over_repeats(k):
    a, total = k.filled("a"), k.filled("total", (128,))
    k.t.vec_add(128, total, a, total, 8, 0, 8, 0)
    assert (k.store(total)[0] == 9).all()


def test_accumulation_needs_the_last_source(k):
    a, total = k.filled("a"), k.filled("total", (128,))
    with refused("overlap", "writes in the next repeat"):
        k.t.vec_sub(128, total, total, a, 8, 0, 0, 8)


def test_reduction_over_its_own_source(k):
    a = k.filled()
    with refused("overlap", "'dst' must be clear of 'src'"):
        k.t.vcadd(128, a, a, 2, 1, 1, 8)


def test_transposition_partly_over_itself(k):
    a = k.filled()
    with refused("overlap", "'src' must be clear of 'dst', or identical"):
        k.t.vec_trans(a[128], a, 1, 1, 1)


def test_copy_over_itself(k):
    a = k.filled()
    with refused("overlap", "overlapping bursts"):
        k.t.data_move(a[16], a, 0, 1, 8, 0, 0)
    k.t.data_move(a[16], a, 0, 4, 1, 1, 1)  # interleaved, disjoint


# --- work tensors ---------------------------------------------------------------------------------
def test_work_tensor_too_small(k):
    a, b = k.filled("a", dtype=F32), k.ub("b", dtype=F32)
    work = k.ub("work", (255,), F32)
    with refused("bounds", "'work_tensor' must be a tensor or slice t\\[k:\\].* of at least 256 elements, but got 255"):
        k.t.vec_rec_high_preci(64, b, a, work, 2, 8, 8)


def test_single_element_for_a_call_that_needs_a_range(k):
    a, b = k.filled("a", dtype=F32), k.ub("b", dtype=F32)
    work = k.ub("work", (1024,), F32)
    with refused("bounds", "t\\[k:\\] \\(not t\\[k\\]\\)"):
        k.t.vec_rec_high_preci(64, b, a[64], work, 1, 8, 8)


def test_work_tensor_of_another_dtype(k):
    a, b = k.filled("a"), k.ub("b")
    with refused("dtype", "'work_tensor' must be of dtype float32"):
        k.t.vec_rec_high_preci(128, b, a, k.ub("work", (4096,)), 1, 8, 8)


# --- moves ----------------------------------------------------------------------------------------
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
    with refused(rule, words):
        k.t.data_move(a, x, *arguments)


def test_move_beyond_gm_and_its_32_byte_tail(k):
    x, a = k.gm("x", (1000,)), k.ub()
    k.t.data_move(a, x, 0, 1, 63, 0, 0)  # 1008 elements: up to the next 32-byte boundary
    with refused("bounds", "'src' must be inside 'x' of 2000 bytes"):
        k.t.data_move(a, x, 0, 1, 64, 0, 0)


def test_store_beyond_gm(k):
    x, a = k.gm("x", (1000,), output=True), k.filled()
    with refused("bounds", "'dst' must be inside 'x' of 2000 bytes, but got bytes 0..2015"):
        k.t.data_move(x, a, 0, 1, 63, 0, 0)


def test_stride_beyond_the_tensor_at_run_time(k):
    x, a = k.gm("x"), k.ub()
    with k.t.for_range(0, 5) as i:
        k.t.data_move(a, x[i * 256], 0, 1, 16, 0, 0)
    with refused("bounds", "'src' must be inside 'x' of 2048 bytes, but got bytes 2048..2559"):
        k.store(k.filled("b"))


@pytest.mark.parametrize(
    "dst, src",
    [("scope_gm", "scope_gm"), ("scope_gm", "scope_cbuf"), ("scope_cbuf", "scope_cbuf"), ("scope_ubuf", "scope_ca"),
     ("scope_cb", "scope_ubuf"), ("scope_gm", "scope_cc"), ("scope_cbuf", "scope_cc")],
)  # fmt: skip
def test_path_that_does_not_exist(k, dst, src):
    a, b = k.local(dst, "a"), k.local(src, "b")
    with refused("path", "'src' must be moved on one of the paths GM->UB"):
        k.t.data_move(a, b, 0, 1, 1, 0, 0)


def test_move_between_dtypes(k):
    with refused("dtype", "data_move does not convert"):
        k.t.data_move(k.ub("a", dtype=F32), k.filled("b"), 0, 1, 1, 0, 0)


def test_move_to_an_unaligned_address(k):
    with refused("alignment", "'dst' must be at a multiple of 32 bytes"):
        k.t.data_move(k.ub("a")[8], k.gm("x"), 0, 1, 1, 0, 0)


def test_l0c_address_inside_a_fractal(k):
    c, a = k.local("scope_cc", "c", (1024,), F32), k.ub("a", dtype=F32)
    with refused("alignment", "'src' must be at a multiple of 1024 bytes"):
        k.t.tensor_mov(a, c[16], "m", 1, 1, 0, 0)


def test_load_of_an_unaligned_fractal(k):
    left, x = k.local("scope_ca", "left"), k.local("scope_cbuf", "x")
    with refused("alignment", "'src' must be at a multiple of 512 bytes"):
        k.t.load2dv1(left, x[16], 0, 1, 1, 0)


def test_load_limits(k):
    left, x = k.local("scope_ca", "left"), k.local("scope_cbuf", "x")
    with refused("range", "'repeat_times' must be in 1..255"):
        k.t.load2dv1(left, x, 0, 256, 1, 0)
    with refused("range", "'src_stride' must be in 0..65535"):
        k.t.load2dv1(left, x, 0, 1, 65536, 0)
    with refused("bounds", "'src' must be inside 'x'"):
        k.t.load2dv1(left, x, 3, 2, 1, 0)
    with refused("path", "L1->L0A"):
        k.t.load2dv1(k.ub(), x, 0, 1, 1, 0)
    with refused("path", "'if_transpose' must be False"):
        k.t.load2dv1(x, k.gm("g"), 0, 1, 1, 0, if_transpose=True)
    with refused("dtype", "on 910A"):
        k.t.load2dv1(k.local("scope_ca", "w", dtype=F32), k.local("scope_cbuf", "v", dtype=F32), 0, 1, 1, 0)


def test_scatter_lists_and_strides(k):
    a, b = k.filled("a"), k.ub("b")
    rows = [b[16 * i] for i in range(16)]
    with refused("range", "'src_list' must be a list of 16 tensors, but got 15"):
        k.t.vec_trans_scatter(False, False, rows, [a[16 * i] for i in range(15)], 1, 0, 0)
    with refused("range", "'src_rep_stride' must be 0 when repeat_times is 1"):
        k.t.vec_trans_scatter(False, False, rows, [a[16 * i] for i in range(16)], 1, 0, 16)


# --- the cube -------------------------------------------------------------------------------------
def cube_operands(k, dst=F32):
    return (k.local("scope_cc", "c", (4096,), dst), k.local("scope_ca", "a"), k.local("scope_cb", "b"))


def test_mmad_limits(k):
    c, a, b = cube_operands(k)
    with refused("range", "'m' must be in 0..4095"):
        k.t.mmad(c, a, b, 4096, 16, 16, 0)
    with refused("gemv", "'m' must be rounded up to 16"):
        k.t.mmad(c, a, b, 1, 16, 16, 0)
    with refused("bounds", "'a' must be inside 'a'"):
        k.t.mmad(c, a, b, 48, 32, 16, 0)
    with refused("scope", "'a' must be in L0A"):
        k.t.mmad(c, b, a, 16, 16, 16, 0)
    with refused("unsupported", "'smask' must be None on 910A"):
        k.t.mmad(c, a, b, 16, 16, 16, 0, smask=c)


def test_matmul_limits(k):
    c, a, b = k.local("scope_cc", "c", (4096,), F32), k.local("scope_cbuf", "a"), k.local("scope_cbuf", "b")
    with refused("range", "'m' must be in 1..4096"):
        k.t.matmul(c, a, b, 4097, 16, 16)
    with refused("range", "'k' must be in 1..16384"):
        k.t.matmul(c, a, b, 16, 16385, 16)
    with refused("bounds", "'a' must be a slice of at least 1536 elements"):
        k.t.matmul(c, a, b, 48, 32, 16)
    with refused("bounds", "t\\[k:\\], not t\\[k\\]"):
        k.t.matmul(c, a[256], b, 16, 16, 16)
    with k.t.for_range(1, 3) as i:
        with refused("type", "'m' must be a Python int, but got a run-time value"):
            k.t.matmul(c, a, b, i * 16, 16, 16)


def test_matmul_without_room_in_l0(k):
    k.local("scope_ca", "left", (32768,))
    c, a, b = k.local("scope_cc", "c", (4096,), F32), k.local("scope_cbuf", "a"), k.local("scope_cbuf", "b")
    with refused("capacity", "at least 1024 bytes of L0A free, but got 0"):
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
    with refused("uninitialized", "'vec_abs', 'src' must be written before it is read, but got element \\(0, 0\\)"):
        k.store(u)


# --- uninitialised memory -------------------------------------------------------------------------
def test_read_of_a_fresh_tensor(k):
    a, b = k.ub("a"), k.ub("b")
    k.t.vec_abs(128, b, a, 8, 8, 8)
    with refused("uninitialized", "element \\(0, 0\\) of the part of 'a' it reads"):
        k.store(b)


def test_contents_do_not_survive_an_iteration(k):
    total = k.filled("total")
    with k.t.for_range(0, 2) as i:
        a = k.ub("a")
        with k.t.if_scope(i == 0):
            k.t.vec_dup(128, a, 1, 8, 8)
        k.t.vec_add(128, total, total, a, 8, 8, 8, 8)
    with refused("uninitialized", "'src1'"):
        k.store(total)


def test_copies_carry_the_mark(k):
    a, level1, b = k.ub("a"), k.local("scope_cbuf", "level1"), k.ub("b")
    k.t.vec_dup(128, a, 1, 4, 8)
    k.t.data_move(level1, a, 0, 1, 64, 0, 0)
    k.t.data_move(b, level1, 0, 1, 64, 0, 0)
    k.t.vec_abs(128, b, b, 4, 8, 8)
    k.t.vec_abs(128, b[512], b[512], 4, 8, 8)
    with refused("uninitialized", "part of 'b'"):
        k.store(b)


def test_output_not_written_in_full(k):
    out, a = k.gm("out", (1024,), output=True), k.filled()
    k.t.data_move(out, a, 0, 1, 63, 0, 0)
    with refused("uninitialized", "'out' must be written in full by the program, but got element 1008"):
        k.run()


def test_output_that_nothing_writes(k):
    k.gm("out", output=True)
    with refused("build", "'out' must be written by the program"):
        k.run()


def test_scalar_read_of_a_fresh_tensor(k):
    a = k.ub("a", dtype=S32)
    value = k.t.Scalar(S32, "value")
    value.set_as(a[3])
    with refused("uninitialized", "'load_scalar'"):
        k.store(k.filled("b"))


def test_nan_instead_of_an_error():
    k = Kernel(uninitialized="nan")
    a, b = k.ub("a"), k.ub("b")
    k.t.vec_abs(128, b, a, 8, 8, 8)
    assert np.isnan(k.store(b)[0]).all()


# --- arithmetic -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "call, value, event",
    [("vec_exp", 100.0, "overflow"), ("vec_ln", 0.0, "divide by zero"), ("vec_ln", -1.0, "invalid"),
     ("vec_rec", 0.0, "divide by zero"), ("vec_rsqrt", 0.0, "divide by zero")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [F16, F32])
def test_undefined_results(k, call, value, event, dtype):
    a = k.ub("a", (64,), dtype)
    k.t.vec_dup(64, a, value, 1, 8)
    getattr(k.t, call)(64, a, a, 1, 8, 8)
    with refused("undefined", "'{}', 'src' must be in the range where the result is defined.*{}".format(call, event)):
        k.store(a)


def test_nan_from_infinities(k):
    a = k.ub("a", (64,), F32)
    k.t.vec_dup(64, a, float("inf"), 1, 8)
    k.t.vec_sub(64, a, a, a, 1, 8, 8, 8)
    with refused("undefined", "invalid value"):
        k.store(a)


def test_saturation_is_counted(k):
    a, b = k.ub("a", (64,), F32), k.ub("b", (64,))
    k.t.vec_dup(64, a, -1e6, 1, 8)
    k.t.vec_conv(64, "none", b, a, 1, 4, 8)
    assert (k.store(b)[0] == -65504).all()
    assert k.t.report["saturations"] == 64


def test_reciprocal_stress_error():
    k = Kernel(reciprocal_error=2.0**-9)
    a = k.filled("a", (64,), F32)
    k.t.vec_rec(64, a, a, 1, 8, 8)
    error = np.abs(k.store(a)[0] - 1)
    assert 0 < error.max() <= 2.0**-9


# --- scalars --------------------------------------------------------------------------------------
def test_scalars_of_different_kinds(k):
    value = k.t.Scalar(F32, "value", 1.5)
    with refused("dtype", "of the Scalar's kind \\(int32\\)"):
        k.t.Scalar(S32, "count").set_as(value)
    with refused("dtype", "of dtype float16"):
        k.t.Scalar(F16, "half").set_as(value)


def test_scalar_from_a_tensor_of_another_dtype(k):
    with refused("dtype", "of the Scalar's dtype int32"):
        k.t.Scalar(S32, "count").set_as(k.filled()[0])


def test_scalar_from_gm(k):
    with refused("scope", "reads and writes tensors in UB only"):
        k.t.Scalar(F16, "value").set_as(k.gm("x")[0])


def test_run_time_arguments_are_checked_when_they_occur(k):
    a = k.filled("a")
    count = k.t.Scalar(S32, "count", 255)
    count.set_as(count + 1)
    k.t.vec_abs(128, a, a, count, 8, 8)
    with refused("range", "'repeat_times' must be in 1..255, but got 256"):
        k.store(a)


def test_repeat_zero_at_run_time_does_nothing(k):
    a = k.filled("a")
    count = k.t.Scalar(S32, "count", 0)
    k.t.vec_muls(128, a, a, 3.0, count, 8, 8)
    assert (k.store(a)[0] == 1).all()


# --- loops and branches ---------------------------------------------------------------------------
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
    with refused(rule, words):
        with k.t.for_range(**arguments):
            pass


def test_one_multicore_loop_and_not_nested(k):
    with refused("loop", "outside every other scope"):
        with k.t.for_range(0, 2):
            with k.t.for_range(0, 2, block_num=2):
                pass
    with k.t.for_range(0, 2, block_num=2):
        pass
    with refused("loop", "used by one loop"):
        with k.t.for_range(0, 2, block_num=2):
            pass


def test_else_without_if(k):
    with refused("branch", "directly after if_scope or elif_scope"):
        with k.t.else_scope():
            pass
    with k.t.if_scope(True):
        pass
    with k.t.else_scope():
        pass
    with refused("branch", "directly after"):
        with k.t.elif_scope(True):
            pass


def test_condition_that_is_no_comparison(k):
    count = k.t.Scalar(S32, "count", 1)
    with refused("type", "a comparison of ints"):
        with k.t.if_scope(count):
            pass


def test_scopes_opened_and_not_entered(k):
    arms = k.t.if_scope(True)
    with refused("scope", "'if_scope', 'scope' must be entered by `with` before the next call, but got elif_scope"):
        k.t.elif_scope(True)
    with arms:
        pass
    k.t.for_range(0, 2)
    with refused("scope", "'for_range', 'scope'.*got another call before that"):
        k.ub()


def test_break_outside_a_loop(k):
    with refused("loop", "'position' must be inside for_range"):
        k.t.tik_break()


def test_too_many_statements(k):
    a = k.filled("a", (128,))
    statement = k.t.program.append
    for _ in range(59990):
        statement(None)
    assert "ir" not in k.t.report["warnings"]
    with k.t.for_range(0, 2, thread_num=2):
        for _ in range(10):
            k.t.vec_abs(128, a, a, 1, 8, 8)  # counts twice
    assert k.t.report["warnings"]["ir"] == 1
    for _ in range(80000 - k.t.report["ir"]):
        statement(None)
    with refused("ir", "at most 80000, but got 80001"):
        k.t.vec_abs(128, a, a, 1, 8, 8)


# --- several cores --------------------------------------------------------------------------------
def cores(k, count, body):
    with k.t.for_range(0, count, block_num=count) as core:
        body(core)
    return k.run()


def test_two_cores_write_one_byte(k):
    out = k.gm("out", (64,), output=True)

    def body(core):
        a = k.filled("a", (48,))
        k.t.data_move(out[core * 16], a, 0, 1, 3, 0, 0)

    with refused("race", "'dst' must be in GM bytes that no other core has used, but got core . and core . on 'out'"):
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

    with refused("race", "on 'out'"):
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

    with refused("race", "core 1 and core 0 on 'out'"):
        cores(k, 2, body)


def test_local_tensor_declared_outside_the_core_loop(k):
    a = k.filled("a")
    with refused("multicore", "'a' declared outside"):
        with k.t.for_range(0, 2, block_num=2):
            k.t.vec_abs(128, a, a, 8, 8, 8)


def test_store_outside_the_core_loop(k):
    out, a = k.gm("out", (1024,), output=True), k.filled()
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    with refused("race", "written by every core"):
        cores(k, 2, lambda core: None)


# --- atomic add -----------------------------------------------------------------------------------
def test_atomic_mode_of_another_chip(k):
    with refused("atomic", "'mode' must be 0 \\(off\\) or 1 \\(float32\\) on 910A, but got 2"):
        k.t.set_atomic_add(2)


def test_atomic_add_left_on(k):
    out, a = k.gm("out", (512,), F32, output=True, is_atomic_add=True), k.filled("a", (512,), F32)
    k.t.set_atomic_add(1)
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    with refused("atomic", "0 at the end of the program"):
        k.run()


def test_atomic_add_of_float16(k):
    out, a = k.gm("out", (1024,), output=True, is_atomic_add=True), k.filled()
    k.t.set_atomic_add(1)
    k.t.data_move(out, a, 0, 1, 64, 0, 0)
    with refused("atomic", "'dst' must be float32 while atomic add is on"):
        k.run()


def test_atomic_add_onto_undefined_memory():
    for options, network in ((dict(), True), (dict(is_atomic_add=True), False)):
        k = Kernel(network_launch=network)
        out, a = k.gm("out", (512,), F32, output=True, **options), k.filled("a", (512,), F32)
        k.t.set_atomic_add(1)
        k.t.data_move(out, a, 0, 1, 64, 0, 0)
        k.t.set_atomic_add(0)
        with refused("uninitialized", "'dst' must be cleared before the first atomic add"):
            k.run()


# --- synchronisation ------------------------------------------------------------------------------
def test_dependence_between_pipes_without_synchronisation(k):
    x, a = k.gm("x"), k.ub()
    with k.t.new_stmt_scope(disable_sync=True):
        k.t.data_move(a, x, 0, 1, 64, 0, 0)
        k.t.vec_abs(128, a, a, 8, 8, 8)
    with refused("sync", "'vec_abs', 'a|ub' must be synchronised.*vec_abs on V after data_move on MTE2"):
        k.store(a)


def test_one_pipe_and_disjoint_ranges_need_no_synchronisation(k):
    x, a, b = k.gm("x"), k.filled("a"), k.ub("b")
    with k.t.new_stmt_scope(disable_sync=True):
        k.t.data_move(b, x, 0, 1, 64, 0, 0)
        k.t.vec_abs(128, a, a, 8, 8, 8)
        k.t.vec_abs(128, a, a, 8, 8, 8)
    k.t.vec_add(128, a, a, b, 8, 8, 8, 8)
    assert (k.store(a)[0] == 2).all()


def test_composite_call_and_nested_scope_without_synchronisation(k):
    a, b = k.filled("a"), k.ub("b")
    with k.t.new_stmt_scope(disable_sync=True):
        with refused("sync", "'vec_reduce_add', 'scope' must be synchronised automatically"):
            k.t.vec_reduce_add(128, b, a, b, 1, 8)
        with refused("sync", "outside another one with disable_sync=True"):
            with k.t.new_stmt_scope():
                pass


# --- h_* ------------------------------------------------------------------------------------------
def test_high_level_broadcasting(k):
    a, b = k.ub("a", (4, 16)), k.ub("b", (1, 16))
    with refused("shape", "'src1' must be of dst's shape \\(4, 16\\) \\(no broadcasting\\), but got \\(1, 16\\)"):
        k.t.h_add(a, a, b)


def test_high_level_unaligned_slice(k):
    a = k.ub("a", (4, 32))
    with refused("alignment", "whole blocks of 16 elements"):
        k.t.h_exp(a[0:4, 0:8], a[0:4, 0:8])


# --- building and feeding -------------------------------------------------------------------------
def test_gm_tensor_that_is_no_argument(k):
    a = k.filled()
    k.t.Tensor(F16, (16,), name="stray", scope=k.tik.scope_gm)
    with refused("build", "'stray' must be an input, an output or a workspace"):
        k.store(a)


def test_workspace_listed_as_output(k):
    work = k.t.Tensor(F16, (1024,), name="work", scope=k.tik.scope_gm, is_workspace=True)
    k.t.data_move(work, k.filled(), 0, 1, 64, 0, 0)
    with refused("workspace", "neither input nor output"):
        k.t.BuildCCE("kernel", [], [work])


def test_tensor_that_is_input_and_output(k):
    x = k.gm("x")
    with refused("build", "'x' must be listed once"):
        k.t.BuildCCE("kernel", [x], [x])


def test_local_tensor_as_argument(k):
    with refused("scope", "'ub' must be in GM"):
        k.t.BuildCCE("kernel", [], [k.filled()])


def test_bad_kernel_name(k):
    with refused("name", "'kernel_name' must be an identifier"):
        k.t.BuildCCE("a-b", [], [])


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
    with refused("feed", words):
        k.t.tikdb.start_debug(feed)


def test_debugging_what_was_built_without_it(k):
    with refused("build", "'program' must be built by BuildCCE"):
        k.t.tikdb.start_debug({})
    t = k.tik.Tik(disable_debug=True)
    out = t.Tensor(F16, (16,), name="out", scope=k.tik.scope_gm)
    local = t.Tensor(F16, (16,), name="local", scope=k.tik.scope_ubuf)
    t.vec_dup(16, local, 0, 1, 8)
    t.data_move(out, local, 0, 1, 1, 0, 0)
    t.BuildCCE("kernel", [], [out])
    with refused("build", "'disable_debug' must be False"):
        t.tikdb.start_debug({})


def test_build_only():
    k = Kernel(execute=False)
    a = k.filled()
    with refused("build", "'SimulatorParams.execute' must be True"):
        k.store(a)


# --- strict=False ---------------------------------------------------------------------------------
def test_hazards_become_warnings():
    k = Kernel(strict=False)
    a, fresh = k.filled("a"), k.ub("fresh")
    k.t.vec_abs(128, a[128], a, 3, 8, 8)  # overlap
    k.t.vec_add(128, fresh, fresh, a, 8, 8, 8, 8)  # uninitialised
    k.store(a)
    assert k.t.report["warnings"] == {"overlap": 1, "uninitialized": 1}
    assert "vec_abs" in k.t.report["messages"][0] and "test_simulator_misuse.py" in k.t.report["messages"][0]


def test_errors_stay_errors_without_strict():
    k = Kernel(strict=False)
    a = k.ub("a", (128,))
    with refused("bounds", "inside 'a'"):
        k.t.vec_dup(128, a, 0, 2, 8)
    with refused("capacity", "bytes left"):
        k.ub("b", (200000,))
    with k.t.new_stmt_scope():
        dead = k.ub("dead")
    with refused("lifetime", "'dead'"):
        k.t.vec_dup(128, dead, 0, 1, 8)
    out = k.gm("out", (64,), output=True)

    def body(core):
        b = k.filled("b", (64,))
        k.t.data_move(out, b, 0, 1, 4, 0, 0)

    with refused("race", "on 'out'"):
        cores(k, 2, body)
