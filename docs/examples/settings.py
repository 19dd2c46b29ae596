"""Sizes of the model and of its training, and the weights it starts from: shared by both frameworks.

First file to read. train_llm_mindspore.py -> training.py -> model_mindspore.py or model_jax.py, all with one Settings.
"""

import dataclasses
import math

import numpy as np

NO_LIMIT = 65536  # what FlashAttention takes as "no window"


class Schedule:
    """What settings with ``steps``, ``warm_up`` and ``learning_rate`` give an optimizer."""

    def learning_rates(self):
        """Learning rate of each step: linear warm-up, then half a cosine down to a tenth."""
        rates = []
        for step in range(self.steps):
            if step < self.warm_up:
                share = (step + 1) / self.warm_up
            else:
                done = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
                share = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
            rates.append(self.learning_rate * share)
        return rates


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """The model that `bash build.sh demo` trains: 7 million weights, bytes as tokens."""

    vocabulary: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 1024
    length: int = 1024
    block_size: int = 128
    prev_blocks: int = 2  # of every second layer: a query sees its own block and two before it
    batch: int = 1
    steps: int = 58
    warm_up: int = 10
    learning_rate: float = 1.5e-3
    held_out_windows: int = 16
    sample_bytes: int = 128  # with the prompt 256: block tables of one width, so that decoding compiles once
    seed: int = 20
    loss_bound: float = 2.9  # nats a byte, on held-out text

    @property
    def hidden(self):
        return self.heads * self.head_dim

    def prev_block_num(self, layer):
        """The window of a layer in blocks: narrow in layers 0, 2, ..., the whole past in layers 1, 3, ..."""
        return self.prev_blocks if layer % 2 == 0 else NO_LIMIT


def tiny(**changes):
    """Settings of the same model so small that a training takes seconds; the text hardly becomes readable."""
    small = dict(
        layers=2, heads=4, head_dim=16, feed_forward=96, length=96, block_size=16, prev_blocks=1, steps=12, warm_up=4,
        held_out_windows=4, sample_bytes=16, loss_bound=5.3,
    )  # fmt: skip
    small.update(changes)
    return Settings(**small)


def weight_shapes(settings):
    """{name: shape}; the names are those MindSpore gives the parameters, matrices are (out, in) as in nn.Dense."""
    hidden, kv_width = settings.hidden, settings.kv_heads * settings.head_dim
    shapes = {"embedding.embedding_table": (settings.vocabulary, hidden)}
    for layer in range(settings.layers):
        prefix = "blocks.{}.".format(layer)
        shapes[prefix + "attention_norm.weight"] = (hidden,)
        shapes[prefix + "query.weight"] = (hidden, hidden)
        shapes[prefix + "key.weight"] = (kv_width, hidden)
        shapes[prefix + "value.weight"] = (kv_width, hidden)
        shapes[prefix + "output.weight"] = (hidden, hidden)
        shapes[prefix + "feed_forward_norm.weight"] = (hidden,)
        shapes[prefix + "up.weight"] = (settings.feed_forward, hidden)
        shapes[prefix + "down.weight"] = (hidden, settings.feed_forward)
    shapes["norm.weight"] = (hidden,)
    shapes["head.weight"] = (settings.vocabulary, hidden)
    return shapes


def initial_weights(settings):
    """{name: float32 array}: ones for norms; embeddings of variance 1, so that bytes stay apart in the first steps;
    normal with variance 1 / inputs elsewhere, smaller where a layer adds to the residual stream."""
    generator = np.random.default_rng(settings.seed)
    weights = {}
    for name, shape in weight_shapes(settings).items():
        spread = 1.0 if name.startswith("embedding") else shape[-1] ** -0.5
        if name.endswith(("output.weight", "down.weight")):
            spread /= math.sqrt(2 * settings.layers)
        if name.startswith("head"):
            spread /= 10  # the first guess is nearly uniform
        normal = generator.standard_normal(shape)
        weights[name] = (np.ones(shape) if len(shape) == 1 else spread * normal).astype(np.float32)
    return weights
