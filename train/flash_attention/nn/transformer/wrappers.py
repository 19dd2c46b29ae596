"""Wrappers of a MindSpore stack: tokens or vectors in, absolute positions, memory tokens, logits out."""

import numpy as np
from mindspore import Parameter, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.transformer import wrappers as shared
from flash_attention.core.transformer.layers import cache_refusal
from flash_attention.core.transformer.rules import make, signature
from flash_attention.nn.layer.position_dropout import PositionDropout
from flash_attention.nn.layer.projection import Projection
from flash_attention.nn.transformer.layers import AttentionLayers, count_parameters, joined_in_front
from flash_attention.nn.transformer.parts import StackNorm, learned, numbers
from flash_attention.ops.functional import computable


class _Table(nn.Cell):
    """A table of learned rows; 'weight' (rows, width)."""

    def __init__(self, array):
        super().__init__()
        self.weight = Parameter(learned(array), name="weight")

    def construct(self, index):
        """The rows of these numbers."""
        return ops.gather(self.weight, index, 0)


class _Waves(nn.Cell):
    """Sines and cosines of positions times a learned factor, 'scale' (1,)."""

    def __init__(self, width):
        super().__init__()
        self.scale = Parameter(learned(np.full(1, width**-0.5)), name="scale")
        self.frequencies = learned(shared.sinusoidal_frequencies(width))

    def construct(self, index):
        """(..., width)."""
        angles = ops.expand_dims(index.astype(mstype.float32), -1) * self.frequencies
        return ops.concat((ops.sin(angles), ops.cos(angles)), -1) * self.scale


class _Wrapper(nn.Cell):
    """Absolute positions, norm and dropout of embedded tokens, and the stack."""

    def __init__(self, layer, options_class, options):
        super().__init__()
        stack = options.pop("attn_layers", None)
        if not isinstance(stack, AttentionLayers):
            need = "an Encoder, Decoder, CrossAttender or AttentionLayers"
            raise invalid_type(layer, "attn_layers", need, type(stack).__name__)
        self.attn_layers = stack
        self.options = make(options_class, layer, (), options)
        self.options.check_stack(self.layers)
        self.dtype, self.layer_name, self.dim = stack.dtype, layer, self.layers.dim
        self.embedding = shared.embedding_kind(self.options, self.layers)
        self.max_seq_len, width = self.options.max_seq_len, self.options.width(self.layers)
        if self.embedding == "learned":
            self.pos_emb = _Table(np.random.standard_normal((self.max_seq_len, width)))
        elif self.embedding == "sinusoidal":
            self.pos_emb = _Waves(width)
        self.position_factor = width**-0.5 if self.embedding == "learned" else 1.0
        self.normalises = self.options.post_emb_norm
        if self.normalises:
            self.post_emb_norm = StackNorm("layernorm", width)
        self.emb_dropout = PositionDropout(self.options.emb_dropout)

    @property
    def layers(self):
        """The stack's ``LayersOptions``."""
        return self.attn_layers.stack.layers

    def embedded(self, x, pos, added):
        """x (B, N, width) with its absolute embedding, a sum, norm and dropout."""
        _check_length(self.layer_name, self.embedding, x.shape[1], self.max_seq_len, pos is not None)
        if self.embedding is not None:
            index = numbers(x.shape[1]) if pos is None else pos
            x = x + (self.pos_emb(index) * self.position_factor).astype(x.dtype)
        if added is not None:
            x = x + added.astype(x.dtype)
        if self.normalises:
            x = self.post_emb_norm(x)
        return self.emb_dropout(x, 0)

    def explain(self):
        """Which path each kind of attention takes, and why; see ``AttentionLayers.explain``."""
        return self.attn_layers.explain()

    def num_parameters(self):
        """Number of learned numbers."""
        return count_parameters(self)

    def extend_repr(self):
        """The options, for ``print``."""
        return signature(self.options)


