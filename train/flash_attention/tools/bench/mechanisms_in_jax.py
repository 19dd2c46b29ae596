"""JAX mechanisms as benchmark candidates: ``{name: function(case) -> attend(query, key, value)}``, BSND tensors.

Another mechanism is one more entry here and in ``mechanisms_in_mindspore.py``. Their results are judged by the tests.
"""

import functools

from flash_attention.jax import blockwise_compute_attn, dilated_attention
from flash_attention.tools.bench.cases import geometric_patterns


def _dilated(case):
    sizes, rates = geometric_patterns(case.q_len)
    return functools.partial(dilated_attention, segment_size=sizes, dilation_rate=rates, is_causal=case.causal)


def _blockwise(case):
    """Chunks of 512 x 512; the scale is the caller's here, as users of the call write it."""

    def attend(query, key, value):
        return blockwise_compute_attn(
            query * case.head_dim**-0.5,
            key,
            value,
            causal_mask=case.causal,
            query_chunk_size=512,
            key_chunk_size=512,
            dtype=case.dtype,
            policy=None,
        )

    return attend


MECHANISMS = {
    "blockwise": _blockwise,
    "dilated": _dilated,
}
