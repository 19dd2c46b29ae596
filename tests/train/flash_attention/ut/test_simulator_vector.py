"""Vector instructions and h_*: what the simulator refuses, one test a misuse."""

import numpy as np
import pytest
from support.tik_misuse import F16, F32, S32, Kernel, expect_error

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.fixture
def k():
    return Kernel()


# --- vector arguments ------------------------------------------------------------------------------
@pytest.mark.parametrize("repeat", [0, 256])
def test_repeat_times_out_of_range(k, repeat):
    a = k.filled()
    with expect_error("range", "'vec_add', 'repeat_times' must be in 1..255, but got {}".format(repeat)):
        k.t.vec_add(128, a, a, a, repeat, 8, 8, 8)


@pytest.mark.parametrize("dtype, mask", [(F16, 129), (F16, 0), (F32, 65)])
def test_mask_out_of_range(k, dtype, mask):
    a = k.filled(dtype=dtype)
    with expect_error("range", "'mask' must be in 1..{}".format(128 if dtype == F16 else 64)):
        k.t.vec_abs(mask, a, a, 1, 8, 8)


def test_mask_of_a_conversion_follows_the_wider_type(k):
    a, b = k.filled("a"), k.ub("b", dtype=F32)
    with expect_error("range", "'mask' must be in 1..64"):
        k.t.vec_conv(128, "none", b, a, 1, 8, 4)


def test_bit_mask_of_zeros_and_beyond_the_lanes(k):
    a = k.filled(dtype=F32)
    with expect_error("range", "set in at least one bit"):
        k.t.vec_abs([0, 0], a, a, 1, 8, 8)
    with expect_error("range", "within 64 lanes"):
        k.t.vec_abs([1, 0], a, a, 1, 8, 8)


def test_stride_out_of_range(k):
    a = k.filled()
    with expect_error("range", "'src0_rep_stride' must be in 0..255, but got 256"):
        k.t.vec_add(128, a, a, a, 1, 8, 256, 8)


def test_unaligned_start(k):
    a = k.filled()
    with expect_error("alignment", "'src' must be at a multiple of 32 bytes, but got byte 16 of UB"):
        k.t.vec_abs(16, a, a[8], 1, 8, 8)


def test_operand_outside_ub(k):
    a, c = k.filled(), k.local("scope_cbuf")
    with expect_error("scope", "'dst' must be in UB"):
        k.t.vec_abs(16, c, a, 1, 8, 8)


def test_access_beyond_the_tensor(k):
    a, b = k.filled(), k.ub("b", (256,))
    with expect_error("bounds", "'dst' must be inside 'b' of 512 bytes, but got bytes 0..767"):
        k.t.vec_abs(128, b, a, 3, 8, 8)


def test_the_mask_cuts_the_last_repeat(k):
    """The last repeat may end at the mask, inside the tensor."""
    a, b = k.filled(), k.ub("b", (2 * 128 + 16,))
    k.t.vec_abs(16, b, a, 3, 8, 8)
    with expect_error("bounds", "inside 'b'"):
        k.t.vec_abs(32, b, a, 3, 8, 8)


@pytest.mark.parametrize("call, dtype", [("vec_relu", F32), ("vec_not", F16), ("vec_abs", S32), ("vec_exp", S32)])
def test_dtype_the_chip_does_not_have(k, call, dtype):
    a = k.ub(dtype=dtype)
    with expect_error("dtype", "on 910A, but got \\({0}, {0}\\)".format(dtype)):
        getattr(k.t, call)(16, a, a, 1, 8, 8)


@pytest.mark.parametrize("soc", ["Ascend910A", "Ascend310P3"])
def test_row_maximum_of_float32_blocks(soc):
    k = Kernel(soc)
    a, b = k.filled("a", dtype=F32), k.ub("b", dtype=F32)
    with expect_error("dtype", "'vcgmax', 'dst, src' must be of dtypes \\(float16, float16\\)"):
        k.t.vcgmax(64, b, a, 1, 1, 1, 8)


def test_round_mode_the_pair_does_not_have(k):
    a, b = k.ub("a", dtype=F32), k.ub("b")
    with expect_error("dtype", "'round_mode' must be one of"):
        k.t.vec_conv(64, "round", b, a, 1, 4, 8)


def test_immediate_beyond_its_type(k):
    a = k.ub()
    with expect_error("range", "'vec_dup', 'scalar' must be within the range of float16, but got 70000"):
        k.t.vec_dup(128, a, 70000.0, 1, 8)
    with expect_error("type", "'scalar' must be a value of int32, but got 0.5"):
        k.t.vec_dup(64, k.ub("b", dtype=S32), 0.5, 1, 8)
    with expect_error("type", "'scalar' must be an immediate or a Scalar, but got '1'"):
        k.t.vec_muls(128, a, a, "1", 1, 8, 8)
    k.t.vec_dup(128, a, float("-inf"), 1, 8)


def test_call_of_another_chip(k):
    with expect_error("absent", "'data_move_pad', 'chip' must be one that has it"):
        k.t.data_move_pad(None, None, 1, 1, 0, 0)


def test_unknown_call_names_the_nearest(k):
    with pytest.raises(AttributeError, match="no 'vec_addd' on the simulator: did you mean vec_add"):
        k.t.vec_addd()


def test_wrong_arguments_show_the_signature(k):
    with pytest.raises(TypeError, match=r"'vec_abs'.*Signature: vec_abs\(mask, dst, src, repeat_times"):
        k.t.vec_abs(128)


