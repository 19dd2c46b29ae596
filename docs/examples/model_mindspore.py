"""A small decoder-only language model in MindSpore with the FlashAttention Cell: the example to copy from.

Pre-norm blocks, RMSNorm, grouped-query attention with ALiBi (so no position embedding), block windows in every second
layer. `Trainer` is what training.py drives; with attention="naive" the same model takes plain softmax attention.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.spec import AttentionSpec
from flash_attention.nn.layer.flash_attention import FlashAttention
from flash_attention.ops import ENGINES
from flash_attention_infer.nn import CachedAttention, KVCache
from flash_attention_infer.nn.cache import tensors

CACHE_BLOCK = 64  # tokens in a block of the paged cache


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2)) * weight over the last axis."""

    def __init__(self, width):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(width, np.float32)), name="weight")

    def construct(self, x):
        return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + 1e-6) * self.weight


class NaiveAttention(nn.Cell):
    """softmax(q k^T / sqrt(D) + bias) v, with the whole (N, S, S) bias (mask and ALiBi) in memory: the comparison."""

    def __init__(self, settings, prev_block_num):
        super().__init__()
        self.group = settings.heads // settings.kv_heads
        self.scale = settings.head_dim**-0.5
        self.bias = Tensor(naive_bias(settings.heads, settings.length, settings.block_size, prev_block_num))

    def construct(self, query, key, value):
        batch, heads, length, head_dim = query.shape
        key = ops.tile(key.expand_dims(2), (1, 1, self.group, 1, 1)).reshape(batch, heads, length, head_dim)
        value = ops.tile(value.expand_dims(2), (1, 1, self.group, 1, 1)).reshape(batch, heads, length, head_dim)
        scores = ops.matmul(query * self.scale, key.swapaxes(2, 3)) + self.bias[:, :length, :length]
        return ops.matmul(ops.softmax(scores, -1), value)


def naive_bias(heads, length, block_size, prev_block_num):
    """float32 (heads, length, length): ALiBi where a key is visible, -1e9 where it is not."""
    position = np.arange(length)
    distance = position[:, None] - position
    blocks = position[:, None] // block_size - position // block_size
    visible = (distance >= 0) & (blocks <= prev_block_num)
    alibi = -alibi_slopes(heads)[:, None, None] * np.abs(distance)
    return np.where(visible, alibi, -1e9).astype(np.float32)


class Block(nn.Cell):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, settings, attention):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = settings.heads, settings.kv_heads, settings.head_dim
        hidden, kv_width = settings.hidden, settings.kv_heads * settings.head_dim
        self.attention_norm = RMSNorm(hidden)
        self.query = nn.Dense(hidden, hidden, has_bias=False)
        self.key = nn.Dense(hidden, kv_width, has_bias=False)
        self.value = nn.Dense(hidden, kv_width, has_bias=False)
        self.attention = attention
        self.output = nn.Dense(hidden, hidden, has_bias=False)
        self.feed_forward_norm = RMSNorm(hidden)
        self.up = nn.Dense(hidden, settings.feed_forward, has_bias=False)
        self.down = nn.Dense(settings.feed_forward, hidden, has_bias=False)

    def construct(self, x, *step):
        batch, length, hidden = x.shape
        y = self.attention_norm(x)
        query = self.query(y).reshape(batch, length, self.heads, self.head_dim).swapaxes(1, 2)
        key = self.key(y).reshape(batch, length, self.kv_heads, self.head_dim).swapaxes(1, 2)
        value = self.value(y).reshape(batch, length, self.kv_heads, self.head_dim).swapaxes(1, 2)
        y = self.attention(query, key, value, *step)  # (batch, heads, length, head_dim)
        x = x + self.output(y.swapaxes(1, 2).reshape(batch, length, hidden))
        return x + self.down(ops.silu(self.up(self.feed_forward_norm(x))))


class LanguageModel(nn.Cell):
    """Tokens, int32 (batch, length) -> logits of the next token, float32 (batch, length, vocabulary).

    Further inputs go to the attention of each layer: nothing in training, a step of the cache in generation.
    """

    def __init__(self, settings, make_attention):
        super().__init__()
        self.embedding = nn.Embedding(settings.vocabulary, settings.hidden)
        self.blocks = nn.CellList([Block(settings, make_attention(layer)) for layer in range(settings.layers)])
        self.norm = RMSNorm(settings.hidden)
        self.head = nn.Dense(settings.hidden, settings.vocabulary, has_bias=False)

    def construct(self, tokens, *step):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, *step)
        return self.head(self.norm(x))


