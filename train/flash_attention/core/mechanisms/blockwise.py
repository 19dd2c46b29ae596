"""Blockwise parallel transformer (Liu and Abbeel, 2023): checks, the shapes of its masks, and its loss in numpy.

A query chunk runs through attention and feed-forward network before the next one begins, so that nothing of the full
length times the hidden width, or of the length squared, exists. The loss does the same with the vocabulary.
"""

import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.validation import check_bool, check_int, check_positive, check_rate

POLICIES = (
    "everything_saveable", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable",
)  # fmt: skip
"""What may be kept for the backward pass: members of ``jax.checkpoint_policies``. None: no rematerialisation."""

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "swish", "quick_gelu")
REDUCTIONS = ("token_mean", "chunk_mean")


def check_policy(layer, policy, prevent_cse):
    """Raise unless both are known: KeyError for an unknown policy, as a look-up in ``jax.checkpoint_policies`` does."""
    if policy is not None and policy not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise KeyError("For '{}', the 'policy' must be None or one of {}, but got {!r}.".format(layer, names, policy))
    check_bool(layer, "prevent_cse", prevent_cse)


def recomputes(policy):
    """True where MindSpore, which keeps or recomputes a whole Cell, has to recompute it."""
    return policy == "nothing_saveable"


def check_chunk(layer, name, size, length):
    """Raise unless ``size`` is None or an int >= 1; returns the tokens of a chunk, at most ``length``."""
    return length if size is None else min(check_int(layer, name, size, 1), length)


def check_options(layer, flags, rate):
    """Raise unless ``flags`` (``{name: value}``) are bools and ``rate`` is a probability."""
    for name, flag in flags.items():
        check_bool(layer, name, flag)
    check_rate(layer, "attn_pdrop", rate)


def check_attention(layer, query, key, value):
    """Raise unless the shapes are (B, Nq, H, D) and (B, Nk, H, D) twice."""
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) != 4 or shape[0] != query[0] or shape[2:] != query[2:]:
            need = "of shape (B, N, H, D), all but N as the query's"
            raise invalid_value(layer, name, need, "shape {}".format(tuple(shape)))
    if tuple(key) != tuple(value):
        raise invalid_value(layer, "value", "of the key's shape {}".format(tuple(key)), tuple(value))


def check_bias(layer, shape, query, key):
    """Raise unless a bias has four axes, each 1 or that of (B, H, Nq, Nk). Arguments are shapes, BNHD."""
    full = (query[0], query[2], query[1], key[1])
    if len(shape) != 4 or any(size not in (1, want) for size, want in zip(shape, full)):
        need = "of four axes, each 1 or that of {}".format(full)
        raise invalid_value(layer, "bias", need, "shape {}".format(tuple(shape)))


def check_ffn(layer, shape, chunk_size):
    """Raise unless the inputs are (B, N, E); returns the tokens of a chunk."""
    if len(shape) != 3:
        raise invalid_value(layer, "inputs", "of shape (B, N, E)", "shape {}".format(tuple(shape)))
    return check_chunk(layer, "chunk_size", chunk_size, shape[1])


def check_loss(layer, logits, tokens, valid, chunk_size, reduction):
    """Raise unless the shapes are (B, N, V or E), (B, N) and (B, N) or None; returns the tokens of a chunk."""
    if len(logits) != 3:
        raise invalid_value(layer, "logits", "of shape (B, N, V)", "shape {}".format(tuple(logits)))
    for name, shape in (("tokens", tokens), ("valid", valid)):
        if shape is not None and tuple(shape) != tuple(logits[:2]):
            need = "of shape ({}, {})".format(*logits[:2])
            raise invalid_value(layer, name, need, "shape {}".format(tuple(shape)))
    if reduction not in REDUCTIONS:
        need = "one of {}".format(", ".join(map(repr, REDUCTIONS)))
        raise invalid_value(layer, "reduction", need, repr(reduction))
    return check_chunk(layer, "chunk_size", chunk_size, logits[0] * logits[1])


def check_integers(layer, dtype):
    """Raise unless ``tokens`` are integers. ``dtype`` is its name, in lower case."""
    if "int" not in dtype:
        raise invalid_type(layer, "tokens", "an integer tensor", dtype)


def check_head(layer, hidden, weight, bias):
    """Raise unless the head is a weight (V, E) and a bias (V,) or None for hidden states (B, N, E)."""
    if len(weight) != 2 or weight[1] != hidden[-1]:
        need = "of shape (V, {})".format(hidden[-1])
        raise invalid_value(layer, "weight", need, "shape {}".format(tuple(weight)))
    if bias is not None and tuple(bias) != tuple(weight[:1]):
        raise invalid_value(layer, "bias", "of shape ({},)".format(weight[0]), "shape {}".format(tuple(bias)))


