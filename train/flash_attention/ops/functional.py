"""The functional MindSpore call: validate, choose an engine, bring tensors to BNSD, run, bring them back.

Everything that is decided from shapes and options happens in :func:`resolve`, a ``constexpr``: ordinary Python that
runs once while a graph is compiled and at every call in PyNative mode. An exception raised there reaches the user
with its own text in both modes, also from nested Cells.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.spec import NO_LIMIT, Operands
from flash_attention.core.validation import Options, TensorInfo, check_bool, check_length, check_seed, make_spec
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.host import is_eager

LAYER = "flash_attention"
_NAMES = (
    "query", "key", "value", "bias", "mask", "alibi_slopes", "sinks", "q_segment_ids", "kv_segment_ids",
    "query_seq_lengths", "key_value_seq_lengths", "q_offset", "dropout_seed",
)  # fmt: skip


def flash_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    engine=None,
    prev_block_num=NO_LIMIT,
    next_block_num=NO_LIMIT,
    block_size=128,
    alibi_slopes=None,
    dropout_rate=0.0,
    dropout_seed=None,
    logits_soft_cap=None,
    sinks=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    q_offset=None,
    layout="BSND",
    return_lse=False,
):
    """FlashAttention-2 (Dao, 2023) in MindSpore: exact attention in memory linear in the sequence lengths.

    The keywords are those of ``flash_attention.jax.flash_attention``. Works in PyNative and graph mode and inside
    ``ms.jit``; differentiable in query, key, value, bias, slopes, sinks, and through the LSE.

    Args:
        query (Tensor): (B, T, N, H); float16, bfloat16 or float32.
        key, value (Tensor): (B, S, K, H); K divides N, query head h uses key head ``h // (N / K)``.
        bias (Tensor): float, broadcastable to (B, N, T, S), added to the scaled scores; differentiable.
        mask (Tensor): keep where True or > 0; broadcastable to (B, N, T, S), or compact (block_size, block_size).
        scale (float): factor on the scores; default ``1 / sqrt(H)``.
        is_causal (bool): key j is visible to query i only when ``j <= i + q_offset``.
        query_seq_lengths, key_value_seq_lengths (int, Tensor): (B,); rows from there on give 0, keys are hidden.
        local_window_size (int, tuple): tokens around the query's position, (left, right), inclusive, None = no limit.
        engine (str): None or 'auto', or one of the engines that ``python -m flash_attention info`` lists.
        prev_block_num, next_block_num (int): visible blocks before and after the query's own; 65536 = no limit.
        block_size (int): tokens in such a block; independent of the tiles that are computed.
        alibi_slopes (Tensor): (N,) or (B, N); adds ``-slope * |i + q_offset - j|`` (Press et al., 2022).
        dropout_rate (float): probability of dropping a softmax weight, in [0, 1); acts whenever it is > 0.
        dropout_seed (int, Tensor): uint32 scalar, needed with dropout; see ``flash_attention.core.dropout``.
        logits_soft_cap (float): scores become ``cap * tanh(score / cap)``, before bias and ALiBi.
        sinks (Tensor): (N,) logits that join the softmax's denominator without a value.
        q_segment_ids, kv_segment_ids (Tensor): int (B, T), (B, S); a query sees keys of its own segment.
        q_offset (int, Tensor): position of query 0, scalar or (B,); default ``S - T`` (bottom-right alignment).
        layout (str): 'BSND' (default) or 'BNSD', for query, key, value and the output.
        return_lse (bool): also return the log-sum-exp, float32 (B, N, T); -inf where a row sees no key.

    Returns:
        Tensor in the query's shape and dtype; with ``return_lse`` a pair (output, LSE). A row that sees no key is 0.

    Raises:
        ValueError, TypeError: bad argument; the message names it, what is needed and what came.
        UnsupportedError: the engine asked for cannot run this call, with the remedy.

    Supported Platforms:
        ``Ascend`` ``GPU`` ``CPU`` (what was proven where: see the support table)
    """
    query_seq_lengths = length_tensor("query_seq_lengths", query_seq_lengths, query)
    key_value_seq_lengths = length_tensor("key_value_seq_lengths", key_value_seq_lengths, query)
    dropout_seed = seed_tensor(LAYER, dropout_seed)
    offset_tensor = q_offset if isinstance(q_offset, Tensor) else None
    offset_int = None if isinstance(q_offset, Tensor) else q_offset
    tensors = (
        query, key, value, bias, mask, alibi_slopes, sinks, q_segment_ids, kv_segment_ids, query_seq_lengths,
        key_value_seq_lengths, offset_tensor, dropout_seed,
    )  # fmt: skip
    options = (
        scale, is_causal, local_window_size, prev_block_num, next_block_num, block_size, dropout_rate,
        logits_soft_cap, offset_int, layout,
    )  # fmt: skip
    shapes, dtypes = describe(LAYER, _NAMES, tensors)
    check_flag(LAYER, "return_lse", return_lse)
    if mask is not None and is_eager():
        check_not_additive(LAYER, mask)
    cell, mask_shape, bias_shape, slopes_shape, axes = resolve(LAYER, shapes, dtypes, options, engine)
    if layout == "BSND":
        query, key, value = swap(query, axes), swap(key, axes), swap(value, axes)
    out, lse = cell(
        query,
        key,
        value,
        None if bias is None else bias.reshape(bias_shape),
        None if mask is None else keep(mask).reshape(mask_shape),
        None if alibi_slopes is None else alibi_slopes.reshape(slopes_shape),
        sinks,
        q_segment_ids,
        kv_segment_ids,
        query_seq_lengths,
        key_value_seq_lengths,
        offset_tensor,
        dropout_seed if dropout_rate > 0 else None,
    )
    if layout == "BSND":
        out = swap(out, axes)
    if return_lse:
        return out, lse
    return out


def swap(x, axes):
    """``x`` with two axes exchanged, as between BSND and BNSD.

    ``axes`` must come out of a ``constexpr`` that has checked the rank, so that a graph checks before it transposes.
    """
    if x.dtype == mstype.bfloat16 and on_cpu():  # the CPU has no bfloat16 transpose
        return x.astype(mstype.float32).swapaxes(axes[0], axes[1]).astype(mstype.bfloat16)
    return x.swapaxes(axes[0], axes[1])


def computable(x):
    """``x`` in a dtype that this device has kernels for, gradients too: half precision becomes float32 on the CPU."""
    if x.dtype != mstype.float32 and on_cpu():
        return x.astype(mstype.float32)
    return x


@constexpr
def on_cpu():
    """True when MindSpore computes on the CPU."""
    return ms.get_context("device_target") == "CPU"


def describe(layer, names, tensors):
    """Shapes and dtypes of a tuple of tensors as constants; None stays None. Runs in graphs."""
    shapes = ()
    dtypes = ()
    for index in range(len(tensors)):
        tensor = tensors[index]
        if not isinstance(tensor, Tensor) and (tensor is not None or index < 3):
            reject(layer, names[index], tensor)
        shapes = shapes + (None if tensor is None else tensor.shape,)
        dtypes = dtypes + (None if tensor is None else tensor.dtype,)
    return shapes, dtypes


@constexpr(check=False)
def reject(layer, name, value):
    """Raise: ``value`` is not a Tensor."""
    raise invalid_type(layer, name, "a Tensor", type(value).__name__)


@constexpr(check=False)
def check_not_additive(layer, mask):
    """A float mask with negative entries was meant to be added. Graphs skip this: values are unknown there."""
    if "Float" in str(mask.dtype) and float(mask.min()) < 0:
        need = "boolean or >= 0 (keep where True or > 0)"
        got, remedy = "a float mask with negative values", "Pass an additive mask as bias=."
        raise invalid_value(layer, "mask", need, got, remedy)


def keep(mask):
    """The functional ``mask`` as booleans: keep where True or > 0."""
    return mask if mask.dtype == mstype.bool_ else mask > 0


@constexpr
def resolve(layer, shapes, dtypes, options, engine, shards=(1, 1)):
    """Validate one call and choose its engine.

    Args:
        layer (str): name used in messages.
        shapes, dtypes (tuple): of query, key, value and the ten operands; None where absent.
        options (tuple): the fields of ``core.validation.Options``.
        engine (str): what the user asked for.
        shards (tuple): (dp, mp), the devices that share batch and heads under semi-automatic parallelism.

    Returns:
        the spec's differentiable Cell, the shapes its mask, bias and slopes must be given (() where absent), and the
        axes that lead from BSND to BNSD.
    """
    infos = [None if shape is None else info(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    ENGINES.check_name(engine, layer)
    spec = make_spec(layer, infos[0], infos[1], infos[2], Operands(*infos[3:]), Options(*options))
    cell = ENGINES.choose(spec, engine, layer).run.cell(spec, shards)
    return cell, spec.mask_shape or (), spec.bias_shape or (), spec.alibi_shape or (), (1, 2)


@constexpr
def counted(length):
    """0 .. length - 1 as an int32 Tensor."""
    return Tensor(np.arange(length, dtype=np.int32))


def info(shape, dtype):
    """:class:`TensorInfo` from MindSpore's shape (None or -1 = only known at run time) and dtype ('Float32')."""
    return TensorInfo(tuple(-1 if size is None else size for size in shape), str(dtype).lower())


@constexpr
def check_flag(layer, name, value):
    """Raise unless ``value`` is a bool."""
    check_bool(layer, name, value)


def length_tensor(name, value, query):
    """Lengths given as an int become a constant tensor (B,)."""
    if value is None or isinstance(value, Tensor):
        return value
    return _constant_vector(name, value, query.shape)


@constexpr
def _constant_vector(name, value, query_shape):
    length = check_length(LAYER, name, value)
    batch = query_shape[0] if query_shape else 1  # a wrong rank is reported by resolve()
    if batch is None or batch < 0:
        raise invalid_value(LAYER, name, "a tensor of shape (B,) when the batch is dynamic", value)
    return Tensor(np.full((batch,), length, np.int32))


def seed_tensor(layer, seed):
    """A seed given as an int becomes a constant uint32 scalar."""
    if seed is None or isinstance(seed, Tensor):
        return seed
    return _constant_seed(layer, seed)


@constexpr
def _constant_seed(layer, seed):
    return Tensor(np.asarray(check_seed(layer, seed), np.uint32))
