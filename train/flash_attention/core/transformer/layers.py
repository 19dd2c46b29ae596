"""Options of ``FeedForward`` and ``AttentionLayers``, and the plan of a stack: which layer comes when."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.mechanisms import positions
from flash_attention.core.transformer.attention import AttentionOptions
from flash_attention.core.transformer.rules import Excludes, Needs, check_bools, check_rules, make, split_by_prefix
from flash_attention.core.validation import check_int, check_positive, check_rate

FEED_FORWARD, LAYER = "FeedForward", "AttentionLayers"
SELF, CROSS, FEED = "a", "c", "f"
NAMES = {SELF: "Attention", CROSS: "cross Attention", FEED: "FeedForward"}
NORM_EPSILON = 1e-5  # LayerNorm
LENGTH_EPSILON = 1e-12  # smallest length that RMSNorm and ScaleNorm divide by
SMALLEST_ROTARY = 32  # features


@dataclass(frozen=True)
class FeedForwardOptions:
    """Arguments of ``FeedForward``; a stack takes them with the prefix ``ff_``.

    Attributes:
        dim: width of the input and of the output.
        mult: the inner width is ``int(mult * dim)``.
        glu: ``value * act(gate)`` of two projections (Shazeer, "GLU Variants", 2020); with ``swish`` SwiGLU.
        swish: SiLU instead of exact GELU.
        relu_squared: ``max(x, 0) ** 2`` instead of GELU (So et al., "Primer", 2021).
        post_act_ln: LayerNorm of the inner features.
        no_bias: the projections have no biases.
        dropout: of the inner features, in training.
        zero_init_output: ``proj_out`` begins at 0.
    """

    dim: int
    mult: float = 4
    glu: bool = False
    swish: bool = False
    relu_squared: bool = False
    post_act_ln: bool = False
    no_bias: bool = False
    dropout: float = 0.0
    zero_init_output: bool = False

    def __post_init__(self):
        check_int(FEED_FORWARD, "dim", self.dim, 1)
        if self.mult is None:
            raise invalid_type(FEED_FORWARD, "mult", "a float > 0", None)
        check_positive(FEED_FORWARD, "mult", self.mult)
        check_bools(FEED_FORWARD, self)
        check_rate(FEED_FORWARD, "dropout", self.dropout)
        if self.inner < 1:
            raise invalid_value(FEED_FORWARD, "mult", "at least 1 / dim", self.mult)
        check_rules(FEED_FORWARD, self, FEED_FORWARD_RULES)

    @property
    def inner(self):
        """Inner width."""
        return int(self.dim * self.mult)

    @property
    def activation(self):
        """'gelu', 'silu' or 'relu_squared'."""
        return "relu_squared" if self.relu_squared else "silu" if self.swish else "gelu"


FEED_FORWARD_RULES = (Excludes("swish", ("relu_squared",), "each is the activation"),)

_OTHER_POSITIONS = ("rel_pos_bias", "dynamic_pos_bias")
_SELF_ONLY = "a stack of cross-attention has no self-attention"
RULES = (
    Excludes("alibi_pos_bias", _OTHER_POSITIONS, "one bias by position at most"),
    Excludes("rel_pos_bias", ("dynamic_pos_bias",), "one bias by position at most"),
    Excludes("use_rmsnorm", ("use_scalenorm",), "each is the norm"),
    Excludes("resi_dual", ("deepnorm", "gate_residual", "sandwich_norm"), "it has residuals and norms of its own"),
    Excludes("deepnorm", ("gate_residual", "sandwich_norm"), "its bound holds for scaled residuals and post-norm"),
    Excludes("pre_norm", ("sandwich_norm",), "the sandwich is a pre-norm and a norm of the branch"),
    Excludes("layer_dropout", ("residual_attn", "cross_residual_attn"), "a skipped layer has no scores to hand on"),
    Excludes("cross_attend", ("only_cross",), "each says which layers there are"),
    Excludes(
        "only_cross",
        ("sandwich_coef", "residual_attn", "rotary_pos_emb", "rotary_xpos", "alibi_pos_bias") + _OTHER_POSITIONS,
        _SELF_ONLY,
    ),
    Needs("rotary_xpos", "causal", "its factors grow with the distance to keys ahead", "Use rotary_pos_emb."),
    Needs("rotary_xpos_scale_base", "rotary_xpos", "it is the decay of xPos"),
    Needs("alibi_num_heads", "alibi_pos_bias", "it counts the heads with a bias"),
    Needs("rel_pos_num_buckets", "rel_pos_bias", "it is the size of the table"),
    Needs("rel_pos_max_distance", "rel_pos_bias", "it is where the last bucket begins"),
    Needs("dynamic_pos_bias_num_layers", "dynamic_pos_bias", "it is the depth of its network"),
    Needs("dynamic_pos_bias_log_distance", "dynamic_pos_bias", "it is the input of its network"),
)


@dataclass(frozen=True)
class LayersOptions:
    """Arguments of ``AttentionLayers`` beside ``attn_*`` and ``ff_*``.

    Attributes:
        dim: width of the stack.
        depth: repetitions of the block.
        heads: of every attention.
        causal: of self-attention; ``Decoder`` sets it, ``Encoder`` does not have it.
        cross_attend: the block is self-attention, cross-attention, feed-forward.
        only_cross: the block is cross-attention, feed-forward; ``CrossAttender`` sets it.
        macaron: another feed-forward in front of the block; every one counts half (Lu et al., 2019).
        sandwich_coef: the first so many blocks give their attention, the last their feed-forward (Press et al., 2020).
        pre_norm: normalise the branch's input and the end of the stack; False: after each residual.
        sandwich_norm: normalise the branch's output too.
        use_rmsnorm: ``x / |x| * sqrt(dim) * g`` (Zhang and Sennrich, 2019) instead of LayerNorm without bias.
        use_scalenorm: the same with one scalar g (Nguyen and Salazar, 2019).
        rotary_pos_emb: rotate queries and keys of self-attention, half-split pairs.
        rotary_emb_dim: features that turn; None = half of a head; at least 32, at most the whole head.
        rotary_xpos: rotary with xPos's decay; implies rotary_pos_emb; causal only.
        rotary_xpos_scale_base: larger = slower decay.
        alibi_pos_bias: ``-slope * distance`` (Press et al., 2022).
        alibi_num_heads: heads that have it; None = all.
        rel_pos_bias: T5's learned bias times ``sqrt(dim_head)``, one table for the stack.
        rel_pos_num_buckets, rel_pos_max_distance: of that table.
        dynamic_pos_bias: a small network of the distance gives the bias; one for the stack.
        dynamic_pos_bias_num_layers: its hidden layers, of width ``dim // 4``.
        dynamic_pos_bias_log_distance: it reads ``sign(d) log(1 + |d|)``.
        gate_residual: a GRU cell joins branch and residual (Parisotto et al., 2020).
        scale_residual: learned factors on the residual's features.
        residual_attn: the scores of the self-attention before are added to a layer's own (He et al., "RealFormer",
            2021), biases included.
        cross_residual_attn: the same among cross-attentions.
        resi_dual: post-norm, and a second residual stream that is normalised once at the end (Xie et al., 2023).
        shift_tokens: shift shares of the features by 0 .. n tokens (causal), by -n .. n otherwise, before each branch.
        layer_dropout: probability of skipping a layer, in training.
        zero_init_branch_output: every branch begins as 0.
        deepnorm: post-norm with residuals times ``(2 depth) ** 0.25`` and smaller first weights (Wang et al., 2022).
        recompute: keep a layer's input only and compute the layer again in the backward pass.
    """

    dim: int
    depth: int
    heads: int = 8
    causal: bool = False
    cross_attend: bool = False
    only_cross: bool = False
    macaron: bool = False
    sandwich_coef: Optional[int] = None
    pre_norm: bool = True
    sandwich_norm: bool = False
    use_rmsnorm: bool = False
    use_scalenorm: bool = False
    rotary_pos_emb: bool = False
    rotary_emb_dim: Optional[int] = None
    rotary_xpos: bool = False
    rotary_xpos_scale_base: float = 512
    alibi_pos_bias: bool = False
    alibi_num_heads: Optional[int] = None
    rel_pos_bias: bool = False
    rel_pos_num_buckets: int = 32
    rel_pos_max_distance: int = 128
    dynamic_pos_bias: bool = False
    dynamic_pos_bias_num_layers: int = 2
    dynamic_pos_bias_log_distance: bool = False
    gate_residual: bool = False
    scale_residual: bool = False
    residual_attn: bool = False
    cross_residual_attn: bool = False
    resi_dual: bool = False
    shift_tokens: int = 0
    layer_dropout: float = 0.0
    zero_init_branch_output: bool = False
    deepnorm: bool = False
    recompute: bool = False

    def __post_init__(self):
        for name in ("dim", "depth", "heads", "rel_pos_num_buckets", "rel_pos_max_distance",
                     "dynamic_pos_bias_num_layers"):  # fmt: skip
            check_int(LAYER, name, getattr(self, name), 1)
        check_bools(LAYER, self)
        if self.sandwich_coef is not None:
            check_int(LAYER, "sandwich_coef", self.sandwich_coef, 1, self.depth)
        if self.alibi_num_heads is not None:
            check_int(LAYER, "alibi_num_heads", self.alibi_num_heads, 1, self.heads)
        check_int(LAYER, "shift_tokens", self.shift_tokens, 0)
        if len(self.shifts) > self.dim:
            raise invalid_value(LAYER, "shift_tokens", "small enough that each shift has a feature", self.shift_tokens)
        check_rate(LAYER, "layer_dropout", self.layer_dropout)
        check_rules(LAYER, self, RULES)
        if self.cross_residual_attn and not self.has(CROSS):
            raise invalid_value(LAYER, "cross_residual_attn", "False without cross-attention", True)
        if self.rotary_emb_dim is not None:
            check_int(LAYER, "rotary_emb_dim", self.rotary_emb_dim, 2)
            if not self.rotates:
                raise invalid_value(LAYER, "rotary_emb_dim", "left out without rotary_pos_emb=", self.rotary_emb_dim)
        if self.rotary_xpos_scale_base is None:
            raise invalid_type(LAYER, "rotary_xpos_scale_base", "a float > 0", None)
        check_positive(LAYER, "rotary_xpos_scale_base", self.rotary_xpos_scale_base)
        if self.rel_pos_bias:
            positions.check_t5(LAYER, self.rel_pos_num_buckets, self.rel_pos_max_distance, not self.causal)

    @property
    def order(self):
        """The layers' kinds, a tuple of 'a', 'c' and 'f'."""
        block = (SELF, CROSS, FEED) if self.cross_attend else (CROSS, FEED) if self.only_cross else (SELF, FEED)
        if self.macaron:
            block = (FEED,) + block
        folded = self.sandwich_coef or 0
        return (SELF,) * folded + block * (self.depth - folded) + (FEED,) * folded

    def has(self, kind):
        """Whether a layer of this kind exists."""
        return kind in self.order

    @property
    def rotates(self):
        """Whether queries and keys of self-attention are rotated."""
        return self.rotary_pos_emb or self.rotary_xpos

    @property
    def normalises_first(self):
        """Whether branches read normalised inputs."""
        return self.pre_norm and not (self.resi_dual or self.deepnorm)

    @property
    def norm(self):
        """'rmsnorm', 'scalenorm' or 'layernorm'."""
        return "rmsnorm" if self.use_rmsnorm else "scalenorm" if self.use_scalenorm else "layernorm"

    @property
    def residual_factor(self):
        """DeepNorm's factor on the residual, 1 otherwise."""
        return (2.0 * self.depth) ** 0.25 if self.deepnorm else 1.0

    @property
    def deepnorm_gain(self):
        """DeepNorm's factor on the first weights of feed-forwards, values and outputs."""
        return (8.0 * self.depth) ** -0.25 if self.deepnorm else 1.0

    @property
    def branch_factor(self):
        """Macaron's factor on a feed-forward."""
        return 0.5 if self.macaron else 1.0

    @property
    def shifts(self):
        """Tokens by which each share of the features moves toward the end; () = none do."""
        if not self.shift_tokens:
            return ()
        return tuple(range(0 if self.causal else -self.shift_tokens, self.shift_tokens + 1))

    @property
    def has_position(self):
        """Whether an absolute embedding is left out."""
        return self.rotates or self.rel_pos_bias

    @property
    def biased(self):
        """Whether the stack forms a bias by distance."""
        return self.rel_pos_bias or self.dynamic_pos_bias


