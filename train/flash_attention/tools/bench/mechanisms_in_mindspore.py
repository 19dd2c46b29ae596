"""MindSpore mechanisms as benchmark candidates: ``{name: function(case) -> Cell of (query, key, value)}``, BNSD."""

from mindspore import nn

from flash_attention.nn import BlockwiseAttention, dilated_attention
from flash_attention.tools.bench.cases import geometric_patterns


class _Dilated(nn.Cell):
    def __init__(self, case):
        super().__init__()
        self.sizes, self.rates = geometric_patterns(case.q_len)
        self.causal = case.causal

    def construct(self, query, key, value):
        query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
        return dilated_attention(query, key, value, self.sizes, self.rates, is_causal=self.causal).swapaxes(1, 2)


class _Blockwise(nn.Cell):
    def __init__(self, case):
        super().__init__()
        self.attention = BlockwiseAttention(
            causal_mask=case.causal, query_chunk_size=512, key_chunk_size=512, policy=None
        )
        self.scale = case.head_dim**-0.5

    def construct(self, query, key, value):
        query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
        return self.attention(query * self.scale, key, value).swapaxes(1, 2)


MECHANISMS = {
    "blockwise": _Blockwise,
    "dilated": _Dilated,
}
