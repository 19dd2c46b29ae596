"""mindformers' LLaMA generating over our caches, against the library's own attention without a cache.

bash build.sh test integration mindformers
"""

import pytest
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
from support.cached_mindformers import FLOAT32, SIZES, Cached
from support.libraries import VOCABULARY, set_weights

from flash_attention_infer.integrations.mindformers import CachedModel
from flash_attention_infer.nn import generate

pytestmark = [pytest.mark.integration, pytest.mark.level1, pytest.mark.platform_x86_cpu]
LONGEST = 32


class TestLlama(Cached):
    kv_heads, inner, bound = 2, "model", 1e-5

    def build(self, flash):
        options = dict(
            SIZES, n_kv_heads=self.kv_heads, intermediate_size=64, max_position_embedding=LONGEST, use_rope_slice=True,
            pad_token_id=VOCABULARY,  # the library hides padding; here no token is
            rotary_dtype="float32", fused_rms_norm=False, use_flash_attention=flash,
        )  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**options, **FLOAT32))
        set_weights(model)
        return model.set_train(False)

    def test_refuses_positions_beyond_the_table(self):
        cache = self.paged()
        with CachedModel(self.ours(), cache) as forward:
            with pytest.raises(
                ValueError, match="'positions' must be below the model's max_position_embedding, 32, bu"
            ):
                generate(forward, cache, [list(range(1, 40))], 1)
