"""core/conventions.py as a table, and one asymmetric mask through the JAX calls (MindSpore: the file beside this)."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.conventions import KINDS, draws, expected, mask_of, takes_any_mask

from flash_attention.core.conventions import CALLS, table
from flash_attention.jax.distributed import make_mesh

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
IN_JAX = [call for call in CALLS if ".jax." in call.path and takes_any_mask(call)]


def test_table_lists_every_call():
    lines = table()
    assert len(lines) == 2 + len(CALLS)
    assert all(line.count("|") - line.count("\\|") == 7 for line in lines)
    assert all("`{}`".format(call.path) in line for call, line in zip(CALLS, lines[2:]))


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", IN_JAX, ids=lambda call: call.path)
def test_mask(call, kind, layout):
    if layout not in call.layout:
        pytest.skip("this call has one layout")
    module, name = call.path.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    q, k, v, keep = draws()
    mask = {call.mask_argument: jnp.asarray(mask_of(call.polarity, kind, keep))}
    if name == "FlexibleAttentionModule":
        layer = function(num_attention_heads=q.shape[1], num_kv_heads=k.shape[1], head_dims=q.shape[-1])
        function = functools.partial(layer, causal=False)
    if module.endswith("distributed"):
        function = functools.partial(function, mesh=make_mesh((1, 1, 1, -1), devices=jax.devices()[:1]))
    if name == "FlashAttention":
        found = function(q.shape[-1])(*map(jnp.asarray, (q, k, v)), **mask)
    elif layout == "BNSD":
        found = function(*map(jnp.asarray, (q, k, v)), layout="BNSD", **mask)
    else:
        found = function(*(jnp.asarray(x.swapaxes(1, 2)) for x in (q, k, v)), **mask)
        found = getattr(found, "attention_outputs", found).swapaxes(1, 2)
    np.testing.assert_allclose(found, expected(), atol=1e-5)
