"""Mechanisms of the registry as the tests see them: one value for every argument, and a conformance adapter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support import mechanism_arguments
from support.jax_engines import JaxEngine
from support.mechanism_arguments import B, D, K, N, T  # noqa: F401

from flash_attention.jax import AttentionMetadata, AttentionRegistry


@functools.lru_cache(maxsize=None)
def one_device():
    """Metadata of a mesh of one device, with small tiles so that several are visited."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("dp", "fsdp", "tp", "sp"))
    return AttentionMetadata(mesh=mesh, blocksize_q=16, blocksize_k=8)


def draws(kv_len=T):
    """query (B, T, N, D), key, value (B, kv_len, K, D), float32."""
    return tuple(map(jnp.asarray, mechanism_arguments.draws(kv_len)))


def examples():
    """{argument of a mechanism: keywords that set it to something that changes the result}."""

    def to_jax(x):
        return jnp.asarray(x) if isinstance(x, (np.ndarray, np.generic)) else x

    found = mechanism_arguments.examples()
    return {name: {key: to_jax(x) for key, x in arguments.items()} for name, arguments in found.items()}


class Mechanism(JaxEngine):
    """A mechanism in the conformance suite: it gives what an engine gives, less the LSE."""

    def attend(self, query, key, value, layout="BSND", **arguments):
        swap = (lambda x: jnp.swapaxes(x, 1, 2)) if layout == "BNSD" else (lambda x: x)
        impl = AttentionRegistry.create(self.name, one_device())
        out = impl(*map(swap, (query, key, value)), **arguments).attention_outputs
        return swap(out), jnp.zeros((out.shape[0], out.shape[2], out.shape[1]), jnp.float32)

    def run(self, case):
        results = super().run(case)
        del results["lse"]
        return results
