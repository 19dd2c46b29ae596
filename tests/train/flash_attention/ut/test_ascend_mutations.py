"""Deliberate mistakes in the Ascend kernels: each is caught by the simulator, or by comparing numbers.

The mistakes (`support/mutations_*.py`) were written without looking at how the simulator finds them.
"""

import numpy as np
import pytest
from support.mutation import apply
from support.mutations_backward import BACKWARD
from support.mutations_forward import FORWARD, SURVIVORS
from support.mutations_shared import SHARED
from support.selection import mostly_slow

from flash_attention.ascend import simulated
from flash_attention.ascend.geometry import KernelTiles
from flash_attention.ascend.simulator import SimulatorError
from flash_attention.core import reference
from flash_attention.core.spec import AttentionSpec, Operands
from tolerances import error, largest

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def call(q_len, kv_len, head_dim, heads, tiles, backward_tiles=None, **options):
    """(spec, forward tiles, backward tiles) of a call with small tiles; ``tiles`` are (q, kv, groups)."""
    spec = AttentionSpec(heads[0], heads[1], heads[2], q_len, kv_len, head_dim, "float16", **options)
    q, kv, groups = backward_tiles or tiles
    return spec, KernelTiles(tiles[0], tiles[1], 2, tiles[2]), KernelTiles(q, kv, 1, groups)


SMALL = (32, 48, 1)
CALLS = {
    "causal": call(96, 96, 32, (1, 2, 2), SMALL, causal=True),
    "ragged": call(70, 105, 32, (1, 1, 1), SMALL),
    "square": call(64, 64, 32, (1, 1, 1), (32, 32, 2)),
    "window": call(128, 128, 16, (1, 1, 1), SMALL, local_window_size=(40, 20)),
    "groups": call(48, 48, 16, (1, 4, 2), SMALL),
    "dead rows": call(96, 40, 16, (1, 1, 1), SMALL, causal=True),
    "extreme": call(48, 96, 16, (1, 1, 1), SMALL, scale=4.0),
    "mask": call(64, 64, 16, (2, 2, 1), SMALL, mask_shape=(2, 1, 64, 64)),
    "bias": call(64, 96, 16, (1, 2, 2), SMALL, bias_shape=(1, 2, 64, 96), causal=True, q_offset=0),
    "key bias": call(64, 96, 16, (1, 2, 2), SMALL, bias_shape=(1, 2, 1, 96)),
    "ALiBi": call(96, 96, 16, (1, 2, 2), SMALL, alibi_shape=(2,)),
    "negative slopes": call(70, 90, 16, (1, 2, 2), (64, 64, 2), alibi_shape=(2,)),
    "dropout": call(64, 96, 16, (1, 2, 2), SMALL, dropout_rate=0.4),
    "large tile": call(128, 128, 16, (1, 1, 1), (128, 128, 8)),
    "large scores": call(48, 96, 16, (1, 1, 1), SMALL, scale=0.25),
    "large products": call(48, 96, 16, (1, 1, 1), SMALL),
    "head size 256": call(64, 128, 256, (1, 1, 1), (32, 128, 1), (32, 64, 1)),
    "chosen tiles": (AttentionSpec(1, 1, 1, 128, 128, 256, "float16"), None, None),
}


def tensors(name):
    """query, key, value, operands, d_out, d_lse of a call."""
    spec = CALLS[name][0]
    rng = np.random.default_rng(len(name))
    query, d_out = rng.standard_normal((2, spec.batch, spec.heads, spec.q_len, spec.head_dim)).astype(np.float16)
    key, value = rng.standard_normal((2, spec.batch, spec.kv_heads, spec.kv_len, spec.head_dim)).astype(np.float16)
    if name == "large scores":  # 6e4, but for a few units
        query[..., 0], key[..., 0] = 480.0, 500.0
    if name == "large products":  # |dP - delta| up to 5e5, gradients within fp16
        d_out *= 1e4
    operands = Operands(
        mask=None if spec.mask_shape is None else rng.random(spec.mask_shape) < 0.7,
        bias=None if spec.bias_shape is None else rng.standard_normal(spec.bias_shape).astype(np.float32),
        slopes=None if spec.alibi_shape is None else np.float32([-1.5, -0.5] if "neg" in name else [0.5, 0.02]),
        dropout_seed=np.uint32(3) if spec.dropout_rate else None,
    )
    d_lse = rng.standard_normal(query.shape[:3]).astype(np.float32)
    if name == "dead rows":  # what they are worth to the loss is nobody's business
        d_lse[:, :, : spec.q_len - spec.kv_len] = np.nan
    return query, key, value, operands, d_out, d_lse


