"""What is hidden cannot spoil: NaN in unvisited tiles, and beyond the lengths, changes nothing. MindSpore engines."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.mindspore_engines import engines_here
from support.padded import CALLS as PADDED
from support.padded import KV_LENGTHS, Q_LENGTHS, assert_padding_is_ignored
from support.unvisited import CALLS, poisoned

from flash_attention.ops import flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.env_onecard]


class Attend(nn.Cell):
    """The functional call with everything but query, key and value bound."""

    def __init__(self, engine, options, alibi_slopes=None, q_lengths=None, kv_lengths=None):
        super().__init__()
        self.engine, self.options = engine, options
        tensors = (alibi_slopes, q_lengths, kv_lengths)
        self.slopes, self.q_lengths, self.kv_lengths = [None if x is None else Tensor(x) for x in tensors]

    def construct(self, query, key, value):
        return flash_attention(
            query, key, value, alibi_slopes=self.slopes, engine=self.engine, layout="BNSD", return_lse=True,
            query_seq_lengths=self.q_lengths, key_value_seq_lengths=self.kv_lengths, **self.options,
        )  # fmt: skip


def forward_and_backward(net):
    """``run(q, k, v, d_out) -> [out, lse, dq, dk, dv]`` of numpy arrays."""
    gradient = ops.GradOperation(get_all=True, sens_param=True)(net)

    def run(*arrays):
        q, k, v, d_out = map(Tensor, arrays)
        out, lse = net(q, k, v)
        return [x.asnumpy() for x in (out, lse) + tuple(gradient(q, k, v, (d_out, ops.ones_like(lse))))]

    return run


@pytest.mark.parametrize("engine", engines_here())
@pytest.mark.parametrize("name", CALLS)
def test_nan_in_unvisited_tiles(name, engine):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    call = CALLS[name]
    (q, k, v, d_out), (bad_k, bad_v), hidden = poisoned(call)
    run = forward_and_backward(Attend(engine, call.options, **call.tensors))
    clean, found = run(q, k, v, d_out), run(q, bad_k, bad_v, d_out)
    for label, a, b in zip(("out", "lse", "query", "key", "value"), clean, found):
        np.testing.assert_array_equal(a, b, err_msg=label)
    for grad in found[3:]:
        assert not grad[:, :, hidden].any()


@pytest.mark.parametrize("engine", engines_here())
@pytest.mark.parametrize("name", PADDED)
def test_nan_in_padding(name, engine):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = Attend(engine, PADDED[name], q_lengths=Q_LENGTHS, kv_lengths=KV_LENGTHS)
    assert_padding_is_ignored(forward_and_backward(net))
