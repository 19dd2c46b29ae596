"""The `splash` engine: JAX's splash attention kernels for TPUs, with masks made from our TilePlan.

The library builds its masks by evaluating them element by element, minutes at a million tokens. Here the visited
blocks come from ``core.plan``, in time linear in their number, and the kernel evaluates ``core.ranges`` inside a block.
On the CPU the kernels are interpreted.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core.engine import Engine
from flash_attention.core.errors import Reason
from flash_attention.core.plan import make_plan
from flash_attention.core.ranges import Band, visible
from flash_attention.core.spec import Operands
from flash_attention.jax.engines import cudnn, xla
from flash_attention.jax.engines.platforms import backend, compiled_or_interpreted
from flash_attention.jax.engines.shared import lse_of

PLATFORM = "tpu"
LANES = 128
"""Lanes of a TPU's vector unit: lengths and head sizes are padded to multiples of it."""

BLOCK = 512
"""Queries and keys of a block, fewer for shorter calls. Not tuned: no TPU was at hand."""

HIDDEN = -0.7 * float(np.finfo(np.float32).max)
_REMEDY = "Use implementation='xla'."
_ABSENT = tuple(pair for pair in cudnn.ABSENT if pair[0] != "logits_soft_cap")


@dataclass(frozen=True)
class Predicate:
    """What the kernels ask of a partial block: boolean, True where a position sees a key. Compared by its band."""

    band: Band

    def __call__(self, position, key):
        return visible(self.band, position, key)


def run(spec, query, key, value, operands=Operands()):
    """Attention by splash attention; arguments and results as :func:`xla.run`.

    Where a caller uses the LSE, `xla` computes it: the library's is not differentiable.
    """
    lse = lse_of(xla.run, spec, query, key, value, operands)
    scaled = (query.astype(jnp.float32) * spec.scale).astype(query.dtype)
    padded = (_padded(spec, x) for x in (scaled, key, value))
    out = compiled_or_interpreted(
        (PLATFORM,), lambda platform, *x: jax.vmap(_kernel(spec, platform == "cpu"))(*x), *padded
    )
    return out[:, :, : spec.q_len, : spec.head_dim], lse


def _block(spec):
    """Side of a block: :data:`BLOCK`, less where a call is shorter."""
    longest = max(spec.q_len, spec.kv_len)
    return min(BLOCK, -(-longest // LANES) * LANES)


def _padded(spec, x):
    """(B, N, S, D) with whole blocks and whole lanes; what is added is hidden or cut off."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _block(spec)), (0, -x.shape[3] % LANES)))


def _kernel(spec, interpret):
    """The library's kernel of one batch row, (N, Sq, D) and (Nkv, Sk, D) in."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    block = _block(spec)
    by_query, by_key = mask_infos(spec, block)
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return library.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        is_mqa=False,
        block_sizes=sizes,
        save_residuals=False,
        mask_value=HIDDEN,
        attn_logits_soft_cap=spec.soft_cap,
        residual_checkpoint_name=None,
        mask_function=Predicate(spec.band),
        interpret=interpret,
    )


def mask_infos(spec, block):
    """The library's ``(MaskInfo of forward and dQ, MaskInfo of dK and dV)`` from the TilePlan.

    ``block_mask`` (1, query blocks, most visited key blocks) is 2 for a full block, 1 for a partial one and 0 for none;
    ``data_next`` is the key block's number. For dK and dV: (1, most visiting query blocks, key blocks).
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    plan = make_plan(spec.band, spec.offset, block, block)
    positions = np.arange(plan.q_tiles * block, dtype=np.int32) + np.int32(spec.offset)

    def info(ranges, full, transposed):
        state, block_index = _visits(ranges, full)
        if transposed:
            state, block_index = state.T, block_index.T
        return MaskInfo(
            data_next=block_index[None],
            mask_next=None,
            block_mask=state[None],
            partial_mask_blocks=None,
            q_sequence=positions,
        )

    return info(plan.kv_range, plan.full_range, False), info(plan.q_range, plan.q_full_range, True)


def _visits(ranges, full):
    """``(state, block index)``, (blocks, most visits) each; places beyond a block's visits repeat its last one.

    They go into a TPU's scalar memory, which is small: hence the least integers that hold them.
    """
    first, stop = ranges[:, :1], ranges[:, 1:]
    place = first + np.arange(max(1, int((stop - first).max())), dtype=np.int32)
    state = np.where((place >= full[:, :1]) & (place < full[:, 1:]), 2, 1)
    state = np.where(place < stop, state, 0)
    place = np.clip(place, 0, np.maximum(stop - 1, 0))
    return state.astype(np.int8), place.astype(np.int8 if place.max() < 128 else np.int16)


def constraints(spec):
    """Why the kernels cannot compute ``spec`` as this package defines it, or None.

    A row that sees no key would be the mean of the values instead of 0: what leaves such rows, or may, is refused.
    """
    if spec.dtype != "bfloat16":
        return Reason("dtype", spec.dtype, "bfloat16 (the kernels multiply in it)", _REMEDY)
    reason = cudnn.given(spec, _ABSENT, _REMEDY)
    if reason is not None:
        return reason
    if spec.wide:
        return Reason("dtype", "a float32 part of a larger call", "that of the whole call", _REMEDY)
    position = np.arange(spec.q_len, dtype=np.int64) + spec.offset
    if np.any(spec.band.first_key(position) > spec.band.last_key(position)):
        lengths = "{} and {}".format(spec.q_len, spec.kv_len)
        return Reason("sequence length", lengths, "such that every query sees a key", _REMEDY)
    return None


def supports(spec):
    """:func:`constraints`, and a TPU (or a CPU that interprets the kernels)."""
    if backend() not in (PLATFORM, "cpu"):
        return Reason("backend", backend(), "a TPU, or a CPU that interprets it", _REMEDY)
    return constraints(spec)


ENGINE = Engine(
    "splash",
    run,
    supports,
    note="splash attention, TPUs; interpreted on the CPU and exported for TPUs, not run on a TPU",
)
