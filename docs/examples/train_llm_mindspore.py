"""Train a small language model in MindSpore with FlashAttention, and again with naive attention: the main job.

    bash build.sh demo            or, with the package installed:  python docs/examples/train_llm_mindspore.py

Reads Python's own help pages, byte by byte. Both trainings start from the same weights and see the same data in the
same order, each in a process of its own. Then: held-out loss, a text generated with a paged KV cache, and the same
weights in the JAX twin model, which generates too; tokens a second with the cache and without. Exits 1 when a bound
fails. Without MindSpore the JAX model trains; without JAX the twin part is left out: it says so.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time

import generation
import numpy as np
import report
import settings as sizes
import text
import training


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default=None, help="engine of the FlashAttention Cell (default: the best one here)")
    parser.add_argument("--framework", choices=("mindspore", "jax"), help="default: mindspore where it is installed")
    parser.add_argument("--steps", type=int, help="training steps (the bound on the held-out loss is for the default)")
    parser.add_argument("--tiny", action="store_true", help="a model that trains in seconds, to see that all works")
    default = os.path.join("build", "demo")
    parser.add_argument("--out", default=default, help="folder of the results (default: %(default)s)")
    parser.add_argument("--train", choices=("flash", "naive"), help=argparse.SUPPRESS)  # one training, in this process
    return parser.parse_args(arguments)


def describe(settings):
    """The model and the data, as text."""
    count = sum(int(np.prod(shape)) for shape in sizes.weight_shapes(settings).values())
    training_text, held_out_text = text.corpus()
    return (
        "model: {:.1f} million weights, {} layers, {} heads / {} kv heads of {}, sequence {}, ALiBi, causal;\n"
        "       every second layer sees only its own block of {} and {} before it\n"
        "text:  Python's help pages, {:,} bytes to learn from, {:,} held out\n"
        "       unigram model: {:.2f} nats a byte over the whole text, {:.2f} on the held-out part"
    ).format(
        count / 1e6, settings.layers, settings.heads, settings.kv_heads, settings.head_dim, settings.length,
        settings.block_size, settings.prev_blocks, len(training_text), len(held_out_text),
        text.unigram_entropy(np.concatenate([training_text, held_out_text])),
        text.unigram_loss(training_text, held_out_text),
    )  # fmt: skip


def train_apart(attention, arguments, framework):
    """Run one training in a process of its own; its results."""
    command = [sys.executable, os.path.abspath(__file__)] + arguments + ["--framework", framework, "--train", attention]
    quiet = dict(os.environ, GLOG_v=os.environ.get("GLOG_v", "3"))  # errors only, or MindSpore's warnings cut the bar
    done = subprocess.run(command, env=quiet)
    if done.returncode != 0:
        raise SystemExit("the training with {} attention ended with code {}".format(attention, done.returncode))
    folder = parse(arguments).out
    with open(os.path.join(folder, attention + ".json"), encoding="utf-8") as stream:
        return json.load(stream)


def twin(settings, folder):
    """The JAX model on the trained weights: ``(largest difference of its logits, its generation)``."""
    with np.load(os.path.join(folder, "weights.npz")) as stored:
        weights = dict(stored)
    tokens, logits = weights.pop("tokens"), weights.pop("logits")
    trainer = training.load_trainer("jax")(settings, weights, "flash", "xla")
    prompt = training.prompt_of(settings, text.corpus()[1])
    return float(np.abs(trainer.logits(tokens) - logits).max()), generation.compare(trainer, settings, prompt)


def main(arguments):
    """Both trainings and the report; the exit code."""
    options = parse(arguments)
    settings = sizes.tiny() if options.tiny else sizes.Settings()
    if options.steps:
        settings = dataclasses.replace(settings, steps=options.steps)
    framework = options.framework or ("mindspore" if training.has("mindspore") else "jax")
    os.makedirs(options.out, exist_ok=True)
    if options.train:
        training.run(settings, framework, options.train, options.engine, options.out)
        return 0

    start = time.time()
    if not training.has(framework):
        raise SystemExit("'{}' is not installed: pip install it, or let `bash build.sh demo` do that".format(framework))
    if framework == "jax" and not training.has("mindspore"):
        print("MindSpore is not installed here: the JAX twin model is trained instead.")
    print(describe(settings), flush=True)
    ours = train_apart("flash", arguments, framework)
    naive = train_apart("naive", arguments, framework)
    mode = "whole step as one graph by ms.jit" if framework == "mindspore" else "whole step under jax.jit"
    print("\n{}, {}, {} steps each, {:.0f} s in all".format(
        ours["framework"], mode, settings.steps, time.time() - start))  # fmt: skip
    print(report.comparison(ours, naive))
    generations = [ours["generation"]]
    checks = [
        ("largest difference of the two loss curves, first 50 steps",
         report.curve_difference(ours["losses"], naive["losses"]), report.CURVE_BOUND),
        ("held-out loss, nats a byte", ours["held_out"], settings.loss_bound),
    ]  # fmt: skip
    if framework == "mindspore" and training.has("jax"):
        difference, generated = twin(settings, options.out)
        checks.append(("largest logit difference, JAX twin on the same weights", difference, report.TWIN_BOUND))
        generations.append(generated)
    elif framework == "mindspore":
        print("\nJAX is not installed here: the comparison with the twin model is left out.")
    checks += [
        ("largest logit difference with a cache, " + one["framework"], one["difference"], report.CACHE_BOUND)
        for one in generations
    ]
    prompt = text.decode(training.prompt_of(settings, text.corpus()[1]))
    print("\nprompt: ...{!r}\nsample: {}".format(prompt[-60:], text.decode(generations[0]["tokens"])))
    print(report.generation_table(generations))
    verdict, held = report.judge(checks)
    print("\n" + verdict + "\n" + report.plot(ours, naive, os.path.join(options.out, "loss.png")))
    with open(os.path.join(options.out, "demo.json"), "w", encoding="utf-8") as stream:
        json.dump({"checks": checks, "flash": ours, "naive": naive, "generation": generations}, stream, indent=1)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
