"""docs/examples/dilated_attention.py in both frameworks: the published calls, and a classifier that learns."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "docs" / "examples"))

import dilated_attention as example  # noqa: E402  (needs the path above)

pytestmark = [pytest.mark.level1, pytest.mark.platform_x86_cpu, pytest.mark.slow]


@pytest.mark.parametrize("framework", ["jax", "mindspore"])
def test_published_calls(framework):
    pytest.importorskip(framework)
    found = example.published_calls(framework)
    assert found == [(shape, dtype) for shape, _, dtype in example.CALLS]


@pytest.mark.parametrize("train", [example.train_jax, example.train_mindspore], ids=["jax", "mindspore"])
def test_classifier_learns(train, request):
    pytest.importorskip(request.node.callspec.id)
    losses = train(25)
    assert np.mean(losses[-5:]) < 0.7 * np.log(example.SYMBOLS)
