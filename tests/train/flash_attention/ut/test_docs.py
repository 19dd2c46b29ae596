"""The documentation is true: code blocks run and print what stands below them, tables are up to date, links resolve.

English and Chinese pages have the same structure and the same code blocks, so running the English ones covers both.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attention.tools.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[4]
ENGLISH, CHINESE = ROOT / "docs" / "en", ROOT / "docs" / "zh"
pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]

GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.S)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
NAMES = sorted(path.name for path in ENGLISH.glob("*.md"))
PAIRS = [(ROOT / "README.md", ROOT / "README_CN.md")] + [(ENGLISH / name, CHINESE / name) for name in NAMES]
ALL_PAGES = [page for pair in PAIRS for page in pair] + [ROOT / name for name in ("CONTRIBUTING.md", "RELEASE.md")]


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(path):
    """[(language, text)] of the fenced blocks."""
    return FENCE.findall(read(path))


def headings(path):
    """[(level, text)] outside of fenced blocks."""
    found = re.findall(r"^(#+) (.+)$", FENCE.sub("", read(path)), re.M)
    return [(len(marks), text) for marks, text in found]


def relative(path):
    return str(path.relative_to(ROOT))


def environment():
    """os.environ with the sources on the path, for commands that are run in a process of their own."""
    path = os.pathsep.join([str(ROOT / "train"), str(ROOT / "infer"), os.environ.get("PYTHONPATH", "")])
    # The pages compile many small functions once each: compile them fast rather than well.
    return dict(os.environ, PYTHONPATH=path.rstrip(os.pathsep), JAX_DISABLE_MOST_OPTIMIZATIONS="1")


def run(arguments, timeout=120):
    """Run a command in the root; returns (exit code, stdout)."""
    done = subprocess.run(
        arguments, cwd=str(ROOT), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout
    )
    if done.returncode:
        sys.stderr.write(done.stderr.decode("utf-8", "replace"))
    return done.returncode, done.stdout.decode("utf-8")


# --- two languages --------------------------------------------------------------------------------
def test_pages_come_in_pairs():
    assert NAMES == sorted(path.name for path in CHINESE.glob("*.md"))
    assert len(NAMES) >= 13


@pytest.mark.parametrize("english, chinese", PAIRS, ids=[relative(pair[0]) for pair in PAIRS])
def test_both_languages_have_the_same_structure(english, chinese):
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert blocks(english) == blocks(chinese)
    tables = [re.findall(r"^<!-- generated: (.+) -->$", read(page), re.M) for page in (english, chinese)]
    assert tables[0] == tables[1]
    rows = [len(re.findall(r"^\|", FENCE.sub("", read(page)), re.M)) for page in (english, chinese)]
    assert rows[0] == rows[1], "tables of different length"


@pytest.mark.parametrize("page", [pair[1] for pair in PAIRS if pair[1].name != "api.md"], ids=relative)
def test_chinese_pages_are_chinese(page):
    prose = GENERATED.sub("", FENCE.sub("", read(page)))
    assert len(re.findall("[\u4e00-\u9fff]", prose)) > 0.1 * len(prose)


# --- code blocks ----------------------------------------------------------------------------------
WITH_CODE = [page for page, _ in PAIRS if {"python", "pycon"} & set(dict(blocks(page)))]


@pytest.fixture(scope="module")
def results():
    """What docs/tools/run_page.py says of every page with Python in it; one process, because frameworks load slowly."""
    pages = [relative(page) for page in WITH_CODE]
    code, output = run([sys.executable, os.path.join("docs", "tools", "run_page.py")] + pages, timeout=300)
    assert code == 0
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_python_blocks_print_what_the_page_says(results, page):
    result = results[relative(page)]
    assert result["error"] is None, result["error"]
    expected = re.findall(r"^```python\n.*?^```$(?:\n\n```text\n(.*?)^```$)?", read(page), re.S | re.M)
    assert len(result["outputs"]) == len(expected)
    if expected and all(printed is None for printed in result["outputs"]):
        pytest.skip("needs a framework that is not installed")
    for printed, text in zip(result["outputs"], expected):
        if printed is not None:
            assert printed == text


NOT_RUN = [
    r"bash build\.sh( (demo|test|bench|env|finetune)\b.*)?$",  # whole jobs; names as in `build.sh help`
    r"cd train && (bash build\.sh|python setup\.py install)$",
    r'pip install (dist/flash_attention-\*\.whl|"mindspore>=2\.2" "numpy<2"|"jax>=0\.6")$',
    r'pip install "dist/NAME\.whl\[cuda,bench\]"$',
    # the CANN package: its generator has tests of its own, the rest needs CANN
    r"python -m flash_attention_infer\.ascend_package --out flash_attention_opp --soc ascend910 ascend310p$",
    r"bash flash_attention_opp/(build\.sh ascend310p|project/build_out/.*)$",
    r"export ASCEND_CUSTOM_OPP_PATH=flash_attention_opp/vendors/customize$",
    r"atc --model=model\.onnx .*$",
    r"msrun --worker_num=4 --local_worker_num=4 --join=True train\.py$",  # several processes have tests of their own
    r"(PYTHONPATH=train:infer )?python -m flash_attention \w+( --?[\w-]+| \d+)*$",
    r"python -m flash_attention bench gpu$",
]


def bash_lines():
    texts = [text for page, _ in PAIRS for language, text in blocks(page) if language == "bash"]
    return [line for text in texts for line in text.splitlines()]


def test_bash_blocks_hold_only_known_commands():
    lines = bash_lines()
    assert len(lines) > 10
    assert [line for line in lines if not any(re.match(pattern, line) for pattern in NOT_RUN)] == []
    code, usage = run(["bash", "build.sh", "help"])
    assert code == 0
    for line in lines:
        words = line.split()
        if words[:2] == ["bash", "build.sh"] and len(words) > 2:
            assert "bash build.sh " + words[2] in usage, line
        if "flash_attention" in words:
            assert words[words.index("flash_attention") + 1] in COMMANDS, line


RUN = sorted({line for line in bash_lines() if line.startswith("python -m flash_attention ")} - {NOT_RUN[-1][:-1]})


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command):
    words = command.split()
    if words[3] == "check":
        words.append("--help")  # the check itself takes long and has tests of its own
    if words[3] == "info" and importlib.util.find_spec("mindspore") is None and importlib.util.find_spec("jax") is None:
        pytest.skip("needs a framework")
    code, output = run([sys.executable] + words[1:])
    assert code == 0
    assert output.strip()


# --- generated parts, links, variables ------------------------------------------------------------
def test_generated_parts_are_up_to_date():
    code, output = run([sys.executable, str(ROOT / "docs" / "tools" / "build_docs.py"), "--check"], timeout=300)
    assert code == 0, output + "Run `python docs/tools/build_docs.py`."


def anchor(text):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def test_links_resolve():
    broken, seen = [], 0
    for page in ALL_PAGES:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(page)))
        for target in re.findall(r"\]\(([^)]+)\)", prose):
            if re.match(r"https?://", target):
                continue
            seen += 1
            name, _, fragment = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            known = file.exists() and (not fragment or fragment in [anchor(text) for _, text in headings(file)])
            if not known:
                broken.append("{}: {}".format(relative(page), target))
    assert seen > 50
    assert broken == []


def test_files_that_pages_name_exist():
    missing, seen, tops = [], 0, (ROOT, ROOT / "train" / "flash_attention")
    for page in ALL_PAGES:
        for name in re.findall(r"`([\w./-]+/[\w-]+\.(?:py|sh|md))`", FENCE.sub("", read(page))):
            seen += 1
            if "NAME" not in name and not any((top / name).exists() for top in tops):
                missing.append("{}: {}".format(relative(page), name))
    assert seen > 30
    assert missing == []


def test_every_variable_is_listed():
    """FLASH_* in the scripts, the package and the tests, against the page on environment variables."""
    files = [ROOT / "build.sh"] + [path for path in (ROOT / ".ci" / "run",) if path.exists()]
    for folder in (ROOT / "train", ROOT / "infer", ROOT / "tests"):
        files += [path for path in folder.rglob("*.py") if path != Path(__file__).resolve()]
    pattern = r"\bFLASH_[A-Z]+(?:_[A-Z]+)*\b"
    used = {name for path in files for name in re.findall(pattern, read(path))}
    listed = set(re.findall(pattern, read(ENGLISH / "environment.md")))
    assert used == listed


def test_the_support_table_opens_the_readme():
    for page in PAIRS[0]:
        assert read(page).index("<!-- generated: support -->") < read(page).index("\n## ")
