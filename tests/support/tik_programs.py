"""Tiny TIK programs, each with the result expected of it, written without the simulator; any `tik` module runs them.

`PROGRAMS` maps the name of an instruction to the programs that show it. This file has the harness and the vector
instructions that work element by element; tik_programs_lanes.py, _moves.py and _high.py have the others.
"""

import numpy as np

F16, F32, S8, U8, S16, U16, S32, U32 = (
    "float16", "float32", "int8", "uint8", "int16", "uint16", "int32", "uint32",
)  # fmt: skip
PROGRAMS = {}
BLOCK = 32


class Program:
    """One program.

    Attributes:
        inputs: name -> array, in GM.
        body: body(t, tik, gm, out) emits the statements; gm: name -> input tensor, out: the output tensor.
        expected: the output.
        ulp: accepted error in units of the last place of the largest expected value.
    """

    def __init__(self, label, inputs, body, expected, ulp):
        self.label, self.inputs, self.body, self.expected, self.ulp = label, inputs, body, expected, ulp


def add(name, *programs):
    PROGRAMS.setdefault(name, []).extend(programs)


def build(program, tik):
    """The built Tik instance."""
    t = tik.Tik(disable_debug=False)
    gm = {key: t.Tensor(str(value.dtype), value.shape, name=key, scope=tik.scope_gm)
          for key, value in program.inputs.items()}  # fmt: skip
    want = program.expected
    out = t.Tensor(str(want.dtype), want.shape, name="out", scope=tik.scope_gm)
    program.body(t, tik, gm, out)
    t.BuildCCE(kernel_name="tiny", inputs=list(gm.values()), outputs=[out])
    return t


def run(program, tik):
    """Build and execute with a `tik` module; the output array."""
    return build(program, tik).tikdb.start_debug(feed_dict=dict(program.inputs), interactive=False)[0]


def check(program, tik):
    """Assert that a run gives what is expected."""
    got, want = run(program, tik), program.expected
    assert got.shape == want.shape and got.dtype == want.dtype
    if want.dtype.kind != "f" or program.ulp == 0:
        np.testing.assert_array_equal(got, want)
        return
    finite = np.abs(want[np.isfinite(want)])
    slack = program.ulp * np.finfo(want.dtype).eps * (finite.max() if finite.size else 1)
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=0, atol=slack)


def bytes_of(array):
    return array.size * array.itemsize


def load(t, tik, tensor, name, scope=None):
    """A tensor of GM copied whole into a local tensor of its shape."""
    local = t.Tensor(tensor.dtype, tensor.shape, name=name, scope=scope or tik.scope_ubuf)
    t.data_move(local, tensor, 0, 1, _blocks(tensor), 0, 0)
    return local


def store(t, out, local):
    t.data_move(out, local, 0, 1, _blocks(out), 0, 0)


def _blocks(tensor):
    elements = 1
    for extent in tensor.shape:
        elements *= extent
    size = elements * np.dtype(tensor.dtype).itemsize
    assert size % BLOCK == 0
    return size // BLOCK


def vector_program(label, before, sources, body, expected, ulp=1):
    """body(t, dst, *sources) works on UB copies; dst starts as `before` and is the output."""

    def whole(t, tik, gm, out):
        dst = load(t, tik, gm["before"], "dst_ub")
        body(t, dst, *[load(t, tik, gm["src%d" % i], "src%d_ub" % i) for i in range(len(sources))])
        store(t, out, dst)

    inputs = {"before": before}
    inputs.update({"src%d" % i: source for i, source in enumerate(sources)})
    return Program(label, inputs, whole, expected, ulp)


def lanes(mask, count):
    """The lanes a mask selects, by the definition of both its forms."""
    if isinstance(mask, int):
        return list(range(mask))
    bits = mask[0] << 64 | mask[1]
    return [lane for lane in range(count) if bits >> lane & 1]


