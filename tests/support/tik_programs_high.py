"""Tiny TIK programs: the `h_*` family. See tik_programs.py."""

import math

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
    anything,
    draw,
    exact,
    multiply,
    positive,
    vector_program,
)  # fmt: skip


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
    ("h_mul", multiply, anything), ("h_max", max, anything), ("h_min", min, anything),
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
            rows = exact(41, dtype, (16, 48))
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
