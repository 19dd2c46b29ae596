"""Random configurations drawn by hypothesis, JAX's blockwise engine: 250 calls against the float64 reference."""

import jax
import pytest
from hypothesis import HealthCheck, given, seed, settings
from support.jax_engines import JaxEngine

from conformance import check, random_cases

pytestmark = [pytest.mark.slow, pytest.mark.level1, pytest.mark.platform_x86_cpu]


@seed(20231107)
@given(random_cases())
@settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_xla(case):
    check(JaxEngine("xla"), case)


def teardown_module():
    jax.clear_caches()
