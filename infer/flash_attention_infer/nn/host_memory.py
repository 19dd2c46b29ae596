"""A cache's pools under numpy: how PyNative writes and reads them on the CPU, where a Parameter lies in host memory.

MindSpore's scatter copies the whole pool there at every write (3.7 ms for 31 MB, a token's write itself takes 0.01 ms)
and cannot copy more than 2 GiB; its gather copies a pool that was reshaped. ``Parameter.asnumpy`` copies nothing, waits
for the operators that are still queued, and what is written through it is seen by later operators and graphs.
"""

import functools

import numpy as np
from mindspore import Parameter, Tensor
from mindspore.ops.primitive import constexpr

from flash_attention.ops.functional import on_cpu


@constexpr(check=False)
def in_host_memory():
    """True where this module may be used (from PyNative; a graph has no numpy)."""
    return on_cpu() and _asnumpy_shares()


@functools.lru_cache(maxsize=None)
def _asnumpy_shares():
    """Asked of MindSpore itself: on a version whose ``asnumpy`` copies, every write would be lost."""
    pool = Parameter(Tensor(np.zeros(2, np.float32)), name="probe", requires_grad=False)
    pool.asnumpy()[1] = 1
    return float((pool + 0.0).asnumpy()[1]) == 1


@constexpr(check=False)
def write(pools, slots, tokens):
    """Put ``tokens``, one Tensor (B, T, ...) a pool, at ``slots`` (B, T) of the pools; slot -1 is not written."""
    slots = slots.asnumpy().reshape(-1)
    there = slots >= 0
    places = slots[there]
    for pool, new in zip(pools, tokens):
        held = pool.asnumpy()
        rows = held.reshape((-1,) + held.shape[2:])
        rows[places] = new.asnumpy().reshape((-1,) + rows.shape[1:])[there]


@constexpr(check=False)
def view(pool, shape):
    """The pool in another shape, over the same memory."""
    return Tensor.from_numpy(pool.asnumpy().reshape(shape))


@constexpr(check=False)
def copy_blocks(pools, pairs):
    """Copy blocks from ``pairs[:, 0]`` to ``pairs[:, 1]``."""
    source, target = pairs.asnumpy().T
    for pool in pools:
        held = pool.asnumpy()
        held[target] = held[source]
