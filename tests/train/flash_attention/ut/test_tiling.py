"""core/tiling: each strategy's tiles for the shapes it was made for, and the registry."""

import pytest

from flash_attention.core.spec import AttentionSpec
from flash_attention.core.tiling import Strategy, Tile, get_strategy, register_strategy, strategy_names

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
PREFERRED = Tile(256, 512)


def tiles(name, q_len, kv_len, head_dim=64):
    return get_strategy(name).tiles(AttentionSpec(1, 8, 8, q_len, kv_len, head_dim), PREFERRED)


@pytest.mark.parametrize(
    "name, q_len, kv_len, head_dim, want",
    [
        ("sparse", 4096, 4096, 128, (128, 128)),
        ("sparse", 1000, 129, 64, (128, 128)),
        ("sparse", 1, 77, 64, (16, 80)),
        ("wukong", 4096, 4096, 40, (256, 256)),
        ("wukong", 1024, 1024, 80, (128, 128)),
        ("wukong", 256, 256, 160, (64, 64)),
        ("wukong", 64, 64, 160, (64, 64)),
        ("wukong", 4096, 77, 40, (256, 77)),
        ("wukong", 300, 300, 512, (64, 64)),
        ("auto", 4096, 4096, 64, PREFERRED),
        ("auto", 100, 4096, 64, (112, 512)),
    ],
)
def test_tiles(name, q_len, kv_len, head_dim, want):
    assert tiles(name, q_len, kv_len, head_dim) == want


def test_block_sizes():
    assert {name: get_strategy(name).block_size for name in strategy_names()} == {
        "sparse": 128, "wukong": 64, "auto": 128,
    }  # fmt: skip


def test_a_name_is_registered_once():
    with pytest.raises(ValueError) as caught:
        register_strategy(Strategy("sparse", 128, lambda spec, preferred: preferred))
    assert str(caught.value) == "tiling strategy 'sparse' is registered already"
