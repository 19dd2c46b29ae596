"""The demo (docs/examples): its parts on a tiny model, the script from start to end, and (slow) the real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mindspore
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[4] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

import report  # noqa: E402  (these need the path above)
import settings as sizes  # noqa: E402
import text  # noqa: E402
import training  # noqa: E402

pytestmark = [pytest.mark.level1, pytest.mark.platform_x86_cpu, pytest.mark.env_onecard]
SCRIPT = str(EXAMPLES / "train_llm_mindspore.py")


def tokens_of(settings):
    tokens, _ = next(text.spread_windows(text.corpus()[1], settings.length, 1))
    return tokens


def trained(settings, attention, engine=None, framework="mindspore"):
    """(trainer after its steps, loss of each step)."""
    trainer = training.load_trainer(framework)(settings, sizes.initial_weights(settings), attention, engine)
    return trainer, training.train(trainer, settings, text.corpus()[0])[0]


def run_script(folder, *arguments, timeout=300):
    """The script in a process of its own: (exit code, what it printed, demo.json or None)."""
    command = [sys.executable, SCRIPT, "--out", str(folder)] + list(arguments)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, env=environment, cwd=str(folder)
    )
    stored = Path(str(folder)) / "demo.json"
    printed = done.stdout.decode("utf-8", "replace")
    return done.returncode, printed, json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else None


@pytest.fixture(scope="module")
def naive_losses():
    return trained(sizes.tiny(), "naive")[1]


@pytest.mark.parametrize("engine", ["portable", "jax"])
def test_training_equals_naive_attention_and_the_twin(engine, naive_losses):
    if engine == "jax":
        pytest.importorskip("jax")
    settings = sizes.tiny()
    trainer, losses = trained(settings, "flash", engine)
    assert trainer.engine == engine
    assert losses[-1] < losses[0] - 0.5  # it learns
    assert report.curve_difference(losses, naive_losses) < 1e-4
    tokens = tokens_of(settings)
    if training.has("jax"):
        twin = training.load_trainer("jax")(settings, trainer.weights(), "flash", "xla")
        assert np.abs(twin.logits(tokens) - trainer.logits(tokens)).max() < report.TWIN_BOUND


def test_jax_fallback_trains_like_mindspore(naive_losses):
    pytest.importorskip("jax")
    for attention in ("flash", "naive"):
        losses = trained(sizes.tiny(), attention, framework="jax")[1]
        assert report.curve_difference(losses, naive_losses) < 1e-4


def test_the_window_matters(naive_losses):
    """The comparison can fail: other windows give other losses."""
    losses = trained(sizes.tiny(prev_blocks=0), "naive")[1]
    assert report.curve_difference(losses, naive_losses) > report.CURVE_BOUND


def test_weights_that_do_not_fit_are_refused():
    from model_mindspore import build_model, load_weights

    settings = sizes.tiny()
    weights = sizes.initial_weights(settings)
    model = build_model(settings)
    load_weights(model, weights)
    weights["extra"] = weights.pop("head.weight")
    with pytest.raises(ValueError, match="weights and model differ in .'extra', 'head.weight'."):
        load_weights(model, weights)


def test_text():
    training_text, held_out_text = text.corpus()
    assert min(len(training_text), len(held_out_text)) > 20000
    assert text.decode(text.encode("a \u00e9")) == "a \u00e9"
    first, again = (list(text.batches(training_text, 2, 32, 3, seed=5)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    tokens, targets = first[0]
    assert tokens.shape == (2, 32) and np.array_equal(tokens[:, 1:], targets[:, :-1])
    assert text.unigram_entropy(np.array([7, 7, 9, 9])) == pytest.approx(np.log(2))
    assert text.unigram_loss(np.array([7, 7, 9]), np.array([7])) == pytest.approx(-np.log(3 / 259))


def test_bounds_decide():
    held = report.judge([("a", 0.5, 1.0)])
    assert held[1] and "ok" in held[0]
    for value in (2.0, float("nan")):
        words, good = report.judge([("a", 0.5, 1.0), ("b", value, 1.0)])
        assert not good and "FAILED" in words


def test_script_from_start_to_end(tmp_path):
    code, printed, stored = run_script(tmp_path, "--tiny", "--steps", "5", "--engine", "portable")
    wanted = ("unigram model: 3.2", "time per step", "peak memory", "loss curves", "sample:", "portable")
    for words in wanted + ("with the paged cache", "without a cache"):
        assert words in printed, printed
    assert len(stored["generation"]) == 1 + training.has("jax")
    assert (len(stored["flash"]["losses"]), len(stored["naive"]["losses"])) == (5, 5)
    failed = [name for name, value, bound in stored["checks"] if not value < bound]
    assert code == (1 if failed else 0), printed
    assert stored["checks"][0][1] < stored["checks"][0][2], printed


@pytest.mark.slow
def test_the_real_run(tmp_path, figure):
    code, printed, stored = run_script(tmp_path, timeout=850)
    ours, naive = stored["flash"], stored["naive"]
    values = {name: value for name, value, _ in stored["checks"]}
    names = list(values)
    figure("demo: largest difference of the loss curves, first 50 steps", values[names[0]], report.CURVE_BOUND)
    figure("demo: held-out loss", values[names[1]], sizes.Settings().loss_bound, "nats a byte")
    if len(names) > 2:
        figure("demo: largest logit difference of the JAX twin", values[names[2]], report.TWIN_BOUND)
    figure("demo: step, FlashAttention", report.step_seconds(ours["seconds"]), unit="s")
    figure("demo: step, naive attention", report.step_seconds(naive["seconds"]), 0.3, "s", at_least=True)
    figure("demo: peak memory, FlashAttention", ours["memory"], unit="MiB")
    figure("demo: peak memory, naive attention", naive["memory"], unit="MiB")
    assert code == 0, printed
    assert mindspore.__version__ in ours["framework"]
