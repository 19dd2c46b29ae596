"""`python -m flash_attention info`: versions, devices, and every engine with what it takes or why it does not run."""

import importlib

from flash_attention.core.spec import AttentionSpec
from flash_attention.tools import machine
from flash_attention.tools.frontends import FRONT_ENDS
from flash_attention.tools.table import format_table

_DTYPES = ("float16", "bfloat16", "float32")


def add_arguments(parser):
    """`info` takes none."""
    del parser


def run(args):
    """Print the report; returns 0."""
    del args
    versions = [[name, found or "not installed"] for name, found in machine.versions().items()]
    print(format_table(["version", ""], versions))
    print()
    print("CPU      class {}: {}".format(machine.cpu_class(), machine.cpu_name()))
    if machine.idle_cores():
        print("         {}".format(machine.idle_cores()))
    for front_end in FRONT_ENDS:
        print("{:8} {}".format(front_end.name, front_end.missing() or devices(front_end.module)))
    for front_end in FRONT_ENDS:
        if front_end.missing() is None:
            rows, refused = engine_rows(front_end.engines())
            print()
            print(format_table(["{} engine".format(front_end.name), "here", "note"], rows))
            for line in refused:
                print(line)
            if front_end.choices():
                print(format_table(["on", "auto takes", "because"], front_end.choices()))
    return 0


def devices(module):
    """One line on the devices a framework sees."""
    framework = importlib.import_module(module)
    if module == "jax":
        return "devices " + ", ".join(str(device) for device in framework.devices())
    return "device target " + str(framework.get_context("device_target"))


def engine_rows(engines):
    """Table rows ``[name, what it takes, note]`` for a plain causal call, and lines why the others refuse it."""
    rows, refused = [], []
    for engine in engines:
        reasons = {dtype: engine.supports(_spec(dtype)) for dtype in _DTYPES}
        taken = [dtype for dtype in _DTYPES if reasons[dtype] is None]
        rows.append([engine.name, "runs: " + ", ".join(taken) if taken else "no", engine.note])
        if not taken:
            refused.append("no {}: {}".format(engine.name, reasons[_DTYPES[0]]))
    return rows, refused


def _spec(dtype):
    return AttentionSpec(batch=1, heads=8, kv_heads=8, q_len=1024, kv_len=1024, head_dim=64, dtype=dtype, causal=True)