def place(repeat, lane, itemsize, block_stride, repeat_stride):
    """Index of the element that repeat `repeat` and lane `lane` address."""
    per_block = BLOCK // itemsize
    return repeat * repeat_stride * per_block + lane // per_block * block_stride * per_block + lane % per_block


def draw(dtype, size, seed, low=-4.0, high=4.0):
    random = np.random.RandomState(seed)
    if np.dtype(dtype).kind == "f":
        return random.uniform(low, high, size).astype(dtype)
    info = np.iinfo(dtype)
    return random.randint(max(info.min, -1000), min(info.max, 60000) + 1, size).astype(dtype)


def exact(seed, dtype, size):
    """Small multiples of 1/8, whose sums are exact in both float types."""
    return np.random.RandomState(seed).randint(-16, 17, size).astype(dtype) / np.dtype(dtype).type(8)


# --- element by element ---------------------------------------------------------------------------
def positive(seed, dtype, size):
    return draw(dtype, size, seed, 0.25, 4.0)


def anything(seed, dtype, size):
    return draw(dtype, size, seed)


def elementwise(label, call, dst_dtype, src_dtypes, function, mask, repeats, blocks, strides, data=anything, ulp=1):
    """The program of an elementwise call and its result, computed one element at a time.

    call(t, mask, dst, sources, repeats, blocks, strides) emits it; function(old, *values) is the mathematics in
    float64 or Python ints; blocks and strides list dst first.
    """
    dtypes = [dst_dtype] + src_dtypes
    widths = [np.dtype(dtype).itemsize for dtype in dtypes]
    count = 256 // max(max(widths), 2)
    sizes = [
        max(place(r, lane, w, b, s) for r in range(repeats) for lane in range(count)) + BLOCK
        for w, b, s in zip(widths, blocks, strides)
    ]
    sizes = [-(-size // 64) * 64 for size in sizes]
    before = data(90, dst_dtype, sizes[0])
    sources = [data(91 + i, dtype, size) for i, (dtype, size) in enumerate(zip(src_dtypes, sizes[1:]))]
    expected = before.copy()
    for repeat in range(repeats):
        for lane in lanes(mask, count):
            where = [place(repeat, lane, w, b, s) for w, b, s in zip(widths, blocks, strides)]
            values = [source[i].item() for source, i in zip(sources, where[1:])]
            expected[where[0]] = function(expected[where[0]].item(), *values)

    def body(t, dst, *tensors):
        call(t, mask, dst, tensors, repeats, blocks, strides)

    return vector_program(label, before, sources, body, expected, ulp)


def both_forms(name, low_name, count, dtypes, function, data=anything, ulp=1, updates=False):
    """Programs of `vec_*` (block strides 1, a partial mask) and the low-level form (block strides, a bit mask)."""

    def mathematics(old, *values):
        return function(old, *values) if updates else function(*values)

    for dtype in dtypes:
        wide = np.dtype(dtype).itemsize == 4
        kinds = [dtype] * count
        if name:

            def call(t, mask, dst, sources, repeats, blocks, strides):
                getattr(t, name)(mask, dst, *(list(sources) + [repeats] + strides))

            for mask in (64 if wide else 128, 50 if wide else 100):
                label = "{} mask {}".format(dtype, mask)
                add(name, elementwise(label, call, dtype, kinds, mathematics, mask, 3, [1] * (count + 1),
                                      [8, 9, 10][: count + 1], data, ulp))  # fmt: skip
        if low_name:

            def low(t, mask, dst, sources, repeats, blocks, strides):
                getattr(t, low_name)(mask, dst, *(list(sources) + [repeats] + blocks + strides))

            mask = [0 if wide else 0xF0F000000000FFFF, 0x00FF3FFFFFFF0001]
            add(low_name, elementwise(dtype + " bits", low, dtype, kinds, mathematics, mask, 2, [2, 1, 3][: count + 1],
                                      [16, 8, 24][: count + 1], data, ulp))  # fmt: skip


def multiply(a, b):
    """The product; of integers, its low 32 bits."""
    if not isinstance(a, int):
        return a * b
    low = a * b & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


both_forms("vec_add", "vadd", 2, (F16, F32, S32), lambda a, b: a + b)
both_forms("vec_sub", "vsub", 2, (F16, F32, S32), lambda a, b: a - b)
both_forms("vec_mul", "vmul", 2, (F16, F32, S32), multiply)
both_forms("vec_max", "vmax", 2, (F16, F32, S32), max)
both_forms("vec_min", "vmin", 2, (F16, F32, S32), min)
both_forms("vec_and", "vand", 2, (U16, S16), lambda a, b: a & b)
both_forms("vec_or", "vor", 2, (U16, S16), lambda a, b: a | b)
both_forms("vec_not", "vnot", 1, (S16,), lambda a: -a - 1)
both_forms("vec_not", "vnot", 1, (U16,), lambda a: 65535 - a)
both_forms(None, "vdiv", 2, (F16, F32), lambda a, b: a / b, positive)
both_forms("vec_abs", "vabs", 1, (F16, F32), abs)
both_forms("vec_relu", "vrelu", 1, (F16,), lambda a: a if a > 0 else 0.0)
both_forms("vec_exp", "vexp", 1, (F16, F32), lambda a: float(np.exp(a)), ulp=2)
both_forms("vec_ln", "vln", 1, (F16, F32), lambda a: float(np.log(a)), positive, ulp=2)
both_forms("vec_rec", "vrec", 1, (F16, F32), lambda a: 1 / a, positive)
both_forms("vec_rsqrt", "vrsqrt", 1, (F16, F32), lambda a: a**-0.5, positive, ulp=2)
both_forms(None, "vsqrt", 1, (F16, F32), lambda a: a**0.5, positive)
both_forms(None, "vmla", 2, (F16, F32), lambda old, a, b: old + a * b, updates=True, ulp=2)
both_forms(None, "vmadd", 2, (F16, F32), lambda old, a, b: a * old + b, updates=True, ulp=2)
both_forms(None, "vmaddrelu", 2, (F16, F32), lambda old, a, b: max(a * old + b, 0.0), updates=True, ulp=2)


def _mixed_multiply_add():
    def call(t, mask, dst, sources, repeats, blocks, strides):
        t.vmla(mask, dst, sources[0], sources[1], repeats, *(blocks + strides))

    return elementwise("f32 += f16 * f16", call, F32, [F16, F16], lambda old, a, b: old + a * b, 60, 2, [1, 1, 1],
                       [8, 4, 4], ulp=2)  # fmt: skip


add("vmla", _mixed_multiply_add())


def with_scalar(name, low_name, function, pairs, updates=False):
    """Calls with a scalar: an immediate in the vec_* form, a Scalar in the low-level form."""
    value = 1.5
    for dst, src in pairs:

        def mathematics(old, x):
            return function(old, x, 1.5) if updates else function(x, 1.5)

        def call(t, mask, out, sources, repeats, blocks, strides):
            getattr(t, name)(mask, out, sources[0], value, repeats, *strides)

        def low(t, mask, out, sources, repeats, blocks, strides, src=src):
            scalar = t.Scalar(src, "factor")
            scalar.set_as(value)
            getattr(t, low_name)(mask, out, sources[0], scalar, repeats, *(blocks + strides))

        strides = [8, 4] if dst != src else [8, 8]
        wide = dst == F32
        add(name, elementwise(dst + src, call, dst, [src], mathematics, 64 if wide else 77, 2, [1, 1], strides, ulp=2))
        add(low_name, elementwise(dst + src, low, dst, [src], mathematics, 30, 2, [1, 1], strides, ulp=2))


with_scalar("vec_adds", "vadds", lambda x, s: x + s, [(F16, F16), (F32, F32)])
with_scalar("vec_muls", "vmuls", lambda x, s: x * s, [(F16, F16), (F32, F32)])
with_scalar("vec_axpy", "vaxpy", lambda old, x, s: old + x * s, [(F16, F16), (F32, F32), (F32, F16)], updates=True)

for _dtype in (F16, F32, S16, U16, S32, U32):
    _value = 3 if np.dtype(_dtype).kind != "f" else -2.5

    def _fill(t, mask, dst, sources, repeats, blocks, strides, value=_value):
        t.vec_dup(mask, dst, value, repeats, *strides)

    def _low_fill(t, mask, dst, sources, repeats, blocks, strides, value=_value):
        t.vector_dup(mask, dst, value, repeats, *(blocks + strides))

    def _constant(old, value=_value):
        return value

    add("vec_dup", elementwise(_dtype, _fill, _dtype, [], _constant, 40, 3, [1], [9]))
    add("vector_dup", elementwise(_dtype, _low_fill, _dtype, [], _constant, [0, 0xF0F0], 2, [2], [16]))


# --- conversion -----------------------------------------------------------------------------------
def _away(x):
    return int(np.floor(abs(x) + 0.5)) * (1 if x > 0 else -1)


_MODES = {"round": lambda x: int(round(x)), "floor": lambda x: int(np.floor(x)), "ceil": lambda x: int(np.ceil(x)),
          "to-zero": int, "away-zero": _away}  # fmt: skip


def _halves(seed, dtype, size):
    """Multiples of one half, so that rounding modes differ."""
    return np.random.RandomState(seed).randint(-20, 21, size).astype(dtype) / np.dtype(dtype).type(2)


def _small(seed, dtype, size):
    return np.random.RandomState(seed).randint(0, 100, size).astype(dtype)


def conversion(dst, src, mode, function, data, **keywords):
    """vec_conv and vconv from src to dst: 64 lanes where a side has 32 bits, strides by the width of each side."""
    wide = max(np.dtype(dst).itemsize, np.dtype(src).itemsize, 2)
    strides = [8 * np.dtype(dst).itemsize // wide, 8 * np.dtype(src).itemsize // wide]

    def call(t, mask, out, sources, repeats, blocks, strides):
        t.vec_conv(mask, mode, out, sources[0], repeats, *strides, **keywords)

    def low(t, mask, out, sources, repeats, blocks, strides):
        t.vconv(mask, mode, out, sources[0], repeats, *(blocks + strides), **keywords)

    def value(old, x):
        return function(x)

    label = "{}<-{} {}".format(dst, src, mode)
    add("vec_conv", elementwise(label, call, dst, [src], value, 50, 3, [1, 1], strides, data, ulp=0))
    add("vconv", elementwise(label, low, dst, [src], value, 64, 2, [2, 3], [20, 30], data, ulp=0))


conversion(F16, F32, "none", np.float16, anything)
conversion(F32, F16, "none", float, anything)
for _mode, _function in _MODES.items():
    for _src in (F16, F32):
        conversion(S32, _src, _mode, _function, lambda s, d, n: _small(s, d, n) if d == S32 else _halves(s, d, n))
conversion(F32, S32, "none", float, _small)
conversion(F16, S32, "none", lambda x: np.float16(x * 0.5), _small, deqscale=0.5)
for _byte in ("int8", "uint8"):
    conversion(_byte, F16, "floor", int, _small)
    conversion(F16, _byte, "none", float, _small)


def _odd(x):
    """Nearest float16 with an odd last bit, or the exact value: the two neighbours are tried."""
    down = np.float16(x)
    candidates = [down, np.nextafter(down, np.float16(np.inf)), np.nextafter(down, np.float16(-np.inf))]
    if float(down) == x:
        return down
    odd = [c for c in candidates if c.view(np.uint16) & 1 and abs(float(c) - x) < abs(float(np.spacing(down)))]
    return min(odd, key=lambda c: abs(float(c) - x))


conversion(F16, F32, "odd", _odd, anything)
