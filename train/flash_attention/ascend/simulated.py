"""The kernels as numpy functions: built once a spec and run on the TIK simulator. Needs neither MindSpore nor CANN."""

import functools
import threading

import numpy as np

from flash_attention.ascend import host
from flash_attention.ascend.backward import build_backward
from flash_attention.ascend.backward_arguments import divided_cotangents, pack_backward, unpack_backward
from flash_attention.ascend.chips import ASCEND_910A
from flash_attention.ascend.forward import build_forward
from flash_attention.ascend.geometry import Geometry
from flash_attention.ascend.limits import supports
from flash_attention.ascend.preprocess import build_preprocess
from flash_attention.ascend.preprocess_arguments import pack_preprocess
from flash_attention.ascend.simulator import Toolkit
from flash_attention.ascend.tiles import choose_tiles
from flash_attention.core.spec import Operands

_ONE_AT_A_TIME = threading.Lock()


def forward(spec, query, key, value, operands=Operands(), tiles=None, chip=ASCEND_910A):
    """``(out, lse)`` of the forward kernel.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec` in float16.
        query, key, value: float16 arrays (B, N, Sq, D), (B, Nkv, Sk, D), (B, Nkv, Sk, D).
        operands: :class:`~flash_attention.core.spec.Operands` of arrays, mask as keep mask.
        tiles: :class:`~flash_attention.ascend.geometry.KernelTiles`; None = what the kernel would take on a device.
        chip: :class:`~flash_attention.ascend.chips.Chip`.

    Returns:
        out float16 (B, N, Sq, D), lse float32 (B, N, Sq).

    Raises:
        UnsupportedError: the kernels do not take ``spec``.
    """
    reason = supports(spec)
    if reason is not None:
        raise reason.error(engine="simulator")
    geometry = Geometry(spec, tiles or choose_tiles(spec, "forward", chip))
    kernel = _forward_kernel(geometry, chip)
    return run_forward(kernel, geometry, chip.cores, query, key, value, operands)


def run_forward(kernel, geometry, cores, query, key, value, operands):
    """Run a kernel that was built for ``geometry`` and ``cores``; arguments and result as in :func:`forward`."""
    tensors = [np.asarray(x) for x in (query, key, value)]
    feed = host.pack_forward(geometry, cores, *tensors, operands)
    return host.unpack_forward(geometry, _run(kernel, feed))


def backward(spec, saved, cotangents, tiles=None, chip=ASCEND_910A):
    """Gradients of query, key, value, bias, slopes and sinks, in the dtypes of these; None for an absent operand.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec` in float16.
        saved: ``(query, key, value, operands, out, lse)``: what :func:`forward` took and returned.
        cotangents: ``(d_out, d_lse)``, float16 (B, N, Sq, D) and float32 (B, N, Sq).
        tiles, chip: as for :func:`forward`.

    Raises:
        UnsupportedError: the kernels do not take ``spec``.
    """
    reason = supports(spec)
    if reason is not None:
        raise reason.error(engine="simulator")
    geometry = Geometry(spec, tiles or choose_tiles(spec, "backward", chip))
    kernels = _preprocess_kernel(geometry, chip), _backward_kernel(geometry, chip)
    return run_backward(kernels, geometry, chip.cores, saved, cotangents)


def run_backward(kernels, geometry, cores, saved, cotangents):
    """Run kernels that were built for ``geometry`` and ``cores``, the one in front first.

    Args:
        kernels: TIK instances of ``build_preprocess`` and ``build_backward``.
        geometry, cores: what they were built for.
        saved, cotangents: as for :func:`backward`, and so is the result.
    """
    query, key, value, operands, out, lse = saved
    query, key, value, out, lse, d_out, d_lse = map(np.asarray, (query, key, value, out, lse) + cotangents)
    d_out, d_lse, power = divided_cotangents(geometry.spec, value, lse, d_out, d_lse)
    prepared = _run(kernels[0], pack_preprocess(geometry, cores, out, lse, d_out, d_lse))
    feed = pack_backward(geometry, cores, query, key, value, operands, d_out, prepared, power)
    grads = unpack_backward(geometry, _run(kernels[1], feed), feed["factors"])
    if "bias" in grads:
        grads["bias"] = grads["bias"].astype(operands.bias.dtype)
    return tuple(grads.get(name) for name in ("query", "key", "value", "bias", "slopes", "sinks"))


def _run(kernel, feed):
    """A kernel keeps its machine, and a compiled graph calls from threads of its own."""
    with _ONE_AT_A_TIME:
        return host.run(kernel, feed)


@functools.lru_cache(maxsize=64)
def _preprocess_kernel(geometry, chip):
    return build_preprocess(Toolkit(soc=chip.soc).tik, geometry, chip.cores)


@functools.lru_cache(maxsize=64)
def _backward_kernel(geometry, chip):
    return build_backward(Toolkit(soc=chip.soc).tik, geometry, chip.cores)


@functools.lru_cache(maxsize=64)
def _forward_kernel(geometry, chip):
    return build_forward(Toolkit(soc=chip.soc).tik, geometry, chip.cores)
