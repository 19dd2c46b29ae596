"""Random configurations drawn by hypothesis, JAX's blockwise engine: 250 calls against the float64 reference."""

import jax
import pytest
from hypothesis import given, seed
from support.jax_engines import JaxEngine

from conformance import check, random_cases, random_settings

pytestmark = [pytest.mark.slow, pytest.mark.level1, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize("number", range(10))
def test_xla(number, figure):
    shares = []

    @seed(20231107 + number)
    @given(random_cases())
    @random_settings(25)
    def run(case):
        shares.append(check(JaxEngine("xla"), case))

    run()
    figure("random calls, JAX xla: largest error / bound", max(shares), 1.0, largest=True)
    jax.clear_caches()
