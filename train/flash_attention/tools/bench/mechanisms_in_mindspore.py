"""MindSpore mechanisms as benchmark candidates: ``{name: function(case) -> Cell of (query, key, value)}``, BNSD."""

import functools

from mindspore import Tensor, nn

from flash_attention.nn import (
    BlockwiseAttention,
    ConditionalRoutedAttention,
    DynamicSparseAttention,
    FusedLandmarkAttention,
    dilated_attention,
)
from flash_attention.tools.bench.cases import (
    BUCKETS,
    KEPT,
    LANDMARK_BLOCK,
    geometric_patterns,
    routed_layer,
    sparse_indices,
)


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


class _Sparse(nn.Cell):
    def __init__(self, candidate, case):
        super().__init__()
        mode, q_idx, k_idx = sparse_indices(case, candidate)
        self.q_idx, self.k_idx = Tensor(q_idx), Tensor(k_idx)
        self.attention = DynamicSparseAttention(sparsity_mode=mode)

    def construct(self, query, key, value):
        query, key, value = query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)
        return self.attention(query, key, value, self.q_idx, self.k_idx).swapaxes(1, 2)


def _landmark(case):
    del case
    return FusedLandmarkAttention(block_size=LANDMARK_BLOCK)


class _Colt5(nn.Cell):
    """A self-attention layer: its input is the query's heads side by side; key and value are not used."""

    def __init__(self, case):
        super().__init__()
        width, sizes = routed_layer(case)
        self.layer = ConditionalRoutedAttention(width, **sizes)

    def construct(self, query, key, value):
        x = query.swapaxes(1, 2)
        return self.layer(x.reshape((x.shape[0], x.shape[1], -1))).reshape(x.shape).swapaxes(1, 2)


MECHANISMS = {
    "blockwise": _Blockwise,
    "colt5": _Colt5,
    "dilated": _Dilated,
    "landmark": _landmark,
}
MECHANISMS.update((name, functools.partial(_Sparse, name)) for name in tuple(BUCKETS) + tuple(KEPT))
