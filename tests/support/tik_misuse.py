"""What the misuse tests of the simulator share: a program under construction, and the error it must end in."""

import re
from contextlib import contextmanager

import numpy as np
import pytest

from flash_attention.ascend.simulator import SimulatorError, SimulatorParams, Toolkit

F16, F32, S32 = "float16", "float32", "int32"


class Kernel:
    """A program under construction: short names for tensors of each scope, and `run`."""

    def __init__(self, soc="Ascend910A", **params):
        self.toolkit = Toolkit(SimulatorParams(**params), soc=soc)
        self.tik = self.toolkit.tik
        self.t = self.tik.Tik()
        self.inputs, self.outputs, self.feed = [], [], {}

    def gm(self, name, shape=(1024,), dtype=F16, output=False, **options):
        tensor = self.t.Tensor(dtype, shape, name=name, scope=self.tik.scope_gm, **options)
        (self.outputs if output else self.inputs).append(tensor)
        if not output:
            self.feed[name] = np.ones(shape, dtype)
        return tensor

    def ub(self, name="ub", shape=(1024,), dtype=F16):
        return self.t.Tensor(dtype, shape, name=name, scope=self.tik.scope_ubuf)

    def local(self, scope, name="local", shape=(1024,), dtype=F16):
        return self.t.Tensor(dtype, shape, name=name, scope=getattr(self.tik, scope))

    def filled(self, name="ub", shape=(1024,), dtype=F16):
        """A UB tensor full of ones."""
        tensor = self.ub(name, shape, dtype)
        lanes = 256 // np.dtype(dtype).itemsize
        for start in range(0, shape[0], lanes):
            self.t.vec_dup(min(lanes, shape[0] - start), tensor[start], 1, 1, 8)
        return tensor

    def run(self, **feed):
        self.t.BuildCCE("kernel", self.inputs, self.outputs)
        return self.t.tikdb.start_debug(dict(self.feed, **feed))

    def store(self, local):
        """Make a whole UB tensor the program's output, build and run."""
        out = self.gm("out", local.shape, local.dtype, output=True)
        self.t.data_move(out, local, 0, 1, local.size * np.dtype(local.dtype).itemsize // 32, 0, 0)
        return self.run()


@contextmanager
def expect_error(rule, words):
    """A SimulatorError of `rule` whose text matches `words` and names a line of these tests."""
    with pytest.raises(SimulatorError, match=words) as caught:
        yield
    assert caught.value.rule == rule, str(caught.value)
    assert re.search(r"(test_simulator_\w+|tik_misuse)\.py:\d+$", caught.value.line)
    assert caught.value.line in str(caught.value)


def cores(k, count, body):
    """body(core) on each of `count` cores; the outputs."""
    with k.t.for_range(0, count, block_num=count) as core:
        body(core)
    return k.run()
