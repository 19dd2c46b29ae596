"""Tiny TIK programs: moves, the cube, scalars and atomic add. See tik_programs.py."""

import numpy as np
from support.tik_programs import (
    F16,
    F32,
    S8,
    S16,
    S32,
    U8,
    U16,
    Program,
    add,
    draw,
    exact,
    load,
    store,
    vector_program,
)  # fmt: skip


# --- moves ----------------------------------------------------------------------------------------
def _strided_move():
    source, want = draw(F16, 512, 15), np.zeros(512, F16)
    for k in range(3):  # runs of 4 blocks, 2 blocks of gap in the source, 1 in the destination
        want[80 * k : 80 * k + 64] = source[96 * k : 96 * k + 64]
    moved = vector_program("UB->UB gaps", np.zeros(512, F16), [source],
                           lambda t, d, s: t.data_move(d, s, 0, 3, 4, 2, 1), want, 0)  # fmt: skip

    def through(t, tik, gm, out):
        level1 = load(t, tik, gm["src0"], "level1", tik.scope_cbuf)
        local = t.Tensor(F16, (512,), name="local", scope=tik.scope_ubuf)
        t.data_move(local, level1, 0, 1, 32, 0, 0)
        t.data_move(level1, local, 0, 1, 32, 0, 0)
        t.data_move(local, level1, 0, 1, 32, 0, 0)
        store(t, out, local)

    return moved, Program("GM->L1->UB->L1->UB->GM", {"src0": source}, through, source, 0)


add("data_move", *_strided_move())


def _matrix_round_trip(name, dtype):
    """UB -> L0C -> UB by fractals, the second leg converting to float16 where tensor_mov does."""
    source = draw(F32, 1024, 16)
    narrow = name == "tensor_mov" and dtype == F16
    want = source.astype(F16) if narrow else source

    def body(t, tik, gm, out):
        local = load(t, tik, gm["src0"], "local")
        cube = t.Tensor(F32, (1024,), name="cube", scope=tik.scope_cc)
        result = t.Tensor(str(want.dtype), (1024,), name="result", scope=tik.scope_ubuf)
        if name == "tensor_mov":
            t.tensor_mov(cube, local, "m", 1, 4, 0, 0)
            t.tensor_mov(result, cube, "m", 2, 2, 0, 0)
        else:
            t.data_move(cube, local, 0, 1, 4, 0, 0)
            t.data_move(result, cube, 0, 2, 2, 0, 0)
        store(t, out, result)

    add(name, Program("L0C {}".format(want.dtype), {"src0": source}, body, want, 0))


_matrix_round_trip("tensor_mov", F32)
_matrix_round_trip("tensor_mov", F16)
_matrix_round_trip("data_move", F32)


