"""A long axis, one chunk after the other, under JAX's rematerialisation: what the blockwise mechanisms share."""

import jax
import jax.numpy as jnp


def rematerialised(function, policy, prevent_cse):
    """``function`` under ``jax.checkpoint`` with the named policy; as it is when ``policy`` is None."""
    if policy is None:
        return function
    return jax.checkpoint(function, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=prevent_cse)


def over_chunks(body, arrays, size, carry=None):
    """Run ``carry, outs = body(carry, start, chunks)`` over axis 1 of ``arrays``, ``size`` rows at a time.

    A scan, so that compile time and temporary memory do not depend on the length; a ragged last chunk is one more call.

    Args:
        arrays: pytree of arrays (B, N, ...).
        carry: pytree that the body hands on.

    Returns:
        ``(carry, outs)``: the last carry, and the outs (pytree of (B, chunk, ...)) joined along axis 1.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    count, rest = divmod(length, max(size, 1))
    outs = []
    if count:
        starts = jnp.arange(count, dtype=jnp.int32) * size
        parts = jax.tree.map(lambda x: jnp.moveaxis(_folded(x, count, size), 1, 0), arrays)
        carry, out = jax.lax.scan(lambda carry, part: body(carry, *part), carry, (starts, parts))
        outs.append(jax.tree.map(lambda x: _unfolded(jnp.moveaxis(x, 0, 1)), out))
    if rest or not count:
        carry, out = body(carry, jnp.int32(count * size), jax.tree.map(lambda x: x[:, count * size :], arrays))
        outs.append(out)
    return carry, outs[0] if len(outs) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, 1), *outs)


def _folded(x, count, size):
    return x[:, : count * size].reshape(x.shape[:1] + (count, size) + x.shape[2:])


def _unfolded(x):
    return x.reshape(x.shape[:1] + (-1,) + x.shape[3:])
