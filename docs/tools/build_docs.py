"""Writes the generated parts of the documentation: tables from the code, drawings, and the API reference.

    python docs/tools/build_docs.py            write them
    python docs/tools/build_docs.py --check    write nothing; list what is out of date, exit 1 when something is

A page asks for a table with two comment lines, `<!-- generated: NAME -->` and `<!-- end -->`; what stands between them
is replaced. The output of a bash block whose commands are all `python -m flash_attention plan ...` or
`bash build.sh help` is written into the text block that follows it. `api.md` is generated as a whole.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), ROOT, os.path.join(ROOT, "train")]

import api_reference  # noqa: E402  (needs the path above)
import tables  # noqa: E402

MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
BASH_AND_TEXT = re.compile(r"```bash\n([^`]*)```\n\n```text\n[^`]*```")
LANGUAGES = ("en", "zh")


def pages():
    """`(path, language)` of every page that may hold generated parts."""
    found = [(os.path.join(ROOT, "README.md"), "en"), (os.path.join(ROOT, "README_CN.md"), "zh")]
    for language in LANGUAGES:
        folder = os.path.join(ROOT, "docs", language)
        names = sorted(name for name in os.listdir(folder) if name.endswith(".md") and name != "api.md")
        found += [(os.path.join(folder, name), language) for name in names]
    return found


def output_of(command):
    """What a documented command prints, or None when documentation must not run it."""
    if command == "bash build.sh help":
        return subprocess.check_output(["bash", os.path.join(ROOT, "build.sh"), "help"]).decode("utf-8")
    words = shlex.split(command)
    if words[:4] == ["python", "-m", "flash_attention", "plan"]:
        from flash_attention.tools.cli import main

        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            main(words[3:])
        return text.getvalue()
    return None


def filled(text, language):
    """The page with every generated part that this computer can make; the others stay as they are."""

    def table(match):
        lines = tables.TABLES[match.group(2)](language)
        return match.group(0) if lines is None else match.group(1) + "\n".join(lines) + "\n" + match.group(3)

    def output(match):
        outputs = [output_of(line) for line in match.group(1).splitlines()]
        if None in outputs:
            return match.group(0)
        return "```bash\n{}```\n\n```text\n{}```".format(match.group(1), "".join(outputs))

    return BASH_AND_TEXT.sub(output, MARKED.sub(table, text))


def wanted():
    """`{path: text}` of every page as it should be."""
    texts = {}
    for path, language in pages():
        with open(path, encoding="utf-8") as stream:
            texts[path] = filled(stream.read(), language)
    for language in LANGUAGES:
        texts[os.path.join(ROOT, "docs", language, "api.md")] = api_reference.page(ROOT, language)
    return texts


def out_of_date(texts):
    """Paths, relative to the root, whose file differs from `texts`."""
    stale = []
    for path, text in texts.items():
        have = None
        if os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                have = stream.read()
        if have != text:
            stale.append(os.path.relpath(path, ROOT))
    return sorted(stale)


def main():
    parser = argparse.ArgumentParser(description="write the generated parts of the documentation")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a page is out of date")
    args = parser.parse_args()
    texts = wanted()
    stale = out_of_date(texts)
    for path in stale:
        print(("out of date: {}" if args.check else "written: {}").format(path))
        if not args.check:
            with open(os.path.join(ROOT, path), "w", encoding="utf-8") as stream:
                stream.write(texts[os.path.join(ROOT, path)])
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
