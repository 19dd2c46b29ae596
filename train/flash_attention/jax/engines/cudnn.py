"""The `cudnn` engine: NVIDIA's fused kernel through jax.nn, for calls that it computes as this package defines them.

jax.nn gives no LSE on jax 0.6, and a rounded one without a derivative later. Where a caller uses the LSE, `pallas`
computes it, or `xla`; where not, the compiler drops that part.
"""

import jax
import jax.numpy as jnp

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.core.spec import Operands
from flash_attention.jax.engines import pallas, xla
from flash_attention.jax.engines.platforms import backend
from flash_attention.jax.engines.shared import lse_of

PLATFORM = "cuda"
IMPLEMENTATION = "cudnn"
"""What jax.nn is asked for; tests ask for its 'xla'."""

ABSENT = (
    ("mask", "mask_shape"),
    ("bias", "bias_shape"),
    ("alibi_slopes", "alibi_shape"),
    ("q_segment_ids", "segments"),
    ("query_seq_lengths", "q_lengths"),
    ("key_value_seq_lengths", "kv_lengths"),
    ("logits_soft_cap", "soft_cap"),
    ("sinks", "sinks"),
    ("dropout_rate", "dropout_rate"),
    ("q_offset", "dynamic_offset"),
)
_REMEDY = "Use implementation='pallas' or 'xla'."


def run(spec, query, key, value, operands=Operands()):
    """Attention by cuDNN; arguments and results as :func:`xla.run`."""
    lse = lse_of(xla.run if pallas.supports(spec) else pallas.run, spec, query, key, value, operands)
    if spec.layout == "BNSD":
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    band = spec.band
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=spec.scale,
        is_causal=band.right == 0,
        local_window_size=None if band.left is None else (band.left, 0),
        implementation=IMPLEMENTATION,
    )
    return jnp.swapaxes(out, 1, 2) if spec.layout == "BNSD" else out, lse


def given(spec, absent=ABSENT, remedy=_REMEDY):
    """The Reason that names the first of the arguments ``absent`` that the call has, or None."""
    for argument, field in absent:
        value = getattr(spec, field)
        if value not in (None, False, 0.0):
            return Reason(argument, value if isinstance(value, float) else "a tensor", "left out", remedy)
    return None


def constraints(spec):
    """Why the kernel cannot compute ``spec`` on any device, or None.

    Rows that see no key would be the mean of the values instead of 0: what may leave such rows is refused.
    """
    if spec.dtype not in ("float16", "bfloat16"):
        return Reason("dtype", spec.dtype, "float16 or bfloat16", _REMEDY)
    if spec.head_dim % 8 or spec.head_dim > 128:
        return Reason("head_dim", spec.head_dim, "a multiple of 8 up to 128", _REMEDY)
    reason = given(spec)
    if reason is not None:
        return reason
    if spec.tile is not None:
        return Reason("tile", spec.tile, "left out (the kernel has its own)", _REMEDY)
    band = spec.band
    if band.prev is not None or band.next is not None:
        return Reason("prev_block_num", spec.prev_block_num, "left out, as next_block_num", _REMEDY)
    if band.left is not None and band.right != 0 or band.right not in (None, 0):
        need = "(left, 0), or (left, None) when causal"
        return Reason("local_window_size", spec.local_window_size, need, _REMEDY)
    if not band.is_dense and (spec.q_len != spec.kv_len or spec.offset):
        lengths = "{} and {}, q_offset {}".format(spec.q_len, spec.kv_len, spec.offset)
        return Reason("sequence length", lengths, "equal for queries and keys, q_offset 0, when causal", _REMEDY)
    if spec.wide:
        return Reason("dtype", "a float32 part of a larger call", "that of the whole call", _REMEDY)
    return None


def supports(spec):
    """:func:`constraints`, and an NVIDIA GPU."""
    if backend() != PLATFORM:
        return Reason("backend", backend(), "an NVIDIA GPU", "Use implementation='xla'.")
    return constraints(spec)


ENGINE = Engine(
    "cudnn",
    run,
    supports,
    note="cuDNN through jax.nn, NVIDIA GPUs; tested and measured on an H200",
    layouts=("BNSD", "BSND"),
)
