"""Position encodings in MindSpore, both modes: the properties of support/positions.py."""

import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore
from support.positions import Encodings

from flash_attention.nn import Rotary, T5Bias, XPos, alibi_bias

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


class _AtOffset(nn.Cell):
    def __init__(self, cell, offset):
        super().__init__()
        self.cell, self.offset = cell, offset

    def construct(self, x):
        return self.cell(x, self.offset)


class _Sized(nn.Cell):
    def __init__(self, cell, *sizes):
        super().__init__()
        self.cell, self.sizes = cell, sizes

    def construct(self, x):
        return self.cell(*self.sizes) + x


class _Alibi(nn.Cell):
    def construct(self, x):
        return x + alibi_bias(6, 5, 9, 4)


class InMindSpore(Encodings):
    mode = None

    def run(self, *args, **options):
        with in_mindspore.mode(self.mode):
            return in_mindspore.run(*args, **options)

    @staticmethod
    def rotary(**options):
        return Rotary(**options)

    @staticmethod
    def xpos(offset=0, **options):
        return _AtOffset(XPos(**options), offset)

    def alibi(self, *sizes):
        assert sizes == (6, 5, 9, 4)
        return self.run(_Alibi(), [np.zeros(sizes[:3])])[0]

    def t5(self, table, q_len, kv_len, step, bidirectional, d_out):
        cell = T5Bias(table.shape[1], bidirectional, num_buckets=table.shape[0])
        cell.weight.set_data(Tensor(table.astype(np.float32)))
        call = _Sized(cell, q_len, kv_len, step)
        with in_mindspore.mode(self.mode):
            out, _, d_weights = in_mindspore.run_layer(call, [np.zeros(1)], d_out)
        return out, d_weights["cell.weight"]


class TestPynative(InMindSpore):
    mode = "pynative"


class TestGraph(InMindSpore):
    mode = "graph"