class Stack(NamedTuple):
    """Everything about a stack: its options, those of self-attention, of cross-attention and of the feed-forward."""

    layers: LayersOptions
    attention: AttentionOptions
    cross: AttentionOptions
    feed_forward: FeedForwardOptions

    @property
    def rotated(self):
        """Features of a head that turn, 0 where none do."""
        if not self.layers.rotates:
            return 0
        dim = self.attention.dim_head
        wanted = self.layers.rotary_emb_dim or dim // 2
        return min(max(wanted, SMALLEST_ROTARY), dim)

    def options_of(self, kind):
        """The options of a layer of this kind."""
        return {SELF: self.attention, CROSS: self.cross, FEED: self.feed_forward}[kind]

    def explain(self):
        """One line a kind of attention: its layers, the path they take, and why."""
        lines = []
        for kind in (SELF, CROSS):
            places = [str(n) for n, other in enumerate(self.layers.order) if other == kind]
            if places:
                path = str(self.options_of(kind).path)
                handed = self.layers.residual_attn if kind == SELF else self.layers.cross_residual_attn
                if handed:
                    path += "; scores of layers before are products of concatenated heads, never stored"
                lines.append("layers {} ({}): {}".format(", ".join(places), NAMES[kind], path))
        if self.layers.biased:
            lines.append("the bias by distance is one array (heads, Nq, Nk) for the stack")
        return "\n".join(lines)


