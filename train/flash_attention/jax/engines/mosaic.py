"""The `mosaic` engine: FlashAttention-3's structure for Hopper, as our own kernels in Pallas Mosaic GPU.

front end -> **run** -> mosaic_forward / mosaic_backward -> mosaic_tiles -> mosaic_operations. Successor of `pallas` on
compute capability 9.0, whose Triton back end JAX deprecates. Interpreted only and lowered, never run on a device: so
`auto` never takes it. On the CPU the same kernels are interpreted: slow.
"""

import importlib.util

import jax

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.core.spec import Operands
from flash_attention.jax.engines import cudnn, pallas_sizes
from flash_attention.jax.engines import mosaic_sizes as sizes
from flash_attention.jax.engines.platforms import backend
from flash_attention.jax.engines.shared import differentiable, gradients_by_kernels, per_example

PLATFORM = "cuda"
CAPABILITY = "9.0"
LEAST_JAX = (0, 10)
_REMEDY = "Use implementation='pallas' or 'xla'."
_ABSENT = tuple(pair for pair in cudnn.ABSENT if pair[0] in ("mask", "bias", "dropout_rate"))


def run(spec, query, key, value, operands=Operands()):
    """FlashAttention-2's tiles in FlashAttention-3's structure; arguments and results as :func:`xla.run`."""
    return _attention(spec, query, key, value, operands)


def operations():
    """What the kernels are traced with: the device's operations, or on a CPU those of the interpreter."""
    from flash_attention.jax.engines.mosaic_operations import Hopper, Interpreted

    return Hopper() if backend() == PLATFORM else Interpreted()


@per_example
def forward_pass(spec, query, key, value, operands):
    from flash_attention.jax.engines.mosaic_forward import forward

    return forward(spec, operations(), query, key, value, operands)


@per_example
def backward_pass(spec, saved, cotangents):
    from flash_attention.jax.engines.mosaic_backward import key_gradients, query_gradient

    def run_kernel(kernel):
        return lambda spec, *inputs: kernel(spec, operations(), *inputs)

    return gradients_by_kernels(spec, saved, cotangents, *map(run_kernel, (query_gradient, key_gradients)))


_attention = differentiable(forward_pass, backward_pass)


def constraints(spec):
    """Why the kernels cannot compute ``spec`` on any device, or None."""
    if spec.dtype not in ("float16", "bfloat16"):
        return Reason("dtype", spec.dtype, "float16 or bfloat16", _REMEDY)
    if spec.wide:
        return Reason("dtype", "a float32 part of a larger call", "that of the whole call", _REMEDY)
    if spec.head_dim not in sizes.HEAD_DIMS:
        return Reason("head_dim", spec.head_dim, " or ".join(map(str, sizes.HEAD_DIMS)), _REMEDY)
    most = pallas_sizes.MOST_PROGRAMS
    if max(spec.batch, spec.heads) > most:
        return Reason("batch", spec.batch, "at most {}, as the heads".format(most), "Use implementation='xla'.")
    reason = cudnn.given(spec, _ABSENT, _REMEDY)
    if reason is not None:
        return reason
    for direction in sizes.DIRECTIONS:
        tiles = sizes.tiles_of(spec, direction)
        shared, registers = (count(spec, tiles, direction) for count in (sizes.shared_bytes, sizes.registers))
        if shared > sizes.SHARED_LIMIT or registers > sizes.COMPUTING_REGISTERS:
            need = "a tile that fits {} bytes of shared memory and {} registers of a thread".format(
                sizes.SHARED_LIMIT, sizes.COMPUTING_REGISTERS
            )
            return Reason("tile", spec.tile, need, "Ask for a smaller one, or none.")
    return None


def supports(spec):
    """:func:`constraints`, a Hopper or a CPU that interprets it, and a jax that has Mosaic GPU."""
    reason = constraints(spec)
    if reason is not None:
        return reason
    here, capability = backend(), pallas_sizes.capability()
    if here not in (PLATFORM, "cpu"):
        return Reason("backend", here, "a Hopper GPU, or a CPU that interprets it", "Use implementation='xla'.")
    if here == PLATFORM and capability not in ("", CAPABILITY):
        need = "a Hopper GPU (compute capability {})".format(CAPABILITY)
        return Reason("backend", "compute capability {}".format(capability), need, _REMEDY)
    if jax.__version_info__[:2] < LEAST_JAX:
        need = "used with jax {}.{} or newer (Mosaic GPU)".format(*LEAST_JAX)
        return Reason("implementation", "'mosaic' with jax {}".format(jax.__version__), need, _REMEDY)
    if importlib.util.find_spec("absl") is None:
        need = "used where absl-py is installed (Mosaic GPU imports it)"
        return Reason("implementation", "'mosaic' without it", need, "Install absl-py, or use 'pallas' or 'xla'.")
    return None


ENGINE = Engine(
    "mosaic",
    run,
    supports,
    note="our Hopper kernels (Pallas, Mosaic GPU): interpreted only and lowered, never run on a device",
    layouts=("BNSD", "BSND"),
)
