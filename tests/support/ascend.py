"""Programs of single tile operations on the TIK simulator, and the forward kernel over the conformance suite."""

import contextlib
from dataclasses import replace

import numpy as np

from conformance import Case, make_inputs, run_naive, run_reference
from flash_attention.ascend import simulated
from flash_attention.ascend.program import Buffer, GmTensor, Program
from flash_attention.ascend.simulator import SimulatorParams, Toolkit
from flash_attention.core.spec import AttentionSpec
from tolerances import FORWARD, assert_close

CHIP = "Ascend910A"


class Stage:
    """One core's program around tile operations: inputs from arrays, one output; strict simulator.

    Usage::

        stage = Stage(x=array)
        with stage.program((16, 16), "float32") as out:
            ...  # stage.api, stage.gm["x"], stage.local("name", "UB", "float16", 256), stage.load(...)
        result = stage.run()
    """

    def __init__(self, **inputs):
        self._toolkit = Toolkit(SimulatorParams(strict=True, trace=True), soc=CHIP)
        self._program = Program(self._toolkit.tik)
        self.api = self._program.api
        self.inputs = inputs
        self.gm = {
            name: self._program.gm(GmTensor(name, str(array.dtype), array.shape, "")) for name, array in inputs.items()
        }

    @contextlib.contextmanager
    def program(self, shape, dtype):
        """The body of the kernel; yields the output tensor in global memory."""
        output = self._program.gm(GmTensor("result", dtype, shape, ""))
        with self.api.for_range(0, 1, block_num=1):
            yield output
        self.api.BuildCCE(kernel_name="stage", inputs=list(self.gm.values()), outputs=[output])

    @property
    def tik_program(self):
        """The Program, for what declares its own buffers."""
        return self._program

    def local(self, name, scope, dtype, elements):
        """A local tensor."""
        return self._program.local(Buffer(name, scope, dtype, elements, ""))

    def load(self, name, scope="UB"):
        """A whole input in a new local tensor."""
        array = self.inputs[name]
        tensor = self.local(name + "_local", scope, str(array.dtype), array.size)
        self.api.data_move(tensor, self.gm[name], 0, 1, array.nbytes // 32, 0, 0)
        return tensor

    def store(self, output, tensor):
        """A whole local tensor to the output."""
        elements, size = int(np.prod(output.shape)), {"float32": 4, "int32": 4, "float16": 2}[output.dtype]
        self.api.data_move(output, tensor, 0, 1, elements * size // 32, 0, 0)

    def run(self):
        """The output array."""
        return self.api.tikdb.start_debug(feed_dict=self.inputs, interactive=False)[0]

    def cycles(self, pipe):
        """Busy cycles of a pipe in the last run."""
        return self.api.trace.cycles()[pipe]


# --- whole kernels --------------------------------------------------------------------------------
_FEATURES = {
    "causal": {"band": "causal", "lengths": (110, 150)},
    "dead rows": {"band": "causal", "lengths": (150, 90), "cotangent": True},
    "window": {"band": "window"},
    "blocks": {"band": "blocks16-causal"},
    "mask": {"mask": "heads"},
    "key mask": {"mask": "keys"},
    "mask, dead rows": {"mask": "rows"},
    "compact mask": {"mask": "compact", "band": "blocks16-causal"},
    "compact mask, offset": {"mask": "compact", "band": "blocks64", "offset": "offset23"},
    "bias": {"bias": "full"},
    "key bias": {"bias": "keys", "logits": "scale"},
    "ALiBi": {"slopes": "alibi"},
    "ALiBi, causal": {"slopes": "alibi-batch", "band": "causal"},
    "dropout": {"dropout": 0.2},
    "everything": {"slopes": "alibi", "bias": "heads", "mask": "dense", "band": "window", "dropout": 0.5},
    "everything a key": {"slopes": "alibi", "bias": "keys", "mask": "keys", "band": "blocks64", "dropout": 0.5},
}
FEATURES = {
    name: Case(dtype="float16", **dict({"lengths": (110, 110), "heads": (1, 2, 1)}, **options))
    for name, options in _FEATURES.items()
}
"""What a call can have, one at a time and together, at lengths of a few small tiles: both kernels run all of it."""


WINDOWS = [(prev, following) for prev in (0, 1, 3, 4, 5) for following in (0, 1, 4, 5)]
"""Blocks seen before and after the own one, around the count of five; the fast suite runs SOME_WINDOWS."""
SOME_WINDOWS = [(0, 0), (1, 4), (5, 0)]

LOGITS = [(logit, scale) for logit in (-6e4, 6e4) for scale in (2.0**-10, 0.25, -0.25, 2.0**10)]
"""Logits at the ends of fp16's range and scales of both signs and at the ends of theirs; SOME_LOGITS are fast."""
SOME_LOGITS = [(-6e4, 2.0**-10), (6e4, -0.25)]


def at_logit(logit, scale, lengths=(90, 110), head_dim=32):
    """(spec, query, key, value) of a plain call whose logits are ``logit`` but for a few units."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 1, n, head_dim)) for n in (lengths[0], lengths[1], lengths[1]))
    spread = abs(scale) ** -0.5 / head_dim**0.25  # differences of logits of about one
    query, key = spread * query, spread * key
    product = logit / scale
    query[..., 0], key[..., 0] = abs(product) ** 0.5, np.sign(product) * abs(product) ** 0.5
    spec = AttentionSpec(1, 1, 1, lengths[0], lengths[1], head_dim, "float16", scale=scale)
    return (spec,) + tuple(x.astype(np.float16) for x in (query, key, value))


def fp16_case(case):
    """A case of the shared list as the forward kernel can take it: float16, no gradients."""
    return replace(case, dtype="float16", layout="BNSD", gradients=False, cotangent=False)


def run_kernel(case, tiles=None, **options):
    """The forward kernel's results for a case, by the suite's names; tiles of 128 x 128 where none are given."""
    inputs = make_inputs(case)
    tensors = [x.astype(np.float16) for x in (inputs.query, inputs.key, inputs.value)]
    out, lse = simulated.forward(
        replace(inputs.spec, tiling="sparse"), *tensors, inputs.operands, tiles=tiles, **options
    )
    return {"out": out, "lse": lse}


def assert_kernel_matches(case, got):
    """Output and LSE against float64 by the table's fp16 rule; rows that see no key give exactly 0 and -inf.

    The kernel's LSE comes from sums of fp16 probabilities, so it is judged as fp16, although it is stored as fp32.
    """
    want, naive = run_reference(case), run_naive(case)
    dead = np.isneginf(want["lse"])
    assert np.array_equal(np.isneginf(got["lse"]), dead), "the LSE must be -inf exactly where no key is seen"
    assert not got["out"][dead].any(), "a row that sees no key must give exactly 0"
    for name in ("out", "lse"):
        one = [{name: results[name]} for results in (got, want) + tuple(naive)]
        assert_close(one[0], one[1], one[2:], "float16", FORWARD)
