"""Train a tiny model of a model library, before and after its attention is replaced by the FlashAttention Cell.

    bash build.sh finetune mindformers       LLaMA of mindformers 1.9.0: grouped-query attention, rotary positions
    bash build.sh finetune mindone           BLOOM of mindone 0.5.0: ALiBi

Both trainings start from the same weights and see the same data (Python's own help pages, byte by byte), each in a
process of its own. Then: a table of time and memory, the loss curves as PNG. Exits 1 when the two curves differ.
"""

import argparse
import json
import os
import subprocess
import sys

import report
import text
import training
from library_models import TRAINERS, Settings


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=sorted(TRAINERS))
    parser.add_argument("--engine", default=None, help="engine of the FlashAttention Cell (default: the best one here)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (default: %(default)s)")
    default = os.path.join("build", "finetune")
    parser.add_argument("--out", default=default, help="folder of the results (default: %(default)s)")
    parser.add_argument("--train", choices=("flash", "naive"), help=argparse.SUPPRESS)  # one training, in this process
    return parser.parse_args(arguments)


def train_here(options):
    """One training in this process; writes ATTENTION.json."""
    settings = Settings(steps=options.steps, length=options.length)
    trainer = TRAINERS[options.library](settings, options.train, options.engine)
    training_text, held_out_text = text.corpus()
    before = training.peak_memory()
    losses, seconds = training.train(trainer, settings, training_text, "{:>9}".format(trainer.engine))
    result = {
        "framework": trainer.framework,
        "engine": trainer.engine,
        "losses": losses,
        "seconds": seconds,
        "memory_before": before,
        "memory": training.peak_memory(),
        "held_out": training.held_out_loss(trainer, settings, held_out_text),
    }
    with open(os.path.join(options.out, options.train + ".json"), "w", encoding="utf-8") as stream:
        json.dump(result, stream)


def train_apart(attention, arguments, folder):
    """The same in a process of its own; its results."""
    command = [sys.executable, os.path.abspath(__file__)] + arguments + ["--train", attention]
    quiet = dict(os.environ, GLOG_v=os.environ.get("GLOG_v", "3"))  # errors only, or warnings cut the progress bar
    if subprocess.run(command, env=quiet).returncode != 0:
        raise SystemExit("the training with {} attention failed".format(attention))
    with open(os.path.join(folder, attention + ".json"), encoding="utf-8") as stream:
        return json.load(stream)


def main(arguments):
    """Both trainings and the report; the exit code."""
    options = parse(arguments)
    os.makedirs(options.out, exist_ok=True)
    if options.train:
        train_here(options)
        return 0
    before = train_apart("naive", arguments, options.out)
    after = train_apart("flash", arguments, options.out)
    print("\n{}, {} steps of {} tokens each".format(after["framework"], options.steps, options.length))
    print(report.comparison(after, before))
    difference = report.curve_difference(after["losses"], before["losses"])
    verdict, held = report.judge(
        [
            ("largest difference of the two loss curves, first 50 steps", difference, report.CURVE_BOUND),
            ("last training loss / first", after["losses"][-1] / after["losses"][0], 1.0),
        ]
    )
    path = os.path.join(options.out, "loss-{}.png".format(options.library))
    print("\n" + verdict + "\n" + report.plot(after, before, path))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
