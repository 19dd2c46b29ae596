"""Conformance adapter of the JAX engines: a case through `flash_attention.jax.flash_attention`."""

import contextlib
import functools
import threading
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from conformance import DIFFERENTIABLE, make_inputs
from flash_attention.jax import ENGINES, flash_attention


def to_layout(x, layout):
    """A BNSD array in `layout`."""
    return x if layout == "BNSD" else x.swapaxes(1, 2)


def heads_of(case, inputs):
    """[query, key, value, d_out] of a case in its layout and dtype.

    The dtype by JAX's own name: where MindSpore was imported after JAX, numpy's "bfloat16" is MindSpore's.
    """
    return [to_layout(jnp.asarray(x, getattr(jnp, case.dtype)), case.layout) for x in inputs[1:5]]


def in_float64():
    """A context in which JAX computes in float64; newer versions spell it otherwise."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


@contextlib.contextmanager
def compiled_fast():
    """For many small programs that are run once each: XLA optimises little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def interpreted_fast():
    """For Pallas' interpreters of threads: they compile a kernel once, not anew for each thread of each block."""
    from jax._src.pallas.mosaic.interpret import thread_map

    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in compiled:  # which is kept, so that no other gets its id
                traced = jax.jit(lambda *x: jax.core.eval_jaxpr(jaxpr, *x) and None).trace(consts, *args)
                compiled[id(jaxpr)] = jaxpr, traced.lower().compile()
        compiled[id(jaxpr)][1](consts, *args)

    with mock.patch.object(thread_map, "_run_jaxpr", run, create=True), compiled_fast():
        yield


class Functions:
    """XLA's own functions on numpy arrays, for the naive implementation: its tanh and exp are off by several units."""

    @staticmethod
    def exp(x):
        return np.asarray(jnp.exp(jnp.asarray(x, jnp.float32)))

    @staticmethod
    def log(x):
        return np.asarray(jnp.log(jnp.asarray(x, jnp.float32)))

    @staticmethod
    def tanh(x):
        return np.asarray(jnp.tanh(jnp.asarray(x, jnp.float32)))


class _WithProducts(Functions):
    @staticmethod
    def matmul(a, b):
        return np.asarray(jnp.matmul(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), precision="highest"))


Functions.with_products = _WithProducts


def forward_and_backward(layout, **options):
    """``run(q, k, v, d_out) -> (out, lse, dq, dk, dv)`` of one compiled call in ``layout``, BNSD outside of it."""

    def attend(*qkv):
        qkv = (to_layout(x, layout) for x in qkv)
        out, lse = flash_attention(*qkv, layout=layout, return_lse=True, **options)
        return to_layout(out, layout), lse

    @jax.jit
    def run(q, k, v, d_out):
        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return (out, lse) + pullback((d_out, jnp.ones_like(lse)))

    return run


class JaxEngine:
    """An engine of the JAX front end; `run(case)` gives numpy results by name, BNSD."""

    functions = Functions

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name

    def supports(self, spec):
        return ENGINES[self.name].supports(spec)

    def attend(self, query, key, value, **arguments):
        """(out, lse) of one call."""
        return flash_attention(query, key, value, return_lse=True, implementation=self.name, **arguments)

    def run(self, case):
        inputs = make_inputs(case)
        q, k, v, d_out = heads_of(case, inputs)
        tensors = {name: x if isinstance(x, int) else jnp.asarray(x) for name, x in inputs.tensors.items()}
        wanted = {name: tensors.pop(name) for name in DIFFERENTIABLE if name in tensors}
        constant = {name: tensors.pop(name) for name in list(tensors) if isinstance(tensors[name], int)}

        both = _compiled(self, replace(case, draw=0), tuple(sorted(constant.items())))
        (out, lse), grads = both(q, k, v, wanted, tensors, (d_out, jnp.asarray(inputs.d_lse)))
        assert out.dtype == q.dtype and lse.dtype == jnp.float32
        results = {"out": _numpy(to_layout(out, case.layout)), "lse": np.asarray(lse)}
        if grads:
            for name, x, grad in zip(("query", "key", "value"), (q, k, v), grads):
                assert grad.dtype == x.dtype
                results[name] = _numpy(to_layout(grad, case.layout))
            for name, grad in grads[3].items():
                results[DIFFERENTIABLE[name]] = _as_reference(grad, DIFFERENTIABLE[name], inputs)
        return results


@functools.lru_cache(maxsize=1)  # the draws of one case come one after the other
def _compiled(engine, case, constant):
    """``((out, lse), gradients or None)`` of a call, compiled once for all draws of its case."""

    def attend(query, key, value, wanted, tensors):
        return engine.attend(query, key, value, **wanted, **tensors, **dict(constant), **case.options)

    @jax.jit
    def both(q, k, v, wanted, tensors, cotangents):
        if not case.gradients:
            return attend(q, k, v, wanted, tensors), None
        results, pullback = jax.vjp(functools.partial(attend, tensors=tensors), q, k, v, wanted)
        return results, pullback(cotangents)

    return both


def _numpy(x):
    return np.asarray(x.astype(jnp.float32))


def _as_reference(grad, name, inputs):
    """In the shape in which the reference gives it."""
    return _numpy(grad).reshape(np.shape(getattr(inputs.operands, name)))
