"""Options of the wrappers' ``Attention``: names, defaults, checks, sizes, and the path that a configuration takes."""

from dataclasses import dataclass
from typing import NamedTuple, Optional

from flash_attention.core.errors import invalid_value
from flash_attention.core.mechanisms.multi_query import check_mapping
from flash_attention.core.transformer.rules import Excludes, Needs, check_bools, check_rules, is_set
from flash_attention.core.validation import check_bool, check_int, check_positive, check_rate

LAYER = "Attention"
FUSED, FORMED, MECHANISM = "fused", "formed", "mechanism"
GATE_BIAS = 10.0  # where gate_values begins: sigmoid(10) is 1 but for 5e-5
QUERY_TILE = 128  # queries whose whole rows of scores exist at one time on the formed path
MEMORY_SALT = 0x5BD1E995  # xor into the dropout seed for the columns of num_mem_kv

_WHOLE_ROW = "it needs whole rows of weights, which the fused kernel never forms"
_REPLACED = "the mechanism computes its own softmax"
RULES = (
    Excludes("one_kv_head", ("kv_heads",), "both say how many key/value heads there are"),
    Excludes("shared_kv", ("value_dim_head",), "values are the keys"),
    Needs("qk_norm_scale", "qk_norm", "it replaces the scale of normalised queries and keys"),
    Needs("qk_norm_groups", "qk_norm", "it says what is normalised together"),
    Needs("qk_norm_dim_scale", "qk_norm", "it scales normalised features"),
    Excludes(
        "attention", ("talking_heads", "sparse_topk", "num_mem_kv", "value_dim_head", "flash"), _REPLACED,
        "Leave attention= out for the core call.",
    ),
    Needs("attention_options", "attention", "they are keywords of the mechanism"),
)  # fmt: skip


@dataclass(frozen=True)
class AttentionOptions:
    """Arguments of ``Attention``; a stack takes them with the prefix ``attn_``.

    Attributes:
        dim: width of the input and of the output.
        dim_head: size of a query or key head.
        heads: query heads H.
        causal: key j visible to query i when ``j <= i + Nk - Nq``.
        kv_heads: key/value heads, a divisor of ``heads``; None = ``heads``.
        one_kv_head: the same as ``kv_heads=1``.
        kv_head_mapping: 'tile': query head h uses key/value head ``h % kv_heads``; 'interleave': ``h // group``.
        num_mem_kv: learned key/value pairs a key/value head, visible to every query whatever the masks; no position.
        qk_norm: L2-normalise queries and keys and replace the scale ``dim_head ** -0.5`` by ``qk_norm_scale``.
        qk_norm_scale: that scale.
        qk_norm_groups: normalise so many groups of features each by itself, a divisor of ``dim_head``.
        qk_norm_dim_scale: learned factors on the features of normalised queries and keys.
        talking_heads: learned (H, H) mixing of the scores before, and of the weights after the softmax (Shazeer et
            al., 2020).
        sparse_topk: keep, in each row, the scores that reach the so-manieth largest visible one.
        max_attend_past: hide keys more than so many positions before the query; self-attention only.
        head_scale: a learned factor on each head's output (Shleifer et al., "NormFormer", 2021).
        gate_values: output times ``sigmoid(Linear(x))`` before ``to_out``; begins wide open.
        on_attn: ``to_out`` gives ``2 * dim``, ``u * sigmoid(g)`` is returned (Huang et al., "Attention on Attention",
            2019).
        shared_kv: values are the keys (before rotation and qk_norm).
        value_dim_head: size of a value head; None = ``dim_head``.
        flash: None: the fused core call where the options allow it; True: the same, and an error where they do not;
            False: form the weights, in query tiles. It never changes a result beyond rounding.
        dropout: of the softmax weights, in training.
        zero_init_output: ``to_out`` begins at 0.
        attention: how to attend: None = the core call; a name of the framework's registry, or an object: see the
            classes. Self-attention only.
        attention_options: keywords that every call of it gets: a dict.
    """

    dim: int
    dim_head: int = 64
    heads: int = 8
    causal: bool = False
    kv_heads: Optional[int] = None
    one_kv_head: bool = False
    kv_head_mapping: str = "tile"
    num_mem_kv: int = 0
    qk_norm: bool = False
    qk_norm_scale: float = 10.0
    qk_norm_groups: int = 1
    qk_norm_dim_scale: bool = False
    talking_heads: bool = False
    sparse_topk: Optional[int] = None
    max_attend_past: Optional[int] = None
    head_scale: bool = False
    gate_values: bool = False
    on_attn: bool = False
    shared_kv: bool = False
    value_dim_head: Optional[int] = None
    flash: Optional[bool] = None
    dropout: float = 0.0
    zero_init_output: bool = False
    attention: object = None
    attention_options: object = None

    def __post_init__(self):
        for name in ("dim", "dim_head", "heads", "qk_norm_groups"):
            check_int(LAYER, name, getattr(self, name), 1)
        for name in ("kv_heads", "sparse_topk", "value_dim_head"):
            if getattr(self, name) is not None:
                check_int(LAYER, name, getattr(self, name), 1)
        check_int(LAYER, "num_mem_kv", self.num_mem_kv, 0)
        if self.max_attend_past is not None:
            check_int(LAYER, "max_attend_past", self.max_attend_past, 0)
        check_bools(LAYER, self)
        if self.flash is not None:
            check_bool(LAYER, "flash", self.flash)
        if self.qk_norm_scale is None:
            raise invalid_value(LAYER, "qk_norm_scale", "a float > 0", None)
        check_positive(LAYER, "qk_norm_scale", self.qk_norm_scale)
        check_rate(LAYER, "dropout", self.dropout)
        check_mapping(LAYER, self.kv_head_mapping)
        if self.heads % self.key_heads:
            raise invalid_value(LAYER, "kv_heads", "a divisor of heads = {}".format(self.heads), self.kv_heads)
        if self.dim_head % self.qk_norm_groups:
            need = "a divisor of dim_head = {}".format(self.dim_head)
            raise invalid_value(LAYER, "qk_norm_groups", need, self.qk_norm_groups)
        check_rules(LAYER, self, RULES)
        if self.flash:
            for name in ("talking_heads", "sparse_topk"):
                if is_set(self, name):
                    need = "None or False with {}= ({})".format(name, _WHOLE_ROW)
                    raise invalid_value(LAYER, "flash", need, True)

    @property
    def key_heads(self):
        """Key/value heads."""
        return 1 if self.one_kv_head else self.heads if self.kv_heads is None else self.kv_heads

    @property
    def tiled(self):
        """True where query heads must be reordered for the core call, whose groups are neighbours."""
        return self.kv_head_mapping == "tile" and 1 < self.key_heads < self.heads

    @property
    def value_dim(self):
        """Size of a value head."""
        return self.dim_head if self.value_dim_head is None else self.value_dim_head

    @property
    def scale(self):
        """Factor on the products of queries and keys."""
        return float(self.qk_norm_scale) if self.qk_norm else self.dim_head**-0.5

    @property
    def path(self):
        """:class:`Path` of these options."""
        if self.attention is not None:
            return Path(MECHANISM, "attention={!r} computes the softmax".format(self.attention))
        rows = [name for name in ("talking_heads", "sparse_topk") if is_set(self, name)]
        if rows:
            verb = "need" if len(rows) > 1 else "needs"
            why = "{} {} whole rows of weights; memory O({} x Nk) a head".format(" and ".join(rows), verb, QUERY_TILE)
            return Path(FORMED, why)
        if self.flash is False:
            return Path(FORMED, "flash=False; memory O({} x Nk) a head".format(QUERY_TILE))
        merged = " and one over the learned keys, merged by LSE" if self.num_mem_kv else ""
        return Path(FUSED, "every option fits the core call{}; memory O(N)".format(merged))


