"""Random configurations drawn by hypothesis, the portable MindSpore engine: 250 calls against the float64 reference."""

import mindspore  # noqa: F401  (conftest leaves this file out where it is missing)
import pytest
from hypothesis import given, seed
from support.mindspore_engines import MindSporeEngine, engines_here

from conformance import check, random_cases, random_settings

pytestmark = [pytest.mark.slow, pytest.mark.level1, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("engine", [name for name in engines_here() if name != "jax"])
def test_pynative(engine, number, figure):
    shares = []

    @seed(20231107 + number)
    @given(random_cases())
    @random_settings(25)
    def run(case):
        shares.append(check(MindSporeEngine(engine), case))

    run()
    figure("random calls, MindSpore {}: largest error / bound".format(engine), max(shares), 1.0, largest=True)
