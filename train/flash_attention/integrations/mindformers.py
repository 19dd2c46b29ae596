"""MindSpore Transformers (``mindformers``): its ``FlashAttention`` is replaced by an adapter over our Cell.

    from flash_attention.integrations import mindformers
    mindformers.enable()                                     # before the model is built
    model = LlamaForCausalLM(LlamaConfig(..., use_flash_attention=True))

library's model -> :class:`FlashAttention` (the library's names, layouts, uint8 masks) -> ``nn.FlashAttention``.
"""

import importlib

from mindspore import nn
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import Reason, invalid_type, invalid_value
from flash_attention.core.validation import check_bool, check_int
from flash_attention.integrations.patching import Patches, check_version
from flash_attention.nn.layer.flash_attention import FlashAttention as OurCell
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import swap

LAYER = "mindformers.FlashAttention"
TESTED = ("1.3.2", "1.9.0")
NO_TOKENS = 2147483647
"""``pre_tokens`` / ``next_tokens`` from here on mean "no limit", as in the fused operator."""
TRIANGLE = 2048
"""Rows and columns of the mask that the fused operator wants in sparse modes 2, 3 and 4."""

_LAYOUTS = ("BSH", "BNSD", "SBH", "BSND")
_MODES = ("defaultMask", "allMask", "leftUpCausal", "rightDownCausal", "band")
_READ_MASK = (0, 1)  # modes whose mask is read; that of the others is the triangle by definition
_PACKED = (
    "Packed sequences need one attn_mask over the whole batch, with sparse_mode=1 and a layout that has a batch axis."
)


class FlashAttention(nn.Cell):
    """``mindformers.modules.flash_attention.FlashAttention`` over our Cell: same constructor, call and meaning.

    Symbols: B batch, N heads, Nkv key/value heads (divide N), S1, S2 lengths, D head size, H = N * D.

    Args:
        head_num (int): N, checked against the query.
        keep_prob (float): probability of keeping a softmax weight; acts in training mode only. Default: 1.0.
        scale_value (float): factor on the scores. Default: 1.0.
        pre_tokens, next_tokens (int): tokens visible before and after a query's own, at least 0; used in sparse modes 0
            (from the top-left diagonal) and 4 (bottom-right), as in the fused operator. Default: 2147483647, no limit.
        input_layout (str): 'BSH', 'BNSD', 'SBH' or 'BSND'. Default: 'BSH'.
        sparse_mode (int): 0 defaultMask, 1 allMask, 2 leftUpCausal, 3 rightDownCausal, 4 band. Default: 0.
        use_attention_mask (bool): attn_mask is given in each call. Default: True.
        use_alibi_mask (bool): alibi_mask is given in each call. Default: False.
        use_mqa (bool): key and value are not split by model parallelism, which must be 1 then. Default: False.
        use_ring_attention, use_3d_tensor_parallel, use_actual_seqlen (bool): must be False. Default: False.
        tp_x, tp_y, tp_z (int): must be 1. Default: 1.

    Inputs:
        - **query** (Tensor) - in ``input_layout``; float16, bfloat16 or float32.
        - **key**, **value** (Tensor) - likewise, with Nkv heads.
        - **attn_mask** (Tensor) - **non-zero = discard**; modes 0, 1: (B, N, S1, S2), (B, 1, S1, S2) or (S1, S2). Modes
          2 to 4 need none; the operator's (2048, 2048) triangle is accepted, and implied by the mode.
        - **alibi_mask** (Tensor) - (1|B, N, 1|S1, S2), added to the scaled scores.
        - **prefix**, **padding_mask**, **actual_seq_qlen**, **actual_seq_kvlen** - must be None.

    Outputs:
        Tensor in the query's shape and dtype. A query that sees no key gives 0.

    Raises:
        UnsupportedError: what this adapter cannot honour, with the reason and the remedy.
        ValueError, TypeError: bad argument.
    """

    engine = None

    def __init__(
        self,
        head_num,
        keep_prob=1.0,
        scale_value=1.0,
        pre_tokens=NO_TOKENS,
        next_tokens=NO_TOKENS,
        input_layout="BSH",
        sparse_mode=0,
        use_attention_mask=True,
        use_alibi_mask=False,
        use_mqa=False,
        use_ring_attention=False,
        use_3d_tensor_parallel=False,
        use_actual_seqlen=False,
        tp_x=1,
        tp_y=1,
        tp_z=1,
    ):
        super().__init__()
        devices = "key and value stay whole on a device here: use data_parallel and model_parallel"
        _check_default("use_ring_attention", use_ring_attention, False, devices)
        _check_default("use_3d_tensor_parallel", use_3d_tensor_parallel, False, devices)
        for name, value in (("tp_x", tp_x), ("tp_y", tp_y), ("tp_z", tp_z)):
            _check_default(name, value, 1, devices)
        _check_default("use_actual_seqlen", use_actual_seqlen, False, _PACKED)
        self.rules = check_arguments(head_num, input_layout, sparse_mode, use_attention_mask, use_alibi_mask)
        window = token_window(sparse_mode, pre_tokens, next_tokens)
        if sparse_mode == 0 and not use_attention_mask:
            window = None  # as in the fused operator: without a mask, no limits
        self.limited = window is not None
        self.input_layout = input_layout
        self.reads_mask = sparse_mode in _READ_MASK
        self.attention = OurCell(
            None,
            dropout_rate(keep_prob),
            alibi=use_alibi_mask,
            local_window_size=window,
            scale=scale_value,
            engine=self.engine,
            head_num=head_num,
            use_mqa=use_mqa,
        )

    def construct(
        self,
        query,
        key,
        value,
        attn_mask=None,
        alibi_mask=None,
        prefix=None,
        padding_mask=None,
        actual_seq_qlen=None,
        actual_seq_kvlen=None,
    ):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        absent = (attn_mask is None, alibi_mask is None)
        reserved = (prefix is None, padding_mask is None, actual_seq_qlen is None, actual_seq_kvlen is None)
        mask_shape = None if attn_mask is None else attn_mask.shape
        axes, head_dim = check_call(self.rules, self.limited, query.shape, key.shape, mask_shape, absent, reserved)
        out = self.attention(
            self.to_bnsd(query, axes, head_dim),
            self.to_bnsd(key, axes, head_dim),
            self.to_bnsd(value, axes, head_dim),
            attn_mask if self.reads_mask else None,
            alibi_mask,
        )
        return self.from_bnsd(out, axes, query.shape)

    def to_bnsd(self, x, axes, head_dim):
        """``x`` from ``input_layout`` to BNSD; ``axes`` is (0, 1, 2)."""
        if self.input_layout == "BNSD":
            return x
        if self.input_layout == "SBH":
            x = swap(x, axes[:2])
        if self.input_layout != "BSND":
            x = x.reshape(x.shape[0], x.shape[1], -1, head_dim)
        return swap(x, axes[1:])

    def from_bnsd(self, x, axes, shape):
        """The inverse for the output, whose ``shape`` is the query's."""
        if self.input_layout == "BNSD":
            return x
        x = swap(x, axes[1:])
        if self.input_layout == "SBH":
            x = swap(x, axes[:2])
        return x.reshape(shape)

    def shard(self, parallel_config):
        """Take data and model parallelism from the library's ``parallel_config`` (None = 1, 1).

        Returns:
            FlashAttention, this Cell.
        """
        sizes = {
            name: 1 if parallel_config is None else getattr(parallel_config, name, 1)
            for name in ("data_parallel", "model_parallel", "context_parallel")
        }
        if sizes["context_parallel"] != 1:
            remedy = "Split the batch or the heads instead: data_parallel, model_parallel."
            raise Reason("context_parallel", sizes["context_parallel"], "1 (a sequence is not split)", remedy).error(
                LAYER
            )
        self.attention.shard(((sizes["data_parallel"], sizes["model_parallel"], 1, 1),) * 3)
        return self


