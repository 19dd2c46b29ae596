"""Stacks of the MindSpore transformer: the order of layers, norms and residuals around each, and what they share."""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.errors import invalid_value
from flash_attention.core.transformer.attention import check_key_mask
from flash_attention.core.transformer.layers import CROSS, FEED, SELF, make_stack
from flash_attention.core.transformer.rules import signature
from flash_attention.core.transformer.wrappers import check_mems
from flash_attention.nn.transformer.attention import Attention
from flash_attention.nn.transformer.feed_forward import FeedForward
from flash_attention.nn.transformer.parts import Residual, SkipLayer, StackNorm, numbers, shifted
from flash_attention.nn.transformer.positions import NO_ROTATION, distance_bias
from flash_attention.ops.functional import computable


class _StackLayer(nn.Cell):
    """One layer with its norms and its residual."""

    def __init__(self, kind, stack, dtype, engine):
        super().__init__()
        options = stack.layers
        self.kind, self.first, self.sandwich = kind, options.normalises_first, options.sandwich_norm
        self.shifts, self.factor = options.shifts, options.branch_factor
        if kind == FEED:
            self.block = FeedForward(**vars(stack.feed_forward), dtype=dtype)
        else:
            self.block = Attention(**vars(stack.options_of(kind)), dtype=dtype, engine=engine)
        self.norm = StackNorm(options.norm, options.dim)
        if self.sandwich:
            self.branch_norm = StackNorm(options.norm, options.dim)
        self.residual = Residual(options, dtype)
        if options.deepnorm:
            for name, parameter in self.block.parameters_and_names():
                if name in ("to_v.weight", "to_out.weight", "proj_in.weight", "proj_out.weight"):
                    parameter.set_data(parameter * options.deepnorm_gain)

    def construct(
        self, x, dual, context, mask, context_mask, attn_mask, bias, slopes, mem, cache, previous, rotation,
        return_weights, kept,
    ):  # fmt: skip
        """``(x, dual, previous, weights, cache)``; handed on: see ``Attention.attended``; kept: ``SkipLayer``."""
        branch, handed, weights, written = x, None, None, None
        if self.first:
            branch = self.norm(branch)
            if mem is not None:
                mem = self.norm(mem.astype(x.dtype))
        branch = shifted(branch, self.shifts, mask)
        if self.kind == FEED:
            branch = self.block(branch)
            if self.factor != 1.0:
                branch = branch * self.factor
        elif self.kind == SELF:
            branch, handed, weights, written = self.block.attended(
                branch, None, mask, None, attn_mask, bias, slopes, mem, cache, previous, rotation, return_weights
            )  # fmt: skip
        else:
            branch, handed, weights, _ = self.block.attended(
                branch, context, None, context_mask, None, None, None, None, None, previous, NO_ROTATION,
                return_weights,
            )  # fmt: skip
        new_dual = dual + branch
        if self.sandwich:
            branch = self.branch_norm(branch)
        out = self.residual(branch, x)
        if not self.first:
            out = self.norm(out)
        if kept is not None:
            out = out * kept + x * (1.0 - kept)
            new_dual = new_dual * kept + dual * (1.0 - kept)
        return out, new_dual, handed, weights, written


