"""Engine 'jax': the JAX twin's blockwise engine inside a MindSpore graph on the CPU.

The one file where MindSpore and JAX meet. JAX is imported when the engine is first used, and compiles each spec at its
first call.
"""

import importlib.util
import sys

import mindspore as ms

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.ops.hosted import hosted_engine

_REMEDY = "Use engine='portable'."


def supports(spec):
    """None where JAX can serve ``spec`` on this computer, else the :class:`Reason`."""
    if sys.version_info < (3, 10):
        return Reason("engine", "Python {}.{}".format(*sys.version_info[:2]), "used with Python >= 3.10", _REMEDY)
    if importlib.util.find_spec("jax") is None:
        return Reason("engine", "no Python package 'jax'", "used where JAX is installed", _REMEDY)
    if ms.get_context("device_target") != "CPU":
        return Reason("engine", ms.get_context("device_target"), "used on the CPU", _REMEDY)
    if spec.batch < 0:
        return Reason("batch", "a dynamic size", "known when the graph is compiled", _REMEDY)
    from flash_attention.jax.engines import xla

    reason = xla.supports(spec)
    return reason and Reason(reason.argument, reason.value, reason.need, "Cast the inputs to float32.")


def pays(spec):
    """True for long sequences, by `bench ms-small ms-dense ms-windows` (CPU class A, MindSpore 2.10, jax 0.6.2).

    Below 4,096 tokens 'portable' takes 0.4 to 1.15 of this engine's time, from there on 0.55 to 1.25, gradients the
    upper half; but there its graph compiles for 5 to 60 s where this one takes 3.
    """
    return spec.q_len * spec.kv_len >= 4096**2


def _forward(*args):
    from flash_attention.jax.engines import parallel

    return parallel.forward_pass(*args)


def _backward(*args):
    from flash_attention.jax.engines import parallel

    return parallel.backward_pass(*args)


ENGINE = Engine(
    "jax",
    hosted_engine(_forward, _backward),
    supports,
    order=30,
    note="the JAX twin's engine on the CPU, through ops.Custom; `auto` takes it from 4,096 tokens on",
    pays=pays,
)
