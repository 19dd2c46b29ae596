"""core/tiling: each strategy's tiles for the shapes it was made for, and the registry."""

import pytest

from flash_attention.core.spec import AttentionSpec
from flash_attention.core.tiling import (
    Strategy,
    Tile,
    choice,
    choose_tile,
    get_strategy,
    register_cost,
    register_strategy,
    strategy_names,
)

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
OFFERED = (Tile(256, 512), Tile(128, 128))


def candidates(name, q_len, kv_len, head_dim=64):
    return get_strategy(name).candidates(AttentionSpec(1, 8, 8, q_len, kv_len, head_dim), OFFERED)


@pytest.mark.parametrize(
    "name, q_len, kv_len, head_dim, want",
    [
        ("sparse", 4096, 4096, 128, ((128, 128),)),
        ("sparse", 1000, 129, 64, ((128, 128),)),
        ("sparse", 1, 77, 64, ((16, 80),)),
        ("wukong", 4096, 4096, 40, ((256, 256),)),
        ("wukong", 1024, 1024, 80, ((128, 128),)),
        ("wukong", 256, 256, 160, ((64, 64),)),
        ("wukong", 64, 64, 160, ((64, 64),)),
        ("wukong", 4096, 77, 40, ((256, 77),)),
        ("wukong", 300, 300, 512, ((64, 64),)),
        ("auto", 4096, 4096, 64, OFFERED),
        ("auto", 100, 4096, 64, ((112, 512), (112, 128))),
        ("auto", 100, 100, 64, ((112, 112),)),
    ],
)
def test_candidates(name, q_len, kv_len, head_dim, want):
    assert candidates(name, q_len, kv_len, head_dim) == want


def test_cost_function_decides_between_candidates(monkeypatch):
    """Only where there are several, and only the engine's own; without one the first candidate is taken."""
    monkeypatch.setattr(choice, "_COSTS", {})
    spec, asked = AttentionSpec(1, 8, 8, 4096, 4096, 64), []

    def cost(spec, tile, target):
        asked.append((tile, target))
        return tile.q

    assert choose_tile(get_strategy("auto"), spec, "mine", OFFERED) == OFFERED[0]
    register_cost("mine", cost)
    assert choose_tile(get_strategy("auto"), spec, "mine", OFFERED, "chip") == OFFERED[1]
    assert asked == [(tile, "chip") for tile in OFFERED]
    assert choose_tile(get_strategy("sparse"), spec, "mine", OFFERED) == (128, 128)
    assert choose_tile(get_strategy("auto"), spec, "another", OFFERED) == OFFERED[0]
    assert len(asked) == 2
    with pytest.raises(ValueError, match="a cost function for 'mine' is registered already"):
        register_cost("mine", cost)


def test_block_sizes():
    assert {name: get_strategy(name).block_size for name in strategy_names()} == {
        "sparse": 128, "wukong": 64, "auto": 128,
    }  # fmt: skip


def test_a_name_is_registered_once():
    with pytest.raises(ValueError) as caught:
        register_strategy(Strategy("sparse", 128, lambda spec, offered: offered))
    assert str(caught.value) == "tiling strategy 'sparse' is registered already"
