"""The `pallas` engine: FlashAttention-2 as our own kernels for GPUs, in Pallas, which compiles them through Triton.

front end -> **run** -> pallas_forward / pallas_backward / pallas_bias -> pallas_tiles -> the tile's scores, from
xla_tiles. On the CPU the same kernels are interpreted: slow, and the same results.
"""

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.core.spec import Operands
from flash_attention.jax.engines.pallas_sizes import (
    DIRECTIONS,
    MAX_HEAD_DIM,
    MOST_PROGRAMS,
    shared_bytes,
    shared_limit,
    tiles_of,
)
from flash_attention.jax.engines.platforms import backend, compiled_or_interpreted
from flash_attention.jax.engines.shared import differentiable, gradients_by_kernels, per_example

PLATFORMS = ("cuda", "rocm")
_DTYPES = ("float16", "bfloat16", "float32")


def run(spec, query, key, value, operands=Operands()):
    """FlashAttention-2 in kernels that visit planned tiles only; arguments and results as :func:`xla.run`."""
    return _attention(spec, query, key, value, operands)


@per_example
def forward_pass(spec, query, key, value, operands):
    from flash_attention.jax.engines.pallas_forward import forward

    out, lse = compiled_or_interpreted(PLATFORMS, *forward(spec, query, key, value, operands))
    return out, lse


@per_example
def backward_pass(spec, saved, cotangents):
    from flash_attention.jax.engines.pallas_backward import key_gradients, query_gradient
    from flash_attention.jax.engines.pallas_bias import bias_gradient

    def run_kernel(kernel):
        return lambda *inputs: compiled_or_interpreted(PLATFORMS, *kernel(*inputs))

    return gradients_by_kernels(
        spec, saved, cotangents, *map(run_kernel, (query_gradient, key_gradients, bias_gradient))
    )


_attention = differentiable(forward_pass, backward_pass)


def supports(spec):
    """GPUs (and, interpreted, CPUs); head sizes that a tile can hold; tiles that shared memory can hold."""
    remedy = "Use implementation='xla'."
    if spec.dtype not in _DTYPES:
        return Reason("dtype", spec.dtype, "float16, bfloat16 or float32", remedy)
    if spec.head_dim > MAX_HEAD_DIM:
        return Reason("head_dim", spec.head_dim, "at most {}".format(MAX_HEAD_DIM), remedy)
    if max(spec.batch, spec.heads) > MOST_PROGRAMS:
        return Reason("batch", spec.batch, "at most {}, as the heads".format(MOST_PROGRAMS), remedy)
    if backend() not in PLATFORMS + ("cpu",):
        return Reason("backend", backend(), "a GPU, or a CPU that interprets it", remedy)
    if max(shared_bytes(spec, tiles_of(spec, way), way) for way in DIRECTIONS) > shared_limit():
        need = "a tile that fits {} bytes of shared memory".format(shared_limit())
        return Reason("tile", spec.tile, need, "Ask for a smaller one, or none.")
    return None


ENGINE = Engine(
    "pallas",
    run,
    supports,
    note="our GPU kernels (Pallas, Triton): tested and measured on an H200; interpreted on the CPU",
    pays=lambda spec: spec.dtype != "float32",  # no tensor cores: measured at half the speed of xla, and less
    layouts=("BNSD", "BSND"),
)
