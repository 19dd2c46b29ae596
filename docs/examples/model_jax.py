"""The same language model in JAX with the twin `flash_attention.jax.FlashAttention`, on the weights of MindSpore's.

The weights are one dictionary with MindSpore's parameter names, so a MindSpore checkpoint loads as it is. `Trainer` has
the interface of model_mindspore.Trainer and trains here where MindSpore is not installed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core.alibi import alibi_slopes
from flash_attention.jax import FlashAttention
from flash_attention_infer.jax import KVCache, prefill

CACHE_BLOCK = 64  # tokens in a block of the paged cache


def rms_norm(x, weight):
    """x / sqrt(mean(x^2)) * weight over the last axis."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def naive_attention(settings, prev_block_num, query, key, value):
    """softmax(q k^T / sqrt(D) + bias) v with the (N, S, S) scores in memory: the comparison."""
    position = np.arange(query.shape[2])
    distance = position[:, None] - position
    blocks = position[:, None] // settings.block_size - position // settings.block_size
    visible = (distance >= 0) & (blocks <= prev_block_num)
    bias = jnp.where(visible, -alibi_slopes(settings.heads)[:, None, None] * distance, -1e9)
    key, value = (jnp.repeat(x, settings.heads // settings.kv_heads, axis=1) for x in (key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query * settings.head_dim**-0.5, key) + bias
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), value)


def attentions(settings, attention="flash", engine=None):
    """One function (query, key, value) -> output, all BNSD, for each layer."""
    layers = []
    for layer in range(settings.layers):
        window = settings.prev_block_num(layer)
        if attention == "naive":
            layers.append(functools.partial(naive_attention, settings, window))
            continue
        layers.append(
            FlashAttention(
                settings.head_dim,
                prev_block_num=window,
                next_block_num=0,
                alibi=True,
                causal=True,
                block_size=settings.block_size,
                engine=engine,
            )
        )
    return layers


def model_logits(settings, layers, weights, tokens):
    """Tokens, int32 (batch, length) -> logits of the next token, float32 (batch, length, vocabulary)."""
    batch, length = tokens.shape
    x = weights["embedding.embedding_table"][tokens]
    for layer, attend in enumerate(layers):
        block = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"blocks.{layer}.")}
        y = rms_norm(x, block["attention_norm.weight"])
        query, key, value = (
            (y @ block[name + ".weight"].T).reshape(batch, length, -1, settings.head_dim).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        y = attend(query, key, value).swapaxes(1, 2).reshape(batch, length, -1)
        x = x + y @ block["output.weight"].T
        y = rms_norm(x, block["feed_forward_norm.weight"])
        x = x + jax.nn.silu(y @ block["up.weight"].T) @ block["down.weight"].T
    return rms_norm(x, weights["norm.weight"]) @ weights["head.weight"].T


def cached_logits(settings, weights, caches, step, tokens):
    """The model over KV caches, new tokens int32 (batch, length) of a step.

    Returns:
        ``(logits (batch, vocabulary) of each sequence's last new token, the caches with the new tokens)``.
    """
    slopes, caches = jnp.asarray(alibi_slopes(settings.heads)), list(caches)

    def attend(layer, *tensors):
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in tensors)
        window = dict(prev_block_num=settings.prev_block_num(layer), block_size=settings.block_size)
        out, caches[layer] = prefill(caches[layer], step, query, key, value, alibi_slopes=slopes, **window)
        return jnp.swapaxes(out, 1, 2)

    layers = [functools.partial(attend, layer) for layer in range(settings.layers)]
    logits = model_logits(settings, layers, weights, tokens)
    return logits.reshape(-1, settings.vocabulary)[step.last], caches


def adam(weights, gradients, moments, step, rate, beta1=0.9, beta2=0.95, epsilon=1e-8):
    """One step of Adam as mindspore.nn.Adam takes it (epsilon beside the uncorrected moment); -> weights, moments."""
    rate = rate * jnp.sqrt(1 - beta2**step) / (1 - beta1**step)
    first = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, moments[0], gradients)
    second = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, moments[1], gradients)
    weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + epsilon), weights, first, second)
    return weights, (first, second)


class Trainer:
    """One model in training: Adam, float32, one `jax.jit` a step."""

    framework = "JAX " + jax.__version__

    def __init__(self, settings, weights, attention="flash", engine=None):
        self.engine = (engine or "auto") if attention == "flash" else "naive"
        self._settings = settings
        self._weights = {name: jnp.asarray(weight) for name, weight in weights.items()}
        self._moments = tuple(jax.tree.map(jnp.zeros_like, self._weights) for _ in range(2))
        self._done, self._rates = 0, settings.learning_rates()
        layers = attentions(settings, attention, engine)

        def loss_of(weights, tokens, targets):
            logits = model_logits(settings, layers, weights, tokens)
            chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
            return (jax.nn.logsumexp(logits, -1) - chosen).mean()

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train_step(weights, moments, step, rate, tokens, targets):
            loss, gradients = jax.value_and_grad(loss_of)(weights, tokens, targets)
            return (loss,) + adam(weights, gradients, moments, step, rate)

        self._step, self._loss = train_step, jax.jit(loss_of)
        self._logits = jax.jit(functools.partial(model_logits, settings, layers))

    def step(self, tokens, targets):
        """Update the weights; the loss before the update, nats a byte."""
        rate = self._rates[self._done]
        self._done += 1
        loss, self._weights, self._moments = self._step(
            self._weights, self._moments, float(self._done), rate, tokens, targets
        )
        return float(loss)

    def loss(self, tokens, targets):
        """The loss without an update."""
        return float(self._loss(self._weights, tokens, targets))

    def logits(self, tokens):
        """float32 numpy (batch, length, vocabulary)."""
        return np.asarray(self._logits(self._weights, tokens))

    def cached(self, length):
        """``(cache, forward)`` of generation for one sequence of `length` tokens: the model over a paged KV cache."""
        blocks = -(-length // CACHE_BLOCK)
        sizes = (self._settings.layers, blocks, self._settings.kv_heads, self._settings.head_dim)
        cache = KVCache.paged(*sizes, block_size=CACHE_BLOCK)
        compiled = jax.jit(functools.partial(cached_logits, self._settings), donate_argnums=1)

        def forward(tokens, positions, step):
            logits, cache.layers = compiled(self._weights, cache.layers, step, tokens)
            return logits

        return cache, forward

    def weights(self):
        """{name: numpy array}."""
        return {name: np.asarray(weight) for name, weight in self._weights.items()}