def _matrix_gaps(name, dtype):
    """Two runs each way. UB -> L0C: 64-element gaps in UB, one fractal of gap in L0C; back with both gaps again."""
    source, narrow = draw(F32, 1088, 19), dtype == F16
    first, second = source[:512], source[576:1088]
    gap = 128 if narrow else 64  # 8 blocks
    want = np.zeros(1024 + gap, dtype)
    want[:512], want[512 + gap :] = first, second

    def body(t, tik, gm, out):
        local = load(t, tik, gm["src0"], "local")
        cube = t.Tensor(F32, (5 * 256,), name="cube", scope=tik.scope_cc)
        result = t.Tensor(dtype, want.shape, name="result", scope=tik.scope_ubuf)
        t.vec_dup(64, result, 0, want.size // 64, 8 if dtype == F32 else 4)
        if name == "tensor_mov":
            t.tensor_mov(cube, local, "m", 2, 2, 1, 8)
            t.tensor_mov(result, cube, "m", 2, 2, 8, 1)
        else:
            t.data_move(cube, local, 0, 2, 2, 8, 1)
            t.data_move(result, cube, 0, 2, 2, 1, 8)
        store(t, out, result)

    add(name, Program("gaps {}".format(dtype), {"src0": source}, body, want, 0))


_matrix_gaps("tensor_mov", F32)
_matrix_gaps("tensor_mov", F16)
_matrix_gaps("data_move", F32)


def _broadcast_gaps():
    source = _halves_or_ints(F16)
    want = np.concatenate([np.tile(source[16 * k : 16 * k + 16], 16) for k in (0, 2)])

    def body(t, tik, gm, out):
        local = load(t, tik, gm["src0"], "local")
        cube = t.Tensor(F16, (1024,), name="cube", scope=tik.scope_cc)
        result = t.Tensor(F16, (512,), name="result", scope=tik.scope_ubuf)
        t.broadcast_ub_to_l0c(cube, local, 2, 1, 1, 2)
        t.data_move(result, cube, 0, 1, 1, 0, 0)
        t.data_move(result[256], cube[768], 0, 1, 1, 0, 0)
        store(t, out, result)

    return Program("gaps", {"src0": source}, body, want, 0)


def _relu_move():
    source = draw(F32, 512, 17)

    def body(t, tik, gm, out):
        local = load(t, tik, gm["src0"], "local")
        cube = t.Tensor(F32, (512,), name="cube", scope=tik.scope_cc)
        result = t.Tensor(F16, (512,), name="result", scope=tik.scope_ubuf)
        t.tensor_mov(cube, local, "m", 1, 2, 0, 0)
        t.tensor_mov(result, cube, "m", 1, 2, 0, 0, relu=True)
        store(t, out, result)

    want = np.where(source > 0, source, 0).astype(F16)
    return Program("relu", {"src0": source}, body, want, 0)


add("tensor_mov", _relu_move())


def _broadcast():
    for dtype in (F16, F32, S32):
        source = _halves_or_ints(dtype)
        want = np.concatenate([np.tile(source[16 * k : 16 * k + 16], 16) for k in range(4)])

        def body(t, tik, gm, out, dtype=dtype):
            local = load(t, tik, gm["src0"], "local")
            cube = t.Tensor(dtype, (1024,), name="cube", scope=tik.scope_cc)
            result = t.Tensor(dtype, (1024,), name="result", scope=tik.scope_ubuf)
            t.broadcast_ub_to_l0c(cube, local, 2, 2, 0, 0)
            t.data_move(result, cube, 0, 1, 4, 0, 0)
            store(t, out, result)

        add("broadcast_ub_to_l0c", Program(dtype, {"src0": source}, body, want, 0))


def _halves_or_ints(dtype):
    return np.random.RandomState(18).randint(-50, 50, 64).astype(dtype)


_broadcast()
add("broadcast_ub_to_l0c", _broadcast_gaps())


# --- the cube -------------------------------------------------------------------------------------
def to_zn(matrix, size=16):
    """(rows, columns) -> [columns / size, rows, size]."""
    rows, columns = matrix.shape
    return np.ascontiguousarray(matrix.reshape(rows, columns // size, size).transpose(1, 0, 2))


def from_zn(array):
    return array.transpose(1, 0, 2).reshape(array.shape[1], -1)


def fill_l0a(t, tik, x, rows, columns, transpose):
    """The four recipes' left half: L0A holds X, or X^T, of a zN matrix X (rows x columns) in L1."""
    r1, c1 = rows // 16, columns // 16
    local = t.Tensor(F16, (r1 * c1 * 256,), name="l0a", scope=tik.scope_ca)
    if transpose:
        t.load2dv1(local, x, 0, r1 * c1, 1, 0, if_transpose=True)
    else:
        for r in range(r1):
            t.load2dv1(local[r * c1 * 256], x, r, c1, r1, 0)
    return local


def fill_l0b(t, tik, x, rows, columns, transpose):
    """The right half: L0B holds X^T (n = rows), or X (n = columns)."""
    r1, c1 = rows // 16, columns // 16
    local = t.Tensor(F16, (r1 * c1 * 256,), name="l0b", scope=tik.scope_cb)
    if transpose:
        t.load2dv1(local, x, 0, r1 * c1, 1, 0)
    else:
        for r in range(r1):
            t.load2dv1(local[r * c1 * 256], x, r, c1, r1, 0, if_transpose=True)
    return local


def product(left_transposed, right_transposed, m=32, k=48, n=64, emit=None):
    """C = op(A) op(B) through L0, or through `emit(t, tik, c, a, b)`; result float32 zN."""
    a_shape, b_shape = ((k, m) if left_transposed else (m, k)), ((n, k) if right_transposed else (k, n))
    a, b = draw(F16, a_shape, 20), draw(F16, b_shape, 21)
    want = to_zn(
        (a.T if left_transposed else a).astype(np.float64) @ (b.T if right_transposed else b).astype(np.float64)
    )

    def body(t, tik, gm, out):
        a1, b1 = [load(t, tik, gm[key], key + "1", tik.scope_cbuf) for key in "ab"]
        c = t.Tensor(F32, want.shape, name="c", scope=tik.scope_cc)
        if emit:
            emit(t, tik, c, a1, b1)
        else:
            left = fill_l0a(t, tik, a1, a_shape[0], a_shape[1], left_transposed)
            right = fill_l0b(t, tik, b1, b_shape[0], b_shape[1], right_transposed)
            t.mmad(c, left, right, m, k, n, 0)
        result = t.Tensor(F32, want.shape, name="result", scope=tik.scope_ubuf)
        t.tensor_mov(result, c, "m", 1, m * n // 256, 0, 0)
        store(t, out, result)

    label = "A{} B{}".format("T" if left_transposed else "", "T" if right_transposed else "")
    return Program(label, {"a": to_zn(a), "b": to_zn(b)}, body, want.astype(F32), 8)


RECIPES = [product(left, right) for left in (False, True) for right in (False, True)]
add("mmad", *RECIPES)
add("load2dv1", RECIPES[0], RECIPES[3])


def _accumulated(name):
    """Two halves of k added up: the second product accumulates."""

    def by_matmul(t, tik, c, a, b):
        t.matmul(c, a[0:1, 0:32, 0:16], b[0:1, 0:64, 0:16], 32, 16, 64)
        t.matmul(c, a[1:3, 0:32, 0:16], b[1:3, 0:64, 0:16], 32, 32, 64, init_l1out=False)

    def by_mmad(t, tik, c, a, b):
        left, right = fill_l0a(t, tik, a, 32, 48, False), fill_l0b(t, tik, b, 64, 48, True)
        t.mmad(c, left, right, 32, 48, 64, 0)
        t.mmad(c, left, right, 32, 48, 64, 1)

    program = product(False, True, emit=by_matmul if name == "matmul" else by_mmad)
    if name == "mmad":
        program.expected = program.expected * 2
    return program


def _fractal_moves():
    """Every second fractal from GM to L1, in the types that only the cube could read back from L0."""
    for dtype in (S16, U16, S8, U8):
        elements = 512 // np.dtype(dtype).itemsize
        source = draw(dtype, 4 * elements, 24, 0, 1) % 100
        want = np.concatenate([source[k * elements : (k + 1) * elements] for k in (1, 3)])

        def body(t, tik, gm, out, dtype=dtype, size=2 * elements):
            level1 = t.Tensor(dtype, (size,), name="level1", scope=tik.scope_cbuf)
            t.load2dv1(level1, gm["src0"], 1, 2, 2, 0)
            local = t.Tensor(dtype, (size,), name="local", scope=tik.scope_ubuf)
            t.data_move(local, level1, 0, 1, 32, 0, 0)
            store(t, out, local)

        add("load2dv1", Program("GM->L1 {}".format(dtype), {"src0": source}, body, want, 0))


_fractal_moves()


def _integer_product(name, kinds):
    """C = A B^T of 8-bit operands, K0 = 32, in 32-bit integers."""
    random = np.random.RandomState(25)
    low = [0 if kind == U8 else -100 for kind in kinds[1:]]
    a, b = [random.randint(start, 100, shape).astype(kind)
            for start, shape, kind in zip(low, ((16, 64), (32, 64)), kinds[1:])]  # fmt: skip
    want = to_zn(a.astype(np.int64) @ b.astype(np.int64).T).astype(kinds[0])

    def body(t, tik, gm, out):
        a1, b1 = [load(t, tik, gm[key], key + "1", tik.scope_cbuf) for key in "ab"]
        c = t.Tensor(kinds[0], want.shape, name="c", scope=tik.scope_cc)
        if name == "matmul":
            t.matmul(c, a1, b1, 16, 64, 32)
        else:
            left = t.Tensor(kinds[1], (1024,), name="left", scope=tik.scope_ca)
            right = t.Tensor(kinds[2], (2048,), name="right", scope=tik.scope_cb)
            t.load2dv1(left, a1, 0, 2, 1, 0)
            t.load2dv1(right, b1, 0, 4, 1, 0)
            t.mmad(c, left, right, 16, 64, 32, 0)
        result = t.Tensor(kinds[0], want.shape, name="result", scope=tik.scope_ubuf)
        t.data_move(result, c, 0, 1, 2, 0, 0)
        store(t, out, result)

    return Program("<-".join(kinds), {"a": to_zn(a, 32), "b": to_zn(b, 32)}, body, want, 0)


for _kinds in ((S32, S8, S8), (S32, U8, S8)):
    add("matmul", _integer_product("matmul", _kinds))
for _kinds in ((S32, S8, S8), (S32, U8, S8), ("uint32", U8, U8)):
    add("mmad", _integer_product("mmad", _kinds))


def _half_accumulator():
    a, b = exact(26, F16, (16, 16)), exact(27, F16, (16, 16))
    want = to_zn(a.astype(np.float64) @ b.astype(np.float64).T).astype(F16)

    def body(t, tik, gm, out):
        a1, b1 = [load(t, tik, gm[key], key + "1", tik.scope_cbuf) for key in "ab"]
        c = t.Tensor(F16, (1, 16, 16), name="c", scope=tik.scope_cc)
        left, right = fill_l0a(t, tik, a1, 16, 16, False), fill_l0b(t, tik, b1, 16, 16, True)
        t.mmad(c, left, right, 16, 16, 16, 0)
        result = t.Tensor(F16, (1, 16, 16), name="result", scope=tik.scope_ubuf)
        t.data_move(result, c, 0, 1, 1, 0, 0)
        store(t, out, result)

    return Program("float16", {"a": to_zn(a), "b": to_zn(b)}, body, want, 1)


add("mmad", _half_accumulator())
add("matmul", product(False, True, emit=lambda t, tik, c, a, b: t.matmul(c, a, b, 32, 48, 64)), _accumulated("matmul"))
add("mmad", _accumulated("mmad"))


def _drained(narrow):
    """fixpipe drops the padded rows of a (20 x 32) result of 20 rows, with and without conversion."""
    a, b = exact(22, F16, (20, 16)), exact(23, F16, (32, 16))
    want = to_zn(a.astype(np.float64) @ b.astype(np.float64).T).astype(F16 if narrow else F32)
    padded = np.zeros((32, 16), F16)
    padded[:20] = a

    def body(t, tik, gm, out):
        a1, b1 = [load(t, tik, gm[key], key + "1", tik.scope_cbuf) for key in "ab"]
        c = t.Tensor(F32, (2, 32, 16), name="c", scope=tik.scope_cbuf_out)
        t.matmul(c, a1, b1, 20, 16, 32)
        params = {"quantize_params": {"mode": "fp322fp16", "mode_param": None}} if narrow else None
        t.fixpipe(out, c, 2, 20 * 16 * 4 // 32, 0, 0, extend_params=params)

    return Program("narrow" if narrow else "wide", {"a": to_zn(padded), "b": to_zn(b)}, body, want, 0)


add("fixpipe", _drained(False), _drained(True))


def _drained_integers(narrow):
    a, b = [np.random.RandomState(seed).randint(-5, 6, (16, 32)).astype(S8) for seed in (28, 29)]
    exact = to_zn(a.astype(np.int64) @ b.astype(np.int64).T)
    want = (exact * 0.5).astype(F16) if narrow else exact.astype(S32)

    def body(t, tik, gm, out):
        a1, b1 = [load(t, tik, gm[key], key + "1", tik.scope_cbuf) for key in "ab"]
        c = t.Tensor(S32, (1, 16, 16), name="c", scope=tik.scope_cbuf_out)
        t.matmul(c, a1, b1, 16, 32, 16)
        params = {"quantize_params": {"mode": "int322fp16", "mode_param": 0.5}} if narrow else None
        t.fixpipe(out, c, 1, 32, 0, 0, extend_params=params)

    label = "int32 to float16" if narrow else "int32"
    return Program(label, {"a": to_zn(a, 32), "b": to_zn(b, 32)}, body, want, 0)


add("fixpipe", _drained_integers(False), _drained_integers(True))


# --- scalars and control of the device ------------------------------------------------------------
def _scalars():
    source = np.arange(10, 26).astype(S32)

    def body(t, d, s):
        value = t.Scalar(S32, "value")
        with t.for_range(0, 3) as i:
            value.set_as(s[i + 4])
            d[i].set_as(value)
        d[5] = s[15]
        d[6].set_as(value * 2 + 1)

    want = np.zeros(16, S32)
    want[:3], want[5], want[6] = source[4:7], source[15], 2 * source[6] + 1
    return vector_program("int32", np.zeros(16, S32), [source], body, want, 0)


add("set_as", _scalars())
add("load_scalar", _scalars())


def _atomic():
    source = draw(F32, 64, 44)

    def body(t, tik, gm, out):
        local = load(t, tik, gm["src0"], "local")
        store(t, out, local)
        t.set_atomic_add(1)
        store(t, out, local)
        t.set_atomic_add(0)

    return Program("twice", {"src0": source}, body, source * 2, 0)


add("set_atomic_add", _atomic())
