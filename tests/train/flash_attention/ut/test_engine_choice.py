"""How a front end's table chooses an engine, and which one `auto` takes in MindSpore."""

import pytest

from flash_attention.core.engine import Engine, EngineTable
from flash_attention.core.errors import Reason, UnsupportedError
from flash_attention.core.spec import AttentionSpec

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def spec(length, dtype="float32"):
    return AttentionSpec(1, 2, 2, length, length, 64, dtype, causal=True)


def table():
    """fast: first in order, pays from 100 tokens on; slow: takes float32 alone; named: only by name."""
    found = EngineTable("engine")
    refusal = Reason("dtype", "float16", "float32", "Cast it.")
    found.add(Engine("slow", None, lambda spec: None if spec.dtype == "float32" else refusal, order=2))
    found.add(Engine("fast", None, lambda spec: None, order=1, pays=lambda spec: spec.q_len >= 100))
    found.add(Engine("named", None, lambda spec: None, order=None))
    return found


@pytest.mark.parametrize(
    "length, dtype, requested, chosen",
    [
        (200, "float32", None, "fast"),
        (50, "float32", "auto", "slow"),
        (50, "float16", None, "fast"),  # does not pay, but the other one refuses
        (50, "float32", "fast", "fast"),
        (50, "float32", "named", "named"),
    ],
)
def test_choice(length, dtype, requested, chosen):
    assert table().choose(spec(length, dtype), requested).name == chosen


def test_when_all_refuse_the_most_portable_engine_says_why():
    found = EngineTable("engine")
    for order, name in enumerate(["first", "last"]):
        reason = Reason("head_dim", 64, "less than what {} takes".format(name))
        pays = order == 1
        found.add(Engine(name, None, lambda spec, x=reason: x, order=order, pays=lambda spec, x=pays: x))
    with pytest.raises(UnsupportedError) as caught:
        found.choose(spec(8))
    assert str(caught.value) == (
        "For 'flash_attention' (engine 'last'), 'head_dim' must be less than what last takes, but got 64."
    )


def test_mindspore_takes_jax_where_it_pays():
    pytest.importorskip("mindspore")
    pytest.importorskip("jax")
    from flash_attention.ops import ENGINES

    assert ENGINES.choose(spec(1024)).name == "portable"
    assert ENGINES.choose(spec(4096)).name == "jax"
