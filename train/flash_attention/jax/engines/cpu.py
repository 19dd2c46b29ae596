"""What this computer's CPU can do, read once; the `xla` engine chooses its dot products by it."""

import functools
import re

import jax
import jax.numpy as jnp


@functools.lru_cache(maxsize=None)
def features():
    """Instruction-set flags of the CPU (lower case, as Linux spells them); empty where they cannot be read."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            found = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found.group(1).lower().split()) if found else frozenset()


def on_cpu():
    """True when JAX computes on the CPU unless told otherwise."""
    return jax.default_backend() == "cpu"


def named_dtype(name):
    """The dtype called ``name``. Not ``numpy.dtype(name)``: MindSpore gives "bfloat16" there to a type of its own."""
    return jnp.dtype(getattr(jnp, name, name))


def dot_dtype(dtype, rows):
    """The dtype in which products of ``dtype`` operands, ``rows`` at a time, are formed (always summed in float32).

    Accelerators multiply what they are given. On a CPU float16 has no fast product anywhere, and bfloat16 has one only
    with AVX-512 BF16 or AMX: without them XLA emulates it at half the speed of converting the tiles to float32
    (measured: 98-107 against 150-176 GFLOP/s with AVX2 only, 270 against 128-140 with AVX-512 BF16). Products of few
    rows are bound by memory, and converting wins there too (decoding: 0.8 of the time).
    """
    if not on_cpu():
        return dtype
    native = features() & {"avx512_bf16", "amx_bf16"}
    return dtype if dtype.name == "bfloat16" and native and rows >= 64 else named_dtype("float32")