class AttentionLayers(nn.Cell):
    r"""A stack of attention and feed-forward layers with the options of x-transformers.

    Args:
        args, options: see ``flash_attention.core.transformer.layers.LayersOptions``: ``dim``, ``depth``, ``heads=8``,
            ``causal=False``, and the others by keyword; ``attn_*`` go to ``Attention``, ``ff_*`` to ``FeedForward``.
        dtype: keyword only; of the computation and the output; parameters are float32. Default: float32.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.

    Attributes:
        stack: the checked options.

    Inputs:
        - **x** (Tensor) - (B, N, dim).
        - **context** (Tensor) - (B, Nk, dim), for cross-attention. Default: None.
        - **mask** (Tensor) - (B, N), keep where True or > 0: other tokens are no keys of self-attention. Default: None.
        - **context_mask** (Tensor) - (B, Nk), the same of the context. Default: None.
        - **attn_mask** (Tensor) - of self-attention, keep where True or > 0; (N, Nk), (1|H, N, Nk) or
          (1|B, 1|H, N, Nk). Default: None.

    Outputs:
        Tensor (B, N, dim) in ``dtype``.

    Raises:
        ValueError, TypeError: unknown options, or options that do not fit together, with the reason.
    """

    fixed = {}

    def __init__(self, *args, dtype=mstype.float32, engine=None, **options):
        super().__init__()
        self.stack = make_stack(type(self).__name__, args, options, self.fixed)
        layers = self.stack.layers
        self.dtype, self.dim, self.order = dtype, layers.dim, layers.order
        self.layers = nn.CellList([_StackLayer(kind, self.stack, dtype, engine) for kind in layers.order])
        # Outside of the layers: a graph that recomputes a layer with such a draw inside has a cycle (MindSpore 2.10).
        self.skips = nn.CellList([SkipLayer(layers.layer_dropout) for _ in layers.order])
        if layers.recompute:
            for layer in self.layers:
                layer.recompute()
        self.rotation = (self.stack.rotated, layers.rotary_xpos_scale_base if layers.rotary_xpos else None)
        self.biased, self.dual = layers.biased, layers.resi_dual
        if self.biased:
            self.bias = distance_bias(self.stack)
        self.slopes = None
        if layers.alibi_pos_bias:
            self.slopes = Tensor(alibi_slopes(layers.heads, layers.alibi_num_heads))
        self.normalises = layers.normalises_first or layers.resi_dual
        if self.normalises:
            self.final_norm = StackNorm(layers.norm, layers.dim)
        self.hands_on = (layers.residual_attn, layers.cross_residual_attn)
        self.crosses, self.layer_name = layers.has(CROSS), type(self).__name__

    def construct(self, x, context=None, mask=None, context_mask=None, attn_mask=None):
        """Run the stack; shapes and meaning of the inputs are in the class's documentation."""
        return self.run(x, context, mask, context_mask, attn_mask, None, False, None)[0]

    def run(self, x, context, mask, context_mask, attn_mask, mems, return_weights, cache):
        """What ``construct`` computes, with state.

        Args:
            mems (tuple): hidden states before x, (B, M, dim) for each self-attention, or None.
            return_weights (bool): also give the weights of every attention; they are formed then.
            cache: None; an int: one of so many places begins, x being the first tokens; or that of the call before:
                (tokens in it, ((key, value) of each self-attention)), x being the tokens that follow. The newest
                token has the last place, so that every distance to it is a constant of the graph.

        Returns:
            (out, the inputs of the self-attentions, the weights by layer, the cache of the next call or None).
        """
        _check(
            self.layer_name, x.shape, self.dim, self.order, context is not None, context_mask is not None,
            None if mask is None else mask.shape, _shapes(mems),
        )  # fmt: skip
        x = x.astype(self.dtype)
        tokens, index, places = x.shape[1], None, 0
        before = 0 if mems is None else mems[0].shape[1]
        if isinstance(cache, int):
            places = cache
        elif cache is not None:
            index, places = cache[0], cache[1][0][0].shape[1]
            before, attn_mask = places - tokens, _filled(index, tokens, places)
        rotation = self.rotation + (places, index)
        bias = self.bias(tokens, tokens + before) if self.biased else None
        dual, previous_self, previous_cross = x, None, None
        hiddens, weights, written = (), (), ()
        for n in range(len(self.order)):
            kind, mem, held, previous = self.order[n], None, None, previous_cross
            if kind == SELF:
                mem = None if mems is None else mems[len(hiddens)]
                held = None if index is None else cache[1][len(hiddens)]
                hiddens, previous = hiddens + (x,), previous_self
            x, dual, handed, weight, made = self.layers[n](
                x, dual, context, mask, context_mask, attn_mask, bias, self.slopes, mem, held, previous, rotation,
                return_weights, self.skips[n](x),
            )  # fmt: skip
            if kind == SELF and places > 0:
                written = written + ((_at_end(made[0], places), _at_end(made[1], places)),)
            if kind == SELF and self.hands_on[0]:
                previous_self = handed
            if kind == CROSS and self.hands_on[1]:
                previous_cross = handed
            if kind != FEED:
                weights = weights + (weight,)
        if self.dual:
            x = x + self.final_norm(dual)
        elif self.normalises:
            x = self.final_norm(x)
        if places == 0:
            return x, hiddens, weights, None
        count = _count(tokens) if index is None else index + tokens
        return x, hiddens, weights, (count, written)

    def explain(self):
        """Which path each kind of attention takes ('fused', 'formed', 'mechanism'), and why."""
        return self.stack.explain()

    def num_parameters(self):
        """Number of learned numbers."""
        return count_parameters(self)

    def extend_repr(self):
        """The options, for ``print``."""
        return signature(self.stack.layers)


def count_parameters(cell):
    """Number of learned numbers of a Cell."""
    return sum(x.size for x in cell.trainable_params())


def _shapes(tensors):
    found = ()
    if tensors is None:
        return found
    for tensor in tensors:
        found = found + (tensor.shape,)
    return found


def _filled(index, tokens, places):
    """Keep mask (tokens, places) of a cache that held ``index`` tokens before these ones."""
    kept = (numbers(places) >= places - tokens - index).astype(mstype.float32)
    return ops.tile(ops.expand_dims(kept, 0), (tokens, 1))


def _at_end(x, places):
    """(B, S, H, D) with zeros in front, ``places`` tokens in all."""
    if x.shape[1] == places:
        return x
    shape = (x.shape[0], places - x.shape[1]) + x.shape[2:]
    return ops.concat((ops.zeros(shape, mstype.float32), x.astype(mstype.float32)), 1).astype(x.dtype)


@constexpr
def _count(tokens):
    return Tensor(tokens, mstype.int32)


@constexpr
def _check(name, x, dim, order, has_context, has_context_mask, mask, mems):
    """Raise where an input is missing, or would be ignored; arguments are shapes."""
    if CROSS in order and not has_context:
        raise invalid_value(name, "context", "given to a stack with cross-attention", None)
    if CROSS not in order and (has_context or has_context_mask):
        argument = "context" if has_context else "context_mask"
        raise invalid_value(name, argument, "left out without cross-attention", "a tensor")
    if len(x) != 3 or x[2] != dim:
        raise invalid_value(name, "x", "of shape (B, N, {})".format(dim), "shape {}".format(x))
    if mask is not None:
        check_key_mask("mask", mask, x[0], x[1])
    if mems:
        check_mems(name, mems, order.count(SELF), x[0], dim)


class Encoder(AttentionLayers):
    """``AttentionLayers`` in which every token sees every token; ``causal`` is not an argument."""

    fixed = {"causal": False}


class Decoder(AttentionLayers):
    """``AttentionLayers`` in which a token sees itself and those before; ``causal`` is not an argument."""

    fixed = {"causal": True}


class CrossAttender(AttentionLayers):
    """``AttentionLayers`` of cross-attention and feed-forward only."""

    fixed = {"only_cross": True}


def joined_in_front(front, x):
    """Tokens in front of x, in x's dtype."""
    return ops.concat((computable(front.astype(x.dtype)), computable(x)), 1).astype(x.dtype)
