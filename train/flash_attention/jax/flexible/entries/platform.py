"""'cudnn' and 'splash': the engines that one platform's libraries bring, refused elsewhere with what will run."""

from dataclasses import replace

import jax.numpy as jnp

from flash_attention.core.errors import Reason
from flash_attention.jax.engines import cudnn, splash
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry, output_of
from flash_attention.jax.functional import attend, call_of, prepare


class PlatformEngine(AttentionImpl):
    """Attention by one engine, on its own platform only. Not run on a device here.

    Attributes:
        engine: the engine's module: ``ENGINE``, and ``constraints(spec)``, why no device can compute a call.
        backends: where it runs; device: the same in words.
    """

    engine = None
    backends = ()
    device = ""

    def forward_native(self, query, key, value, **arguments):
        name = self.engine.ENGINE.name
        return output_of(attend(self.get_impl_name(), query, key, value, *call_of(**arguments), name)[0])

    def supports(self, query, key, value, arguments):
        """Raises only for an argument that the call itself would raise for."""
        backend, remedy = self.current_backend(), "Use 'flash_attn2'."
        if backend not in self.backends:
            return Reason("backend", backend, self.device, remedy)
        spec, _ = prepare(self.get_impl_name(), query, key, value, *call_of(**arguments))
        if self.metadata.runtime_dtype is not None:
            spec = replace(spec, dtype=jnp.dtype(self.metadata.runtime_dtype).name)
        reason = self.engine.constraints(spec)
        return None if reason is None else replace(reason, remedy=remedy)


@AttentionRegistry.register
class Cudnn(PlatformEngine):
    """cuDNN's kernel through jax.nn, for the calls that it computes as this package defines them."""

    names = "cudnn"
    engine, backends, device = cudnn, ("cuda", "gpu"), "an NVIDIA GPU"


@AttentionRegistry.register
class Splash(PlatformEngine):
    """JAX's splash attention, with masks made from our plan, for the calls that it computes as this package defines."""

    names = "splash"
    engine, backends, device = splash, ("tpu",), "a TPU"
