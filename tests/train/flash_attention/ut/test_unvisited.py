"""What is hidden cannot spoil: NaN in unvisited tiles, and beyond the lengths, changes nothing. JAX engines.

The reference forms every product, so it is not one of them. MindSpore's engines: test_unvisited_mindspore.py.
"""

import numpy as np
import pytest
from support.jax_engines import forward_and_backward
from support.padded import CALLS as PADDED
from support.padded import KV_LENGTHS, Q_LENGTHS, assert_padding_is_ignored
from support.unvisited import CALLS, poisoned

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize("engine", ["xla", pytest.param("pallas", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_nan_in_unvisited_tiles(name, engine):
    call = CALLS[name]
    (q, k, v, d_out), (bad_k, bad_v), hidden = poisoned(call)
    run = forward_and_backward("BNSD", implementation=engine, **call.tensors, **call.options)
    clean, found = run(q, k, v, d_out), run(q, bad_k, bad_v, d_out)
    for name, a, b in zip(("out", "lse", "query", "key", "value"), clean, found):
        np.testing.assert_array_equal(a, b, err_msg=name)
    for grad in found[3:]:
        assert not np.asarray(grad)[:, :, hidden].any()


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("name", PADDED)
def test_nan_in_padding(name, layout):
    lengths = {"query_seq_lengths": Q_LENGTHS, "key_value_seq_lengths": KV_LENGTHS}
    assert_padding_is_ignored(forward_and_backward(layout, **lengths, **PADDED[name]))
