"""From an engine's forward and backward to one differentiable MindSpore call, for functions and Cells, both modes.

front end -> AttentionSpec -> engine -> **AttentionCell** (this file) -> engine's forward / backward.

MindSpore takes a custom gradient only from ``Cell.bprop``. A plain function gets one by asking a ``constexpr`` for a
Cell that was built once for its spec: the graph compiler accepts a Cell as a constant, and PyNative just calls it.
"""

from mindspore import ops

from flash_attention.core.spec import Operands
from flash_attention.ops.precision import OwnPrecision


class AttentionCell(OwnPrecision):
    """One spec's attention: ``cell(query, key, value, *operands) -> (out, lse)``.

    The operands are the first ten of :class:`~flash_attention.core.spec.Operands`, in order, None where absent. Owns no
    parameter. Gradients reach query, key, value, bias, slopes and sinks; those of the other tensors are zeros.

    Args:
        forward: callable ``(query, key, value, *operands) -> (out, lse)``.
        backward: callable ``(query, key, value, *operands, out, lse, d_out, d_lse) ->
            (d_query, d_key, d_value, d_bias, d_slopes, d_sinks)``, None for an absent operand.
    """

    def __init__(self, forward, backward):
        super().__init__()
        self.forward = forward
        self.backward = backward

    def construct(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed
    ):
        return self.forward(
            query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed
        )

    def bprop(
        self, query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed, out,
        d_out,
    ):  # fmt: skip
        d_query, d_key, d_value, d_bias, d_slopes, d_sinks = self.backward(
            query, key, value, bias, mask, slopes, sinks, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed,
            out[0], out[1], d_out[0], d_out[1],
        )  # fmt: skip
        return (
            d_query, d_key, d_value, d_bias, _zeros(mask), d_slopes, d_sinks, _zeros(q_ids), _zeros(kv_ids),
            _zeros(q_lengths), _zeros(kv_lengths), _zeros(q_offset), _zeros(seed),
        )  # fmt: skip


def _zeros(operand):
    """The gradient of an operand that has none; None stays None."""
    return None if operand is None else ops.zeros_like(operand)


def cell_operands(operands):
    """The ten that an :class:`AttentionCell` takes: a call from MindSpore is a whole one, its last field stays None."""
    return operands[:-1]


class DifferentiableEngine:
    """What an engine gives as ``Engine.run``: Cells made once a spec, and an eager call on top of them.

    Args:
        build: ``build(spec) -> (forward, backward)`` for :class:`AttentionCell`.
    """

    def __init__(self, build):
        self._build = build
        self._cells = {}

    def cell(self, spec, shards=(1, 1)):
        """The :class:`AttentionCell` of ``spec``. Call it from a ``constexpr`` where a graph may be compiling.

        ``shards``, (dp, mp), is for engines whose operators are their own: MindSpore splits the ordinary ones itself.
        """
        del shards
        if spec not in self._cells:
            self._cells[spec] = AttentionCell(*self._build(spec))
        return self._cells[spec]

    def __call__(self, spec, query, key, value, operands=Operands()):
        """``(out, lse)`` for callers outside a graph."""
        return self.cell(spec)(query, key, value, *cell_operands(operands))
