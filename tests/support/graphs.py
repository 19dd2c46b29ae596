"""What a compiled MindSpore graph forms: operators and the shapes of their outputs, read from the graph it saves."""

import glob
import os
import re

import mindspore as ms


def output_shapes(folder, call):
    """Shapes of all outputs of all nodes of the optimised graph that ``call()`` compiles; ``folder`` must be empty."""
    outputs = re.findall(r"^ *: \(.*?\) -> \((.*)\)$", _graph(folder, call), re.MULTILINE)
    shapes = [shape for line in outputs for shape in re.findall(r"<Tensor\[\w+\], \(([\d, ]+)\)", line)]
    return [tuple(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]


def operators(folder, call):
    """Names of the operators of that graph, a set."""
    return set(re.findall(r"^ *%\S+ = (?:PrimFunc_)?(\w+)\(", _graph(folder, call), re.MULTILINE))


def _graph(folder, call):
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE, save_graphs=1, save_graphs_path=folder)
    try:
        call()
    finally:
        ms.set_context(mode=before, save_graphs=0)
    (path,) = glob.glob(os.path.join(folder, "**", "*_validate_*.ir"), recursive=True)
    with open(path, encoding="utf-8") as stream:
        return stream.read()