class Path(NamedTuple):
    """How attention is computed, and why: 'fused' (the core call), 'formed' (in query tiles) or 'mechanism'."""

    name: str
    why: str

    def __str__(self):
        return "{}: {}".format(self.name, self.why)


def check_inputs(x, context, dim):
    """Raise unless x and the context are (B, N, dim) of one batch; arguments are shapes or None."""
    for name, shape in (("x", x), ("context", context)):
        if shape is not None and (len(shape) != 3 or shape[2] != dim or shape[0] != x[0]):
            raise invalid_value(LAYER, name, "of shape (B, N, {})".format(dim), "shape {}".format(tuple(shape)))


def check_key_mask(name, shape, batch, length):
    """Raise unless a mask of tokens is (B, N)."""
    if tuple(shape) != (batch, length):
        raise invalid_value(LAYER, name, "of shape ({}, {})".format(batch, length), "shape {}".format(tuple(shape)))


def attn_mask_shape(shape, batch, heads, q_len, kv_len):
    """4-D shape of ``attn_mask``: (Nq, Nk), (H, Nq, Nk) or (1|B, 1|H, Nq, Nk)."""
    full = {2: (1, 1), 3: (1,) + tuple(shape[:1]), 4: tuple(shape[:2])}.get(len(shape))
    fits = full is not None and tuple(shape[-2:]) == (q_len, kv_len)
    if not (fits and full[0] in (1, batch) and full[1] in (1, heads)):
        need = "of shape ({q}, {k}), (1|{h}, {q}, {k}) or (1|{b}, 1|{h}, {q}, {k})".format(
            b=batch, h=heads, q=q_len, k=kv_len
        )
        raise invalid_value(LAYER, "attn_mask", need, "shape {}".format(tuple(shape)))
    return full + (q_len, kv_len)
