"""Adapter of support/cached.py to MindSpore, for the test files of the portable code and of the vendor's operators."""

import mindspore as ms
import numpy as np
from mindspore import Tensor
from support import in_mindspore
from support.cached import Cached

from flash_attention_infer.nn import KVCache


class InMindSpore(Cached):
    """In PyNative or graph `mode`, with the portable engine."""

    functions, KVCache, mode = in_mindspore.FUNCTIONS, KVCache, "pynative"
    exps = 2  # softmax of a part, then the weights of the parts
    engine = {"engine": "portable"}

    @staticmethod
    def array(x, dtype):
        return Tensor(np.asarray(x, np.float32)).astype(getattr(ms, dtype))

    @staticmethod
    def numpy(x):
        return x.astype(ms.float32).asnumpy()

    @staticmethod
    def poison(cache):
        for layer in cache.layers:
            for pool in layer.pools():
                spoiled = np.full(pool.shape, 127 if pool.dtype == ms.int8 else np.nan, np.float32)
                spoiled.reshape((-1,) + pool.shape[2:])[layer.zero] = 0  # the one place that nothing ever writes
                pool.set_data(Tensor(spoiled).astype(pool.dtype))

    def attend(self, *args, **options):
        with in_mindspore.mode(self.mode):
            return super().attend(*args, **self.engine, **options)