def make_stack(layer, args, keywords, fixed):
    """:class:`Stack` from the arguments of a class.

    Args:
        layer: the class's name in messages. args, keywords: what its caller gave.
        fixed: options that the class itself sets; giving one is an error.
    """
    own, attention, feed = split_by_prefix(keywords, ("attn_", "ff_"))
    for name in fixed:
        if name in own:
            raise invalid_value(layer, name, "left out ({} sets it)".format(layer), own[name])
    for name in ("dim", "heads", "causal"):
        if name in attention or (name == "dim" and name in feed):
            raise invalid_type(layer, "attn_" + name, "given as '{}'".format(name), "a prefixed argument")
    layers = make(LayersOptions, layer, args, dict(own, **fixed))
    zero = {"zero_init_output": True} if layers.zero_init_branch_output else {}
    attention = dict(zero, dim=layers.dim, heads=layers.heads, **attention)
    options = make(AttentionOptions, layer, (), dict(attention, causal=layers.causal))
    # Positions of a context are no positions of the sequence, and a mechanism replaces self-attention only.
    cross = replace(options, causal=False, max_attend_past=None, attention=None, attention_options=None)
    stack = Stack(layers, options, cross, make(FeedForwardOptions, layer, (), dict(zero, dim=layers.dim, **feed)))
    _check_stack(layer, stack)
    return stack


def _check_stack(layer, stack):
    layers, attention = stack.layers, stack.attention
    if stack.rotated % 2:
        name = "rotary_emb_dim" if layers.rotary_emb_dim else "attn_dim_head"
        raise invalid_value(layer, name, "such that an even number of features turns", stack.rotated)
    if attention.attention is not None:
        if layers.residual_attn:
            raise invalid_value(layer, "residual_attn", "False with attn_attention= (it hands on no scores)", True)
        if not layers.has(SELF):
            need = "left out in a stack without self-attention"
            raise invalid_value(layer, "attn_attention", need, repr(attention.attention))


def explain_cache(stack):
    """A line on whether generation caches, and why not."""
    reason = cache_refusal(stack)
    if reason is not None:
        return "generation caches nothing: {}; every token runs the whole sequence".format(reason)
    return "generation caches the keys and values of self-attention"


def cache_refusal(stack):
    """Why keys and values cannot be cached while decoding, or None."""
    if not stack.layers.causal:
        return "the stack is not causal"
    if stack.layers.shift_tokens:
        return "shift_tokens reads the tokens before"
    if stack.attention.attention is not None:
        return "attn_attention computes whole sequences"
    return None
