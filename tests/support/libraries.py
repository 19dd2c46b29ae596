"""Models of the libraries with our attention against the same models with their own: results, comparison, training."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from flash_attention.core.sampling import Sampling, sample
from tolerances import FORWARD, GRADIENTS, assert_close

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PAGE = os.path.join("docs", "en", "model-libraries.md")
VOCABULARY, PAD = 96, 0
STEPS = 20
NO_JAX = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
every_engine = pytest.mark.parametrize("engine", ["portable", pytest.param("jax", marks=NO_JAX)])
RELATIVE = 1e-5
"""Largest difference allowed in float32, as a share of a tensor's largest value."""
TRACKING = 1e-4
"""The same for the losses of training steps, each of which starts from weights that differ already."""


# --- models and their inputs ----------------------------------------------------------------------
def tokens(batch, length, seed=0):
    """int32 (batch, length), never ``PAD``."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, (batch, length)).astype(np.int32)


def set_weights(model, seed=0, gain=1.5):
    """Weights large enough that the softmax is far from uniform: N(0, gain^2 / inputs), norms around 1."""
    generator = np.random.default_rng(seed)
    for parameter in model.trainable_params():
        shape = parameter.shape
        normal = generator.standard_normal(shape)
        if len(shape) == 1:
            base = 0.0 if parameter.name.endswith(("bias", "beta")) else 1.0
            value = base + 0.2 * normal
        else:
            value = normal * gain / np.sqrt(shape[-1] if "embed" not in parameter.name else 4.0)
        parameter.set_data(Tensor(value.astype(np.float32)).astype(parameter.dtype))


# --- results ----------------------------------------------------------------------------------------
def results(model, logits_of, loss_of, batches, learning_rate=1e-3):
    """What the comparisons compare, {name: float64 array}.

    Of the first batch 'logits', 'loss' and the gradient of every parameter, by its name; with more batches 'steps' too:
    the losses of AdamW steps, one a batch.

    Args:
        logits_of, loss_of: functions of a batch's tensors.
        batches: list of tuples of arrays.
    """
    batches = [[Tensor(x) for x in batch] for batch in batches]
    model.set_train(False)
    found = {"logits": _numbers(logits_of(*batches[0]))}
    model.set_train(True)
    parameters = model.trainable_params()
    optimizer = nn.AdamWeightDecay(parameters, learning_rate)
    gradients_of = ms.value_and_grad(loss_of, None, parameters)
    losses = []
    for batch in batches:
        loss, gradients = gradients_of(*batch)
        if not losses:
            found.update((parameter.name, _numbers(x)) for parameter, x in zip(parameters, gradients))
        losses.append(float(_numbers(loss).ravel()[0]))
        optimizer(gradients)
    found["loss"] = np.array(losses[:1])
    if len(losses) > 1:
        found["steps"] = np.array(losses)
    return found


def first_steps(found, count):
    """`results` as they were with so many batches (at least 2)."""
    return dict(found, steps=found["steps"][:count])


def mindformers_results(model, shown, steps):
    """`results` of a model of mindformers, whose training takes one token more than its forward; of what is ``shown``.

    Args:
        shown: boolean (B, S + 1), False where there is padding.
    """
    shape = shown.shape
    batches = [(np.where(shown, tokens(*shape, seed=seed), PAD).astype(np.int32),) for seed in range(steps)]
    found = results(model, lambda ids: model(ids[:, :-1])[0], model, batches)
    found["logits"] = found["logits"].reshape(shape[0], shape[1] - 1, -1)[shown[:, :-1]]
    return found


def halve_scale(monkeypatch, adapter):
    """Let ``adapter``, our class for mindformers, attend with half the scale that it is given."""
    init = adapter.__init__

    def halved(self, head_num, **arguments):
        init(self, head_num, **dict(arguments, scale_value=0.5 * arguments["scale_value"]))

    monkeypatch.setattr(adapter, "__init__", halved)


def _numbers(x):
    return x.astype(ms.float32).asnumpy().astype(np.float64)


def once_a_mode(run):
    """`run` (a function that gives `results`), computed once for each of MindSpore's modes and for each call."""
    found = {}

    def remembered(*arguments, **options):
        key = (ms.get_context("mode"), arguments, tuple(sorted(options.items())))
        if key not in found:
            found[key] = run(*arguments, **options)
        return found[key]

    return remembered


