"""``AutoregressiveWrapper`` in MindSpore: the loss of the next token, and generation with cached keys and values."""

import numpy as np
from mindspore import Tensor, mutable, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.sampling import Sampling
from flash_attention.core.transformer import wrappers as shared
from flash_attention.core.transformer.layers import explain_cache
from flash_attention.nn.transformer.layers import count_parameters
from flash_attention.nn.transformer.wrappers import TransformerWrapper
from flash_attention.ops.sampling import sample


class AutoregressiveWrapper(nn.Cell):
    r"""Training and generation of a causal ``TransformerWrapper``; its parameters are those of ``net``.

    Args:
        net (TransformerWrapper): the model; its stack is causal.
        ignore_index (int): keyword only; targets of this value do not count in the loss. Default: -100.
        pad_value (int): keyword only; token that stands for ignored inputs, and after ``eos_token``. Default: 0.

    Inputs:
        - **x** (Tensor) - int (B, N), N >= 2; where it is ``ignore_index`` nothing is predicted.
        - **mask** (Tensor) - (B, N), keep where True or > 0. Default: None.
        - **context**, **context_mask** (Tensor) - for cross-attention. Default: None.

    Outputs:
        Tensor, a float32 scalar: the mean negative log-likelihood, in nats, of tokens 1 .. N - 1 given those before.
    """

    def __init__(self, net, *, ignore_index=shared.IGNORE, pad_value=0):
        super().__init__()
        if not isinstance(net, TransformerWrapper):
            raise invalid_type(shared.AUTOREGRESSIVE, "net", "a TransformerWrapper", type(net).__name__)
        shared.check_autoregressive(net.layers.causal, ignore_index, pad_value)
        self.net, self.ignore_index, self.pad_value = net, ignore_index, pad_value
        self.log_softmax = P.LogSoftmax(-1)

    def construct(self, x, mask=None, context=None, context_mask=None):
        """The loss; shapes and meaning of the inputs are in the class's documentation."""
        _check(x.shape)
        length = x.shape[1]
        inputs, targets = x[:, : length - 1], x[:, 1:]
        if mask is not None:
            mask = mask.astype(mstype.float32)[:, : length - 1]
        inputs = ops.where(inputs == self.ignore_index, ops.full_like(inputs, self.pad_value), inputs)
        counts = (targets != self.ignore_index).astype(mstype.float32)
        logits = self.net(inputs, mask, context, context_mask).astype(mstype.float32)
        index = ops.where(targets == self.ignore_index, ops.zeros_like(targets), targets)
        chosen = ops.gather_elements(self.log_softmax(logits), 2, ops.expand_dims(index, -1))[..., 0]
        return -(chosen * counts).sum() / ops.maximum(counts.sum(), Tensor(1.0, mstype.float32))

    def generate(
        self, start, seq_len, *, eos_token=None, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0,
        cache_kv=None, context=None, context_mask=None
    ):  # fmt: skip
        """Continue a prompt; in graph mode two compilations a shape: of the prompt, and of a token.

        Args:
            start (Tensor): int (B, T) or (T,), without padding.
            seq_len (int): tokens to generate.
            eos_token (int): rows that drew it go on with ``pad_value``.
            temperature, top_k, top_p, min_p: see ``flash_attention.core.sampling.Sampling``; 0 is greedy.
            seed (int): uint32 of the draws; the same seed draws the same tokens in JAX.
            cache_kv (bool): None: where the options allow it keys and values are cached; False: every token runs the
                whole sequence; True: an error where they do not.
            context, context_mask (Tensor): for cross-attention.

        Returns:
            Tensor int32 (B, seq_len) or (seq_len,): the new tokens.
        """
        shape = tuple(start.shape)
        total = shape[-1] + seq_len if shape else 0
        shared.check_generation(shape, seq_len, eos_token, total, self.net.embedding, self.net.max_seq_len)
        cached = self.net.refusal is None if cache_kv is None else cache_kv
        if cached and self.net.refusal is not None:
            raise invalid_value(
                shared.AUTOREGRESSIVE, "cache_kv", "None or False ({})".format(self.net.refusal), cache_kv
            )
        sampling = Sampling(temperature, top_k, top_p, min_p)
        rows = start.asnumpy().reshape((-1, shape[-1])).astype(np.int32)
        training = self.training
        self.set_train(False)
        tokens = self._drawn(rows, seq_len, sampling, seed, eos_token, (context, context_mask), cached)
        self.set_train(training)
        return Tensor(tokens if len(shape) == 2 else tokens[0])

    def _drawn(self, rows, seq_len, sampling, seed, eos_token, seeing, cached):
        """int32 (B, seq_len); the tokens are collected on the host, one call of the net each."""
        batch, given = rows.shape
        tokens = np.pad(rows, ((0, 0), (0, seq_len)), constant_values=self.pad_value)
        finished, cache = np.zeros(batch, bool), None
        for place in range(given, given + seq_len):
            if cached:
                logits, cache = self._advance(tokens, place, seeing, cache)
            else:
                logits = self.net(Tensor(tokens), None, *seeing)[:, place - 1]
            drawn = sample(logits.astype(mstype.float32), seed, place, **vars(sampling)).asnumpy()
            tokens[:, place] = np.where(finished, self.pad_value, drawn)
            if eos_token is not None:
                finished |= tokens[:, place] == eos_token
                if finished.all():
                    break
        return tokens[:, given:]

    def _advance(self, tokens, place, seeing, cache):
        """Logits (B, V) of the token at ``place``, and the cache with all tokens before it; None begins one."""
        if cache is None:
            new, cache = tokens[:, :place], tokens.shape[1]
        else:
            new, cache = tokens[:, place - 1 : place], mutable(cache)
        logits, cache = self.net(
            Tensor(new), None, *seeing, None, False, False, False, None, False, None, None, None, cache
        )  # fmt: skip
        return logits[:, -1], cache

    def explain(self):
        """The paths of the attention, and whether generation caches keys and values."""
        return self.net.explain() + "\n" + explain_cache(self.net.attn_layers.stack)

    def num_parameters(self):
        """Number of learned numbers."""
        return count_parameters(self)


@constexpr
def _check(shape):
    if len(shape) != 2 or shape[1] < 2:
        raise invalid_value(shared.AUTOREGRESSIVE, "x", "of shape (B, N), N >= 2", "shape {}".format(shape))
