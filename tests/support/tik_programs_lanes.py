"""Tiny TIK programs: reductions, precise calls, comparison, selection and transposes. See tik_programs.py."""

import math

import numpy as np
from support.tik_programs import (
    F16,
    F32,
    S8,
    S16,
    U8,
    U16,
    add,
    anything,
    draw,
    exact,
    lanes,
    place,
    positive,
    vector_program,
)  # fmt: skip


# --- reductions -----------------------------------------------------------------------------------
def _masked(source, repeats, mask, block, stride):
    """The elements of each repeat that a mask selects: list of {lane: value}."""
    itemsize = source.itemsize
    return [
        {lane: source[place(r, lane, itemsize, block, stride)] for lane in lanes(mask, 256 // itemsize)}
        for r in range(repeats)
    ]


def _per_block(name, function):
    source, before = exact(1, F16, 512), np.zeros(64, F16)
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
    _source, _before = exact(2, _dtype, 768), np.zeros(32, _dtype)
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


def _tree():
    """Adjacent pairs first: 2048 + 1 would stay 2048 in float16, but 1 + 1 come together before."""
    source, want = np.zeros(128, F16), np.zeros(16, F16)
    source[0], source[2:4], want[0] = 2048, 1, 2050

    def reduce(t, d, s):
        work = t.Tensor(F16, (16,), name="work", scope=s.scope)
        t.vec_reduce_add(128, d, s, work, 1, 8)

    yield "vec_reduce_add", vector_program("order of the tree", np.zeros(16, F16), [source], reduce, want, 0)

    def each(t, d, s):
        t.vcadd(128, d, s, 1, 1, 1, 8)

    yield "vcadd", vector_program("order of the tree", np.zeros(16, F16), [source], each, want, 0)


for _name, _program in _tree():
    add(_name, _program)


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
    source, want = exact(4, F16, 512), np.zeros(256, F16)
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
