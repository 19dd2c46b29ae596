"""Runs the Python blocks of pages; prints what each block printed, as JSON: {page: {"outputs": [...], "error": text}}.

    python docs/tools/run_page.py docs/en/tiling.md docs/en/engines.md

Used by the tests. The blocks of a page share one namespace; after one that fails the page ends. A block that needs a
framework that is not installed is skipped (null), and so are those after it, up to one that begins with imports.
Examples (`>>>`) are run the same way, as doctests.
"""

import contextlib
import doctest
import importlib.util
import io
import json
import re
import sys
import traceback

BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.S | re.M)
NEEDS = {
    "mindspore": r"\bmindspore\b|flash_attention\.(nn|ops)\b",
    "jax": r"^\s*(import jax|from jax)|flash_attention\.jax\b",
    "mindformers": r"^\s*(import|from) mindformers\b",
    "mindone": r"^\s*(import|from) mindone\b",
    "flax": r"^\s*(import|from) flax\b",
    "onnxruntime": r"^\s*import onnxruntime\b",
}


def missing(code):
    """Name of the first framework that the code needs and that is not installed, or None."""
    for name, pattern in NEEDS.items():
        if re.search(pattern, code, re.M) and importlib.util.find_spec(name) is None:
            return name
    return None


def independent(code):
    """True for a block that begins with imports: it starts anew, whatever was skipped before."""
    return re.match(r"(import|from) ", code) is not None


def run_examples(code, name, line):
    """Doctest the examples of one block; raises AssertionError with the report of a failure."""
    report = io.StringIO()
    examples = doctest.DocTestParser().get_doctest(code, {}, name, name, line)
    assert doctest.DocTestRunner().run(examples, out=report.write).failed == 0, report.getvalue()


def run(path, outputs):
    """Append the output of every Python block to `outputs`, None where it was skipped; stops where one fails."""
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    namespace, skipping = {"__name__": "page"}, False
    for match in BLOCK.finditer(text):
        language, code = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if language == "pycon":
            if not missing(code):
                run_examples(code, path, line)
            continue
        skipping = bool(missing(code)) or (skipping and not independent(code))
        if skipping:
            outputs.append(None)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, path, "exec"), namespace)  # an error names the page and its line
        outputs.append(printed.getvalue())


def main(paths):
    results = {}
    for path in paths:
        outputs, error = [], None
        try:
            run(path, outputs)
        except Exception:  # one page must not hide the others
            error = traceback.format_exc()
        results[path] = {"outputs": outputs, "error": error}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
