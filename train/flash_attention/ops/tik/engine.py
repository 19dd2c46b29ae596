"""One spec's forward and backward Cell around the kernels, and ``RUN``, what engine 'tik' registers."""

from dataclasses import replace

import mindspore as ms
from mindspore import nn
from mindspore.ops import operations as P

from flash_attention.ascend.backward_arguments import KEPT
from flash_attention.ascend.entry.request import BACKWARD, FORWARD, PREPROCESS, KernelRequest
from flash_attention.ascend.geometry import Geometry
from flash_attention.core.sharding import share
from flash_attention.ops.autograd import AttentionCell, DifferentiableEngine
from flash_attention.ops.tik.backward_operands import BiasGradient, Scaled, SlopeGradient, Statistics
from flash_attention.ops.tik.custom import custom_operator
from flash_attention.ops.tik.operands import TileOperands, constant_tensors
from flash_attention.ops.tik.sharding import split

SPLITTING = ("semi_auto_parallel", "auto_parallel")
"""Parallel modes in which an operator's strategy is heeded."""


def requests(kind, spec, shards):
    """``(part, whole)``: the request of one device's kernel, and of the whole call at the same tiles.

    Args:
        kind: of kernel. spec: of the whole call. shards: (dp, mp).
    """
    part = KernelRequest.of(kind, share(spec, *shards))
    return part, replace(part, geometry=Geometry(spec, part.geometry.tiles))


class Forward(nn.Cell):
    """``(query, key, value, *operands) -> (out, lse)``.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec` that ``limits.supports`` takes.
        operator: ``operator(part, whole)`` -> the kernel as a function of its inputs, with a tuple of its outputs.
        shards: (dp, mp): the devices that share batch and heads.
    """

    def __init__(self, spec, operator, shards=(1, 1)):
        super().__init__(auto_prefix=False)
        part, whole = requests(FORWARD, spec, shards)
        self.kernel = operator(part, whole)
        self.operands = TileOperands(whole.geometry, 0.0)
        self.constants = constant_tensors(part.constants())
        self.size = (spec.batch, spec.heads, spec.q_len)
        self.slice = P.Slice()

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed
    ):
        packed = self.operands(query, bias, mask, slopes, seed)
        out, lse = self.kernel(*((query, key, value) + packed + self.constants))
        return out, self.slice(lse, (0, 0, 0), self.size)


class Backward(nn.Cell):
    """``(query, key, value, *operands, out, lse, d_out, d_lse)`` -> the six gradients; made as :class:`Forward` is."""

    def __init__(self, spec, operator, shards=(1, 1)):
        super().__init__(auto_prefix=False)
        part, whole = requests(BACKWARD, spec, shards)
        geometry = whole.geometry
        self.kernel = operator(part, whole)
        before = [replace(request, kind=PREPROCESS) for request in (part, whole)]
        self.preprocess = operator(*before)
        self.shares = constant_tensors(before[0].constants())
        self.operands, self.scaled, self.statistics = (
            TileOperands(geometry, KEPT),
            Scaled(geometry),
            Statistics(geometry),
        )
        constants = constant_tensors(part.constants())
        self.key_columns, self.constants = constants[:1], constants[1:]
        self.has_dropout, self.has_bias = spec.dropout_rate > 0, spec.bias_shape is not None
        self.has_slopes = spec.alibi_shape is not None
        if self.has_bias:
            self.bias = BiasGradient(geometry)
        if self.has_slopes:
            self.slopes = SlopeGradient(geometry)

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed,
        out, lse, d_out, d_lse,
    ):  # fmt: skip
        d_out, d_lse, power, factors = self.scaled(value, lse, d_out, d_lse)
        columns, minus_delta = self.preprocess(*((out, d_out, self.statistics(lse, d_lse)) + self.shares))
        inputs = (query, key, value, d_out, columns) + self.key_columns + (factors,)
        inputs = inputs + self.operands(query, bias, mask, slopes, seed)
        if self.has_dropout:
            inputs = inputs + (minus_delta,)
        grads = self.kernel(*(inputs + self.constants))
        d_bias = self.bias(grads[3], bias, power) if self.has_bias else None
        d_slopes = self.slopes(grads[-1], slopes, power) if self.has_slopes else None
        return grads[0], grads[1], grads[2], d_bias, d_slopes, None


class TikEngine(DifferentiableEngine):
    """``Engine.run`` whose kernels ``operator(part, whole)`` gives; see :class:`Forward`."""

    def __init__(self, operator):
        super().__init__(lambda spec: (Forward(spec, operator), Backward(spec, operator)))
        self._operator = operator
        self._sharded = {}

    def cell(self, spec, shards=(1, 1)):
        """As in the base class; the kernels are split by (dp, mp) where MindSpore splits graphs as it is told."""
        if shards == (1, 1) or ms.get_auto_parallel_context("parallel_mode") not in SPLITTING:
            return super().cell(spec)
        if (spec, shards) not in self._sharded:

            def operator(part, whole):
                return split(self._operator(part, whole), whole, *shards)

            cells = Forward(spec, operator, shards), Backward(spec, operator, shards)
            self._sharded[spec, shards] = AttentionCell(*cells)
        return self._sharded[spec, shards]


RUN = TikEngine(custom_operator)
