"""Ring attention over several processes, started by the launcher: each compares its part with one device's result.

python -m flash_attention launch -n N tests/support/processes.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flash_attention.jax import flash_attention
from flash_attention.jax.distributed import attention, initialize, make_mesh
from flash_attention.tools.launch import progress


def main():
    rank, size = initialize()
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == size and jax.process_count() == size
    mesh = make_mesh((1, 1, 1, -1))
    sharding = NamedSharding(mesh, PartitionSpec(None, "sp"))
    rng = np.random.default_rng(0)
    # Chunks of 13 or 26 tokens, which tiles of 8 do not divide; the window crosses the borders of shards.
    arrays = [rng.standard_normal((1, 104, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    spread = [jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for x in arrays]
    cases = {
        "ring": ("ring", {"is_causal": True}),
        "window": ("ring", {"local_window_size": (20, 3)}),
        "ulysses": ("ulysses", {"is_causal": True}),
    }
    for step, (name, (strategy, options)) in enumerate(cases.items()):
        progress(step)

        def loss(attend, *tensors):
            out = attend(*tensors)
            return (out**2).sum(), out

        def run(attend, tensors):
            (_, out), grads = jax.jit(
                jax.value_and_grad(lambda *x: loss(attend, *x), (0, 1, 2), has_aux=True)  # noqa: B023
            )(*tensors)
            return (out, *grads)

        distributed = functools.partial(attention, mesh=mesh, strategy=strategy, tile=(8, 8), **options)
        found = run(distributed, spread)
        want = run(lambda *x: flash_attention(*x, **options), [jnp.asarray(x) for x in arrays])  # noqa: B023
        for x, wanted in zip(found, want):
            for shard in x.addressable_shards:
                np.testing.assert_allclose(shard.data, np.asarray(wanted)[shard.index], atol=2e-5)
        print("{} {} equal".format(name, rank), flush=True)
    progress("done")


if __name__ == "__main__":
    main()
