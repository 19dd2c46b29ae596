"""`python -m flash_attention COMMAND`: one line a command; each is a module with `add_arguments` and `run`."""

import argparse
import importlib

COMMANDS = {
    "info": ("flash_attention.tools.info", "versions, devices, and which engines run here (and why not the others)"),
    "check": ("flash_attention.tools.check", "verify every engine on this computer against the numpy reference"),
    "plan": ("flash_attention.tools.plan", "draw the tile plan of a call"),
    "bench": ("flash_attention.tools.bench.run", "measure engines side by side: time, memory, error"),
    "launch": ("flash_attention.tools.launch", "start local processes of a script; end all when one fails or hangs"),
}


def build_parser():
    """The parser of all commands. Command modules import no framework until they run."""
    parser = argparse.ArgumentParser(prog="python -m flash_attention", description="FlashAttention tools")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True
    for name, (module, about) in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        module = importlib.import_module(module)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, parser=sub)
    return parser


def main(argv=None):
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    return args.run(args)
