"""Dense mechanisms: 'vanilla' and 'sharded_vanilla', which form the weights; 'sdpa' and 'cudnn', which do not."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flash_attention.core import reference
from flash_attention.core.errors import Reason
from flash_attention.jax.engines.reference import NAMESPACE
from flash_attention.jax.flexible.output import AttentionOutput
from flash_attention.jax.flexible.partition import TRAIN
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry, output_of
from flash_attention.jax.functional import call_of, flash_attention, prepare


@AttentionRegistry.register
class Vanilla(AttentionImpl):
    """The plain formula, O(T * S) memory; the weights come with the output."""

    names = "vanilla"

    def forward_native(self, query, key, value, **arguments):
        spec, operands = prepare(self.get_impl_name(), query, key, value, *call_of(**arguments))
        return _formula(spec, query, key, value, operands)


@functools.partial(jax.jit, static_argnums=0)
def _formula(spec, query, key, value, operands):
    wide = jnp.promote_types(query.dtype, jnp.float32)
    tensors = (jnp.swapaxes(x, 1, 2).astype(wide) for x in (query, key, value))
    result = reference.forward(NAMESPACE, spec, *tensors, operands)
    out = jnp.swapaxes(result.out, 1, 2).astype(query.dtype)
    return AttentionOutput(result.dropped.astype(query.dtype), out)


@AttentionRegistry.register
class ShardedVanilla(Vanilla):
    """'vanilla' with the layout of query, key, value and output pinned to the mesh; XLA places the communication."""

    names = "sharded_vanilla"

    def forward_native(self, query, key, value, *, mode=TRAIN, **arguments):
        metadata = self.metadata
        # The heads of key and value are sharded where they divide the axis; else XLA would replicate queries too.
        specs = metadata.get_shardings(mode, qkv_mni_sharding=True)

        def pinned(x, spec):
            spec = self.create_stable_sharding(spec, tensor=x)
            return jax.lax.with_sharding_constraint(x, NamedSharding(metadata.mesh, spec))

        if metadata.mesh is not None:
            query, key, value = (pinned(x, spec) for x, spec in zip((query, key, value), specs))
        result = super().forward_native(query, key, value, **arguments)
        if metadata.mesh is None:
            return result
        return result.replace(attention_outputs=pinned(result.attention_outputs, specs[5]))


@AttentionRegistry.register
class Sdpa(AttentionImpl):
    """The engine that ``flash_attention`` itself chooses for the call."""

    names = "sdpa"

    def forward_native(self, query, key, value, **arguments):
        return output_of(flash_attention(query, key, value, **arguments))


@AttentionRegistry.register
class Cudnn(AttentionImpl):
    """cuDNN's kernel through jax.nn, on NVIDIA GPUs, for the calls that it computes as this package defines them.

    Not run on a device here. Masks are refused because a row that sees no key would become the mean of the values.
    """

    names = "cudnn"

    def forward_native(self, query, key, value, *, is_causal=False, scale=None, local_window_size=None):
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            scale=scale,
            local_window_size=local_window_size,
            implementation="cudnn",
        )
        return output_of(out)

    def supports(self, query, key, value, arguments):
        backend, remedy = self.current_backend(), "Use 'flash_attn2'."
        if backend not in ("cuda", "gpu"):
            return Reason("backend", backend, "an NVIDIA GPU", remedy)
        dtype = jnp.dtype(self.metadata.runtime_dtype or query.dtype).name
        if dtype not in ("float16", "bfloat16"):
            return Reason("dtype", dtype, "float16 or bfloat16", remedy)
        if query.shape[-1] % 8 or query.shape[-1] > 128:
            return Reason("head_dim", query.shape[-1], "a multiple of 8 up to 128", remedy)
        if "is_causal" in arguments and query.shape[1] != key.shape[1]:
            lengths = "{} and {}".format(query.shape[1], key.shape[1])
            return Reason("sequence length", lengths, "equal for queries and keys when causal", remedy)
        return None
