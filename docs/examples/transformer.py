"""A character model from the transformer wrappers in JAX or MindSpore: trains on Python's help pages, then writes.

    python docs/examples/transformer.py [--framework mindspore] [--steps 60]

Both frameworks start from the same weights, see the same batches, and sample with the same seed.
"""

import argparse

import numpy as np
import text

STACK = {
    "dim": 128, "depth": 4, "heads": 4, "attn_dim_head": 32, "rotary_pos_emb": True, "attn_kv_heads": 2,
    "attn_qk_norm": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True,
}  # fmt: skip
MODEL = {"num_tokens": 256, "max_seq_len": 256, "tie_embedding": True}
BATCH, LENGTH, RATE, SEED = 4, 128, 3e-3, 7
PROMPT = "The "


def make_jax():
    """The model, its parameters new."""
    from flash_attention.jax import AutoregressiveWrapper, Decoder, TransformerWrapper

    return AutoregressiveWrapper(TransformerWrapper(attn_layers=Decoder(**STACK), **MODEL))


def make_mindspore(weights=None):
    """The model; with ``weights``, the JAX model's parameters, it starts from them."""
    from flash_attention.nn import AutoregressiveWrapper, Decoder, TransformerWrapper, load_weights

    model = AutoregressiveWrapper(TransformerWrapper(attn_layers=Decoder(**STACK), **MODEL))
    if weights is not None:
        load_weights(model, weights)
    return model


def train_jax(model, batches):
    """Losses in nats a byte; the parameters of the model change."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def step(params, moments, count, tokens):
        loss, grads = jax.value_and_grad(lambda params: model(tokens, params=params))(params)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, moments[1], grads)
        rate = RATE * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
        params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second)
        return loss, params, (first, second)

    moments = tuple(jax.tree.map(jnp.zeros_like, model.params) for _ in range(2))
    losses = []
    for count, tokens in enumerate(batches, 1):
        loss, model.params, moments = step(model.params, moments, float(count), tokens)
        losses.append(float(loss))
    return losses


def train_mindspore(model, batches):
    """Losses in nats a byte; the parameters of the model change."""
    from mindspore import Tensor, nn

    optimiser = nn.Adam(model.trainable_params(), RATE, 0.9, 0.99)
    step = nn.TrainOneStepCell(model, optimiser).set_train()
    return [float(step(Tensor(tokens)).asnumpy()) for tokens in batches]


def write(model, framework, count=120):
    """The prompt, and ``count`` bytes after it."""
    prompt = text.encode(PROMPT).astype(np.int32)[None]
    options = {"temperature": 0.7, "top_k": 20, "seed": SEED}
    if framework == "jax":
        tokens = np.asarray(model.generate(prompt, count, **options))
    else:
        from mindspore import Tensor

        tokens = model.generate(Tensor(prompt), count, **options).asnumpy()
    return PROMPT + text.decode(tokens[0])


def batches_of(steps):
    """`steps` batches of LENGTH + 1 bytes, int32."""
    training, _ = text.corpus()
    for tokens, following in text.batches(training, BATCH, LENGTH, steps, SEED):
        yield np.concatenate([tokens, following[:, -1:]], 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=("jax", "mindspore"), default="jax")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    model = make_jax() if args.framework == "jax" else make_mindspore()
    train = train_jax if args.framework == "jax" else train_mindspore
    print(model)
    print(model.explain())
    losses = train(model, batches_of(args.steps))
    print("loss in nats a byte: {:.2f} at first, {:.2f} at the end".format(losses[0], np.mean(losses[-5:])))
    print(write(model, args.framework))


if __name__ == "__main__":
    main()
