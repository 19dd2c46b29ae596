"""``FlexibleAttention``: one Cell, many mechanisms, chosen by name. The names are those of JAX's registry."""

from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core import alibi as core_alibi
from flash_attention.core.errors import invalid_value
from flash_attention.core.registry import is_default, not_taken
from flash_attention.core.spec import NO_LIMIT
from flash_attention.core.validation import TensorInfo, check_bool, check_int, check_rate
from flash_attention.nn.flexible import Mechanism, MechanismRegistry, Settings
from flash_attention.nn.flexible.registry import TENSORS
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import describe, keep, length_tensor, seed_tensor

__all__ = ["FlexibleAttention", "Mechanism", "MechanismRegistry"]

LAYER = "FlexibleAttention"


class FlexibleAttention(SeededCell):
    r"""Attention by the mechanism of a name, with the conventions of ``flash_attention.jax.FlexibleAttentionModule``.

    Args:
        attn_mechanism (str): a name that ``MechanismRegistry.list_implementations()`` lists. Default: 'flash_attn2'.
        num_attention_heads (int): query heads N.
        head_dims (int): D.
        num_kv_heads (int): key/value heads, a divisor of N; None = N. Default: None.
        sm_scale (float): factor on the scores; None = 1 / sqrt(D). Default: None.
        attention_dropout (float): on the softmax weights; in [0, 1); acts in training mode. Default: 0.0.
        causal (bool): key j visible only when ``j <= i + S - T`` (bottom-right). Default: True.
        local_window_size, prev_block_num, next_block_num, block_size, logits_soft_cap: keyword only; as in
            ``flash_attention.ops.flash_attention``.
        alibi (bool): keyword only; ALiBi with the slopes of Press et al. Default: False.
        return_weights (bool): keyword only; also return the weights (B, N, T, S), from mechanisms that form them
            ('vanilla'). Default: False.
        engine (str): keyword only; as in ``FlashAttention``. Default: None.
        group (str): keyword only; communication group of 'ring' and 'ulysses'. Default: None.
        segment_size, dilation_rate (int, tuple): keyword only; of 'dilated'. Default: None.

    Inputs:
        - **query_states** (Tensor) - (B, T, N, D); over several processes ('ring', 'ulysses') each gives its tokens.
        - **key_states**, **value_states** (Tensor) - (B, S, K, D).
        - **attention_mask** (Tensor) - **keep where True or > 0**; (B, S), (1|B, 1|T, S) or (1|B, 1|N, 1|T, 1|S).
          Default: None.
        - **bias** (Tensor) - float, broadcastable to (B, N, T, S), added to the scores. Default: None.
        - **query_sequence_length**, **key_value_sequence_length** (int, Tensor) - (B,); from there on is padding.
          Default: None.
        - **segment_ids**, **kv_segment_ids** (Tensor) - int (B, T), (B, S); the second None = the same. Default: None.
        - **alibi_slopes**, **sinks** (Tensor), **q_offset** (int, Tensor), **dropout_seed** (int, Tensor) - as in
          ``flash_attention.ops.flash_attention``; a seed is made where dropout acts and none is given. Default: None.

    Outputs:
        Tensor (B, T, N, D) in the query's dtype, or with return_weights a pair (output, weights).

    Raises:
        ValueError, TypeError: bad argument, unknown mechanism; names of other platforms say what to use here.
        UnsupportedError: the mechanism cannot honour an argument; the message says why and what can.

    Supported Platforms:
        ``Ascend`` ``GPU`` ``CPU`` (what was proven where: see the support table)
    """

    def __init__(
        self,
        attn_mechanism="flash_attn2",
        num_attention_heads=None,
        head_dims=None,
        num_kv_heads=None,
        sm_scale=None,
        attention_dropout=0.0,
        causal=True,
        *,
        local_window_size=None,
        prev_block_num=NO_LIMIT,
        next_block_num=NO_LIMIT,
        block_size=128,
        logits_soft_cap=None,
        alibi=False,
        return_weights=False,
        engine=None,
        group=None,
        segment_size=None,
        dilation_rate=None
    ):  # fmt: skip
        super().__init__(check_rate(LAYER, "attention_dropout", attention_dropout))
        self.heads = check_int(LAYER, "num_attention_heads", num_attention_heads, 1)
        self.head_dim = check_int(LAYER, "head_dims", head_dims, 1)
        self.kv_heads = check_int(LAYER, "num_kv_heads", self.heads if num_kv_heads is None else num_kv_heads, 1)
        if self.heads % self.kv_heads:
            need = "a divisor of num_attention_heads = {}".format(self.heads)
            raise invalid_value(LAYER, "num_kv_heads", need, self.kv_heads)
        for name, flag in (("causal", causal), ("alibi", alibi), ("return_weights", return_weights)):
            check_bool(LAYER, name, flag)
        ENGINES.check_name(engine, LAYER)
        settings = Settings(
            sm_scale, causal, local_window_size, prev_block_num, next_block_num, block_size, self.dropout_rate,
            logits_soft_cap, engine, group, segment_size, dilation_rate,
        )  # fmt: skip
        self.impl = MechanismRegistry.get(attn_mechanism)(settings)
        if return_weights and not self.impl.forms_weights:
            need = "False with attn_mechanism '{}', which does not form the weights".format(attn_mechanism)
            raise invalid_value(LAYER, "return_weights", need, True, "Use 'vanilla'.")
        self.forms_weights, self.return_weights = self.impl.forms_weights, return_weights
        self.attn_mechanism, self.static = attn_mechanism, tuple(settings)
        self.slopes = Tensor(core_alibi.alibi_slopes(self.heads), mstype.float32) if alibi else None

    def construct(
        self,
        query_states,
        key_states,
        value_states,
        attention_mask=None,
        bias=None,
        query_sequence_length=None,
        key_value_sequence_length=None,
        segment_ids=None,
        kv_segment_ids=None,
        alibi_slopes=None,
        sinks=None,
        q_offset=None,
        dropout_seed=None,
    ):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        slopes = self.slopes if alibi_slopes is None else alibi_slopes
        seed = None
        if self.training and self.dropout_rate > 0:
            seed = self.next_seed(query_states) if dropout_seed is None else seed_tensor(LAYER, dropout_seed)
        mask = None
        if attention_mask is not None:
            mask = keep(attention_mask).reshape(_mask_shape(attention_mask.shape))
        ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        tensors = (
            bias, mask, slopes, sinks, segment_ids, ids,
            length_tensor("query_sequence_length", query_sequence_length, query_states),
            length_tensor("key_value_sequence_length", key_value_sequence_length, query_states), q_offset, seed,
        )  # fmt: skip
        given = ()
        for tensor in tensors:
            given = given + (None if tensor is None else _shape(tensor),)
        shapes, _ = describe(LAYER, _NAMES, (query_states, key_states, value_states))
        _check(self.attn_mechanism, self.static, shapes, (self.heads, self.kv_heads, self.head_dim), given)
        result = self.impl(query_states, key_states, value_states, *tensors)
        if self.return_weights:
            return result
        return result[0] if self.forms_weights else result


