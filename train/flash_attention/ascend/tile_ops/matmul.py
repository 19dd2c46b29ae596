"""Matrix products of zN tiles in L1: A, A^T, B and B^T, into fp32 zN tiles in L0C.

A matrix X of R rows and C columns lies in L1 as ``[C/16][R][16]`` fp16 (zN): fractal (r1, c1) is number
``c1 * R/16 + r1``. ``load2dv1`` copies fractals into L0A (order [M1, K1]) or L0B (order [K1, N1], each fractal k-major)
and can transpose each fractal on its way, so X and X^T serve as either operand without a copy in L1.
"""

from typing import NamedTuple

from flash_attention.ascend.program import Buffer

FRACTAL = 16
FRACTAL_ELEMENTS = FRACTAL * FRACTAL
HALF_BYTES = 32 * 1024
"""Bytes of one of the two halves of L0A and of L0B that products alternate between."""


class Operand(NamedTuple):
    """A zN tile in L1, or its transpose, as a factor of a product.

    Attributes:
        tensor: one-dimensional fp16 tensor in L1.
        rows, cols: of the tile as it is stored, multiples of 16.
        transposed: use the transpose.
        offset: element where the tile starts, a multiple of 256; int or TIK expression.
        uniform: the tensor holds a single fractal, which stands for every fractal of the tile.
    """

    tensor: object
    rows: int
    cols: int
    transposed: bool = False
    offset: object = 0
    uniform: bool = False

    @property
    def shape(self):
        """(rows, columns) of the factor."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)


def cube_buffers():
    """The L0A and L0B halves that :class:`Cube` needs: one is loaded while the cube reads the other."""
    halves = HALF_BYTES // 2
    return [
        Buffer("{}_{}".format(scope.lower(), half), scope, "float16", halves, "left factor" if scope == "L0A" else
               "right factor")
        for scope in ("L0A", "L0B")
        for half in (0, 1)
    ]  # fmt: skip


class Cube:
    """Issues products; owns the halves of L0A and L0B, which have to be declared in the core's loop.

    Args:
        program: :class:`~flash_attention.ascend.program.Program`.
    """

    def __init__(self, program):
        self._api = program.api
        tensors = [program.local(buffer) for buffer in cube_buffers()]
        self._left, self._right = tensors[:2], tensors[2:]
        self._turn = 0

    def multiply(self, dst, left, right, accumulate=False):
        """``dst (+)= left @ right``: m*k*n/4096 cycles of the cube, (m+2n)*k/256 of the L1 reads.

        Args:
            dst: fp32 tensor in L0C from the result's first element on; zN: ``[n/16][m][16]``.
            left: :class:`Operand` (m, k), or a list of them stacked along m.
            right: :class:`Operand` (k, n).
            accumulate: add to ``dst`` instead of overwriting it.
        """
        stack = left if isinstance(left, list) else [left]
        m, (k, n) = sum(part.shape[0] for part in stack), right.shape
        k1 = k // FRACTAL
        most = max(1, HALF_BYTES // (2 * FRACTAL * max(m, n)))  # fractals of k that fit
        chunks = -(-k1 // most)
        for chunk in range(chunks):
            first = chunk * k1 // chunks
            count = (chunk + 1) * k1 // chunks - first
            l0a, l0b = self._left[self._turn], self._right[self._turn]
            self._turn = 1 - self._turn
            at = 0
            for part in stack:
                self._load_left(l0a, at, part, first, count)
                at += part.shape[0] // FRACTAL * count
            self._load_right(l0b, right, first, count)
            self._api.mmad(dst, l0a, l0b, m, count * FRACTAL, n, int(accumulate or first > 0))

    def _load(self, dst, dst_fractal, operand, src_fractal, repeat, stride, transpose=False):
        src = operand.tensor[operand.offset]
        if operand.uniform:
            src_fractal, stride = 0, 0
        self._api.load2dv1(dst[dst_fractal * FRACTAL_ELEMENTS], src, src_fractal, repeat, stride, 0, transpose)

    def _load_left(self, l0a, at, operand, first, count):
        """L0A rows from fractal ``at`` on: [M1][count] fractals of k1 = first .. first + count - 1."""
        r1, c1 = operand.rows // FRACTAL, operand.cols // FRACTAL
        if operand.transposed:  # M = columns, K = rows: stored [M1][K1] already
            if count == r1:
                self._load(l0a, at, operand, 0, r1 * c1, 1, transpose=True)
            else:
                for m in range(c1):
                    self._load(l0a, at + m * count, operand, m * r1 + first, count, 1, transpose=True)
        elif count == 1 or r1 == 1:
            self._load(l0a, at, operand, first * r1, r1 * count, 1)
        else:
            for m in range(r1):
                self._load(l0a, at + m * count, operand, first * r1 + m, count, r1)

    def _load_right(self, l0b, operand, first, count):
        """L0B rows [count][N1] of k1 = first .. first + count - 1."""
        r1, c1 = operand.rows // FRACTAL, operand.cols // FRACTAL
        if operand.transposed:  # K = columns, N = rows: stored [K1][N1], k contiguous
            self._load(l0b, 0, operand, first * r1, count * r1, 1)
        elif c1 == 1:
            self._load(l0b, 0, operand, first, count, 1, transpose=True)
        else:
            for k in range(count):
                self._load(l0b, k * c1, operand, first + k, c1, r1, transpose=True)
