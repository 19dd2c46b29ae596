"""Candidates 'prefill' and 'decode' over a cache in MindSpore, run by a worker of ``flash_attention.tools.bench``."""

import mindspore as ms
from mindspore import Tensor

from flash_attention_infer.nn import KVCache
from flash_attention_infer.tools.cached import steps


def build(case, direction, candidate, arrays):
    """``(call, results)``, in PyNative mode with what the documentation advises for few cores.

    A cache has no backward, and draws its own inputs.
    """
    del direction, arrays
    ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=True)
    return steps(KVCache, case, candidate, Tensor, lambda out: out.asnumpy())