_NAMES = ("query_states", "key_states", "value_states")


def _shape(x):
    return x.shape if isinstance(x, Tensor) else ()


@constexpr
def _mask_shape(shape):
    """attention_mask's shape with four axes."""
    shapes = {2: shape[:1] + (1, 1) + shape[1:], 3: shape[:1] + (1,) + shape[1:], 4: shape}
    if len(shape) not in shapes:
        raise invalid_value(LAYER, "attention_mask", "of rank 2, 3 or 4", "rank {}".format(len(shape)))
    return shapes[len(shape)]


@constexpr(check=False)
def _check(name, static, shapes, sizes, given):
    """Raise unless the tensors fit the Cell and the mechanism takes every argument that is set."""
    heads, kv_heads, head_dim = sizes
    for argument, shape, count in zip(_NAMES, shapes, (heads, kv_heads, kv_heads)):
        if len(shape) != 4 or shape[2:] != (count, head_dim):
            need = "of shape (B, T, {}, {})".format(count, head_dim)
            raise invalid_value(LAYER, argument, need, "shape {}".format(shape))
    impl, settings = MechanismRegistry.get(name), Settings(*static)
    values = dict(zip(settings._fields, settings))
    if given[-1] is None:
        values["dropout_rate"] = 0.0  # it does not act
    if values["scale"] == head_dim**-0.5:
        values["scale"] = None
    values.update((key, TensorInfo(shape, "")) for key, shape in zip(TENSORS, given) if shape is not None)
    defaults = Settings()._asdict()
    is_set = [key for key, x in values.items() if not (is_default(key, x) if key not in _OWN else x == defaults[key])]
    for key in is_set:
        if key not in impl.takes:
            raise not_taken(key, values[key]).error(name)
    reason = impl.supports(settings, shapes[0], shapes[1], is_set)
    if reason is not None:
        raise reason.error(name)


_OWN = ("engine", "group", "segment_size", "dilation_rate")  # settings that no other front end has
