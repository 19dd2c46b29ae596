"""What is hidden cannot spoil: NaN in unvisited tiles, and beyond the lengths, changes nothing. JAX engines.

The reference forms every product, so it is not one of them. MindSpore's engines: test_unvisited_mindspore.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.padded import CALLS as PADDED
from support.padded import KV_LENGTHS, Q_LENGTHS, assert_padding_is_ignored
from support.unvisited import CALLS, poisoned

from flash_attention.jax import flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize("engine", ["xla", pytest.param("pallas", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_nan_in_unvisited_tiles(name, engine):
    call = CALLS[name]
    (q, k, v, d_out), (bad_k, bad_v), hidden = poisoned(call)
    tensors = {key: jnp.asarray(x) for key, x in call.tensors.items()}

    @jax.jit
    def run(q, k, v):
        def attend(*qkv):
            return flash_attention(
                *qkv, **tensors, **call.options, layout="BNSD", implementation=engine, return_lse=True
            )

        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return (out, lse) + pullback((jnp.asarray(d_out), jnp.ones_like(lse)))

    clean, found = run(q, k, v), run(q, bad_k, bad_v)
    for name, a, b in zip(("out", "lse", "query", "key", "value"), clean, found):
        np.testing.assert_array_equal(a, b, err_msg=name)
    for grad in found[3:]:
        assert not np.asarray(grad)[:, :, hidden].any()


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("name", PADDED)
def test_nan_in_padding(name, layout):
    def swap(x):
        return x if layout == "BNSD" else x.swapaxes(1, 2)

    def attend(*qkv):
        lengths = {"query_seq_lengths": Q_LENGTHS, "key_value_seq_lengths": KV_LENGTHS}
        out, lse = flash_attention(*map(swap, qkv), layout=layout, return_lse=True, **lengths, **PADDED[name])
        return swap(out), lse

    @jax.jit
    def run(q, k, v, d_out):
        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return (out, lse) + pullback((d_out, jnp.ones_like(lse)))

    assert_padding_is_ignored(run)
