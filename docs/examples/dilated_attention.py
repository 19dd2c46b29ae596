"""LongNet's published calls in JAX and MindSpore, and a small classification transformer that learns.

    python docs/examples/dilated_attention.py [--steps 30] [--framework mindspore]

The task of the classifier: which of four symbols occurs most often in a sequence of 200.
"""

import argparse

import numpy as np

CALLS = (
    ((16, 1000, 512), {"dim": 512, "heads": 8, "dilation_rate": 4, "segment_size": 64}, "float32"),
    ((16, 32, 512), {"d_model": 512, "num_heads": 8, "dilation_rate": 2, "segment_size": 16}, "float32"),
    (
        (16, 128, 512),
        {"dim": 512, "heads": 8, "dilation_rate": 4, "segment_size": 64, "casual": True, "use_xpos": True,
         "use_rel_pos_bias": True},
        "float16",
    ),
)  # fmt: skip
SYMBOLS, LENGTH, WIDTH, HEADS, BATCH = 4, 200, 64, 4, 32
PATTERNS = {"dilation_rate": (1, 2, 4), "segment_size": (32, 64, 200)}


def published_calls(framework):
    """`[(shape, dtype) of each output]`."""
    found = []
    for shape, options, dtype in CALLS:
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        if framework == "jax":
            import jax.numpy as jnp

            from flash_attention.jax import DilatedAttention

            out = DilatedAttention(dtype=getattr(jnp, dtype), **options)(jnp.asarray(x))
        else:
            import mindspore as ms

            from flash_attention.nn import DilatedAttention

            out = DilatedAttention(dtype=getattr(ms, dtype), **options)(ms.Tensor(x))
        found.append((tuple(out.shape), str(out.dtype).lower()))
    return found


def batches(steps, seed=0):
    """`(tokens int32 (B, N), the most frequent one int32 (B,))` for each step."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        weights = rng.dirichlet(np.ones(SYMBOLS), BATCH)
        tokens = np.stack([rng.choice(SYMBOLS, LENGTH, p=p) for p in weights]).astype(np.int32)
        counts = np.stack([(tokens == symbol).sum(1) for symbol in range(SYMBOLS)], 1)
        yield tokens, counts.argmax(1).astype(np.int32)


def train_mindspore(steps):
    """Losses of a two-block transformer classifier."""
    import mindspore as ms
    from mindspore import nn

    from flash_attention.nn import DilatedAttention

    class Block(nn.Cell):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm((WIDTH,)), nn.LayerNorm((WIDTH,))
            self.attention = DilatedAttention(WIDTH, HEADS, **PATTERNS)
            self.ffn = nn.SequentialCell(nn.Dense(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Dense(2 * WIDTH, WIDTH))

        def construct(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.ffn(self.norm2(x))

    class Classifier(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(SYMBOLS, WIDTH)
            self.blocks = nn.SequentialCell(Block(), Block())
            self.head = nn.Dense(WIDTH, SYMBOLS)

        def construct(self, tokens):
            return self.head(self.blocks(self.embedding(tokens)).mean(1))

    ms.set_seed(1)
    model = Classifier()
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
    step = nn.TrainOneStepCell(nn.WithLossCell(model, loss), nn.Adam(model.trainable_params(), 3e-3)).set_train()
    return [float(step(ms.Tensor(x), ms.Tensor(y)).asnumpy()) for x, y in batches(steps)]


def train_jax(steps):
    """The same in JAX, with plain gradient descent written out."""
    import jax
    import jax.numpy as jnp

    from flash_attention.jax import DilatedAttention

    layers = [DilatedAttention(WIDTH, HEADS, **PATTERNS) for _ in range(2)]
    keys = jax.random.split(jax.random.PRNGKey(1), 8)

    def weight(key, *shape):
        return jax.random.normal(key, shape) / np.sqrt(shape[0])

    blocks = [
        {"attention": layer.init(keys[n]), "up": weight(keys[2 + n], WIDTH, 2 * WIDTH),
         "down": weight(keys[4 + n], 2 * WIDTH, WIDTH)}
        for n, layer in enumerate(layers)
    ]  # fmt: skip
    params = {"blocks": blocks, "embedding": weight(keys[6], SYMBOLS, WIDTH), "head": weight(keys[7], WIDTH, SYMBOLS)}

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def loss(params, tokens, labels):
        x = params["embedding"][tokens]
        for layer, block in zip(layers, params["blocks"]):
            x = x + layer(norm(x), params=block["attention"])
            x = x + jax.nn.relu(norm(x) @ block["up"]) @ block["down"]
        scores = jax.nn.log_softmax(x.mean(1) @ params["head"])
        return -jnp.take_along_axis(scores, labels[:, None], 1).mean()

    @jax.jit
    def step(params, tokens, labels):
        value, grads = jax.value_and_grad(loss)(params, tokens, labels)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    losses = []
    for tokens, labels in batches(steps):
        params, value = step(params, tokens, labels)
        losses.append(float(value))
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=("jax", "mindspore"), default="jax")
    parser.add_argument("--steps", type=int, default=30, help="training steps of the classifier (default 30)")
    args = parser.parse_args()
    for shape, dtype in published_calls(args.framework):
        print("output", shape, dtype)
    losses = (train_jax if args.framework == "jax" else train_mindspore)(args.steps)
    for number in range(0, len(losses), 5):
        print("step {:3d}  loss {:.3f}".format(number, losses[number]))
    print("last loss {:.3f}, chance {:.3f}".format(losses[-1], np.log(SYMBOLS)))


if __name__ == "__main__":
    main()
