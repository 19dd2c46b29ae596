"""One training, in this process: steps, held-out loss, a sample, and what it cost. Knows no framework.

train_llm_mindspore.py starts it twice, each time in a process of its own, so that each has its own peak of memory.
"""

import importlib.util
import json
import os
import resource
import sys
import time

import generation
import numpy as np
import text
from settings import initial_weights


def has(module):
    """True when `module` is installed. Looks, does not import."""
    return importlib.util.find_spec(module) is not None


def load_trainer(framework):
    """The Trainer class of 'mindspore' or 'jax'."""
    if framework == "mindspore":
        from model_mindspore import Trainer
    else:
        from model_jax import Trainer
    return Trainer


def peak_memory():
    """Peak resident memory of this process so far, in MiB."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as stream:
            for line in stream:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Progress:
    """A bar on stderr: tqdm's where it is installed, else a plain one."""

    def __init__(self, total, label):
        self.total, self.label, self.done, self.bar = total, label, 0, None
        if has("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=label, unit="step", dynamic_ncols=True)

    def advance(self, note):
        """One more step is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
        else:
            filled = 30 * self.done // self.total
            line = "\r{} [{}{}] {}/{} {}".format(
                self.label, "#" * filled, "." * (30 - filled), self.done, self.total, note
            )
            sys.stderr.write(line)
            sys.stderr.flush()

    def close(self):
        """End the line."""
        if self.bar is not None:
            self.bar.close()
        else:
            sys.stderr.write("\n")


def train(trainer, settings, training_text, label="training"):
    """(loss of each step, seconds of each step); the first step includes the compilation."""
    losses, seconds = [], []
    progress = Progress(settings.steps, label)
    batches = text.batches(training_text, settings.batch, settings.length, settings.steps, settings.seed)
    for tokens, targets in batches:
        start = time.perf_counter()
        losses.append(trainer.step(tokens, targets))
        seconds.append(time.perf_counter() - start)
        progress.advance("loss {:.3f}".format(losses[-1]))
    progress.close()
    return losses, seconds


def held_out_loss(trainer, settings, held_out_text):
    """Mean loss in nats a byte over windows spread evenly over the held-out text."""
    windows = text.spread_windows(held_out_text, settings.length, settings.held_out_windows)
    return float(np.mean([trainer.loss(tokens, targets) for tokens, targets in windows]))


def prompt_of(settings, held_out_text):
    """The start of the held-out text, which the model is to continue."""
    return held_out_text[: settings.length // 8]


def run(settings, framework, attention, engine, folder):
    """Train, judge, generate; writes ATTENTION.json and, for "flash", weights.npz (with logits)."""
    trainer = load_trainer(framework)(settings, initial_weights(settings), attention, engine)
    training_text, held_out_text = text.corpus()
    before = peak_memory()
    losses, seconds = train(trainer, settings, training_text, "{:>9}".format(trainer.engine))
    memory = peak_memory()  # of training alone, without what follows
    print("held-out loss{} ...".format(" and a text" if attention == "flash" else ""), flush=True)
    result = {
        "framework": trainer.framework,
        "engine": trainer.engine,
        "losses": losses,
        "seconds": seconds,
        "memory_before": before,
        "memory": memory,
        "held_out": held_out_loss(trainer, settings, held_out_text),
    }
    if attention == "flash":
        tokens, _ = next(text.spread_windows(held_out_text, settings.length, 1))
        np.savez(os.path.join(folder, "weights.npz"), tokens=tokens, logits=trainer.logits(tokens), **trainer.weights())
        result["generation"] = generation.compare(trainer, settings, prompt_of(settings, held_out_text))
    with open(os.path.join(folder, attention + ".json"), "w", encoding="utf-8") as stream:
        json.dump(result, stream)
