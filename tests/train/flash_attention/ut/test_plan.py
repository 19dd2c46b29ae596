"""core/plan.py: small plans written out, the transposed view, the drawing, the split over cores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attention.core.plan import make_plan
from flash_attention.core.ranges import Band

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.mark.parametrize(
    "band, offset, kv_range, full_range, q_range",
    [
        (Band(8, 8), 0, [[0, 2], [0, 2]], [[0, 2], [0, 2]], [[0, 2], [0, 2]]),
        (Band(8, 8, right=0), 0, [[0, 1], [0, 2]], [[0, 0], [0, 1]], [[0, 2], [1, 2]]),
        (Band(4, 12, right=0), 8, [[0, 3]], [[0, 2]], [[0, 1], [0, 1], [0, 1]]),  # wide, bottom-right
        (Band(12, 4, right=0), -8, [[0, 0], [0, 0], [0, 1]], [[0, 0], [0, 0], [0, 0]], [[2, 3]]),  # tall: dead rows
        (Band(10, 10, prev=0, next=0, block_size=4), 0, [[0, 1], [1, 2], [2, 3]], [[0, 1], [1, 2], [2, 3]],
         [[0, 1], [1, 2], [2, 3]]),
        (Band(8, 8, left=1, right=1), 0, [[0, 2], [0, 2]], [[0, 0], [1, 1]], [[0, 2], [0, 2]]),
    ],
    ids=["dense", "causal", "wide", "tall", "ragged blocks", "window"],
)  # fmt: skip
def test_literal_plans(band, offset, kv_range, full_range, q_range):
    plan = make_plan(band, offset, 4, 4)
    assert plan.kv_range.tolist() == kv_range
    assert [b - a for a, b in plan.full_range.tolist()] == [b - a for a, b in full_range]
    assert all(want == found for want, found in zip(full_range, plan.full_range.tolist()) if want[0] != want[1])
    assert plan.q_range.tolist() == q_range
    assert plan.kv_range.dtype == plan.q_range.dtype == np.int32 and plan.core_of.dtype == np.int16


def test_visits_names_full_tiles():
    plan = make_plan(Band(12, 12, left=7, right=0), 0, 4, 4)
    assert plan.visits(0) == [(0, False)]
    assert plan.visits(2) == [(0, False), (1, True), (2, False)]
    assert (plan.visited, plan.partial) == (6, 4)
    assert plan.sparsity == pytest.approx(1 / 3)
    assert (plan.queries(2), plan.keys(1)) == ((8, 12), (4, 8))


@given(
    st.integers(1, 60), st.integers(1, 60), st.none() | st.integers(0, 20), st.none() | st.integers(0, 20),
    st.integers(-30, 30), st.integers(1, 20), st.integers(1, 20),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_forward_and_backward_visit_what_is_visible(q_len, kv_len, left, right, offset, q_tile, kv_tile):
    """Both views hold every tile in which something is visible."""
    plan = make_plan(Band(q_len, kv_len, left, right), offset, q_tile, kv_tile)
    p, j = np.arange(q_len)[:, None] + offset, np.arange(kv_len)[None]
    mask = (left is None or p - j <= left) & (np.ones_like(p - j, bool) if right is None else j - p <= right)
    mask = np.broadcast_to(mask, (q_len, kv_len))
    for i in range(plan.q_tiles):
        for t in range(plan.kv_tiles):
            a, b = plan.queries(i)
            c, d = plan.keys(t)
            if mask[a:b, c:d].any():
                assert plan.kv_range[i, 0] <= t < plan.kv_range[i, 1]
                assert plan.q_range[t, 0] <= i < plan.q_range[t, 1]


def test_drawing():
    assert str(make_plan(Band(16, 16, right=0), 0, 4, 4)).splitlines() == [
        "4 x 4 tiles of 4 x 4: 10 visited (4 partial), 37.5% skipped",
        "+...",
        "#+..",
        "##+.",
        "###+",
        "# full   + partial   . skipped",
    ]


def test_drawing_of_a_large_plan_is_cut_and_says_so():
    lines = str(make_plan(Band(65536, 65536, prev=7, next=0), 0, 128, 128)).splitlines()
    assert lines[0].startswith("512 x 512 tiles of 128 x 128: 4068 visited (0 partial), 98.4% skipped")
    assert len(lines) <= 22 and max(map(len, lines[1:-1])) <= 20
    assert lines[-1].endswith("(1 of 26 rows and 1 of 26 columns of tiles shown)")


@pytest.mark.parametrize("cores", [1, 2, 7, 32])
@pytest.mark.parametrize("band", [Band(4096, 4096, right=0), Band(4096, 4096, prev=7, next=0), Band(4096, 4096)])
def test_cores_share_the_work(band, cores):
    plan = make_plan(band, 0, 128, 128, cores)
    loads = plan.core_loads()
    rows = plan.kv_range[:, 1] - plan.kv_range[:, 0]
    assert len(loads) == min(cores, plan.q_tiles) and loads.sum() == plan.visited
    assert loads.max() - loads.min() <= rows.max()


@pytest.mark.parametrize("arguments", [(0, 4, 1), (4, 0, 1), (4, 4, 0)])
def test_sizes_must_be_positive(arguments):
    with pytest.raises(ValueError) as caught:
        make_plan(Band(8, 8), 0, *arguments)
    assert str(caught.value) == "q_tile, kv_tile and cores must be >= 1, but got {}, {}, {}".format(*arguments)
