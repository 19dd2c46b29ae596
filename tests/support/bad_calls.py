"""Every bad argument and the whole message it must give, once for both frameworks and all ways of calling.

Tensors are given as `shape` or `(shape, dtype)`; a test turns them into tensors of its framework.
"""

from typing import NamedTuple

from flash_attention.core.errors import UnsupportedError


class Bad(NamedTuple):
    """One bad call.

    Attributes:
        name: id of the test.
        error: exact type of the exception; message: all of its text.
        options: plain arguments: of the constructor for Cells, keywords for the functional call.
        tensors: tensors by argument name that differ from, or come beside, the good query, key and value.
    """

    name: str
    error: type
    message: str
    options: dict = {}
    tensors: dict = {}


def _cell(text):
    return "For 'FlashAttention', " + text


def _function(text):
    return "For 'flash_attention', " + text


# --- the constructor of FlashAttention; head_dim=64 where not given -------------------------------
CONSTRUCTOR = [
    Bad("head_dim 0", ValueError, _cell("'head_dim' must be an int >= 1, but got 0."), {"head_dim": 0}),
    Bad("head_dim negative", ValueError, _cell("'head_dim' must be an int >= 1, but got -64."), {"head_dim": -64}),
    Bad("head_dim float", TypeError,
        _cell("'head_dim' must be an int >= 1, but got 64.0 (float)."), {"head_dim": 64.0}),
    Bad("head_dim bool", TypeError, _cell("'head_dim' must be an int >= 1, but got True (bool)."), {"head_dim": True}),
    Bad("dropout 1", ValueError,
        _cell("'dropout_rate' must be a float in [0, 1), but got 1.0."), {"dropout_rate": 1.0}),
    Bad("dropout negative", ValueError,
        _cell("'dropout_rate' must be a float in [0, 1), but got -0.1."), {"dropout_rate": -0.1}),
    Bad("dropout text", TypeError,
        _cell("'dropout_rate' must be a float in [0, 1), but got '0.1' (str)."), {"dropout_rate": "0.1"}),
    Bad("prev negative", ValueError,
        _cell("'prev_block_num' must be an int >= 0, but got -1."), {"prev_block_num": -1}),
    Bad("prev float", TypeError,
        _cell("'prev_block_num' must be an int >= 0, but got 7.0 (float)."), {"prev_block_num": 7.0}),
    Bad("next negative", ValueError,
        _cell("'next_block_num' must be an int >= 0, but got -2."), {"next_block_num": -2}),
    Bad("next float", TypeError,
        _cell("'next_block_num' must be an int >= 0, but got 0.5 (float)."), {"next_block_num": 0.5}),
    Bad("unknown strategy", ValueError,
        _cell("'tiling_stgy_name' must be one of 'sparse', 'wukong', 'auto', but got 'dense'."),
        {"tiling_stgy_name": "dense"}),
    Bad("strategy a list", ValueError,
        _cell("'tiling_stgy_name' must be one of 'sparse', 'wukong', 'auto', but got ['sparse']."),
        {"tiling_stgy_name": ["sparse"]}),
    Bad("dp 0", ValueError, _cell("'dp' must be an int >= 1, but got 0."), {"dp": 0}),
    Bad("mp float", TypeError, _cell("'mp' must be an int >= 1, but got 2.0 (float)."), {"mp": 2.0}),
    Bad("alibi int", TypeError, _cell("'alibi' must be a bool, but got 1 (int)."), {"alibi": 1}),
    Bad("causal None", TypeError, _cell("'causal' must be a bool, but got None (NoneType)."), {"causal": None}),
    Bad("have_attention_mask_batch text", TypeError,
        _cell("'have_attention_mask_batch' must be a bool, but got 'no' (str)."), {"have_attention_mask_batch": "no"}),
    Bad("window negative", ValueError,
        _cell("'local_window_size' must be None, an int >= 0 or a pair (left, right) of those, but got (3, -1)."),
        {"local_window_size": (3, -1)}),
    Bad("window float", TypeError,
        _cell("'local_window_size' must be None, an int >= 0 or a pair (left, right) of those, but got 2.5 (float)."),
        {"local_window_size": 2.5}),
    Bad("block_size 0", ValueError, _cell("'block_size' must be an int >= 1, but got 0."), {"block_size": 0}),
    Bad("scale inf", ValueError,
        _cell("'scale' must be None or a finite float, but got inf."), {"scale": float("inf")}),
    Bad("return_lse int", TypeError, _cell("'return_lse' must be a bool, but got 1 (int)."), {"return_lse": 1}),
]  # fmt: skip

