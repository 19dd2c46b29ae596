"""MindSpore candidates: our engines by name and the naive formula, each under ms.jit or eager ('/pynative')."""

import time

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from flash_attention.ops import ENGINES, flash_attention
from flash_attention.tools.bench.cases import LAYERS, SEED
from flash_attention.tools.bench.mechanisms_in_mindspore import MECHANISMS

CANDIDATES = ("naive", "auto")
_DTYPES = {"float16": ms.float16, "bfloat16": ms.bfloat16, "float32": ms.float32}


def build(case, direction, candidate, arrays):
    """``(call, results)``: ``call()`` runs to completion, ``results()`` gives numpy (out, d_query), None where absent.

    Args:
        candidate: 'naive', 'auto', an engine of ``flash_attention.ops.ENGINES`` or a mechanism; with '/pynative' it
            runs eagerly.
    """
    name, _, mode = candidate.partition("/")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    inputs = [ms.Tensor(arrays[name]).astype(_DTYPES[case.dtype]) for name in ("query", "key", "value", "d_out")]
    net = MECHANISMS[name](case) if name in MECHANISMS else Naive(case) if name == "naive" else _Ours(case, name)
    if direction == "fwd+bwd":
        run = ops.GradOperation(get_all=True, sens_param=True)(net)
    else:
        run, inputs = net, inputs[:3]
    if mode != "pynative":
        run = ms.jit(run)
    last = {}

    def call():
        last.clear()  # the results of the call before would count as memory of this one
        last["results"] = run(*inputs)
        _finish(last["results"])

    def results():
        if name in LAYERS:
            return None, None  # the judge does not know their weights; the tests do
        if direction == "fwd+bwd":
            return None, last["results"][0].astype(ms.float32).asnumpy()
        return last["results"].astype(ms.float32).asnumpy(), None

    return call, results


def compile_seconds(case, direction, candidate):
    """Seconds that the first call takes beyond the second."""
    call, _ = build(case, direction, candidate, case.arrays())
    begin = time.perf_counter()
    call()
    middle = time.perf_counter()
    call()
    return max(0.0, 2 * middle - begin - time.perf_counter())


def _finish(results):
    """Wait as a training loop does, by fetching a result (no copy on the CPU).

    ``ms.runtime.synchronize`` would spin and take one of two cores from the computation: gradients then took twice as
    long.
    """
    (results[-1] if isinstance(results, tuple) else results).asnumpy()


class _Ours(nn.Cell):
    """Our functional call with a case's options."""

    def __init__(self, case, engine):
        super().__init__()
        engine = None if engine == "auto" else engine
        ENGINES.check_name(engine)
        self.options = dict(case.options(), engine=engine, layout="BNSD")
        if case.dropout:
            self.options["dropout_seed"] = SEED
        self.tensors = {name: ms.Tensor(x) for name, x in case.operands().items()}

    def construct(self, query, key, value):
        return flash_attention(query, key, value, **self.options, **self.tensors)


class Naive(nn.Cell):
    """softmax(q k^T * scale + mask) v in float32."""

    def __init__(self, case):
        super().__init__()
        if not case.plain() or case.dtype != "float32" or case.kv_heads:
            raise ValueError("the naive formula here has no such option")
        self.scale = case.spec().scale
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)
        self.masked = case.causal or case.window is not None or case.blocks is not None
        self.mask = ms.Tensor(np.where(case.dense_mask(), 0, -1e30).astype(np.float32)) if self.masked else None

    def construct(self, query, key, value):
        scores = self.scores(query, key) * self.scale
        if self.masked:
            scores = scores + self.mask
        return self.product(self.softmax(scores), value)


@ms.jit
def _square(x):
    return ops.matmul(x, x)


@ms.jit
def _softmax(x):
    return ops.softmax(x)


def limits(seconds):
    """What MindSpore's own operators reach here: matmul GFLOP/s, softmax Gelem/s."""

    def rate(operation, shape, work):
        x = ms.Tensor(np.ones(shape, np.float32))

        return work / seconds(lambda: _finish(operation(x))) / 1e9

    return {
        "matmul_float32_gflops": rate(_square, (1024, 1024), 2 * 1024**3),
        "softmax_gelem": rate(_softmax, (512, 1024), 512 * 1024),
    }
