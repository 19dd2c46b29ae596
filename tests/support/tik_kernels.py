"""Three small kernels written from the public TIK pages alone; any `tik` module runs them."""

import numpy as np
from support import tik_programs_moves


def vector_add(tik, length):
    """z = x + y of float16, any length: whole chunks of 255 repeats, whole repeats, and a tail cut by the mask.

    Two kernels: GM is padded by the caller to whole blocks of 16, as its moves are.
    """
    t = tik.Tik(disable_debug=False)
    padded = -(-length // 16) * 16
    x, y, z = [t.Tensor("float16", (padded,), name=name, scope=tik.scope_gm) for name in "xyz"]
    a, b = [t.Tensor("float16", (padded,), name=name + "_ub", scope=tik.scope_ubuf) for name in "xy"]
    for gm, local in ((x, a), (y, b)):
        t.data_move(local, gm, 0, 1, padded // 16, 0, 0)
    done = 0
    while length - done >= 128:
        repeats = min(255, (length - done) // 128)
        t.vec_add(128, a[done], a[done], b[done], repeats, 8, 8, 8)
        done += 128 * repeats
    if done < length:
        t.vec_add(length - done, a[done], a[done], b[done], 1, 8, 8, 8)
    t.data_move(z, a, 0, 1, padded // 16, 0, 0)
    t.BuildCCE(kernel_name="vector_add", inputs=[x, y], outputs=[z])
    return t


def softmax(tik, rows, columns, cores):
    """Row softmax of a (rows, columns) float16 matrix: rows split over cores, two rows in flight on each."""
    t = tik.Tik(disable_debug=False)
    x = t.Tensor("float16", (rows, columns), name="x", scope=tik.scope_gm)
    y = t.Tensor("float16", (rows, columns), name="y", scope=tik.scope_gm)
    per_core, repeats, burst = rows // cores, columns // 128, columns // 16
    with t.for_range(0, cores, block_num=cores) as core:
        with t.for_range(0, per_core, thread_num=2) as i:
            row = t.Tensor("float16", (columns,), name="row", scope=tik.scope_ubuf)
            work = t.Tensor("float16", (2 * repeats + 128,), name="work", scope=tik.scope_ubuf)
            small = t.Tensor("float32", (64,), name="small", scope=tik.scope_ubuf)
            half = t.Tensor("float16", (128,), name="half", scope=tik.scope_ubuf)
            refine = t.Tensor("float32", (64,), name="refine", scope=tik.scope_ubuf)
            t.data_move(row, x[core * per_core + i, 0], 0, 1, burst, 0, 0)
            t.vec_reduce_max(128, half, row, work, repeats, 8)
            t.vec_muls(1, half, half, -1.0, 1, 8, 8)
            shift = t.Scalar("float16", "shift")
            shift.set_as(half[0])
            t.vec_adds(128, row, row, shift, repeats, 8, 8)
            t.vec_exp(128, row, row, repeats, 8, 8)
            t.vec_reduce_add(128, half, row, work, repeats, 8)
            t.vec_conv(1, "none", small, half, 1, 8, 4)
            t.vec_rec_high_preci(1, small[8:], small[0:], refine[0:], 1, 8, 8)
            t.vec_conv(1, "none", half, small[8:], 1, 4, 8)
            factor = t.Scalar("float16", "factor")
            factor.set_as(half[0])
            t.vec_muls(128, row, row, factor, repeats, 8, 8)
            t.data_move(y[core * per_core + i, 0], row, 0, 1, burst, 0, 0)
    t.BuildCCE(kernel_name="softmax", inputs=[x], outputs=[y])
    return t


def matmul_chain(tik, m, k, n, p):
    """(A B^T) D^T of zN float16 matrices A (m, k), B (n, k), D (p, n); the middle result is rounded to float16."""
    t = tik.Tik(disable_debug=False)

    def gm(name, dtype, rows, columns):
        return t.Tensor(dtype, (columns // 16, rows, 16), name=name, scope=tik.scope_gm)

    a, b, d, out = (
        gm("a", "float16", m, k),
        gm("b", "float16", n, k),
        gm("d", "float16", p, n),
        gm("out", "float32", m, p),
    )

    def level1(tensor):
        local = t.Tensor("float16", tensor.shape, name=tensor.name + "_l1", scope=tik.scope_cbuf)
        t.data_move(local, tensor, 0, 1, tensor.shape[0] * tensor.shape[1], 0, 0)
        return local

    a1, b1, d1 = level1(a), level1(b), level1(d)
    middle = t.Tensor("float16", (n // 16, m, 16), name="middle", scope=tik.scope_cbuf)
    with t.new_stmt_scope():
        first = t.Tensor("float32", (n // 16, m, 16), name="first", scope=tik.scope_cbuf_out)
        rounded = t.Tensor("float16", (n // 16, m, 16), name="rounded", scope=tik.scope_ubuf)
        t.matmul(first, a1, b1, m, k, n)
        t.tensor_mov(rounded, first, "m", 1, m * n // 256, 0, 0)
        t.data_move(middle, rounded, 0, 1, m * n // 16, 0, 0)
    second = t.Tensor("float32", (p // 16, m, 16), name="second", scope=tik.scope_cbuf_out)
    t.matmul(second, middle, d1, m, n, p)
    t.fixpipe(out, second, p // 16, m * 2, 0, 0)
    t.BuildCCE(kernel_name="matmul_chain", inputs=[a, b, d], outputs=[out])
    return t


def check_vector_add(tik, length):
    padded = -(-length // 16) * 16
    random = np.random.RandomState(length)
    x, y = random.randn(padded).astype(np.float16), random.randn(padded).astype(np.float16)
    got = vector_add(tik, length).tikdb.start_debug(feed_dict={"x": x, "y": y}, interactive=False)[0]
    np.testing.assert_array_equal(got[:length], (x + y)[:length])


def check_softmax(tik, rows=8, columns=512, cores=2):
    x = np.random.RandomState(1).uniform(-6, 6, (rows, columns)).astype(np.float16)
    got = softmax(tik, rows, columns, cores).tikdb.start_debug(feed_dict={"x": x}, interactive=False)[0]
    weights = np.exp(x.astype(np.float64) - x.astype(np.float64).max(axis=1, keepdims=True))
    np.testing.assert_allclose(got, weights / weights.sum(axis=1, keepdims=True), rtol=6e-3, atol=1e-6)


def check_matmul_chain(tik, m=32, k=64, n=48, p=80):
    random = np.random.RandomState(2)
    matrices = {name: random.randn(*shape).astype(np.float16)
                for name, shape in (("a", (m, k)), ("b", (n, k)), ("d", (p, n)))}  # fmt: skip
    feed = {name: tik_programs_moves.to_zn(x) for name, x in matrices.items()}
    got = matmul_chain(tik, m, k, n, p).tikdb.start_debug(feed_dict=feed, interactive=False)[0]
    a, b, d = [matrices[name].astype(np.float64) for name in "abd"]
    want = (a @ b.T).astype(np.float16).astype(np.float64) @ d.T
    np.testing.assert_allclose(got.transpose(1, 0, 2).reshape(m, p), want, rtol=1e-2, atol=0.1)
