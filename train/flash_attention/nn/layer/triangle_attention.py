"""``TriangleAttention`` as users of the earlier library know it: unscaled causal attention, on the core call."""

from mindspore import ops
from mindspore.ops.primitive import constexpr

from flash_attention.core.mechanisms import triangle as shared
from flash_attention.nn.layer.flash_attention import discard_to_keep
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import flash_attention


class TriangleAttention(SeededCell):
    r"""Causal attention that computes only the lower triangle of blocks. Scores are **not scaled**: the caller does.

    .. math::
        O = \text{dropout}(\text{softmax}(Q K^T + causal + mask)) V

    Args:
        block_size (int): blocks of so many tokens above the diagonal are skipped; the engines choose the tiles they
            compute themselves, so it changes no result. Default: 512.
        dropout_rate (float): on the softmax weights, inverted, in [0, 1); acts in training mode only. Default: 0.0.
        dp (int): devices that share the batch, for (semi-)auto parallel; stand-alone runs compute the same. Default: 1.
        mp (int): devices that share the heads. Default: 1.
        engine (str): keyword only; None or 'auto' = the best engine here. Default: None.

    Inputs:
        - **query**, **key**, **value** (Tensor) - (B, N, S, D), any S; float16, bfloat16 or float32.
        - **attention_mask** (Tensor) - **non-zero = discard**; (1|B, S, S), on top of causality. Default: None.

    Outputs:
        Tensor (B, N, S, D). A query whose keys are all discarded gives 0.

    Raises:
        ValueError, TypeError: bad argument.
    """

    def __init__(self, block_size=512, dropout_rate=0.0, dp=1, mp=1, *, engine=None):
        shared.check_layer(block_size, dropout_rate, dp, mp)
        super().__init__(dropout_rate)
        ENGINES.check_name(engine, shared.LAYER)
        self.block_size, self.dp, self.mp, self.engine = block_size, dp, mp, engine

    def construct(self, query, key, value, attention_mask=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        _check_shapes(query.shape, key.shape, None if attention_mask is None else attention_mask.shape)
        mask, seed, rate = None, None, 0.0
        if attention_mask is not None:
            mask = ops.expand_dims(discard_to_keep(attention_mask), 1)
        if self.training and self.dropout_rate > 0:
            seed, rate = self.next_seed(query), self.dropout_rate
        return flash_attention(
            query, key, value, mask=mask, scale=1.0, is_causal=True, next_block_num=0, block_size=self.block_size,
            dropout_rate=rate, dropout_seed=seed, engine=self.engine, layout="BNSD",
        )  # fmt: skip


@constexpr
def _check_shapes(query, key, mask):
    shared.check_shapes(query, key, mask)
