"""Tiny TIK programs, second part: reductions, selection, layout, moves, cube, `h_*`, scalars. See tik_programs.py."""

import math

import numpy as np
from support import tik_programs
from support.tik_programs import (
    F16,
    F32,
    PROGRAMS,
    S16,
    S32,
    U16,
    Program,
    add,
    anything,
    draw,
    lanes,
    load,
    place,
    positive,
    store,
    vector_program,
)

__all__ = ["PROGRAMS"]
S8, U8 = "int8", "uint8"


# --- reductions -----------------------------------------------------------------------------------
def _masked(source, repeats, mask, block, stride):
    """The elements of each repeat that a mask selects: list of {lane: value}."""
    itemsize = source.itemsize
    return [
        {lane: source[place(r, lane, itemsize, block, stride)] for lane in lanes(mask, 256 // itemsize)}
        for r in range(repeats)
    ]


def _exact(seed, dtype, size):
    """Small multiples of 1/8, whose sums are exact in both float types."""
    return np.random.RandomState(seed).randint(-16, 17, size).astype(dtype) / np.dtype(dtype).type(8)


def _per_block(name, function):
    source, before = _exact(1, F16, 512), np.zeros(64, F16)
    for mask in (128, 120, [0x00FF00FF00FF00FF, 0xFFFF0001FFFFFFFF]):
        want = before.copy()
        for r, values in enumerate(_masked(source, 2, mask, 2, 16)):
            for block in range(8):
                inside = [value for lane, value in values.items() if lane // 16 == block]
                want[r * 16 + block] = function([float(value) for value in inside])

        def body(t, d, s, mask=mask):
            getattr(t, name)(mask, d, s, 2, 2, 2, 16)

        add(name, vector_program("mask {}".format(mask), before, [source], body, want, 0))


for _name, _function in (("vcgmax", max), ("vcgmin", min), ("vcgadd", sum)):
    _per_block(_name, _function)


for _dtype in (F16, F32):
    _source, _before = _exact(2, _dtype, 768), np.zeros(32, _dtype)
    _want = _before.copy()
    for _r, _values in enumerate(_masked(_source, 3, 37, 1, 9)):
        _want[2 * _r] = sum(float(value) for value in _values.values())
    add("vcadd", vector_program(_dtype, _before, [_source], lambda t, d, s: t.vcadd(37, d, s, 3, 2, 1, 9), _want, 0))

    _total = sum(float(v) for values in _masked(_source, 5, 60, 1, 9) for v in values.values())
    _want = _before.copy()
    _want[0] = _total

    def _sum(t, d, s, dtype=_dtype):
        work = t.Tensor(dtype, (64,), name="work", scope=s.scope)
        t.vec_reduce_add(60, d, s, work, 5, 9)

    add("vec_reduce_add", vector_program(_dtype, _before, [_source], _sum, _want, 0))


def _extremes():
    source = np.random.RandomState(3).permutation(768).astype(F16)
    for low_name, name, best in (("vcmax", "vec_reduce_max", max), ("vcmin", "vec_reduce_min", min)):
        want = np.zeros(32, F16)
        for r, values in enumerate(_masked(source, 3, 90, 1, 8)):
            lane = best(values, key=lambda lane: values[lane])
            want[4 * r], want.view(U16)[4 * r + 1] = values[lane], lane

        def each(t, d, s, n=low_name):
            getattr(t, n)(90, d, s, 3, 2, 1, 8)

        yield low_name, vector_program("value and lane", np.zeros(32, F16), [source], each, want, 0)
        for indexed in (False, True):
            where = best(range(384), key=lambda i: float(source[i]))
            total = np.zeros(32, F16)
            total[0] = source[where]
            if indexed:
                total.view(U16)[1] = where

            def reduce(t, d, s, n=name, indexed=indexed):
                work = t.Tensor(F16, (256,), name="work", scope=s.scope)
                getattr(t, n)(128, d, s, work, 3, 8, cal_index=indexed)

            yield name, vector_program("index {}".format(indexed), np.zeros(32, F16), [source], reduce, total, 0)


for _name, _program in _extremes():
    add(_name, _program)


def _pairs():
    source, want = _exact(4, F16, 512), np.zeros(256, F16)
    for r in range(2):
        row = source[r * 256 : r * 256 + 128].astype(np.float64)
        want[r * 128 : r * 128 + 64] = row[0::2] + row[1::2]
    before = np.zeros(256, F16)
    add(
        "vec_cpadd",
        vector_program("strided", before, [source], lambda t, d, s: t.vec_cpadd(128, d, s, 2, 2, 16), want, 0),
    )
    add(
        "vcpadd", vector_program("strided", before, [source], lambda t, d, s: t.vcpadd(128, d, s, 2, 2, 1, 16), want, 0)
    )


_pairs()


# --- precise --------------------------------------------------------------------------------------
def _precise(name, function, work_dtype, factor, dtypes, data):
    for dtype in dtypes:
        source = data(5, dtype, 256)
        before, want = draw(dtype, 256, 6), None
        want = before.copy()
        for r, values in enumerate(_masked(source, 2, 60, 1, 8)):
            for lane, value in values.items():
                want[place(r, lane, source.itemsize, 1, 8)] = function(float(value))

        def body(t, d, s, dtype=dtype):
            work = t.Tensor(work_dtype, (factor[dtype] * 256,), name="work", scope=s.scope)
            getattr(t, name)(60, d, s, work[0:], 2, 8, 8)

        add(name, vector_program(dtype, before, [source], body, want, 2))


_precise("vec_rec_high_preci", lambda x: 1 / x, F32, {F16: 4, F32: 2}, (F16, F32), positive)
_precise("vec_rsqrt_high_preci", lambda x: x**-0.5, F32, {F16: 6, F32: 4}, (F16, F32), positive)
_precise("vec_expm1_high_preci", math.expm1, F16, {F16: 11}, (F16,), anything)


# --- comparison and selection ---------------------------------------------------------------------
def _comparisons():
    tests = {"lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
             "eq": lambda a, b: a == b, "ne": lambda a, b: a != b}  # fmt: skip
    for dtype in (F16, F32):
        count = 256 // np.dtype(dtype).itemsize
        sources = [np.random.RandomState(7 + i).randint(0, 3, 1024).astype(dtype) for i in range(2)]
        for key, test in tests.items():
            for name, block in (("vec_cmpv_" + key, 1), ("vcmpv_" + key, 2)):
                want = np.full(64, 255, np.uint8)
                bits = [int(test(sources[0][place(r, lane, sources[0].itemsize, block, 16)],
                                 sources[1][place(r, lane, sources[0].itemsize, block, 20)]))
                        for r in range(2) for lane in range(count)]  # fmt: skip
                for k in range(0, len(bits), 8):
                    want[k // 8] = sum(bit << i for i, bit in enumerate(bits[k : k + 8]))
                strides = (block, block) if block == 2 else ()

                def body(t, d, a, b, name=name, strides=strides):
                    getattr(t, name)(d, a, b, 2, *(strides + (16, 20)))

                add(name, vector_program(dtype, np.full(64, 255, np.uint8), sources, body, want))


_comparisons()


def _selection():
    random = np.random.RandomState(8)
    for dtype in (F16, F32):
        count = 256 // np.dtype(dtype).itemsize
        before, a, b = [draw(dtype, 512, seed) for seed in (9, 10, 11)]
        bits = random.randint(0, 256, 32).astype(np.uint8)
        for name, block in (("vec_sel", 1), ("vsel", 2)):
            want = before.copy()
            for r in range(2):
                for lane in range(count - 7):
                    i = place(r, lane, before.itemsize, block, 8 * block)
                    want[i] = (a if bits[lane // 8] >> (lane % 8) & 1 else b)[i]
            strides = ((2, 2, 2) if block == 2 else ()) + (8 * block,) * 3

            def body(t, d, x, y, sel, name=name, strides=strides, count=count):
                getattr(t, name)(count - 7, 0, d, sel, x, y, 2, *strides)

            add(name, vector_program(dtype, before, [a, b, bits], body, want, 0))


_selection()


# --- transposes -----------------------------------------------------------------------------------
def _transposes():
    for dtype in (F16, S16, U16):
        tiles = draw(dtype, 1024, 12)
        swapped = np.concatenate([tile.reshape(16, 16).T.reshape(-1) for tile in (tiles[:256], tiles[512:768])])
        empty = np.zeros(512, dtype)
        add("vec_trans", vector_program(dtype, empty, [tiles], lambda t, d, s: t.vec_trans(d, s, 2, 1, 2), swapped))
        add(
            "vtranspose", vector_program(dtype, empty[:256], [tiles], lambda t, d, s: t.vtranspose(d, s), swapped[:256])
        )
    add(
        "vec_trans", vector_program("in place", tiles[:256], [], lambda t, d: t.vec_trans(d, d, 1, 1, 1), swapped[:256])
    )


_transposes()


def _scattered(name):
    """Rows of 64: block i of the source list at row i; two repeats, two blocks apart."""

    def body(t, d, s):
        getattr(t, name)(False, False, [d[64 * i] for i in range(16)], [s[64 * i] for i in range(16)], 2, 2, 2)

    for dtype in (F16, S16, U16):
        source, want = draw(dtype, 1024, 13).reshape(16, 64), np.zeros((16, 64), dtype)
        for r in range(2):
            want[:, 32 * r : 32 * r + 16] = source[:, 32 * r : 32 * r + 16].T
        add(name, vector_program(dtype, np.zeros(1024, dtype), [source.reshape(-1)], body, want.reshape(-1), 0))

    def high(t, d, s):
        getattr(t, name)(False, True, [d[32 * i] for i in range(16)], [s[32 * i] for i in range(16)], 1, 0, 0)

    for dtype in (S8, U8):
        blocks = np.random.RandomState(14).randint(0, 100, 512).astype(dtype)
        half = np.zeros((16, 32), dtype)
        half[:, :16] = blocks.reshape(16, 32)[:, 16:].T
        label = "{} high half to low".format(dtype)
        add(name, vector_program(label, np.zeros(512, dtype), [blocks], high, half.reshape(-1), 0))


_scattered("vec_trans_scatter")
_scattered("vnchwconv")


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
    a, b = _exact(26, F16, (16, 16)), _exact(27, F16, (16, 16))
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
    a, b = _exact(22, F16, (20, 16)), _exact(23, F16, (32, 16))
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


# --- h_* ------------------------------------------------------------------------------------------
def _high(name, count, dtypes, function, data=anything, number=None, ulp=1):
    """Whole tensors of shape (2, 3, 16) and, in the second program, the slice [1:2, :, :]."""
    for dtype in dtypes:
        before, sources = data(30, dtype, (2, 3, 16)), [data(31 + i, dtype, (2, 3, 16)) for i in range(count)]
        extra = [] if number is None else [number]
        whole, part = before.copy(), before.copy()
        for index in np.ndindex(2, 3, 16):
            whole[index] = function(*([source[index].item() for source in sources] + extra))
            if index[0] == 1:
                part[index] = whole[index]

        def on_whole(t, d, *s, extra=extra):
            getattr(t, name)(d, *(list(s) + extra))

        def on_slice(t, d, *s, extra=extra):
            cut = [x[1:2, 0:3, 0:16] for x in (d,) + s]
            getattr(t, name)(*(cut + extra))

        label = "{}{}".format(dtype, "" if number is None else " with a number")
        add(name, vector_program(label, before, sources, on_whole, whole, ulp))
        add(name, vector_program(label + " slice", before, sources, on_slice, part, ulp))


for _name, _function, _data in (
    ("h_add", lambda a, b: a + b, anything), ("h_sub", lambda a, b: a - b, anything),
    ("h_mul", tik_programs.multiply, anything), ("h_max", max, anything), ("h_min", min, anything),
    ("h_div", lambda a, b: a / b, positive),
):  # fmt: skip
    _high(_name, 2, (F16, F32) + (() if _name == "h_div" else (S32,)), _function, _data)
    _high(_name, 1, (F16,), _function, _data, number=0.75)
_high("h_exp", 1, (F16, F32), math.exp, ulp=2)
_high("h_ln", 1, (F16, F32), math.log, positive, ulp=2)
_high("h_abs", 1, (F16, F32), abs)
_high("h_cos", 1, (F16, F32), math.cos, ulp=2)
_high("h_sin", 1, (F16, F32), math.sin, ulp=2)


def _high_others():
    modes = {S32: ("floor", math.floor), S8: ("none", round), U8: ("none", round)}
    for dst, src in (
        (F16, F32),
        (F32, F16),
        (S32, F16),
        (S32, F32),
        (S8, F16),
        (U8, F16),
        (F32, S32),
        (F16, U8),
        (F16, S8),
    ):
        source = (draw(src, (4, 32), 40, 0, 50) % 50).astype(src)
        mode, function = modes.get(dst, ("none", lambda x: x))
        want = np.array([function(x) for x in source.reshape(-1).tolist()]).astype(dst).reshape(4, 32)
        add("h_cast", vector_program("{}<-{}".format(dst, src), np.zeros((4, 32), dst), [source],
                                     lambda t, d, s, mode=mode: t.h_cast(d, s, mode), want, 0))  # fmt: skip
    for dtype in (F16, F32, S16, U16, S32, "uint32"):
        before = draw(dtype, (4, 16), 45)
        filled = before.copy()
        filled[2] = 7
        add("h_duplicate", vector_program(dtype, before, [], lambda t, d: t.h_duplicate(d[2, 0:16], 7), filled, 0))
    for dtype in (F16, F32):
        for name, function in (("h_reduce_max", max), ("h_reduce_sum", sum)):
            rows = _exact(41, dtype, (16, 48))
            want = np.array([function(row.tolist()) for row in rows], dtype)
            add(name, vector_program(dtype, np.zeros(16, dtype), [rows],
                                     lambda t, d, s, name=name: getattr(t, name)(d, s, 1), want, 0))  # fmt: skip

    def body(t, tik, gm, out):
        local = t.Tensor(F16, (2, 16), name="local", scope=tik.scope_ubuf)
        t.h_data_move(local, gm["src0"][1:3, 0:16])
        t.h_data_move(out, local)

    source = draw(F16, (4, 16), 43)
    add("h_data_move", Program("slice", {"src0": source}, body, source[1:3].copy(), 0))


_high_others()


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
