"""What a warpgroup of the `mosaic` engine does with registers and tensor cores, for a Hopper and for the interpreter.

Pallas' interpreter of Mosaic GPU simulates memory spaces, threads, barriers and TMA copies. It knows (jax 0.10) no
layouts of registers, no sums that stay in registers and no operand that lies there, and TMA's rules for what lies
beyond an array: here each of these has one meaning for the device, and one in plain JAX that gives the same numbers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROW, COLUMN = 0, 1
"""The axis of a (M, N) tile along which a vector of one value a row, or a column, lies."""


class Hopper:
    """On the device. Tiles (M, N) are spread over registers as wgmma wants them, vectors as reduced tiles."""

    options = {}
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    """How 16-bit tiles lie in shared memory for wgmma: 8 x 64 elements, 128 bytes wide, swizzled."""

    @staticmethod
    def padded(length, tile):
        """Rows that an array of ``length`` must have: TMA sees groups of 8, and fills and clips beyond the last."""
        return -(-length // 8) * 8

    @staticmethod
    def tile(x):
        """(M, N) registers."""
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA)

    @staticmethod
    def vector(x, axis=ROW):
        """(M,) or (N,) registers."""
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1 - axis))

    @staticmethod
    def iota(shape, axis):
        """int32 (M, N), the index along ``axis``."""
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    @staticmethod
    def load(ref, axis=ROW):
        """A vector from global or shared memory."""
        index = ((),) if jax.__version_info__ < (0, 11) else ()  # which newer ones deprecate
        return plgpu.load(ref, *index, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)

    @staticmethod
    def product(a, b):
        """A B^T in float32, (M, N), of (M, K) and (N, K) in shared memory."""

        def multiply(total):
            plgpu.wgmma(total, a, b.transpose((1, 0)))
            return total[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    @staticmethod
    def add_product(total, a, b):
        """``total + A B``, (M, N), of (M, K) in registers and (K, N) in shared memory."""
        return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(plgpu.ACC.init(total))


class Interpreted:
    """In the interpreter, on a CPU."""

    transforms = ()
    detect_races = False

    @property
    def options(self):
        """Arguments of ``plgpu.kernel``."""
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax exports it nowhere else

        return {"interpret": InterpretGPUParams(detect_races=self.detect_races)}

    @staticmethod
    def padded(length, tile):
        """As :meth:`Hopper.padded`: whole tiles, since the interpreter neither fills nor clips."""
        return -(-length // tile) * tile

    @staticmethod
    def tile(x):
        return x

    @staticmethod
    def vector(x, axis=ROW):
        return x

    @staticmethod
    def iota(shape, axis):
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    @staticmethod
    def load(ref, axis=ROW):
        return ref[...]

    @staticmethod
    def product(a, b):
        return _dot(a[...], b[...], 1)

    @staticmethod
    def add_product(total, a, b):
        return total + _dot(a, b[...], 0)


def _dot(a, b, axis):
    # wgmma reads shared memory as TMA writes it. To the detector of races, what stands for it here are ordinary loads,
    # and a copy to where they read must come after a fence.
    plgpu.commit_smem()
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def along(x, shape, axis):
    """A vector of ``axis`` repeated over a tile of ``shape``."""
    return lax.broadcast_in_dim(x, shape, [axis])


def filled(ops, shape, value=0.0):
    """float32 registers of one value: a tile, or a vector of rows."""
    x = jnp.full(shape, value, jnp.float32)
    return ops.tile(x) if len(shape) == 2 else ops.vector(x)