class TransformerWrapper(_Wrapper):
    r"""A transformer of tokens: embedding, positions, memory tokens, a stack, logits.

    Args:
        attn_layers (AttentionLayers): the stack.
        options: see ``flash_attention.core.transformer.wrappers.TokenOptions``: ``num_tokens``, ``max_seq_len``, and
            the others, all by keyword. The dtype is the stack's.

    Inputs:
        - **x** (Tensor) - int (B, N).
        - **mask**, **context**, **context_mask**, **attn_mask** - as in ``AttentionLayers``; memory tokens are always
          seen.
        - **return_embeddings** (bool) - the stack's output instead of logits. Default: False.
        - **return_logits_and_embeddings** (bool) - the pair of both. Default: False.
        - **return_mems** (bool) - also the last ``max_mem_len`` hidden states before each self-attention, without
          gradient, the ``mems`` of the next call. Default: False.
        - **mems** (tuple) - such hidden states. Default: None.
        - **return_attn** (bool) - also the weights of every attention, (B, H, N, Nk) each. Default: False.
        - **prepend_embeds** (Tensor) - (B, P, dim), in front of the tokens; ``mask`` is (B, P + N) then. Default: None.
        - **sum_embeds** (Tensor) - (B, N, emb_dim), added to the embedded tokens. Default: None.
        - **pos** (Tensor) - int (N,) or (B, N), positions for the absolute embedding. Default: None.
        - **cache** (int, tuple) - an int begins one with places for so many tokens, x being the first; then that of
          the call before, x being the tokens that follow; in graph mode ``ms.mutable(cache)``, else every call is
          compiled. Default: None.

    Outputs:
        Tensor (B, N, num_tokens), or what was asked for; with return_mems, return_attn or a cache a pair.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, **options):
        super().__init__(shared.TOKENS, shared.TokenOptions, options)
        made, dim = self.options, self.dim
        width, count = made.width(self.layers), made.memory_tokens
        self.token_emb = _Table(shared.token_std(width) * np.random.standard_normal((made.num_tokens, width)))
        self.projects, self.tied, self.memories = width != dim, made.tie_embedding, count
        if self.projects:
            self.project_emb = Projection(width, dim, dtype=self.dtype)
        self.memory_tokens = None
        if count:
            self.memory_tokens = Parameter(learned(np.random.standard_normal((count, dim))), name="memory_tokens")
        if not self.tied:
            self.to_logits = Projection(dim, made.outputs, dtype=self.dtype)
        self.max_mem_len, self.refusal = made.max_mem_len, cache_refusal(self.attn_layers.stack)

    def construct(
        self, x, mask=None, context=None, context_mask=None, attn_mask=None, return_embeddings=False,
        return_logits_and_embeddings=False, return_mems=False, mems=None, return_attn=False, prepend_embeds=None,
        sum_embeds=None, pos=None, cache=None
    ):  # fmt: skip
        """Logits of tokens; shapes and meaning of the inputs are in the class's documentation."""
        _check_tokens(
            x.shape, str(x.dtype), return_embeddings, return_logits_and_embeddings, return_mems, return_attn,
            self.max_mem_len,
        )  # fmt: skip
        memories = self.memories
        if cache is not None:
            given = (mask is not None, attn_mask is not None, mems is not None, prepend_embeds is not None)
            _check_cache(
                self.refusal, x.shape[1], cache if isinstance(cache, int) else None, (return_mems, return_attn) + given
            )  # fmt: skip
        if isinstance(cache, int):
            cache = cache + memories
        elif cache is not None:
            if self.embedding is not None and pos is None:
                pos = cache[0] - memories + numbers(x.shape[1])
            memories = 0
        tokens = self.embedded(self.token_emb(x).astype(self.dtype), pos, sum_embeds)
        if self.projects:
            tokens = self.project_emb(tokens)
        if prepend_embeds is not None:
            tokens = joined_in_front(prepend_embeds, tokens)
        if memories:
            memory = ops.expand_dims(self.memory_tokens, 0) + ops.zeros((x.shape[0], 1, 1), mstype.float32)
            tokens = joined_in_front(memory, tokens)
            mask, attn_mask = seen_in_front(mask, memories, 1), seen_in_front(attn_mask, memories, 2)
        out, hiddens, weights, written = self.attn_layers.run(
            tokens, context, mask, context_mask, attn_mask, mems, return_attn, cache
        )  # fmt: skip
        if memories:
            out = computable(out)[:, memories:].astype(out.dtype)
        result = out
        if not return_embeddings:
            result = self.logits(out)
            if return_logits_and_embeddings:
                result = (result, out)
        if return_mems:
            return result, self.kept(hiddens, mems)
        if return_attn:
            return result, weights
        if written is not None:
            return result, written
        return result

    def logits(self, out):
        """(B, N, num_tokens)."""
        if not self.tied:
            return self.to_logits(out)
        table = computable(self.token_emb.weight.astype(self.dtype))
        return ops.matmul(computable(out), table.swapaxes(0, 1)).astype(self.dtype)

    def kept(self, hiddens, mems):
        """The last ``max_mem_len`` hidden states of each self-attention, without gradient."""
        found = ()
        for n in range(len(hiddens)):
            joined = computable(hiddens[n])
            if mems is not None:
                joined = ops.concat((computable(mems[n]), joined), 1)
            first = max(joined.shape[1] - self.max_mem_len, 0)
            found = found + (ops.stop_gradient(joined[:, first:]).astype(self.dtype),)
        return found