def close(got, want):
    """Within 1% of the largest value, -inf where it must be: what no rounding of the right kernels reaches."""
    return error(got, want) <= 1e-2 * largest(want)


def forward_is_right(name):
    """Run the forward kernel of a call; whether output and LSE are right."""
    spec, tiles, _ = CALLS[name]
    query, key, value, operands, _, _ = tensors(name)
    want = reference.attention(np, spec, *(x.astype(np.float64) for x in (query, key, value)), operands)
    got = simulated.forward(spec, query, key, value, operands, tiles)
    return all(close(*pair) for pair in zip(got, want))


def backward_is_right(name):
    """Run the backward kernel of a call on the exact output and LSE; whether all gradients are right."""
    spec, _, tiles = CALLS[name]
    query, key, value, operands, d_out, d_lse = tensors(name)
    out, lse = reference.attention(np, spec, *(x.astype(np.float64) for x in (query, key, value)), operands)
    want = reference.attention_grad(spec, query, key, value, operands, d_out, d_lse)
    saved = query, key, value, operands, out.astype(np.float16), lse.astype(np.float32)
    got = dict(zip(("query", "key", "value", "bias", "slopes"), simulated.backward(spec, saved, (d_out, d_lse), tiles)))
    return all(close(got[grad], want[grad]) for grad in want)


RIGHT = {"forward": forward_is_right, "backward": backward_is_right}
MISTAKES = [
    (kernel, mutation)
    for group, kernels in ((SHARED, ("forward", "backward")), (FORWARD, ("forward",)), (BACKWARD, ("backward",)))
    for mutation in group
    for kernel in mutation.kernels or kernels
]


def clear_kernels():
    """Kernels are cached by spec; none may come from, or go to, one with another source."""
    simulated._forward_kernel.cache_clear()
    simulated._preprocess_kernel.cache_clear()
    simulated._backward_kernel.cache_clear()


def caught(kernel, mutation):
    """What shows the mistake: the rule that the simulator names, 'numbers', or None when nothing does."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        apply(mutation, monkeypatch)
        clear_kernels()
        try:
            return None if RIGHT[kernel](mutation.call) else "numbers"
        except SimulatorError as failure:
            return "simulator: " + failure.rule
        finally:
            clear_kernels()


@pytest.mark.parametrize("name", mostly_slow(list(CALLS), fast=["causal", "ragged", "negative slopes"]))
def test_without_a_mistake_all_is_right(name):
    clear_kernels()
    assert forward_is_right(name)
    assert backward_is_right(name)


def name_of(value):
    return value if isinstance(value, str) else value.name


CAUGHT = [(kernel, mutation) for kernel, mutation in MISTAKES if (kernel, mutation.name) not in SURVIVORS]


@pytest.mark.parametrize("kernel, mutation", CAUGHT[::6], ids=name_of)
def test_a_mistake_is_caught(kernel, mutation):
    assert caught(kernel, mutation)


@pytest.mark.slow
def test_mistakes_that_survive(figure):
    """All of them; what nothing shows is listed by name in SURVIVORS, with the reason."""
    survivors = {(kernel, mutation.name) for kernel, mutation in MISTAKES if not caught(kernel, mutation)}
    figure("deliberate kernel mistakes", len(MISTAKES), 30, at_least=True)
    figure("deliberate kernel mistakes that survive", len(survivors), len(SURVIVORS))
    assert survivors == set(SURVIVORS)


def test_a_mistake_changes_the_kernel_only_while_it_lasts():
    assert caught(*MISTAKES[0])
    assert RIGHT[MISTAKES[0][0]](MISTAKES[0][1].call)
