"""Generation in MindSpore: the properties of support/generated.py."""

import pytest
from support.cached_mindspore import InMindSpore
from support.generated import Generated

from flash_attention_infer.nn import KVCache

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


class TestMindSpore(Generated):
    array, numpy, engine = staticmethod(InMindSpore.array), staticmethod(InMindSpore.numpy), InMindSpore.engine
    KVCache = KVCache
