"""JAX mechanisms as benchmark candidates: ``{name: function(case) -> attend(query, key, value)}``, BSND tensors.

Another mechanism is one more entry here and in ``mechanisms_in_mindspore.py``. Their results are judged by the tests.
"""

import functools

from flash_attention.jax import dilated_attention
from flash_attention.tools.bench.cases import geometric_patterns


def _dilated(case):
    sizes, rates = geometric_patterns(case.q_len)
    return functools.partial(dilated_attention, segment_size=sizes, dilation_rate=rates, is_causal=case.causal)


MECHANISMS = {
    "dilated": _dilated,
}
