"""Skipped work is skipped: NaN in keys and values of tiles that no query visits changes nothing. MindSpore engines."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.mindspore_engines import engines_here
from support.unvisited import CALLS, poisoned

from flash_attention.ops import flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.env_onecard]


class Attend(nn.Cell):
    """The functional call with everything but query, key and value bound."""

    def __init__(self, engine, call):
        super().__init__()
        self.engine, self.options = engine, dict(call.options)
        self.slopes = Tensor(call.tensors["alibi_slopes"]) if call.tensors else None

    def construct(self, query, key, value):
        return flash_attention(
            query,
            key,
            value,
            alibi_slopes=self.slopes,
            engine=self.engine,
            layout="BNSD",
            return_lse=True,
            **self.options,
        )


@pytest.mark.parametrize("engine", engines_here())
@pytest.mark.parametrize("name", CALLS)
def test_nan_in_unvisited_tiles(name, engine):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    call = CALLS[name]
    (q, k, v, d_out), (bad_k, bad_v), hidden = poisoned(call)
    net = Attend(engine, call)
    gradient = ops.GradOperation(get_all=True, sens_param=True)(net)

    def run(*qkv):
        q, k, v = map(Tensor, qkv)
        out, lse = net(q, k, v)
        grads = gradient(q, k, v, (Tensor(d_out), ops.ones_like(lse)))
        return [x.asnumpy() for x in (out, lse) + tuple(grads)]

    clean, found = run(q, k, v), run(q, bad_k, bad_v)
    for label, a, b in zip(("out", "lse", "query", "key", "value"), clean, found):
        np.testing.assert_array_equal(a, b, err_msg=label)
    for grad in found[3:]:
        assert not grad[:, :, hidden].any()
