"""Where a call runs, and kernels that one platform compiles and the CPU interprets."""

import functools

import jax
from jax import lax


def backend():
    """'cpu', 'cuda', 'rocm', 'tpu', ...: the platform that JAX computes on unless told otherwise."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def compiled_or_interpreted(platforms, call, *arrays):
    """``call(platform, *arrays)`` for that of ``platforms`` which it is lowered for, or 'cpu', which interprets it.

    The choice is made when the program is lowered, so that a computer without the device can export for it.
    """
    branches = {name: functools.partial(call, name) for name in platforms + ("cpu",)}
    return lax.platform_dependent(*arrays, **branches)
