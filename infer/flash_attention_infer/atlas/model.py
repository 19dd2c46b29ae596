"""The documented behaviour of the inference operators as small numpy models: the judge of the mapping.

Same names and arguments as in ``mindspore.ops``; arguments that the mapping never gives are left out. Written from the
docstrings of mindspore 2.10, not compared with a device. What the documents forbid is refused; what they leave open is
answered in the way that a caller may not rely on: rows without a visible key, and rows beyond a length, are NaN.
"""

import numpy as np

from flash_attention_infer.atlas.mapping import COMPACT, NO_TOKENS, SCALE_MULTIPLIES_PSE_SHIFT


def _need(holds, operator, text):
    if not holds:
        raise ValueError("For '{}', {}.".format(operator, text))


def _heads(x, layout, heads):
    """(B, N, S, D) of a tensor in BSH, BNSD or BSND."""
    if layout == "BSH":
        x = x.reshape(x.shape[0], x.shape[1], heads, -1)
    return x if layout == "BNSD" else x.swapaxes(1, 2)


def _back(x, layout, like):
    return (x if layout == "BNSD" else x.swapaxes(1, 2)).reshape(like.shape)


def _softmax(q, k, v, scale, discard, pse):
    """``(out, lse)`` of (B, N, Sq, D), (B, K, Sk, D); rows that see nothing are NaN."""
    group = q.shape[1] // k.shape[1]
    q, k, v = [np.asarray(x, np.float32) for x in (q, k, v)]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores, pse = np.matmul(q, k.swapaxes(-1, -2)), np.float32(0) if pse is None else np.asarray(pse, np.float32)
    scores = scale * (scores + pse) if SCALE_MULTIPLIES_PSE_SHIFT else scale * scores + pse
    scores = np.where(discard, -np.inf, scores)
    with np.errstate(all="ignore"):
        peak = scores.max(-1, keepdims=True)
        weights = np.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        v = np.where(np.isfinite(v), v, 0)  # what is discarded is not read
        return np.matmul(weights / total, v), (peak + np.log(total))


def _beyond(length, lengths, operator):
    """Boolean (B, length): places from each length on."""
    lengths = np.asarray(lengths).reshape(-1, 1)
    _need((lengths > 0).all() and (lengths <= length).all(), operator, "every length must be in [1, S]")
    return np.arange(length)[None, :] >= lengths


def _sparse(operator, mask, mode, pre, after, batch, q_len, kv_len):
    """Boolean (B, 1, Sq, Sk): what the sparse mode and the mask discard."""
    _need(mode in (0, 1, 2, 3, 4), operator, "'sparse_mode' must be 0, 1, 2, 3 or 4")
    nothing = np.zeros((batch, 1, q_len, kv_len), bool)
    if mode == 0 and mask is None:
        return nothing
    _need(mask is not None, operator, "sparse_mode {} needs a mask".format(mode))
    mask = np.asarray(mask)
    _need(mask.dtype in (np.bool_, np.int8, np.uint8), operator, "the mask must be bool, int8 or uint8")
    if mode < 2:
        shapes = ((q_len, kv_len), (1, q_len, kv_len), (batch, q_len, kv_len), (1, 1, q_len, kv_len))
        _need(mask.shape in shapes + ((batch, 1, q_len, kv_len),), operator, "the mask must be (B, 1, Q_S, KV_S)")
        return nothing | (mask.astype(bool) if mask.ndim == 4 else mask.reshape(-1, 1, q_len, kv_len).astype(bool))
    triangle = np.triu(np.ones((COMPACT, COMPACT), bool), 1)
    _need(mask.shape[-2:] == triangle.shape and (mask.astype(bool) == triangle).all(), operator,
          "sparse modes 2, 3 and 4 need the (2048, 2048) triangle")  # fmt: skip
    _need(mode != 4 or (pre >= 0 and after >= 0), operator, "'pre_tokens' and 'next_tokens' must not be negative")
    pre, after = (pre, after) if mode == 4 else (NO_TOKENS, 0)
    distance = np.arange(kv_len)[None, :] - np.arange(q_len)[:, None] - (0 if mode == 2 else kv_len - q_len)
    return nothing | (distance > after) | (distance < -pre)


