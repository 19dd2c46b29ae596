"""Stacks of the JAX transformer: the order of layers, norms and residuals around each, and what they share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.errors import invalid_value
from flash_attention.core.transformer.attention import check_key_mask
from flash_attention.core.transformer.layers import CROSS, FEED, LAYER, NAMES, SELF, cache_refusal, make_stack
from flash_attention.core.transformer.rules import signature
from flash_attention.core.transformer.wrappers import check_mems
from flash_attention.jax.transformer.attention import Attention, Given
from flash_attention.jax.transformer.feed_forward import FeedForward
from flash_attention.jax.transformer.parts import (
    Model,
    Seeds,
    joined,
    norm,
    norm_init,
    residual_init,
    shifted,
)
from flash_attention.jax.transformer.positions import Rotation, bias_init, distance_bias


class Call(NamedTuple):
    """The inputs of one call of a stack that all layers see; None where absent.

    Attributes:
        context, mask, context_mask, attn_mask: as in ``AttentionLayers.__call__``, masks boolean.
        rotate, bias, slopes: positions of self-attention, see ``Given``.
        index: tokens in the cache.
    """

    context: Any
    mask: Any
    context_mask: Any
    attn_mask: Any
    rotate: Any
    bias: Any
    slopes: Any
    index: Any
    return_weights: bool
    deterministic: bool


class StackState(NamedTuple):
    """What a stack returns beside its output: inputs of the self-attentions, the cache, weights by layer."""

    hiddens: Any
    cache: Any
    weights: Any


class AttentionLayers(Model):
    """A stack of attention and feed-forward layers with the options of x-transformers.

    Args:
        args, options: see :class:`flash_attention.core.transformer.layers.LayersOptions`: ``dim``, ``depth``,
            ``heads=8``, ``causal=False``, and the others by keyword; ``attn_*`` go to :class:`Attention`, ``ff_*`` to
            :class:`FeedForward`.
        dtype: of the computation and the output; parameters are float32.
        implementation: of the core call, as in :func:`flash_attention.jax.flash_attention`.

    Attributes:
        stack: the checked options.

    Raises:
        ValueError, TypeError: unknown options, or options that do not fit together, with the reason.
    """

    fixed = {}

    def __init__(self, *args, dtype=jnp.float32, implementation=None, **options):
        self.stack = make_stack(type(self).__name__, args, options, self.fixed)
        self.dtype = dtype
        shown = {"dtype": dtype, "implementation": implementation}
        self.blocks = {
            SELF: Attention(**vars(self.stack.attention), **shown),
            CROSS: Attention(**vars(self.stack.cross), **shown),
            FEED: FeedForward(**vars(self.stack.feed_forward), dtype=dtype),
        }

    def init(self, key):
        """New parameters: 'layers' by number, 'bias' by distance, 'final_norm'."""
        options = self.stack.layers
        bias_key, *keys = jax.random.split(key, len(options.order) + 1)
        params = {"layers": {str(n): self._layer_init(kind, keys[n]) for n, kind in enumerate(options.order)}}
        if options.biased:
            params["bias"] = bias_init(options, bias_key)
        if options.normalises_first or options.resi_dual:
            params["final_norm"] = norm_init(options.norm, options.dim)
        return params

    def _layer_init(self, kind, key):
        options = self.stack.layers
        block_key, residual_key = jax.random.split(key)
        block = self.blocks[kind].init(block_key)
        if options.deepnorm:
            for name in {"to_v", "to_out", "proj_in", "proj_out"} & set(block):
                block[name]["weight"] = block[name]["weight"] * options.deepnorm_gain
        params = {"block": block, "norm": norm_init(options.norm, options.dim)}
        if options.sandwich_norm:
            params["branch_norm"] = norm_init(options.norm, options.dim)
        residual = residual_init(options, residual_key)
        return dict(params, residual=residual) if residual else params

    def __call__(
        self, x, context=None, mask=None, context_mask=None, attn_mask=None, *, deterministic=True, dropout_rng=None,
        params=None,
    ):  # fmt: skip
        """Run the stack.

        Args:
            x: (B, N, dim).
            context: (B, Nk, dim), for cross-attention.
            mask: (B, N), keep where True or > 0: other tokens are no keys of self-attention.
            context_mask: (B, Nk), the same of the context.
            attn_mask: of self-attention, keep where True or > 0; (N, Nk), (1|H, N, Nk) or (1|B, 1|H, N, Nk).
            deterministic: False = training: dropout acts and needs ``dropout_rng``, a PRNG key.
            params: used instead of the stack's own.

        Returns:
            (B, N, dim) in ``dtype``.
        """
        params = self.params if params is None else params
        return self.apply(
            params, x, context, mask, context_mask, attn_mask, deterministic=deterministic, dropout_rng=dropout_rng
        )[0]

    def apply(
        self, params, x, context=None, mask=None, context_mask=None, attn_mask=None, *, mems=None, cache=None,
        return_weights=False, deterministic=True, dropout_rng=None,
    ):  # fmt: skip
        """What :meth:`__call__` computes, with state: ``(out, StackState)``.

        Args:
            mems: hidden states before x, (B, M, dim) for each self-attention.
            cache: of :meth:`new_cache`, or of the call before: x are the tokens that follow.
            return_weights: also give the weights of every attention; they are formed then, O(N * Nk) memory.
        """
        options = self.stack.layers
        self._check(x, context, context_mask, mask, cache, mems)
        parts = [options.layer_dropout, self.stack.attention.dropout, self.stack.feed_forward.dropout]
        seeds = Seeds(LAYER, not deterministic and any(parts), dropout_rng)
        mask = None if mask is None else jnp.asarray(mask) > 0
        length = x.shape[1] + (mems[0].shape[1] if mems else 0)
        index = None if cache is None else cache["index"]
        total = length if cache is None else cache["layers"][0]["key"].shape[1]
        call = Call(
            context, mask, context_mask, attn_mask, *self._positions(params, x.shape[1], length, total, index), index,
            return_weights, deterministic,
        )  # fmt: skip
        out, state = self._run(params, x.astype(self.dtype), call, mems, cache, seeds)
        if cache is not None:
            state = state._replace(cache={"index": index + x.shape[1], "layers": state.cache})
        return out, state

    def _positions(self, params, tokens, length, total, index):
        """``(rotate, bias, slopes)`` of ``tokens`` queries at the end of ``length`` positions, or at ``index``."""
        options, rotate, bias, slopes = self.stack.layers, None, None, None
        if self.stack.rotated:
            base = options.rotary_xpos_scale_base if options.rotary_xpos else None
            rotate = Rotation(self.stack.rotated, base, total)
        if options.biased:
            first = length - tokens if index is None else index
            bias = distance_bias(self.stack, params["bias"], tokens, total, first)
        if options.alibi_pos_bias:
            slopes = jnp.asarray(alibi_slopes(options.heads, options.alibi_num_heads))
        return rotate, bias, slopes

    def _run(self, params, x, call, mems, cache, seeds):
        """The layers, one after the other."""
        options = self.stack.layers
        mems, caches = iter(mems or ()), iter(() if cache is None else cache["layers"])
        dual, previous = x, {}
        hiddens, written, weights = [], [], []
        handing = {SELF: options.residual_attn, CROSS: options.cross_residual_attn}
        for n, kind in enumerate(options.order):
            given = Given()
            if kind == SELF:
                hiddens.append(x)
                given = Given(call.rotate, call.bias, call.slopes, next(mems, None), next(caches, None), call.index)
            given = given._replace(previous=previous.get(kind), return_weights=call.return_weights)
            arguments = (params["layers"][str(n)], x, dual, call, given, seeds.next_key(), seeds.next_key())

            def layer(*arguments, kind=kind):
                return self._layer(kind, *arguments)

            if options.recompute:
                layer = _recomputed(layer, call, given)
            x, dual, made = layer(*arguments)
            if made is not None:
                if handing[kind]:
                    previous[kind] = made.heads
                weights.append(made.weights)
                written += [made.cache] if kind == SELF else []
        if options.resi_dual:
            x = x + norm(options.norm, params["final_norm"], dual, self.dtype)
        elif options.normalises_first:
            x = norm(options.norm, params["final_norm"], x, self.dtype)
        return x, StackState(hiddens, written, weights)

    def _layer(self, kind, params, x, dual, call, given, key, skip_key):
        """One layer with its norms and its residual: ``(x, dual, Made or None)``."""
        options = self.stack.layers
        branch, made = x, None
        if options.normalises_first:
            branch = norm(options.norm, params["norm"], branch, self.dtype)
            if given.mem is not None:
                given = given._replace(mem=norm(options.norm, params["norm"], given.mem, self.dtype))
        branch = shifted(branch, options.shifts, call.mask)
        training = {"deterministic": call.deterministic, "dropout_rng": key}
        block, own = self.blocks[kind], params["block"]
        if kind == FEED:
            branch = block(branch, params=own, **training) * options.branch_factor
        elif kind == SELF:
            branch, made = block.apply(own, branch, None, call.mask, None, call.attn_mask, given, **training)
        else:
            branch, made = block.apply(own, branch, call.context, None, call.context_mask, None, given, **training)
        new_dual = dual + branch
        if options.sandwich_norm:
            branch = norm(options.norm, params["branch_norm"], branch, self.dtype)
        out = joined(options, params.get("residual"), branch, x, self.dtype)
        if not options.normalises_first:
            out = norm(options.norm, params["norm"], out, self.dtype)
        if options.layer_dropout and not call.deterministic:
            kept = jax.random.bernoulli(skip_key, 1.0 - options.layer_dropout)
            out, new_dual = jnp.where(kept, out, x), jnp.where(kept, new_dual, dual)
        return out, new_dual, made

    def new_cache(self, batch, length):
        """An empty cache of ``length`` places for decoding: keys and values of every self-attention.

        Raises:
            ValueError: the options do not allow one, with the reason.
        """
        reason = cache_refusal(self.stack)
        if reason is not None:
            raise invalid_value(type(self).__name__, "cache", "left out ({})".format(reason), "a cache")
        options = self.stack.attention
        shapes = {"key": options.dim_head, "value": options.value_dim}
        layer = {
            name: jnp.zeros((batch, length, options.key_heads, width), self.dtype) for name, width in shapes.items()
        }
        return {"index": jnp.int32(0), "layers": [layer for kind in self.stack.layers.order if kind == SELF]}

    def _check(self, x, context, context_mask, mask, cache, mems):
        """Raise where an input is missing, or would be ignored."""
        name, options = type(self).__name__, self.stack.layers
        if options.has(CROSS) and context is None:
            raise invalid_value(name, "context", "given to a stack with cross-attention", None)
        if not options.has(CROSS) and (context is not None or context_mask is not None):
            argument = "context" if context is not None else "context_mask"
            raise invalid_value(name, argument, "left out without cross-attention", "an array")
        if mask is not None:
            check_key_mask("mask", jnp.shape(mask), *x.shape[:2])
            if cache is not None:
                raise invalid_value(name, "mask", "left out with a cache", "an array")
        if mems is not None:
            check_mems(name, [x.shape for x in mems], options.order.count(SELF), x.shape[0], options.dim)
            if cache is not None:
                raise invalid_value(name, "mems", "left out with a cache", "arrays")

    def explain(self):
        """Which path each kind of attention takes ('fused', 'formed', 'mechanism'), and why."""
        return self.stack.explain()

    def lines(self):
        """The options, then the layers by kind."""
        stack = self.stack
        found = ["{}({})".format(type(self).__name__, signature(stack.layers))]
        for kind in dict.fromkeys(stack.layers.order):
            places = ", ".join(str(n) for n, other in enumerate(stack.layers.order) if other == kind)
            found.append("  {}: {}({})".format(places, NAMES[kind], signature(stack.options_of(kind))))
        return found


def _recomputed(layer, call, given):
    """``layer`` under ``jax.checkpoint``; what is static stays outside of it."""
    static_call = Call(*(None if isinstance(x, jax.Array) else x for x in call))
    arrays = {name: x for name, x in call._asdict().items() if isinstance(x, jax.Array)}
    moving = {name: getattr(given, name) for name in ("mem", "cache", "previous") if getattr(given, name) is not None}

    @jax.checkpoint
    def again(params, x, dual, arrays, moving, key, skip_key):
        return layer(params, x, dual, static_call._replace(**arrays), given._replace(**moving), key, skip_key)

    return lambda params, x, dual, call, given, key, skip_key: again(params, x, dual, arrays, moving, key, skip_key)


class Encoder(AttentionLayers):
    """:class:`AttentionLayers` in which every token sees every token; ``causal`` is not an argument."""

    fixed = {"causal": False}


class Decoder(AttentionLayers):
    """:class:`AttentionLayers` in which a token sees itself and those before; ``causal`` is not an argument."""

    fixed = {"causal": True}


class CrossAttender(AttentionLayers):
    """:class:`AttentionLayers` of cross-attention and feed-forward only."""

    fixed = {"only_cross": True}