# --- calls of FlashAttention(head_dim=16): query, key, value (2, 4, 40, 16) float32 ---------------
_QKV = (2, 4, 40, 16)
_MASKS = "'attention_mask' must be of shape (40, 40), (1|2, 40, 40), (1|2, 1|4, 40, 40) or compact (128, 128), but got "
CELL = [
    Bad("query rank 3", ValueError, _cell("'query' must be of rank 4 with layout BNSD, but got shape (8, 40, 16)."),
        tensors={"query": (8, 40, 16)}),
    Bad("key rank 3", ValueError, _cell("'key' must be of rank 4 with layout BNSD, but got shape (8, 40, 16)."),
        tensors={"key": (8, 40, 16)}),
    Bad("other head_dim", ValueError, _cell("'query' must be of head_dim 16, but got 32."),
        tensors={"query": (2, 4, 40, 32)}),
    Bad("key's head_dim", ValueError,
        _cell("'key' must be of shape (2, 4, 40, 16) (batch and head_dim of the query), but got (2, 4, 40, 8)."),
        tensors={"key": (2, 4, 40, 8), "value": (2, 4, 40, 8)}),
    Bad("key's batch", ValueError,
        _cell("'key' must be of shape (2, 4, 40, 16) (batch and head_dim of the query), but got (3, 4, 40, 16)."),
        tensors={"key": (3, 4, 40, 16), "value": (3, 4, 40, 16)}),
    Bad("value's shape", ValueError,
        _cell("'value' must be of the key's shape (2, 4, 40, 16), but got (2, 4, 41, 16)."),
        tensors={"value": (2, 4, 41, 16)}),
    Bad("key's dtype", TypeError, _cell("'key' must be of the query's dtype float32, but got float16."),
        tensors={"key": (_QKV, "float16")}),
    Bad("value's dtype", TypeError, _cell("'value' must be of the query's dtype float32, but got float16."),
        tensors={"value": (_QKV, "float16")}),
    Bad("int query", TypeError, _cell("'query' must be of dtype float16, bfloat16, float32, float64, but got int32."),
        tensors={name: (_QKV, "int32") for name in ("query", "key", "value")}),
    Bad("heads not divisible", ValueError,
        _cell("'key' must be of a number of heads that divides the query's 4, but got 3."),
        tensors={"key": (2, 3, 40, 16), "value": (2, 3, 40, 16)}),
    Bad("mask's length", ValueError, _cell(_MASKS + "shape (40, 41)."), tensors={"attention_mask": (40, 41)}),
    Bad("mask's batch", ValueError, _cell(_MASKS + "shape (3, 40, 40)."), tensors={"attention_mask": (3, 40, 40)}),
    Bad("mask's heads", ValueError,
        _cell(_MASKS + "shape (2, 2, 40, 40)."), tensors={"attention_mask": (2, 2, 40, 40)}),
    Bad("mask's rank", ValueError, _cell(_MASKS + "shape (40,)."), tensors={"attention_mask": (40,)}),
    Bad("mask's dtype", TypeError,
        _cell("'attention_mask' must be a bool, int or float tensor (non-zero = discard), but got complex64."),
        tensors={"attention_mask": ((40, 40), "complex64")}),
    Bad("compact mask, Sq != Sk", ValueError,
        _cell("'attention_mask' must be of shape (40, 24) when the query and key lengths differ, but got the compact "
              "shape (128, 128). Give the whole mask."),
        tensors={"key": (2, 4, 24, 16), "value": (2, 4, 24, 16), "attention_mask": (128, 128)}),
    Bad("mask batch not allowed", ValueError,
        _cell("'attention_mask' must be of batch size 1 when have_attention_mask_batch=False, but got shape (2, "
              "40, 40). "
              "Use have_attention_mask_batch=True."),
        {"have_attention_mask_batch": False}, {"attention_mask": (2, 40, 40)}),
    Bad("alibi_mask without alibi", ValueError,
        _cell("'alibi_mask' must be None when alibi=False, but got a tensor. Construct the Cell with alibi=True."),
        tensors={"alibi_mask": (1, 4, 1, 40)}),
    Bad("alibi_mask's shape", ValueError,
        _cell("'alibi_mask' must be of shape (1|2, 4, 1|40, 40), but got shape (1, 1, 1, 40)."),
        {"alibi": True}, {"alibi_mask": (1, 1, 1, 40)}),
    Bad("alibi_mask's dtype", TypeError, _cell("'alibi_mask' must be a float tensor, but got int32."),
        {"alibi": True}, {"alibi_mask": ((1, 4, 1, 40), "int32")}),
]  # fmt: skip

