"""BLOOM (ALiBi) of mindformers 1.3.2 generating over our caches, against the library's own attention without a cache.

bash build.sh test integration mindformers-1.3
"""

import pytest
import support.mindformers_on_new_mindspore  # noqa: F401  (modules that newer versions of MindSpore have removed)
from mindformers.models.bloom import BloomConfig, BloomLMHeadModel
from support.cached_mindformers import FLOAT32, SIZES, Cached
from support.libraries import VOCABULARY, set_weights

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]


class TestBloom(Cached):
    """The library rounds queries, keys, values and hidden states to float16."""

    kv_heads, inner, bound = 4, "transformer", 4 * 2.0**-10

    def build(self, flash):
        config = BloomConfig(
            **SIZES, hidden_dropout_rate=0.0, attention_dropout_rate=0.0, use_flash_attention=flash,
            embedding_init_type="float32",
            eos_token_id=VOCABULARY,  # the library hides the tokens that equal it; here none does
            **FLOAT32,
        )  # fmt: skip
        model = BloomLMHeadModel(config)
        set_weights(model, gain=1.0)
        return model.set_train(False)
