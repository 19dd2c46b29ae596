"""Generation in JAX: the properties of support/generated.py."""

import pytest
from support.cached_jax import InJax
from support.generated import Generated

from flash_attention_infer.jax import KVCache

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


class TestJax(Generated):
    array, numpy = staticmethod(InJax.array), staticmethod(InJax.numpy)
    KVCache = KVCache
