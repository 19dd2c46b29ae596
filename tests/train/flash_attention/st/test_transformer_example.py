"""docs/examples/transformer.py in both frameworks: the same weights and batches give the same losses and text."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "docs" / "examples"))

import transformer as example  # noqa: E402  (needs the path above)

pytestmark = [pytest.mark.level1, pytest.mark.platform_x86_cpu, pytest.mark.slow]


def test_both_frameworks_learn_the_same():
    pytest.importorskip("jax")
    pytest.importorskip("mindspore")
    batches = list(example.batches_of(12))
    jax_model = example.make_jax()
    mindspore_model = example.make_mindspore(jax_model.params)
    assert example.write(jax_model, "jax", 12) == example.write(mindspore_model, "mindspore", 12)
    ours, theirs = example.train_jax(jax_model, batches), example.train_mindspore(mindspore_model, batches)
    np.testing.assert_allclose(ours[:4], theirs[:4], rtol=1e-3)
    for losses in (ours, theirs):
        assert np.mean(losses[-3:]) < 0.8 * losses[0]