# --- the functional call: query (2, 40, 4, 16), key and value (2, 24, 2, 16) float32, layout BSND --
_FULL = "'mask' must be broadcastable to (2, 4, 40, 24) or compact (128, 128), but got "
FUNCTION = [
    Bad("unknown layout", ValueError,
        _function("'layout' must be one of 'BSND', 'BNSD', but got 'SBH'."), {"layout": "SBH"}),
    Bad("wrong layout", ValueError,
        _function("'key' must be of a number of heads that divides the query's 40, but got 24."), {"layout": "BNSD"}),
    Bad("rank 2", ValueError, _function("'query' must be of rank 4 with layout BSND, but got shape (40, 64)."),
        tensors={"query": (40, 64)}),
    Bad("no head", ValueError, _function("'head_dim' must be at least 1, but got 0."),
        tensors={"query": (2, 40, 4, 0), "key": (2, 24, 2, 0), "value": (2, 24, 2, 0)}),
    Bad("mask's shape", ValueError, _function(_FULL + "shape (2, 3, 40, 24)."), tensors={"mask": (2, 3, 40, 24)}),
    Bad("mask's dtype", TypeError,
        _function("'mask' must be a bool, int or float tensor (keep where True or > 0), but got complex64."),
        tensors={"mask": ((40, 24), "complex64")}),
    Bad("compact mask, Sq != Sk", ValueError,
        _function("'mask' must be of shape (2, 4, 40, 24) when the query and key lengths differ, but got the "
                  "compact shape "
                  "(128, 128). Give the whole mask."),
        tensors={"mask": (128, 128)}),
    Bad("bias's shape", ValueError,
        _function("'bias' must be broadcastable to (2, 4, 40, 24), but got shape (40, 40)."),
        tensors={"bias": (40, 40)}),
    Bad("bias's dtype", TypeError,
        _function("'bias' must be a float tensor, but got int32. A boolean or integer mask belongs to mask=."),
        tensors={"bias": ((40, 24), "int32")}),
    Bad("is_causal int", TypeError, _function("'is_causal' must be a bool, but got 1 (int)."), {"is_causal": 1}),
    Bad("prev negative", ValueError,
        _function("'prev_block_num' must be an int >= 0, but got -1."), {"prev_block_num": -1}),
    Bad("next float", TypeError,
        _function("'next_block_num' must be an int >= 0, but got 1.0 (float)."), {"next_block_num": 1.0}),
    Bad("block_size 0", ValueError, _function("'block_size' must be an int >= 1, but got 0."), {"block_size": 0}),
    Bad("dropout 1", ValueError, _function("'dropout_rate' must be a float in [0, 1), but got 1."),
        {"dropout_rate": 1, "dropout_seed": 1}),
    Bad("dropout without seed", ValueError,
        _function("'dropout_seed' must be given when dropout_rate > 0, but got None."), {"dropout_rate": 0.1}),
    Bad("seed out of range", ValueError, _function("'dropout_seed' must be in [0, 2**32), but got 4294967296."),
        {"dropout_rate": 0.1, "dropout_seed": 2**32}),
    Bad("seed's dtype", TypeError, _function("'dropout_seed' must be of integer dtype, but got float32."),
        {"dropout_rate": 0.1}, {"dropout_seed": ()}),
    Bad("seed's shape", ValueError, _function("'dropout_seed' must be of shape (), but got shape (2,)."),
        {"dropout_rate": 0.1}, {"dropout_seed": ((2,), "int32")}),
    Bad("scale text", TypeError,
        _function("'scale' must be None or a finite float, but got '1' (str)."), {"scale": "1"}),
    Bad("scale nan", ValueError,
        _function("'scale' must be None or a finite float, but got nan."), {"scale": float("nan")}),
    Bad("soft cap 0", ValueError,
        _function("'logits_soft_cap' must be None or a float > 0, but got 0."), {"logits_soft_cap": 0}),
    Bad("soft cap text", TypeError, _function("'logits_soft_cap' must be None or a float > 0, but got '30' (str)."),
        {"logits_soft_cap": "30"}),
    Bad("window negative", ValueError,
        _function("'local_window_size' must be None, an int >= 0 or a pair (left, right) of those, but got -1."),
        {"local_window_size": -1}),
    Bad("window of three", TypeError,
        _function("'local_window_size' must be None, an int >= 0 or a pair (left, right) of those, but got (1, "
                  "2, 3) (tuple)."),
        {"local_window_size": (1, 2, 3)}),
    Bad("slopes's shape", ValueError, _function("'alibi_slopes' must be of shape (4) or (2, 4), but got shape (2,)."),
        tensors={"alibi_slopes": (2,)}),
    Bad("slopes's dtype", TypeError, _function("'alibi_slopes' must be of float dtype, but got int32."),
        tensors={"alibi_slopes": ((4,), "int32")}),
    Bad("sinks's shape", ValueError,
        _function("'sinks' must be of shape (4), but got shape (2,)."), tensors={"sinks": (2,)}),
    Bad("sinks's dtype", TypeError,
        _function("'sinks' must be of float dtype, but got int32."), tensors={"sinks": ((4,), "int32")}),
    Bad("lengths's shape", ValueError, _function("'key_value_seq_lengths' must be of shape (2), but got shape (3,)."),
        tensors={"key_value_seq_lengths": ((3,), "int32")}),
    Bad("lengths's dtype", TypeError, _function("'query_seq_lengths' must be of integer dtype, but got float32."),
        tensors={"query_seq_lengths": (2,)}),
    Bad("length negative", ValueError,
        _function("'query_seq_lengths' must be at least 0, but got -1."), {"query_seq_lengths": -1}),
    Bad("one side's segments", ValueError,
        _function("'kv_segment_ids' must be given together with the other side's segment ids, but got None."),
        tensors={"q_segment_ids": ((2, 40), "int32")}),
    Bad("segments's shape", ValueError, _function("'kv_segment_ids' must be of shape (2, 24), but got shape (2, 40)."),
        tensors={"q_segment_ids": ((2, 40), "int32"), "kv_segment_ids": ((2, 40), "int32")}),
    Bad("segments's dtype", TypeError, _function("'q_segment_ids' must be of integer dtype, but got float32."),
        tensors={"q_segment_ids": (2, 40), "kv_segment_ids": ((2, 24), "int32")}),
    Bad("offset float", TypeError,
        _function("'q_offset' must be None, an int or an integer tensor, but got 1.5."), {"q_offset": 1.5}),
    Bad("offset's dtype", TypeError,
        _function("'q_offset' must be of integer dtype, but got float32."), tensors={"q_offset": ()}),
    Bad("offset's shape", ValueError, _function("'q_offset' must be of shape () or (2), but got shape (3,)."),
        tensors={"q_offset": ((3,), "int32")}),
    Bad("return_lse int", TypeError, _function("'return_lse' must be a bool, but got 1 (int)."), {"return_lse": 1}),
]  # fmt: skip


