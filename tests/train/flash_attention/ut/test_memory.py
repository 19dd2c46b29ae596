"""The portable engine never forms anything of S x S: the shapes of all operators' outputs, from compiled graphs."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.graphs import output_shapes

from flash_attention.core.alibi import alibi_slopes
from flash_attention.ops import flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
HEADS = 2
CALLS = {
    "dense": (1600, 1600, {}),
    "dense, Sk > Sq": (300, 2100, {}),
    "window": (2000, 2000, {"prev_block_num": 2, "next_block_num": 1}),
    "ALiBi": (1600, 1600, {"is_causal": True, "alibi": True}),
    "dropout": (1600, 1600, {"is_causal": True, "dropout_rate": 0.1, "dropout_seed": 1}),
}


class Attend(nn.Cell):
    """The functional call on the portable engine."""

    def __init__(self, options):
        super().__init__()
        self.options = dict(options)
        self.slopes = Tensor(alibi_slopes(HEADS)) if self.options.pop("alibi", False) else None

    def construct(self, query, key, value):
        return flash_attention(
            query, key, value, alibi_slopes=self.slopes, engine="portable", layout="BNSD", **self.options
        )


class Step(nn.Cell):
    """Forward and backward in one graph."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, query, key, value, d_out):
        return self.net(query, key, value), self.gradient(self.net)(query, key, value, d_out)


SLOW = ("window", "dropout")


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CALLS])
def test_operator_outputs(name, tmp_path):
    q_len, kv_len, options = CALLS[name]
    query, key = (Tensor(np.ones((1, HEADS, size, 32), np.float32)) for size in (q_len, kv_len))
    shapes = output_shapes(str(tmp_path), lambda: Step(Attend(options))(query, key, key, query))
    sizes = [np.prod(shape) for shape in shapes]
    assert len(sizes) > 20  # the graph was read
    assert max(sizes) <= 512 * max(q_len, kv_len) * HEADS