# --- overlap ---------------------------------------------------------------------------------------
def test_partial_overlap_in_one_repeat(k):
    a = k.filled()
    with expect_error("overlap", "'src' must be clear of 'dst', or identical to it, but got a part of 'ub'"):
        k.t.vec_abs(128, a[64], a, 1, 8, 8)


def test_destination_feeds_the_next_repeat(k):
    a = k.filled()
    with expect_error("overlap", "that 'dst' writes in the next repeat"):
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
    with expect_error("overlap", "writes in the next repeat"):
        k.t.vec_sub(128, total, total, a, 8, 0, 0, 8)


@pytest.mark.parametrize("call", ["vmla", "vaxpy"])
def test_updates_of_one_row_by_all_repeats(k, call):
    """Unlike vec_add, these read their destination: the next repeat would need what this one writes."""
    a, total = k.filled("a"), k.filled("total", (128,))
    sources = (a, a) if call == "vmla" else (a, 2.0)
    strides = (1, 1, 1, 0, 8, 8) if call == "vmla" else (1, 1, 0, 8)
    with expect_error("overlap", "'dst' must be clear of 'dst'.*that 'dst' writes in the next repeat"):
        getattr(k.t, call)(128, total, *(sources + (4,) + strides))


def test_selection_over_its_bits(k):
    a, bits = k.filled("a"), k.ub("bits", (256,), "uint8")
    with expect_error("overlap", "'sel' must be clear of 'dst'"):
        k.t.vec_sel(128, 0, bits.reinterpret_cast_to(F16), bits, a, a, 1, 8, 8, 8)


def test_reduction_over_its_own_source(k):
    a = k.filled()
    with expect_error("overlap", "'dst' must be clear of 'src'"):
        k.t.vcadd(128, a, a, 2, 1, 1, 8)


def test_transposition_partly_over_itself(k):
    a = k.filled()
    with expect_error("overlap", "'src' must be clear of 'dst', or identical"):
        k.t.vec_trans(a[128], a, 1, 1, 1)


def test_copy_over_itself(k):
    a = k.filled()
    with expect_error("overlap", "overlapping bursts"):
        k.t.data_move(a[16], a, 0, 1, 8, 0, 0)
    k.t.data_move(a[16], a, 0, 4, 1, 1, 1)  # interleaved, disjoint


# --- work tensors ----------------------------------------------------------------------------------
def test_work_tensor_too_small(k):
    a, b = k.filled("a", dtype=F32), k.ub("b", dtype=F32)
    work = k.ub("work", (255,), F32)
    with expect_error(
        "bounds", "'work_tensor' must be a tensor or slice t\\[k:\\].* of at least 256 elements, but got 255"
    ):
        k.t.vec_rec_high_preci(64, b, a, work, 2, 8, 8)


def test_single_element_for_a_call_that_needs_a_range(k):
    a, b = k.filled("a", dtype=F32), k.ub("b", dtype=F32)
    work = k.ub("work", (1024,), F32)
    with expect_error("bounds", "t\\[k:\\] \\(not t\\[k\\]\\)"):
        k.t.vec_rec_high_preci(64, b, a[64], work, 1, 8, 8)


def test_work_tensor_of_another_dtype(k):
    a, b = k.filled("a"), k.ub("b")
    with expect_error("dtype", "'work_tensor' must be of dtype float32"):
        k.t.vec_rec_high_preci(128, b, a, k.ub("work", (4096,)), 1, 8, 8)


# --- arithmetic ------------------------------------------------------------------------------------
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
    with expect_error(
        "undefined", "'{}', 'src' must be in the range where the result is defined.*{}".format(call, event)
    ):
        k.store(a)


def test_nan_from_infinities(k):
    a = k.ub("a", (64,), F32)
    k.t.vec_dup(64, a, float("inf"), 1, 8)
    k.t.vec_sub(64, a, a, a, 1, 8, 8, 8)
    with expect_error("undefined", "invalid value"):
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


# --- h_* -------------------------------------------------------------------------------------------
def test_high_level_broadcasting(k):
    a, b = k.ub("a", (4, 16)), k.ub("b", (1, 16))
    with expect_error("shape", "'src1' must be of dst's shape \\(4, 16\\) \\(no broadcasting\\), but got \\(1, 16\\)"):
        k.t.h_add(a, a, b)


def test_high_level_unaligned_slice(k):
    a = k.ub("a", (4, 32))
    with expect_error("alignment", "whole blocks of 16 elements"):
        k.t.h_exp(a[0:4, 0:8], a[0:4, 0:8])


def test_masked_lanes_of_a_reduction_are_not_saturated(k):
    """They take part as -infinity, which is no result: nothing is counted."""
    a, b = k.filled("a", (128,)), k.filled("b", (16,))
    k.t.vcgmax(20, b, a, 1, 1, 1, 8)
    k.t.vec_dup(16, b, -1.0, 1, 8)
    k.store(b)
    assert k.t.report["saturations"] == 0


def test_blocks_without_an_active_lane_have_no_result(k):
    """What vcgmax writes for them is not documented: reading it is an error."""
    a, b = k.filled("a", (128,)), k.filled("b", (128,))
    k.t.vcgmax(20, b, a, 1, 1, 1, 8)
    k.t.vec_abs(2, b, b, 1, 8, 8)
    k.t.vec_abs(3, b, b, 1, 8, 8)
    with expect_error("uninitialized", "element \\(0, 2\\) of the part of 'b'"):
        k.store(b)