def _check_heads(operator, query, heads, kv_heads, layout):
    _need(layout in ("BSH", "BNSD", "BSND"), operator, "'input_layout' must be BSH, BNSD or BSND")
    kv_heads = kv_heads or heads
    _need(heads % kv_heads == 0 and heads // kv_heads <= 64, operator, "'num_key_value_heads' must divide 'num_heads'")
    _need(str(query.dtype) in ("float16", "bfloat16"), operator, "'query' must be float16 or bfloat16")
    return kv_heads


def prompt_flash_attention(
    query, key, value, attn_mask=None, actual_seq_lengths=None, actual_seq_lengths_kv=None, pse_shift=None,
    num_heads=1, scale_value=1.0, pre_tokens=NO_TOKENS, next_tokens=0, input_layout="BSH", num_key_value_heads=0,
    sparse_mode=0,
):  # fmt: skip
    """The full-inference operator: the attention output, like ``query``."""
    name = "prompt_flash_attention"
    _need(input_layout in ("BSH", "BNSD"), name, "'input_layout' must be BSH or BNSD")
    return _prompt(
        name, query, key, value, attn_mask, actual_seq_lengths, actual_seq_lengths_kv, pse_shift, num_heads,
        scale_value, pre_tokens, next_tokens, input_layout, num_key_value_heads, sparse_mode,
    )[0]  # fmt: skip


def _prompt(
    name, query, key, value, mask, q_lengths, kv_lengths, pse, heads, scale, pre, after, layout, kv_heads, mode
):
    kv_heads = _check_heads(name, query, heads, kv_heads, layout)
    _need(key.dtype == value.dtype == query.dtype, name, "'query', 'key' and 'value' must have the same dtype")
    q, k, v = [_heads(x, layout, n) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))]
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    discard = _sparse(name, mask, mode, pre, after, batch, q_len, kv_len)
    if kv_lengths is not None:
        discard = discard | _beyond(kv_len, kv_lengths, name)[:, None, None, :]
    if pse is not None:
        shapes = ((1, heads, q_len, kv_len), (batch, heads, q_len, kv_len))
        _need(pse.dtype == query.dtype and pse.shape in shapes, name,
              "'pse_shift' must be (B, N, Q_S, KV_S) in the query's dtype")  # fmt: skip
    out, lse = _softmax(q, k, v, scale, discard, pse)
    if q_lengths is not None:
        out = np.where(_beyond(q_len, q_lengths, name)[:, None, :, None], np.nan, out)
    return _back(out.astype(query.dtype), layout, query), lse


def incre_flash_attention(
    query, key, value, attn_mask=None, actual_seq_lengths=None, pse_shift=None, block_table=None, num_heads=1,
    input_layout="BSH", scale_value=1.0, num_key_value_heads=0, block_size=0,
):  # fmt: skip
    """The one-token operator; ``key`` and ``value`` are lists of one tensor."""
    name = "incre_flash_attention"
    _need(isinstance(key, (list, tuple)) and isinstance(value, (list, tuple)), name, "'key' must be a list")
    _need(input_layout in ("BSH", "BNSD"), name, "'input_layout' must be BSH or BNSD")
    _need(key[0].dtype == query.dtype, name, "'key' must have the query's dtype without antiquant_scale")
    return _one_token(name, query, key[0], value[0], attn_mask, actual_seq_lengths, pse_shift, block_table, num_heads,
                      input_layout, scale_value, num_key_value_heads, block_size)[0]  # fmt: skip


def _one_token(name, query, key, value, mask, lengths, pse, tables, heads, layout, scale, kv_heads, block_size):
    kv_heads = _check_heads(name, query, heads, kv_heads, layout)
    q = _heads(query, layout, heads)
    _need(q.shape[2] == 1, name, "Q_S must be 1")
    if tables is not None:
        align = 32 if key.dtype == np.int8 else 16
        _need(block_size % align == 0 and key.shape[1] == block_size, name, "'block_size' must be a multiple of 16")
        _need(lengths is not None, name, "'actual_seq_lengths' must come with 'block_table'")
        key, value = [x[tables].reshape(len(tables), -1, x.shape[-1]) for x in (key, value)]
    k, v = [_heads(x, layout, kv_heads) for x in (key, value)]
    batch, kv_len = k.shape[0], k.shape[2]
    discard = np.zeros((batch, 1, 1, kv_len), bool)
    if lengths is not None:
        discard = discard | _beyond(kv_len, lengths, name)[:, None, None, :]
    if mask is not None:
        _need(
            mask.shape in ((batch, kv_len), (batch, 1, kv_len), (batch, 1, 1, kv_len)), name, "the mask must be (B, S)"
        )
        discard = discard | mask.reshape(batch, 1, 1, kv_len).astype(bool)
    if pse is not None:
        _need(pse.dtype == query.dtype and pse.shape in ((1, heads, 1, kv_len), (batch, heads, 1, kv_len)), name,
              "'pse_shift' must be (B, N, 1, S) in the query's dtype")  # fmt: skip
    out, lse = _softmax(q, k, v, scale, discard, pse)
    return _back(out.astype(query.dtype), layout, query), lse