def dropout_rate(keep_prob):
    """The Cell's ``dropout_rate`` for the library's ``keep_prob``."""
    if isinstance(keep_prob, bool) or not isinstance(keep_prob, (int, float)):
        raise invalid_type(LAYER, "keep_prob", "a float in (0, 1]", repr(keep_prob))
    if not 0 < keep_prob <= 1:
        raise invalid_value(LAYER, "keep_prob", "a float in (0, 1]", keep_prob)
    return 1.0 - keep_prob


def token_window(sparse_mode, pre_tokens, next_tokens):
    """The Cell's ``local_window_size`` for the operator's sparse mode and tokens; None = no limit."""
    for name, value in (("pre_tokens", pre_tokens), ("next_tokens", next_tokens)):
        check_int(LAYER, name, value, 0, remedy="A band that leaves out a query's own position has no Cell.")
    if sparse_mode == 1:
        return None
    if sparse_mode in (2, 3):
        return None, 0
    left, right = (None if tokens >= NO_TOKENS else tokens for tokens in (pre_tokens, next_tokens))
    return None if left is None and right is None else (left, right)


def check_arguments(head_num, input_layout, sparse_mode, use_attention_mask, use_alibi_mask):
    """The checked arguments that decide which calls are valid, as the tuple that :func:`check_call` takes."""
    check_int(LAYER, "head_num", head_num, 1)
    check_bool(LAYER, "use_attention_mask", use_attention_mask)
    check_bool(LAYER, "use_alibi_mask", use_alibi_mask)
    if input_layout in ("TND", "TH"):
        raise Reason("input_layout", input_layout, "one of " + ", ".join(_LAYOUTS), _PACKED).error(LAYER)
    if input_layout not in _LAYOUTS:
        raise invalid_value(LAYER, "input_layout", "one of " + ", ".join(_LAYOUTS), repr(input_layout))
    check_int(LAYER, "sparse_mode", sparse_mode, 0)
    if sparse_mode >= len(_MODES):
        need = "one of {}".format(", ".join("{} ({})".format(*pair) for pair in enumerate(_MODES)))
        remedy = "Give the whole mask in mode 1: prefixes and blocks are not derived here."
        raise Reason("sparse_mode", sparse_mode, need, remedy).error(LAYER)
    if sparse_mode == 1 and not use_attention_mask:
        raise invalid_value(LAYER, "use_attention_mask", "True in sparse mode 1 (allMask)", False)
    return head_num, input_layout, sparse_mode, use_attention_mask, use_alibi_mask


