"""The `wrappers` benchmark's model in MindSpore: one training step with Adam, compiled."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from flash_attention.nn import AutoregressiveWrapper, Decoder, TransformerWrapper
from flash_attention.tools.bench import wrappers
from flash_attention.tools.bench.cases import SEED
from flash_attention.tools.bench.in_mindspore import Naive
from flash_attention.tools.bench.wrappers import VOCABULARY, check_direction, stack_options, tokens_of


def build(case, direction, candidate, arrays):
    """``(call, results)``: ``call()`` trains one step and gives the loss before it.

    Args:
        case: sizes of the attention. direction: 'fwd+bwd'. candidate: see ``wrappers.stack_options``.
        arrays: not used, a model makes its own queries.
    """
    del arrays
    check_direction(direction)
    net, tokens = model(case, candidate), Tensor(tokens_of(case))
    ms.set_context(mode=ms.GRAPH_MODE)
    step = nn.TrainOneStepCell(net, nn.Adam(net.trainable_params(), wrappers.RATE)).set_train()
    return lambda: float(step(tokens).asnumpy()), lambda: (None, None)  # the tests judge the losses


def model(case, candidate):
    """The decoder with the candidate's attention; the same weights whatever the candidate."""
    np.random.seed(SEED)
    stack = Decoder(dtype=getattr(ms, case.dtype), **stack_options(case, candidate, _Naive(case)))
    net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=case.q_len, attn_layers=stack)
    return AutoregressiveWrapper(net)


class _Naive(nn.Cell):
    """The naive formula of the other benchmarks on BSND tensors."""

    def __init__(self, case):
        super().__init__()
        self.attention = Naive(case)

    def construct(self, query, key, value, *absent):
        """What a stack hands on beside the heads (masks, bias, dropout's seed) is absent in this model."""
        return self.attention(query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)).swapaxes(1, 2)
