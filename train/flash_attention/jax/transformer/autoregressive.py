"""``AutoregressiveWrapper`` in JAX: the loss of the next token, and generation with cached keys and values."""

import jax
import jax.numpy as jnp

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.sampling import Sampling
from flash_attention.core.transformer import wrappers as shared
from flash_attention.core.transformer.layers import cache_refusal, explain_cache
from flash_attention.jax.sampling import sample
from flash_attention.jax.transformer.parts import Model
from flash_attention.jax.transformer.wrappers import TransformerWrapper


class AutoregressiveWrapper(Model):
    """Training and generation of a causal :class:`TransformerWrapper`; its parameters are those of ``net``.

    Args:
        net: the model; its stack is causal.
        ignore_index: targets of this value do not count in the loss.
        pad_value: token that stands for ignored inputs, and after ``eos_token``.
    """

    def __init__(self, net, *, ignore_index=shared.IGNORE, pad_value=0):
        if not isinstance(net, TransformerWrapper):
            raise invalid_type(shared.AUTOREGRESSIVE, "net", "a TransformerWrapper", repr(net))
        shared.check_autoregressive(net.layers.causal, ignore_index, pad_value)
        self.net, self.ignore_index, self.pad_value = net, ignore_index, pad_value
        self._generate = jax.jit(self._tokens, static_argnames=("seq_len", "sampling", "eos_token", "cached"))

    def init(self, key):
        """New parameters: ``{"net": those of the model}``."""
        return {"net": self.net.init(key)}

    def __call__(self, x, *, params=None, **arguments):
        """Mean negative log-likelihood, in nats, of tokens 1 .. N - 1 given those before, float32.

        Args:
            x: int (B, N), N >= 2; where it is ``ignore_index`` nothing is predicted.
            arguments: of :meth:`TransformerWrapper.__call__`; ``mask`` is (B, N).
        """
        params = self.params if params is None else params
        x = jnp.asarray(x)
        if x.ndim != 2 or x.shape[1] < 2:
            need = "of shape (B, N), N >= 2"
            raise invalid_value(shared.AUTOREGRESSIVE, "x", need, "shape {}".format(x.shape))
        if arguments.get("mask") is not None:
            arguments["mask"] = arguments["mask"][:, :-1]
        inputs, targets = jnp.where(x == self.ignore_index, self.pad_value, x)[:, :-1], x[:, 1:]
        logits = self.net(inputs, params=params["net"], **arguments).astype(jnp.float32)
        counts = targets != self.ignore_index
        chosen = jnp.take_along_axis(logits, jnp.where(counts, targets, 0)[..., None], -1)[..., 0]
        loss = jnp.where(counts, jax.nn.logsumexp(logits, -1) - chosen, 0.0)
        return loss.sum() / jnp.maximum(counts.sum(), 1)

    def generate(
        self, start, seq_len, *, eos_token=None, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0,
        cache_kv=None, context=None, context_mask=None, params=None,
    ):  # fmt: skip
        """Continue a prompt; one compilation a shape.

        Args:
            start: int (B, T) or (T,), without padding.
            seq_len: tokens to generate.
            eos_token: rows that drew it go on with ``pad_value``.
            temperature, top_k, top_p, min_p: see :class:`flash_attention.core.sampling.Sampling`; 0 is greedy.
            seed: uint32 of the draws; the same seed draws the same tokens in MindSpore.
            cache_kv: None: where the options allow it keys and values are cached; False: every token runs the whole
                sequence; True: an error where they do not.
            context, context_mask: for cross-attention.

        Returns:
            int32 (B, seq_len) or (seq_len,): the new tokens.
        """
        params = self.params if params is None else params
        start = jnp.asarray(start, jnp.int32)
        net = self.net
        total = start.shape[-1] + seq_len if start.ndim else 0
        shared.check_generation(start.shape, seq_len, eos_token, total, net.embedding, net.options.max_seq_len)
        reason = cache_refusal(net.attn_layers.stack)
        if cache_kv and reason is not None:
            raise invalid_value(shared.AUTOREGRESSIVE, "cache_kv", "None or False ({})".format(reason), True)
        sampling = Sampling(temperature, top_k, top_p, min_p)
        cached = reason is None if cache_kv is None else cache_kv
        seeing = {} if context is None else {"context": context, "context_mask": context_mask}
        rows = start if start.ndim == 2 else start[None]
        tokens = self._generate(
            params["net"], rows, jnp.uint32(seed), seeing, seq_len=seq_len, sampling=sampling, eos_token=eos_token,
            cached=cached,
        )  # fmt: skip
        return tokens if start.ndim == 2 else tokens[0]

    def _tokens(self, params, start, seed, seeing, *, seq_len, sampling, eos_token, cached):
        batch, given = start.shape
        state, logits = self._begin(params, start, seeing, seq_len, cached)
        finished = jnp.zeros(batch, bool)

        def draw(logits, position, finished):
            token = sample(logits, seed, position, **vars(sampling))
            token = jnp.where(finished, self.pad_value, token)
            return token, finished if eos_token is None else finished | (token == eos_token)

        def step(carry, position):
            state, token, finished = carry
            state, logits = self._advance(params, state, token, position, seeing, cached)
            token, finished = draw(logits, position + 1, finished)
            return (state, token, finished), token

        token, finished = draw(logits, given, finished)
        _, rest = jax.lax.scan(step, (state, token, finished), given + jnp.arange(seq_len - 1))
        return jnp.concatenate([token[:, None], rest.T], 1)

    def _begin(self, params, start, seeing, seq_len, cached):
        """The state after the prompt, and the logits (B, V) of its last token."""
        if cached:
            logits, cache = self.net(start, cache=start.shape[1] + seq_len, params=params, **seeing)
            return cache, logits[:, -1]
        tokens = jnp.pad(start, ((0, 0), (0, seq_len)), constant_values=self.pad_value)
        return tokens, self.net(tokens, params=params, **seeing)[:, start.shape[1] - 1]

    def _advance(self, params, state, token, position, seeing, cached):
        """``token`` stands at ``position``: the new state, and the logits of the token after it."""
        if cached:
            logits, state = self.net(token[:, None], cache=state, params=params, **seeing)
            return state, logits[:, 0]
        state = jax.lax.dynamic_update_slice(state, token[:, None], (0, position))
        logits = self.net(state, params=params, **seeing)
        return state, jax.lax.dynamic_index_in_dim(logits, position, 1, keepdims=False)

    def explain(self):
        """The paths of the attention, and whether generation caches keys and values."""
        return self.net.explain() + "\n" + explain_cache(self.net.attn_layers.stack)

    def lines(self):
        """The wrapper, then the model."""
        shown = "AutoregressiveWrapper(ignore_index={}, pad_value={})".format(self.ignore_index, self.pad_value)
        return [shown] + ["  " + line for line in self.net.lines()]