def _check_default(name, value, default, why):
    if value != default:
        raise Reason(name, value, str(default), why[0].upper() + why[1:] + ".").error(LAYER)


@constexpr(check=False)
def check_call(rules, limited, query_shape, key_shape, mask_shape, absent, reserved):
    """Raise unless the call keeps the constructor's rules; the axes (0, 1, 2) and the head size D."""
    head_num, layout, mode, use_attention_mask, use_alibi_mask = rules
    for name, is_absent in zip(("prefix", "padding_mask", "actual_seq_qlen", "actual_seq_kvlen"), reserved):
        if not is_absent:
            raise Reason(name, "a tensor", "None", "Express it in attn_mask, with sparse_mode=1.").error(LAYER)
    rank = 3 if layout in ("BSH", "SBH") else 4
    if len(query_shape) != rank or len(key_shape) != rank:
        got = "query {} and key {}".format(tuple(query_shape), tuple(key_shape))
        raise invalid_value(LAYER, "query", "of rank {} with layout {}, like key and value".format(rank, layout), got)
    if rank == 3 and query_shape[2] % head_num:
        need = "of a hidden size that head_num = {} divides".format(head_num)
        raise invalid_value(LAYER, "query", need, query_shape[2])
    axis = {"BSH": 1, "BSND": 1, "BNSD": 2, "SBH": 0}[layout]
    lengths = (query_shape[axis], key_shape[axis])
    top_left = mode == 2 or (mode == 0 and limited)
    if top_left and lengths[0] != lengths[1]:
        need = "of the query's length in sparse mode {}, which counts from the top-left corner".format(mode)
        remedy = "Modes 3 and 4 count from the bottom-right one, as the Cell does."
        raise Reason("key", "lengths {} and {}".format(*lengths), need, remedy).error(LAYER)
    _check_mask(mode, use_attention_mask, mask_shape, lengths)
    if absent[1] == use_alibi_mask:
        need = "a tensor when use_alibi_mask=True" if use_alibi_mask else "None when use_alibi_mask=False"
        raise invalid_value(LAYER, "alibi_mask", need, "None" if absent[1] else "a tensor")
    return (0, 1, 2), query_shape[-1] // head_num if rank == 3 else query_shape[-1]


def _check_mask(mode, used, shape, lengths):
    """attn_mask against the sparse mode; batch and heads are the Cell's to check."""
    if not used:
        if shape is not None:
            raise invalid_value(
                LAYER, "attn_mask", "None when use_attention_mask=False", "shape {}".format(tuple(shape))
            )
    elif mode in _READ_MASK:
        if shape is None:
            remedy = (
                "Build it with use_attention_mask=False if nothing is masked; pre_tokens, next_tokens are void then."
            )
            raise invalid_value(LAYER, "attn_mask", "a tensor in sparse mode {}".format(mode), "None", remedy)
        if tuple(shape[-2:]) != tuple(lengths):
            need = "of shape (..., {}, {})".format(*lengths)
            raise invalid_value(LAYER, "attn_mask", need, "shape {}".format(tuple(shape)))
    elif shape is not None and tuple(shape) != (TRIANGLE, TRIANGLE):
        need = "None or the (2048, 2048) triangle in sparse mode {}".format(mode)
        raise invalid_value(LAYER, "attn_mask", need, "shape {}".format(tuple(shape)))


# --- in the library -------------------------------------------------------------------------------
_ENABLED = []


def enable(engine=None, any_version=False):
    """Let models that are built from now on compute their attention with our Cell, where they use FlashAttention.

    Ask the library for it as usual: ``use_flash_attention=True`` in the model's configuration. Models that exist
    already keep the attention they were built with.

    Args:
        engine (str): of the Cell; None = the best one here.
        any_version (bool): also patch a version of the library that was not tested.

    Returns:
        a context manager that takes the replacement back at its end; :func:`disable` does it without one.

    Raises:
        UnsupportedError: the library's version was not tested; the message names those that were.
    """
    library = importlib.import_module("mindformers")
    check_version("flash_attention.integrations.mindformers", library, TESTED, any_version)
    ENGINES.check_name(engine, LAYER)
    home = importlib.import_module("mindformers.modules.flash_attention")
    adapter = type("FlashAttention", (FlashAttention,), {"engine": engine, "__doc__": FlashAttention.__doc__})
    patches = Patches()
    patches.exchange("mindformers", home.FlashAttention, adapter)
    _ENABLED.append(patches)
    return patches


def disable():
    """Take every :func:`enable` back."""
    while _ENABLED:
        _ENABLED.pop().undo()
