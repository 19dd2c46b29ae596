"""Blockwise attention and feed-forward network in MindSpore (Liu and Abbeel, 2023): the core call in chunks."""

import dataclasses

from mindspore import dtype as mstype
from mindspore import nn, ops
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import blockwise as shared
from flash_attention.core.validation import Options
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import computable, describe, resolve, seed_tensor

LAYER = "BlockwiseAttention"
_NAMES = ("query", "key", "value", "bias", "mask", "", "", "", "", "", "key_value_seq_lengths", "q_offset", "seed")
_depend = P.Depend()


def chunked_attention(layer, query, key, value, bias, mask, lengths, q_offset, seed, options, engine):
    """The core call on BNSD tensors in compute tiles of the caller's choice.

    Args:
        bias, mask, lengths, q_offset, seed (Tensor): operands of ``flash_attention``, or None.
        options (tuple): the fields of ``core.validation.Options``, ``tile`` among them.
    """
    operands = (bias, mask, None, None, None, None, None, lengths, q_offset, seed)
    shapes, dtypes = describe(layer, _NAMES, (query, key, value) + operands)
    return resolve(layer, shapes, dtypes, options, engine)[0](query, key, value, *operands)[0]


class BlockwiseAttention(SeededCell):
    r"""``softmax(query key^T + bias) value``, a query chunk at a time, for any chunk sizes: ``blockwise_compute_attn``.

    Scores are **not scaled**: divide the query by ``sqrt(D)``. Key chunks above the diagonal are skipped. The scores of
    a chunk are never kept: the backward pass rebuilds them, whatever the policy.

    Args:
        deterministic (bool): True = no dropout, also in training mode. Default: False.
        attn_pdrop (float): probability of dropping a softmax weight, in [0, 1); acts in training mode. Default: 0.0.
        causal_mask (bool): key j visible to query i only when ``j <= i``, both counted from their own start.
            Default: True.
        query_chunk_size, key_chunk_size (int): most tokens of a chunk; None = the whole length. They never change a
            result. The engine 'portable' holds the scores of one query chunk against all keys. Default: None.
        dtype: of the output. Default: float32.
        policy (str): what else may be kept for the backward pass, the output and its LSE: 'nothing_saveable' computes
            them again in graph mode; None and the other ``jax.checkpoint_policies`` keep them.
            Default: 'nothing_saveable'.
        prevent_cse (bool): JAX's; recomputed operators are always kept apart here. Default: False.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.

    Inputs:
        - **query** (Tensor) - (B, Nq, H, D).
        - **key**, **value** (Tensor) - (B, Nk, H, D).
        - **bias** (Tensor) - added to the scores, each axis 1 or that of (B, H, Nq, Nk); -inf hides a key;
          differentiable. Default: None.
        - **dropout_seed** (int, Tensor) - uint32; None = a new one at every call. Default: None.

    Outputs:
        Tensor (B, Nq, H, D) in ``dtype``; a query that sees no key gives 0.

    Raises:
        KeyError: an unknown policy.
        ValueError, TypeError: shapes that do not fit.
    """

    def __init__(
        self, deterministic=False, attn_pdrop=0.0, causal_mask=True, query_chunk_size=None, key_chunk_size=None,
        dtype=mstype.float32, policy="nothing_saveable", prevent_cse=False, *, engine=None
    ):  # fmt: skip
        shared.check_policy(LAYER, policy, prevent_cse)
        shared.check_options(LAYER, {"deterministic": deterministic, "causal_mask": causal_mask}, attn_pdrop)
        for name, size in (("query_chunk_size", query_chunk_size), ("key_chunk_size", key_chunk_size)):
            shared.check_chunk(LAYER, name, size, 1)
        super().__init__(0.0 if deterministic else float(attn_pdrop))
        ENGINES.check_name(engine, LAYER)
        self.attend = _Attend(self.dropout_rate, causal_mask, (query_chunk_size, key_chunk_size), dtype, engine)
        if shared.recomputes(policy):
            self.attend.recompute()

    def construct(self, query, key, value, bias=None, dropout_seed=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        seed = None
        if self.training and self.dropout_rate > 0:
            seed = self.next_seed(query) if dropout_seed is None else seed_tensor(LAYER, dropout_seed)
        return self.attend(query, key, value, bias, seed)


class _Attend(nn.Cell):
    """What is recomputed: the core call, its seed decided before."""

    def __init__(self, rate, causal, chunks, dtype, engine):
        super().__init__()
        self.rate, self.causal, self.chunks, self.dtype, self.engine = rate, causal, chunks, dtype, engine

    def construct(self, query, key, value, bias, seed):
        bias_shape = None if bias is None else bias.shape
        rate = 0.0 if seed is None else self.rate
        options = _options(query.shape, key.shape, value.shape, bias_shape, self.causal, rate, self.chunks)
        query, key, value = _heads_first(query), _heads_first(key), _heads_first(value)
        mask = None
        if bias is not None:
            wide = bias.astype(mstype.float32)
            mask = wide > -3.4e38  # what -inf hides is no key, however many there are
            bias = ops.where(mask, wide, ops.zeros_like(wide))
        out = chunked_attention(LAYER, query, key, value, bias, mask, None, None, seed, options, self.engine)
        return computable(out).swapaxes(1, 2).astype(self.dtype)


def _heads_first(x):
    return computable(x).swapaxes(1, 2).astype(x.dtype)


@constexpr
def _options(query, key, value, bias, causal, rate, chunks):
    shared.check_attention(LAYER, query, key, value)
    if bias is not None:
        shared.check_bias(LAYER, bias, query, key)
    return tiled_options(chunks, query[1], key[1], scale=1.0, is_causal=causal, q_offset=0, dropout_rate=rate)


def tiled_options(chunks, q_len, kv_len, **options):
    """The fields of ``core.validation.Options`` for BNSD tensors and compute tiles of the sizes ``chunks``."""
    tile = tuple(length if size is None else min(size, length) for size, length in zip(chunks, (q_len, kv_len)))
    return dataclasses.astuple(Options(layout="BNSD", tile=tile, **options))


class BlockwiseFFN(nn.Cell):
    r"""A position-wise network, ``chunk_size`` tokens at a time: ``blockwise_compute_ffn``.

    The hidden activation of a chunk is all that exists; chunks run one after the other. A graph has a copy of the
    network for each of them.

    Args:
        cell (Cell): with a method ``forward_ffn(chunk)``, or callable as ``cell(chunk)``.
        chunk_size (int): tokens of a chunk; None = all at once.
        policy (str): 'nothing_saveable' computes a chunk again in the backward pass, in graph mode; None and the other
            ``jax.checkpoint_policies`` keep what it needs. Default: 'nothing_saveable'.
        prevent_cse (bool): JAX's; recomputed operators are always kept apart here. Default: False.

    Inputs:
        - **inputs** (Tensor) - (B, N, E), any N.

    Outputs:
        What one call on the whole sequence gives. Dropout within ``cell`` follows its training mode.

    Raises:
        KeyError: an unknown policy.
        ValueError, TypeError: bad argument.
    """

    def __init__(self, cell, chunk_size, policy="nothing_saveable", prevent_cse=False):
        super().__init__()
        shared.check_policy("BlockwiseFFN", policy, prevent_cse)
        shared.check_chunk("BlockwiseFFN", "chunk_size", chunk_size, 1)
        self.chunk_size = chunk_size
        self.network = _Network(cell)
        if shared.recomputes(policy):
            self.network.recompute()

    def construct(self, inputs):
        """Run; shapes and meaning of the inputs are in the class's documentation."""
        size = _chunk("BlockwiseFFN", inputs.shape, self.chunk_size)
        return over_chunks(self.network, inputs, size)


class _Network(nn.Cell):
    """What is recomputed: one call of the user's network."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.named = cell, hasattr(cell, "forward_ffn")

    def construct(self, chunk):
        if self.named:
            return self.cell.forward_ffn(chunk)
        return self.cell(chunk)


def over_chunks(cell, x, size):
    """``cell`` on ``size`` rows of axis 1 of ``x`` (B, N, E) at a time, in order, joined."""
    length = x.shape[1]
    if size >= length:
        return cell(x)
    wide = computable(x)
    first = cell(wide[:, :size].astype(x.dtype))
    outs = (computable(first),)
    for start in range(size, length, size):
        chunk = wide[:, start : min(start + size, length)].astype(x.dtype)
        # Each waits for the one before, else a graph runs breadth first and holds all chunks at once.
        outs = outs + (computable(cell(_depend(chunk, outs[-1]))),)
    return ops.concat(outs, 1).astype(first.dtype)


@constexpr
def _chunk(layer, shape, size):
    return shared.check_ffn(layer, shape, size)
