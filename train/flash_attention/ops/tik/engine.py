"""One spec's forward and backward Cell around the two kernels, and ``RUN``, what engine 'tik' registers."""

from mindspore import nn
from mindspore.ops import operations as P

from flash_attention.ascend.backward_arguments import KEPT
from flash_attention.ascend.entry.request import BACKWARD, FORWARD, KernelRequest
from flash_attention.ops.autograd import DifferentiableEngine
from flash_attention.ops.tik.backward_operands import BiasGradient, QueryColumns, SlopeGradient
from flash_attention.ops.tik.custom import custom_operator
from flash_attention.ops.tik.operands import TileOperands, constant_tensors


class Forward(nn.Cell):
    """``(query, key, value, *operands) -> (out, lse)``.

    Args:
        spec: :class:`~flash_attention.core.spec.AttentionSpec` that ``limits.supports`` takes.
        operator: ``operator(request)`` -> the kernel as a function of its inputs, with a tuple of its outputs.
    """

    def __init__(self, spec, operator):
        super().__init__(auto_prefix=False)
        request = KernelRequest.of(FORWARD, spec)
        self.kernel = operator(request)
        self.operands = TileOperands(request.geometry, 0.0)
        self.constants = constant_tensors(request.constants())
        self.padded, self.size = (spec.batch, spec.heads, -1), (spec.batch, spec.heads, spec.q_len)
        self.reshape, self.slice = P.Reshape(), P.Slice()

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed
    ):
        packed = self.operands(query, bias, mask, slopes, seed)
        out, lse = self.kernel(*((query, key, value) + packed + self.constants))
        return out, self.slice(self.reshape(lse, self.padded), (0, 0, 0), self.size)


class Backward(nn.Cell):
    """``(query, key, value, *operands, out, lse, d_out, d_lse)`` -> the six gradients; made as :class:`Forward` is."""

    def __init__(self, spec, operator):
        super().__init__(auto_prefix=False)
        request = KernelRequest.of(BACKWARD, spec)
        geometry = request.geometry
        self.kernel = operator(request)
        self.operands, self.columns = TileOperands(geometry, KEPT), QueryColumns(geometry)
        constants = constant_tensors(request.constants())
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
        columns, minus_delta = self.columns(out, lse, d_out, d_lse)
        inputs = (query, key, value, d_out, columns) + self.key_columns
        inputs = inputs + self.operands(query, bias, mask, slopes, seed)
        if self.has_dropout:
            inputs = inputs + (minus_delta,)
        grads = self.kernel(*(inputs + self.constants))
        d_bias = self.bias(grads[3], bias) if self.has_bias else None
        d_slopes = self.slopes(grads[-1], slopes) if self.has_slopes else None
        return grads[0], grads[1], grads[2], d_bias, d_slopes, None


def kernels(operator):
    """:class:`~flash_attention.ops.autograd.DifferentiableEngine` whose kernels ``operator(request)`` gives."""
    return DifferentiableEngine(lambda spec: (Forward(spec, operator), Backward(spec, operator)))


RUN = kernels(custom_operator)
