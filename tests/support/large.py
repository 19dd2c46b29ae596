"""One large call in a process of its own: prints JSON with the peak memory (bytes) and whether results are finite.

python large.py jax|mindspore documented|long [S]
"""

import json
import sys

import numpy as np


def documented():
    """The call of the published documentation: (2, 16, 4096, 128), window 7 and 0, dropout 0.1, compact mask."""
    shape = (2, 16, 4096, 128)
    options = {"head_dim": 128, "dropout_rate": 0.1, "prev_block_num": 7, "next_block_num": 0}
    return shape, np.float16, options, np.triu(np.ones((128, 128), np.float16), 1)


def long(length):
    """One head of `length` tokens, 8 blocks of 128 to each side."""
    return (1, 1, length, 64), np.float32, {"head_dim": 64, "prev_block_num": 8, "next_block_num": 8}, None


def run_jax(arrays, options, mask):
    """Forward and backward through the JAX class."""
    import jax
    import jax.numpy as jnp

    from flash_attention.jax import FlashAttention

    layer = FlashAttention(**options)
    mask = None if mask is None else jnp.asarray(mask)

    def loss(q, k, v):
        return layer(q, k, v, mask, deterministic=False, dropout_seed=1).astype(jnp.float32).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*map(jnp.asarray, arrays))
    return [np.asarray(grad[:, :, ::97]) for grad in grads]


def run_mindspore(arrays, options, mask):
    """Forward and backward through the Cell, as a graph."""
    import mindspore as ms
    from mindspore import Tensor, ops

    from flash_attention.nn.layer.flash_attention import FlashAttention

    ms.set_context(mode=ms.GRAPH_MODE)
    cell = FlashAttention(engine=options.pop("engine", None), **options)
    cell.set_train()
    inputs = [Tensor(x) for x in arrays] + ([] if mask is None else [Tensor(mask)])

    def loss(q, k, v, *mask):
        return cell(q, k, v, *mask).astype(ms.float32).sum()

    grads = ops.grad(loss, (0, 1, 2))(*inputs)
    return [grad[:, :, ::97].asnumpy() for grad in grads]


def peak():
    """High-water mark of this process's resident memory, bytes."""
    with open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def main(framework, what, *numbers):
    shape, dtype, options, mask = {"documented": documented, "long": long}[what](*map(int, numbers))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3)]
    engine = framework.partition(":")[2]
    if engine:
        options["engine"] = engine
    run = run_jax if framework.startswith("jax") else run_mindspore
    grads = run(arrays, options, mask)
    finite = all(np.isfinite(grad).all() and grad.any() for grad in grads)
    print(json.dumps({"peak": peak(), "finite": bool(finite)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
