"""Every MindSpore engine against the float64 reference, over the shared list of cases (tests/conformance.py).

PyNative mode runs the whole list, graph mode the cases tagged 'graph'; `--engine NAME` runs the same on one engine.
"""

import mindspore as ms
import pytest
from support.mindspore_engines import MindSporeEngine, engines_here

from conformance import check, tagged

pytestmark = [
    pytest.mark.level0,
    pytest.mark.platform_x86_cpu,
    pytest.mark.platform_arm_ascend_training,
    pytest.mark.platform_x86_ascend_training,
    pytest.mark.platform_arm_ascend910b_training,
    pytest.mark.env_onecard,
]
NAMES = engines_here()
# The engine 'jax' hands its tensors to the code that test_conformance_jax.py covers: one feature at a time is enough.
FULL = [MindSporeEngine(name) for name in NAMES if name != "jax" or len(NAMES) == 1]
GRAPH = [MindSporeEngine(name, ms.GRAPH_MODE) for name in NAMES]


def judged(figure, engine, case):
    """Check the case; the largest error of all goes into the table of figures."""
    figure("conformance, MindSpore {}: largest error / bound".format(engine), check(engine, case), 1.0, largest=True)


@pytest.mark.parametrize("engine", FULL, ids=str)
@pytest.mark.parametrize("case", tagged("ci", "primary", "pairwise"), ids=str)
def test_pynative(case, engine, figure):
    judged(figure, engine, case)


@pytest.mark.skipif(
    "jax" not in NAMES or len(NAMES) == 1, reason="engine 'jax' does not run here, or runs the full list"
)
@pytest.mark.parametrize("case", tagged("graph"), ids=str)
def test_pynative_through_jax(case, figure):
    judged(figure, MindSporeEngine("jax"), case)


@pytest.mark.parametrize("engine", GRAPH, ids=str)
@pytest.mark.parametrize("case", tagged("graph"), ids=str)
def test_graph(case, engine, figure):
    judged(figure, engine, case)


@pytest.mark.slow
@pytest.mark.parametrize("engine", FULL, ids=str)
@pytest.mark.parametrize("case", tagged("long"), ids=str)
def test_rest_of_the_grid(case, engine, figure):
    judged(figure, engine, case)
