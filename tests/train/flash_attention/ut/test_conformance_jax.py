"""Every JAX engine against the float64 reference, over the shared list of cases (tests/conformance.py)."""

import contextlib

import jax
import pytest
from support.jax_engines import JaxEngine, interpreted_fast

from conformance import check, tagged

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.env_onecard]
BLOCKWISE = [JaxEngine("xla")]
INTERPRETED = [JaxEngine("pallas"), JaxEngine("splash"), JaxEngine("mosaic")]
FAST = {"pallas": ("causal, Sq > Sk: dead rows", "lengths"), "splash": ("plain, bf16",), "mosaic": ("plain, bf16",)}


def judged(figure, engine, case):
    """Check the case; the largest error of all goes into the table of figures."""
    figure("conformance, JAX {}: largest error / bound".format(engine), check(engine, case), 1.0, largest=True)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Hundreds of compiled programs would fill the memory."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize("engine", BLOCKWISE, ids=str)
@pytest.mark.parametrize("case", tagged("ci", "primary", "pairwise"), ids=str)
def test_engine(case, engine, figure):
    judged(figure, engine, case)


@pytest.mark.parametrize("case", tagged("ci"), ids=str)
def test_reference_engine(case, figure):
    judged(figure, JaxEngine("reference"), case)


@pytest.mark.parametrize(
    "engine, case",
    [
        pytest.param(
            engine,
            case,
            id="{}-{}".format(engine, case),
            marks=[] if case.name in FAST[str(engine)] else pytest.mark.slow,
        )
        for engine in INTERPRETED
        for case in tagged("ci", "primary", "pairwise")
    ],
)
def test_interpreted_engine(engine, case, figure):
    threads = str(engine) == "mosaic" and engine.supports(case.spec) is None
    with interpreted_fast() if threads else contextlib.nullcontext():
        judged(figure, engine, case)


@pytest.mark.slow
@pytest.mark.parametrize("engine", BLOCKWISE, ids=str)
@pytest.mark.parametrize("case", tagged("long"), ids=str)
def test_rest_of_the_grid(case, engine, figure):
    judged(figure, engine, case)