# --- comparison -------------------------------------------------------------------------------------
_FORWARD = ("logits", "loss", "steps")


def errors(got, want):
    """{name: largest difference relative to the tensor's largest value}.

    Gradients that cancel to zero in exact arithmetic (of a key's bias) are measured by the largest of all gradients.
    """
    assert set(got) == set(want)
    top = max(np.abs(x).max() for name, x in want.items() if name not in _FORWARD)
    found = {}
    for name, x in want.items():
        assert got[name].shape == x.shape and np.isfinite(x).all() and np.isfinite(got[name]).all(), name
        size = np.abs(x).max()
        found[name] = np.abs(got[name] - x).max() / (top if size < 1e-4 * top else size)
    return found


def assert_equal(got, want, bound=RELATIVE, tracking=TRACKING):
    """Fail unless every tensor is within `bound` of the library's own, and the steps within `tracking`."""
    if len(want.get("steps", ())) == STEPS:  # fewer, each of other tokens, tell nothing
        assert want["steps"][-1] < want["steps"][0], "the library's own model does not learn"
    shares = {name: x / (tracking if name == "steps" else bound) for name, x in errors(got, want).items()}
    name = max(shares, key=shares.get)
    assert shares[name] <= 1, "{}: {:.2g} times what is allowed".format(name, shares[name])


def assert_differs(got, want, bound=RELATIVE, tracking=TRACKING, times=100):
    """Fail unless logits and most gradients are `times` beyond `bound`, and the steps beyond `tracking`.

    So the comparison sees what attention does.
    """
    far = {name: x / bound for name, x in errors(got, want).items()}
    assert far["logits"] > times and np.mean([x > times for x in far.values()]) > 0.5, far
    assert far.get("steps", np.inf) * bound > tracking, far


def assert_close_in_half(got, naive, want):
    """Fail unless float16 results keep the table of tolerances.

    Args:
        got: ours in float16; naive: the library's own in float16; want: its own in float32.
    """
    assert set(got) == set(naive) == set(want)
    assert np.abs(naive["logits"] - want["logits"]).max() > 100 * RELATIVE * np.abs(want["logits"]).max()
    for direction in (FORWARD, GRADIENTS):
        names = [name for name in want if (name in _FORWARD) == (direction == FORWARD)]
        parts = [{name: x[name] for name in names} for x in (got, want, naive)]
        assert_close(parts[0], parts[1], parts[2:], "float16", direction)


def assert_chosen(logits_of, prompts, got, **options):
    """Every new token is what numpy chooses from the logits after all tokens before it, which come back.

    Args:
        logits_of: function of rows of tokens -> float32 (B, longest, V), without any cache.
        prompts, got: rows of tokens; row number n was drawn with the seed n.
        options: of ``Sampling``.
    """
    logits = logits_of([prompt + new for prompt, new in zip(prompts, got)])
    for row, (prompt, new) in enumerate(zip(prompts, got)):
        before = logits[row, len(prompt) - 1 : len(prompt) - 1 + len(new)]
        seeds, numbers = np.full(len(new), row, np.uint32), np.arange(len(new), dtype=np.uint32)
        assert sample(np, before, seeds, numbers, Sampling(**options)).tolist() == new
    return logits


# --- documentation ------------------------------------------------------------------------------------
def assert_page_prints(library, prepare="pass"):
    """Run the page's Python blocks that name `library`; each must print the text below it.

    `prepare`: code that is run first, in the same process.
    """
    code = (
        "{}\nimport runpy, sys\nsys.argv = ['run_page.py', {!r}]\nrunpy.run_path('docs/tools/run_page.py', "
        "run_name='__main__')"
    ).format(prepare, PAGE)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    found = json.loads(done.stdout.decode("utf-8").splitlines()[-1])[PAGE]
    assert found["error"] is None, found["error"]
    with open(os.path.join(ROOT, PAGE), encoding="utf-8") as stream:
        blocks = re.findall(r"^```python\n(.*?)^```$\n\n```text\n(.*?)^```$", stream.read(), re.S | re.M)
    printed = [(text, expected) for text, (block, expected) in zip(found["outputs"], blocks) if library in block]
    assert printed and all(text == expected for text, expected in printed), printed