def fused_infer_attention_score(
    query, key, value, *, pse_shift=None, atten_mask=None, actual_seq_lengths=None, actual_seq_lengths_kv=None,
    antiquant_scale=None, block_table=None, num_heads=1, scale=1.0, pre_tokens=NO_TOKENS, next_tokens=NO_TOKENS,
    input_layout="BSH", num_key_value_heads=0, sparse_mode=0, inner_precise=1, block_size=0, antiquant_mode=0,
    softmax_lse_flag=False,
):  # fmt: skip
    """Both branches, by Q_S: ``(out, softmax_lse (B, N, Q_S, 1))``, the latter zeros (1,) unless asked for."""
    name = "fused_infer_attention_score"
    one = _heads(query, input_layout, num_heads).shape[2] == 1
    _need(inner_precise in ((0, 1) if one else (0, 1, 2, 3)), name, "'inner_precise' must be 0 or 1 when Q_S is 1")
    if antiquant_scale is not None:
        _need(
            antiquant_mode == 1 and antiquant_scale.dtype == np.float32, name, "per-token scales need antiquant_mode 1"
        )
        _need(one and key.dtype == np.int8, name, "per-token scales need int8 keys and Q_S 1")
        key, value, block_table = _dequantize(key, value, antiquant_scale, block_table, block_size, name)
    if one:
        out, lse = _one_token(name, query, key, value, atten_mask, actual_seq_lengths_kv, pse_shift, block_table,
                              num_heads, input_layout, scale, num_key_value_heads, block_size)  # fmt: skip
    else:
        _need(block_table is None, name, "'block_table' is invalid when Q_S > 1")
        out, lse = _prompt(
            name, query, key, value, atten_mask, actual_seq_lengths, actual_seq_lengths_kv, pse_shift, num_heads,
            scale, pre_tokens, next_tokens, input_layout, num_key_value_heads, sparse_mode,
        )  # fmt: skip
    return out, lse if softmax_lse_flag else np.zeros(1, np.float32)


def _dequantize(key, value, scale, tables, block_size, name):
    """float32 keys and values (B, S, H) from int8 ones and scales (2, B, S)."""
    if tables is not None:
        _need(block_size % 32 == 0, name, "'block_size' must be a multiple of 32 with int8 keys")
        key, value = [x[tables].reshape(len(tables), -1, x.shape[-1]) for x in (key, value)]
    _need(scale.shape == (2,) + key.shape[:2], name, "'antiquant_scale' must be (2, B, S)")
    return key * scale[0][..., None], value * scale[1][..., None], None


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping):
    """Write tokens (t, N, D) at ``slot_mapping`` (t,) of caches (blocks, block_size, N, D), in place; gives ``key``."""
    name = "reshape_and_cache"
    _need(key.dtype == key_cache.dtype == np.float16, name, "'key' and 'key_cache' must be float16")
    _need(key.shape[1:] == key_cache.shape[2:], name, "'key' must be (num_tokens, num_head, head_dim)")
    _need(
        slot_mapping.dtype == np.int32 and slot_mapping.shape == key.shape[:1],
        name,
        "'slot_mapping' must be (t,) int32",
    )
    for cache, x in ((key_cache, key), (value_cache, value)):
        cache.reshape((-1,) + cache.shape[2:])[slot_mapping] = x
    return key


def paged_attention(query, key_cache, value_cache, block_tables, context_lens, head_num, scale_value, kv_head_num):
    """PagedAttention: query (tokens, N, D) -> like it; one token of each sequence."""
    name = "paged_attention"
    _need(query.dtype == key_cache.dtype == np.float16, name, "'query' and the caches must be float16")
    key, value = [x[block_tables].reshape((len(query), -1) + x.shape[2:]) for x in (key_cache, value_cache)]
    q, k, v = query[:, :, None], key.swapaxes(1, 2), value.swapaxes(1, 2)
    _need((q.shape[1], k.shape[1]) == (head_num, kv_head_num), name, "'head_num' and 'kv_head_num' must fit")
    discard = _beyond(k.shape[2], context_lens, name)[:, None, None, :]
    return _softmax(q, k, v, scale_value, discard, None)[0][:, :, 0].astype(query.dtype)