def shape_and_dtype(entry):
    """(shape, dtype) of a table's tensor."""
    return entry if entry and isinstance(entry[0], tuple) else (entry, "float32")


def cell_tensors(bad):
    """All tensors of a CELL entry, by argument name, as (shape, dtype)."""
    good = {"query": _QKV, "key": _QKV, "value": _QKV}
    return {name: shape_and_dtype(x) for name, x in dict(good, **bad.tensors).items()}


def function_tensors(bad):
    """All tensors of a FUNCTION entry, by keyword, as (shape, dtype)."""
    good = {"query": (2, 40, 4, 16), "key": (2, 24, 2, 16), "value": (2, 24, 2, 16)}
    return {name: shape_and_dtype(x) for name, x in dict(good, **bad.tensors).items()}


def refused(engine, argument, need, got, remedy, layer="FlashAttention"):
    """(type, message) of an engine's refusal."""
    text = "For '{}' (engine '{}'), '{}' must be {}, but got {}. {}"
    return UnsupportedError, text.format(layer, engine, argument, need, got, remedy)


# (argument, value, error, text): scalar arguments that may be tensors; none is converted silently.
PLAIN = [
    ("dropout_seed", 1.5, TypeError, "None, an int or an int tensor, but got 1.5."),
    ("dropout_seed", True, TypeError, "None, an int or an int tensor, but got True."),
    ("query_seq_lengths", 2.5, TypeError, "None, an int or an int tensor, but got 2.5."),
    ("key_value_seq_lengths", "8", TypeError, "None, an int or an int tensor, but got '8'."),
    ("q_offset", True, TypeError, "None, an int or an integer tensor, but got True."),
]
