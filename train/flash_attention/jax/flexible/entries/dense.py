"""Dense mechanisms: 'vanilla' and 'sharded_vanilla', which form the weights, and 'sdpa', which does not."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flash_attention.core import reference
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