def check_block(layer, sizes, rates, flags, rotary_dim, epsilon, activation):
    """Raise unless the block's sizes fit; returns how many features of a head are rotated.

    Args:
        sizes: ``{name: value}`` of ints >= 1, with 'hidden_size' and 'num_heads'; chunk sizes may be None.
        rates, flags: ``{name: value}``.
    """
    for name, size in sizes.items():
        if size is not None or "chunk" not in name:
            check_int(layer, name, size, 1)
    for name, rate in rates.items():
        check_rate(layer, name, rate)
    for name, flag in flags.items():
        check_bool(layer, name, flag)
    check_positive(layer, "layer_norm_epsilon", epsilon)
    if sizes["hidden_size"] % sizes["num_heads"]:
        need = "a multiple of num_heads = {}".format(sizes["num_heads"])
        raise invalid_value(layer, "hidden_size", need, sizes["hidden_size"])
    if activation not in ACTIVATIONS:
        need = "one of {}".format(", ".join(map(repr, ACTIVATIONS)))
        raise invalid_value(layer, "activation_function", need, repr(activation))
    dim = sizes["hidden_size"] // sizes["num_heads"]
    rotated = dim if rotary_dim is None or rotary_dim == 0 else check_int(layer, "rotary_dim", rotary_dim, 2, dim)
    if rotated % 2:
        raise invalid_value(layer, "rotary_dim", "even (features are rotated in pairs)", rotated)
    return rotated


def mask_shape(layer, shape, batch, heads, q_len, kv_len):
    """4-D shape of an ``attention_mask``: (B, Nk), (1|B, 1, 1, Nk) or (1|B, 1|H, Nq, Nk); ``shape`` may be None."""
    if shape is None:
        return ()
    full = (shape[0], 1, 1, shape[1]) if len(shape) == 2 else tuple(shape)
    fits = len(full) == 4 and full[0] in (1, batch) and full[1] in (1, heads) and full[3] == kv_len
    if not fits or full[2] not in (1, q_len):
        need = "of shape ({b}, {k}), (1|{b}, 1, 1, {k}) or (1|{b}, 1|{h}, {q}, {k})".format(
            b=batch, h=heads, q=q_len, k=kv_len
        )
        raise invalid_value(layer, "attention_mask", need, "shape {}".format(tuple(shape)))
    return full


def check_positions(layer, shape, batch, length):
    """Raise unless ``position_ids`` is (1|B, S)."""
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] != length:
        need = "of shape (1|{}, {})".format(batch, length)
        raise invalid_value(layer, "position_ids", need, "shape {}".format(tuple(shape)))


def check_hidden(layer, shape, width):
    """Raise unless the hidden states are (B, S, width)."""
    if len(shape) != 3 or shape[2] != width:
        raise invalid_value(
            layer, "hidden_states", "of shape (B, S, {})".format(width), "shape {}".format(tuple(shape))
        )


def check_room(layer, index, count, size):
    """Raise where ``count`` more tokens do not fit into a cache of ``size`` that holds ``index``."""
    if index + count > size:
        need = "at most {} more tokens (the cache has room for {})".format(size - index, size)
        raise invalid_value(layer, "hidden_states", need, count, "Allocate a longer cache with init_cache=True.")


def cross_entropy(logits, tokens, valid=None, chunk_size=None, reduction="token_mean"):
    """The loss as a plain formula: ``(loss, accuracy, gradient of the loss by the logits)``, float64 numpy.

    Arguments as those of ``blockwise_cross_entropy``.
    """
    shape = logits.shape
    logits, tokens = np.asarray(logits, np.float64).reshape(-1, shape[-1]), np.asarray(tokens).reshape(-1)
    counted = np.ones(len(tokens), bool) if valid is None else np.asarray(valid).reshape(-1) > 0
    labels = np.where(counted, tokens, 0)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nll = -log_probs[np.arange(len(labels)), labels]
    weights = _token_weights(counted, chunk_size, reduction)
    grad = np.exp(log_probs)
    grad[np.arange(len(labels)), labels] -= 1.0
    right = logits.argmax(-1) == labels
    return (weights * nll).sum(), (weights * right).sum(), (weights[:, None] * grad).reshape(shape)


def _token_weights(counted, chunk_size, reduction):
    """The weight of every token's loss: 1 / count over all, or the mean over chunks of 1 / count within each."""
    if reduction == "token_mean":
        return counted / max(counted.sum(), 1.0)
    size = chunk_size or len(counted)
    chunks = [counted[start : start + size] for start in range(0, len(counted), size)]
    return np.concatenate([chunk / max(chunk.sum(), 1.0) for chunk in chunks]) / len(chunks)
