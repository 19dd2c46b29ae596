"""The functional JAX call: validate, choose an engine, bring tensors to BNSD, run, bring them back."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.spec import KEYWORDS, NO_LIMIT, Operands
from flash_attention.core.validation import Options, TensorInfo, check_bool, check_length, check_seed, make_spec
from flash_attention.jax.engines import ENGINES

LAYER = "flash_attention"


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
    implementation=None,
    return_residual=False,
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
    """FlashAttention-2 (Dao, 2023): exact attention in memory linear in the sequence lengths.

    Every keyword of ``jax.nn.dot_product_attention`` has the same meaning here. Two documented differences: with
    ``T != S`` causality and windows align bottom-right (``q_offset=0`` gives jax.nn's top-left), and a row that sees
    no key is 0 (there: the mean of the values).

    Args:
        query: (B, T, N, H), or (T, N, H) without batch; float16, bfloat16, float32 (float64: 'reference' only).
        key, value: (B, S, K, H); K divides N, query head h uses key head ``h // (N / K)``.
        bias: float, broadcastable to (B, N, T, S), added to the scaled scores; differentiable.
        mask: keep where True or > 0; broadcastable to (B, N, T, S), or compact (block_size, block_size).
        scale: factor on the scores; default ``1 / sqrt(H)``.
        is_causal: key j is visible to query i only when ``j <= i + q_offset``.
        query_seq_lengths, key_value_seq_lengths: int (B,) or int; rows from there on give 0, keys are hidden.
        local_window_size: int or (left, right) tokens around the query's position, inclusive; None = no limit.
        implementation: None or 'auto' (best engine), 'xla' (blockwise), 'pallas' (our GPU kernels), 'mosaic' (our
            Hopper kernels, never run on a device), 'cudnn' (NVIDIA), 'splash' (TPU) or 'reference' (plain formula, the
            judge).
        return_residual: also return the LSE as (B, T, N), as jax.nn does.
        prev_block_num, next_block_num: visible blocks before and after the query's own block; 65536 = no limit.
        block_size: tokens in such a block; independent of the tiles that are computed.
        alibi_slopes: (N,) or (B, N); adds ``-slope * |i + q_offset - j|`` (Press et al., 2022); differentiable.
        dropout_rate: probability of dropping a softmax weight, in [0, 1); acts whenever it is > 0.
        dropout_seed: uint32 scalar, needed with dropout; the mask is a function of (seed, b, head, i, j).
        logits_soft_cap: scores become ``cap * tanh(score / cap)``, before bias and ALiBi.
        sinks: (N,) logits that join the softmax's denominator without a value; differentiable.
        q_segment_ids, kv_segment_ids: int (B, T), (B, S); a query sees keys of its own segment.
        q_offset: position of query 0, an int (fixed at compile time) or an int array, scalar or (B,), that may be
            traced; default ``S - T``.
        layout: 'BSND' (default) or 'BNSD', for query, key, value and the output.
        return_lse: also return the log-sum-exp of the scores, float32 (B, N, T); -inf where a row sees no key;
            differentiable.

    Returns:
        the output in the query's shape and dtype; with ``return_lse`` or ``return_residual`` a pair (output, LSE).

    Raises:
        ValueError, TypeError: bad argument; the message names it, what is needed and what came.
        UnsupportedError: the implementation asked for cannot run this call, with the remedy.
    """
    for name, flag in (("return_lse", return_lse), ("return_residual", return_residual)):
        check_bool(LAYER, name, flag)
    if return_lse and return_residual:
        raise invalid_value(LAYER, "return_residual", "False when return_lse=True", True, "Both return the LSE.")
    operands, options = call_of(
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        q_offset=q_offset,
        dropout_seed=dropout_seed,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        prev_block_num=prev_block_num,
        next_block_num=next_block_num,
        block_size=block_size,
        dropout_rate=dropout_rate,
        logits_soft_cap=logits_soft_cap,
        layout=layout,
    )
    ENGINES.check_name(implementation, LAYER)
    with_lse = return_lse or return_residual
    if jnp.ndim(query) == 3:
        query, key, value = (_batch_of_one(x) for x in (query, key, value))
        ids = {name: _batch_of_one(getattr(operands, name)) for name in ("q_segment_ids", "kv_segment_ids")}
        operands = operands._replace(**ids)
        out, lse = attend(LAYER, query, key, value, operands, options, implementation, with_lse=with_lse)
        out, lse = out[0], lse[0] if with_lse else None
    else:
        out, lse = attend(LAYER, query, key, value, operands, options, implementation, with_lse=with_lse)
    if return_residual:
        return out, jnp.swapaxes(lse, -1, -2)
    return (out, lse) if return_lse else out


def call_of(q_offset=None, **arguments):
    """Keywords of :func:`flash_attention` (and ``tile``, a compute tile) as ``(Operands, Options)``."""
    operands = Operands(**{field: arguments.pop(name, None) for name, field in KEYWORDS.items()})
    if hasattr(q_offset, "ndim"):  # an array, also a traced one, is a run-time operand
        return operands._replace(q_offset=q_offset), Options(**arguments)
    return operands, Options(q_offset=q_offset, **arguments)


def attend(layer, query, key, value, operands, options, implementation=None, wide=False, with_lse=True):
    """The call behind both front ends: batched tensors in ``options.layout``, ``(out, lse (B, N, T))`` out.

    Args:
        layer: name used in error messages.
        operands: :class:`Operands` as the user gave them (lengths and seed may be ints).
        options: :class:`Options`.
        wide: the output stays float32 whatever the inputs are: a part that is to be merged.
        with_lse: False = the LSE is None, and engines that would compute it apart from the output do not.
    """
    _check_devices(layer, query, key, value)
    spec, operands = prepare(layer, query, key, value, operands, options)
    spec = replace(spec, wide=wide)
    engine = ENGINES.choose(spec, implementation, layer)
    arrays = (jnp.asarray(x) for x in (query, key, value))
    return _run(engine.name, spec, options.layout, with_lse, *arrays, operands)


def prepare(layer, query, key, value, operands, options):
    """Validate a call: ``(spec, operands as arrays of the ranks that the spec describes)``. Takes what attend takes."""
    operands = operands._replace(
        mask=checked_mask(layer, operands.mask),
        q_lengths=_lengths(layer, "query_seq_lengths", operands.q_lengths, query),
        kv_lengths=_lengths(layer, "key_value_seq_lengths", operands.kv_lengths, query),
        dropout_seed=_seed(layer, operands.dropout_seed),
    )
    spec = make_spec(
        layer, describe(query), describe(key), describe(value), Operands(*map(describe, operands)), options
    )
    if spec.dtype == "float64" and not jax.config.jax_enable_x64:
        remedy = "Cast it, or call jax.config.update('jax_enable_x64', True)."
        need = "of dtype float16, bfloat16 or float32 unless jax_enable_x64 is set"
        raise invalid_type(layer, "query", need, "float64", remedy)
    if not spec.dropout_rate:
        operands = operands._replace(dropout_seed=None)
    return spec, _arrays(spec, operands)


def describe(x):
    """:class:`TensorInfo` of an array, numpy array or scalar; None stays None."""
    if x is None:
        return None
    dtype = x.dtype if hasattr(x, "dtype") else jnp.asarray(x).dtype
    return TensorInfo(tuple(np.shape(x)), str(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(engine, spec, layout, with_lse, query, key, value, operands):
    engine = ENGINES[engine]
    if layout in engine.layouts:
        out, lse = engine.run(replace(spec, layout=layout), query, key, value, operands)
    else:
        out, lse = engine.run(spec, *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)), operands)
        out = jnp.swapaxes(out, 1, 2)
    return out, lse if with_lse else None


def _arrays(spec, operands):
    """Operands as arrays of the ranks the spec describes."""
    shaped = {}
    for name, shape in (("bias", spec.bias_shape), ("mask", spec.mask_shape), ("slopes", spec.alibi_shape)):
        x = getattr(operands, name)
        shaped[name] = None if x is None else jnp.asarray(x).reshape(shape)
    if operands.mask is not None:
        shaped["mask"] = shaped["mask"] > 0
    return Operands(*(None if x is None else jnp.asarray(x) for x in operands._replace(**shaped)))


def _batch_of_one(x):
    return None if x is None else x[None] if hasattr(x, "ndim") else np.asarray(x)[None]


def _lengths(layer, name, value, query):
    """An int stands for every row of the batch."""
    if _is_array(value):
        return value
    return np.full(np.shape(query)[:1], check_length(layer, name, value), np.int32)


def _seed(layer, seed):
    """A Python int becomes uint32."""
    if _is_array(seed):
        return seed
    return np.uint32(check_seed(layer, seed))


def _is_array(x):
    """True for None, arrays, traced values and lists: what `make_spec` checks by shape and dtype."""
    return x is None or hasattr(x, "ndim") or np.ndim(x) > 0


def is_concrete(x):
    """Whether the values of ``x`` can be seen: no tracer."""
    return not isinstance(x, jax.core.Tracer)


def checked_mask(layer, mask, name="mask"):
    """A float mask with negative entries was meant to be added: say so, wherever its values can be seen."""
    if mask is not None and is_concrete(mask) and jnp.issubdtype(jnp.asarray(mask).dtype, jnp.floating):
        if np.any(np.asarray(mask) < 0):
            need = "boolean or >= 0 (keep where True or > 0)"
            got, remedy = "a float mask with negative values", "Pass an additive mask as bias=."
            raise invalid_value(layer, name, need, got, remedy)
    return mask


def _check_devices(layer, *tensors):
    """Concrete arrays committed to different devices cannot meet in one computation."""
    placed = [
        (name, sorted(map(str, x.devices())))
        for name, x in zip(("query", "key", "value"), tensors)
        if isinstance(x, jax.Array) and is_concrete(x) and x.committed
    ]
    for name, devices in placed[1:]:
        first, want = placed[0]
        if devices != want:
            need = "on the same devices as {}, {}".format(first, want)
            raise invalid_value(layer, name, need, devices, "Move it with jax.device_put.")
