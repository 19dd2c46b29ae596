"""Models of the libraries with our attention against the same models with their own: results, comparison, training."""

import json
import os
import re
import subprocess
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PAGE = os.path.join("docs", "en", "model-libraries.md")
RELATIVE = {"float32": 1e-5}
VOCABULARY = 96


def tokens(batch, length, seed=0):
    """int32 (batch, length)."""
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


def results(model, logits_of, loss_of, *inputs):
    """{name: float64 array}: 'logits', 'loss' and the gradient of every parameter, by its name."""
    model.set_train(False)
    found = {"logits": logits_of(*inputs)}
    model.set_train(True)
    parameters = model.trainable_params()
    loss, gradients = ms.value_and_grad(loss_of, None, parameters)(*inputs)
    found["loss"] = loss
    found.update(zip([parameter.name for parameter in parameters], gradients))
    return {name: x.astype(ms.float32).asnumpy().astype(np.float64) for name, x in found.items()}


def errors(got, want):
    """{name: largest difference relative to the tensor's largest value}.

    Gradients that cancel to zero in exact arithmetic (of a key's bias) are measured by the largest of all gradients.
    """
    assert set(got) == set(want)
    top = max(np.abs(x).max() for name, x in want.items() if name not in ("logits", "loss"))
    found = {}
    for name, x in want.items():
        assert got[name].shape == x.shape and np.isfinite(x).all() and np.isfinite(got[name]).all(), name
        size = np.abs(x).max()
        found[name] = np.abs(got[name] - x).max() / (top if size < 1e-4 * top else size)
    return found


def assert_equal(got, want, bound=RELATIVE["float32"]):
    """Fail unless every tensor is within `bound` of the library's own."""
    worst = errors(got, want)
    name = max(worst, key=worst.get)
    assert worst[name] <= bound, "{}: {:.2g}, allowed {:.2g}".format(name, worst[name], bound)


def assert_differs(got, want, bound=RELATIVE["float32"], times=100):
    """Fail unless logits and most gradients are `times` beyond `bound`: the comparison sees what attention does."""
    far = {name: x / bound for name, x in errors(got, want).items()}
    assert far["logits"] > times and np.mean([x > times for x in far.values()]) > 0.5, far


def train(model, loss_of, batches, learning_rate=1e-3):
    """Losses of AdamW steps, one a batch; `loss_of(batch)`."""
    model.set_train(True)
    parameters = model.trainable_params()
    optimizer = nn.AdamWeightDecay(parameters, learning_rate)
    gradients_of = ms.value_and_grad(loss_of, None, parameters)
    losses = []
    for batch in batches:
        loss, gradients = gradients_of(batch)
        optimizer(gradients)
        losses.append(float(loss.asnumpy().ravel()[0]))
    return np.array(losses)


def assert_page_prints(library, prepare="pass"):
    """Run the page's Python blocks that import `library`; each must print the text below it.

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
    printed = [
        (text, expected) for text, (block, expected) in zip(found["outputs"], blocks) if "from " + library in block
    ]
    assert printed and all(text == expected for text, expected in printed), printed