def build_model(settings, attention="flash", engine=None):
    """The model with our Cell (attention="flash") or with NaiveAttention ("naive")."""

    def make_attention(layer):
        if attention == "naive":
            return NaiveAttention(settings, settings.prev_block_num(layer))
        return FlashAttention(
            settings.head_dim,
            prev_block_num=settings.prev_block_num(layer),
            next_block_num=0,
            alibi=True,
            causal=True,
            block_size=settings.block_size,
            engine=engine,
        )

    return LanguageModel(settings, make_attention)


class CachedLayer(nn.Cell):
    """The attention of one layer over a KV cache, in the place of the FlashAttention Cell."""

    def __init__(self, settings, cache, layer):
        super().__init__()
        window = {"prev_block_num": settings.prev_block_num(layer), "block_size": settings.block_size}
        self.attend = CachedAttention(cache.layers[layer], **window)
        self.slopes = Tensor(alibi_slopes(settings.heads))

    def construct(self, query, key, value, starts, counts, slots, tables, fresh):
        query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
        step = (starts, counts, slots, tables, None, None)  # a ring would have the last two
        return self.attend(query, key, value, *step, self.slopes, None, fresh, 1).swapaxes(1, 2)


def load_weights(model, weights):
    """Put {name: array} into the model; every parameter must be there, and nothing else."""
    parameters = {parameter.name: parameter for parameter in model.trainable_params()}  # a cache's are none
    if set(parameters) != set(weights):
        raise ValueError("weights and model differ in {}".format(sorted(set(parameters) ^ set(weights))))
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(weights[name]))


class Trainer:
    """One model in training: Adam, float32. The whole step is one graph (`ms.jit`): faster than PyNative on a CPU."""

    framework = "MindSpore " + ms.__version__

    def __init__(self, settings, weights, attention="flash", engine=None):
        self.engine = chosen_engine(settings, engine) if attention == "flash" else "naive"
        self._settings = settings
        self.model = model = build_model(settings, attention, engine)
        load_weights(model, weights)
        parameters = model.trainable_params()
        optimizer = nn.Adam(parameters, learning_rate=settings.learning_rates(), beta2=0.95)

        def loss_of(tokens, targets):
            logits = model(tokens)
            return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

        gradients_of = ms.value_and_grad(loss_of, None, parameters)

        def train_step(tokens, targets):
            loss, gradients = gradients_of(tokens, targets)
            optimizer(gradients)
            return loss

        self._step, self._loss, self._logits = ms.jit(train_step), ms.jit(loss_of), ms.jit(model.construct)

    def step(self, tokens, targets):
        """Update the weights; the loss before the update, nats a byte."""
        self.model.set_train(True)
        return float(self._step(Tensor(tokens), Tensor(targets)).asnumpy())

    def loss(self, tokens, targets):
        """The loss without an update."""
        self.model.set_train(False)
        return float(self._loss(Tensor(tokens), Tensor(targets)).asnumpy())

    def logits(self, tokens):
        """float32 numpy (batch, length, vocabulary)."""
        self.model.set_train(False)
        return self._logits(Tensor(tokens)).asnumpy()

    def cached(self, length):
        """``(cache, forward)`` of generation for one sequence of `length` tokens: the model over a paged KV cache."""
        settings, blocks = self._settings, -(-length // CACHE_BLOCK)
        cache = KVCache.paged(settings.layers, blocks, settings.kv_heads, settings.head_dim, block_size=CACHE_BLOCK)
        model = LanguageModel(settings, lambda layer: CachedLayer(settings, cache, layer))
        load_weights(model, self.weights())
        model.set_train(False)

        def logits_of(tokens, last, *step):
            logits = model(tokens, *step)
            return ops.gather(logits.reshape(-1, settings.vocabulary), last, 0)

        graph = ms.jit(logits_of)  # a graph of prompts, and one of single tokens

        def forward(tokens, positions, step):
            return graph(Tensor(tokens), Tensor(step.last), *tensors(step)[:4], step.fresh)

        return cache, forward

    def weights(self):
        """{name: numpy array}: what the JAX twin model loads."""
        return {name: parameter.asnumpy() for name, parameter in self.model.parameters_dict().items()}


def chosen_engine(settings, engine=None):
    """The name of the engine that the Cell picks for the model's full layers."""
    sizes = (settings.batch, settings.heads, settings.kv_heads, settings.length, settings.length, settings.head_dim)
    spec = AttentionSpec(*sizes, dtype="float32", causal=True, alibi_shape=(settings.heads,))
    return ENGINES.choose(spec, engine, "FlashAttention").name