class ContinuousTransformerWrapper(_Wrapper):
    r"""A transformer of vectors: projection, positions, a stack, projection.

    Args:
        attn_layers (AttentionLayers): the stack.
        options: see ``flash_attention.core.transformer.wrappers.ContinuousOptions``: ``max_seq_len``, ``dim_in``,
            ``dim_out``, and the others, all by keyword. The dtype is the stack's.

    Inputs:
        - **x** (Tensor) - (B, N, dim_in).
        - the others as of ``TransformerWrapper``.

    Outputs:
        Tensor (B, N, dim_out); with return_attn a pair.

    Raises:
        ValueError, TypeError: options that do not fit together, with the reason.
    """

    def __init__(self, **options):
        super().__init__(shared.CONTINUOUS, shared.ContinuousOptions, options)
        made, dim = self.options, self.dim
        self.reads, self.writes = made.dim_in is not None, made.dim_out is not None
        if self.reads:
            self.project_in = Projection(made.dim_in, dim, dtype=self.dtype)
        if self.writes:
            self.project_out = Projection(dim, made.dim_out, dtype=self.dtype)
        self.width = made.dim_in or dim

    def construct(
        self, x, mask=None, context=None, context_mask=None, attn_mask=None, return_embeddings=False,
        return_attn=False, prepend_embeds=None, pos=None
    ):  # fmt: skip
        """Run; shapes and meaning of the inputs are in the class's documentation."""
        _check_vectors(x.shape, self.width, return_embeddings, return_attn)
        x = self.project_in(x) if self.reads else x.astype(self.dtype)
        x = self.embedded(x, pos, None)
        if prepend_embeds is not None:
            x = joined_in_front(prepend_embeds, x)
        out, _, weights, _ = self.attn_layers.run(x, context, mask, context_mask, attn_mask, None, return_attn, None)
        if self.writes and not return_embeddings:
            out = self.project_out(out)
        if return_attn:
            return out, weights
        return out


def seen_in_front(mask, count, axes):
    """A keep mask with ``count`` ones in front of its last ``axes`` axes; None stays None."""
    if mask is None:
        return None
    mask = (mask.astype(mstype.float32) > 0).astype(mstype.float32)
    mask = ops.concat((ops.ones(mask.shape[:-1] + (count,), mstype.float32), mask), -1)
    if axes == 2:
        rows = mask.shape[:-2] + (count,) + mask.shape[-1:]
        mask = ops.concat((ops.ones(rows, mstype.float32), mask), -2)
    return mask


@constexpr
def _check_length(layer, kind, length, most, has_pos):
    if kind is None and has_pos:
        raise invalid_value(layer, "pos", "left out without an absolute embedding", "a tensor")
    shared.check_length(layer, kind, length, most)


@constexpr
def _check_tokens(shape, dtype, embeddings, both, mems, attn, max_mem_len):
    shared.check_flags(shared.TOKENS, {"return_embeddings": embeddings, "return_logits_and_embeddings": both})
    shared.check_flags(shared.TOKENS, {"return_mems": mems, "return_attn": attn})
    if len(shape) != 2 or "Int" not in dtype:
        raise invalid_type(shared.TOKENS, "x", "an int tensor of shape (B, N)", "shape {}".format(shape))
    if mems and not max_mem_len:
        raise invalid_value(shared.TOKENS, "return_mems", "False when max_mem_len is 0 (nothing would be kept)", True)


_IGNORED = ("return_mems", "return_attn", "mask", "attn_mask", "mems", "prepend_embeds")


@constexpr
def _check_cache(refusal, tokens, places, given):
    shared.check_cache(shared.TOKENS, refusal, tokens, places, dict(zip(_IGNORED, given)))


@constexpr
def _check_vectors(shape, width, embeddings, attn):
    shared.check_flags(shared.CONTINUOUS, {"return_embeddings": embeddings})
    shared.check_flags(shared.CONTINUOUS, {"return_attn": attn})
    if len(shape) != 3 or shape[2] != width:
        need = "of shape (B, N, {})".format(width)
        raise invalid_value(shared.CONTINUOUS, "x", need, "shape {}".format(shape))
