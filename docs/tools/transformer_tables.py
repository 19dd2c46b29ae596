"""The table of the transformer wrappers' options, from the very list that the tests of both frameworks run over.

Part of build_docs.py, as tables.py is.
"""

import dataclasses
import importlib
import os
import sys

from flash_attention.core.transformer import attention, layers
from flash_attention.core.transformer.rules import Excludes

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OWNERS = {
    "Attention": (attention.AttentionOptions, attention.RULES, "attn_"),
    "FeedForward": (layers.FeedForwardOptions, layers.FEED_FORWARD_RULES, "ff_"),
    "AttentionLayers": (layers.LayersOptions, layers.RULES, ""),
}


def cases():
    """The rows of tests/support/transformer.py."""
    folder = os.path.join(ROOT, "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("support.transformer").CASES


def partners(rules, option):
    """What an option is refused with, and what it needs: two lists of names."""
    refused, needed = [], []
    for rule in rules:
        if isinstance(rule, Excludes):
            if rule.argument == option:
                refused += rule.others
            elif option in rule.others:
                refused.append(rule.argument)
        elif rule.argument == option:
            needed.append(rule.other)
    return refused, needed


def options(language):
    """Every option that changes a result: its default, what it does, what it goes with, and who is tested."""
    which = 0 if language == "en" else 1
    header = (("class", "option", "default", "effect", "needs", "refused with", "JAX", "MindSpore"),
              ("类", "选项", "默认值", "作用", "需要", "不能同时使用", "JAX", "MindSpore"))[which]  # fmt: skip
    tested = ("tested", "已测试")[which]
    rows = [header, ("---",) * len(header)]
    for case in cases():
        record, rules, _ = OWNERS[case.owner]
        default = {field.name: field.default for field in dataclasses.fields(record)}[case.option]
        refused, needed = (", ".join("`{}`".format(name) for name in names) or "-" for names in partners(
            rules, case.option
        ))  # fmt: skip
        effect = (case.english, case.chinese)[which]
        rows.append((
            "`{}`".format(case.owner), "`{}`".format(case.option), "`{!r}`".format(default), effect, needed, refused,
            tested, tested,
        ))  # fmt: skip
    return ["| {} |".format(" | ".join(row)) for row in rows]
