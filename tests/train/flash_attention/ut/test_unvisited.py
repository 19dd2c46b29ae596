"""Skipped work is skipped: NaN in keys and values of tiles that no query visits changes nothing. JAX engines.

The reference forms every product, so it is not one of them. MindSpore's engines: test_unvisited_mindspore.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.unvisited import CALLS, poisoned

from flash_attention.jax import ENGINES, flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize("engine", [name for name in ENGINES.names() if name != "reference"])
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
