"""What the documentation of the Atlas A2/A3 attention operator allows, as data that engine 'aclnn' reads.

spec -> **constraints** -> mapping -> operator. From documentation only, not run on a device. Sources:

* MS: docstrings of ``mindspore.ops.flash_attention_score`` and ``FlashAttentionScore`` (MindSpore 2.10).
* CANN: ``aclnnFlashAttentionScore`` / ``aclnnFlashAttentionScoreGrad`` and "sparse_mode" of cann/ops-transformer.
* NPU: ``torch_npu.npu_fusion_attention`` of Ascend/op-plugin.
"""

from dataclasses import dataclass
from typing import Callable

from flash_attention.core.errors import Reason
from flash_attention.ops.aclnn import mapping

DTYPES = ("float16", "bfloat16")
MAX_HEADS = 256
MAX_HEAD_DIM = 512
MAX_LENGTH = 512 * 1024
MAX_BATCH = 2048
MAX_MASK_BYTES = 2**31
"""Ours, not the vendor's: an explicit mask above 2 GiB is refused instead of exhausting the device."""

_PORTABLE = "Use engine='portable'."


@dataclass(frozen=True)
class Constraint:
    """One rule.

    Attributes:
        argument: the public argument it limits.
        need: the rule, worded to follow "must be".
        source: where the rule comes from: MS, CANN, NPU, or 'ours' where the operator has no such feature.
        broken: ``broken(spec)`` gives the offending value, None where the rule holds.
        remedy: what to do instead.
    """

    argument: str
    need: str
    source: str
    broken: Callable
    remedy: str = _PORTABLE


def _outside(value, low, high):
    return None if low <= value <= high else value


def _unless(holds, value):
    return None if holds else value


def _mask_bytes(spec):
    size = mapping.extra_bytes(spec)["attn_mask"]
    return None if size <= MAX_MASK_BYTES else "{:.1f} GiB".format(size / 2.0**30)


# Order matters: a rule may rely on those above it (static sizes come first, the mask's size last).
CONSTRAINTS = (
    Constraint("dtype", "float16 or bfloat16", "MS", lambda s: _unless(s.dtype in DTYPES, s.dtype),
               "Cast the inputs, or use engine='portable'."),
    Constraint("batch", "known when the graph is compiled", "ours", lambda s: _unless(s.batch >= 0, "a dynamic size")),
    Constraint("sequence length", "known when the graph is compiled", "ours",
               lambda s: _unless(s.q_len >= 0 and s.kv_len >= 0, "a dynamic one"),
               "Only the batch may be dynamic, with engine='portable'; pad the sequences."),
    Constraint("batch", "in [1, {}]".format(MAX_BATCH), "MS", lambda s: _outside(s.batch, 1, MAX_BATCH)),
    Constraint("heads", "in [1, {}]".format(MAX_HEADS), "MS", lambda s: _outside(s.heads, 1, MAX_HEADS)),
    Constraint("head_dim", "in [1, {}]".format(MAX_HEAD_DIM), "MS; smaller ones are padded to a multiple of 16",
               lambda s: _outside(s.head_dim, 1, MAX_HEAD_DIM)),
    Constraint("query length", "in [1, {}]".format(MAX_LENGTH), "MS", lambda s: _outside(s.q_len, 1, MAX_LENGTH)),
    Constraint("key length", "in [1, {}]".format(MAX_LENGTH), "MS", lambda s: _outside(s.kv_len, 1, MAX_LENGTH)),
    Constraint("logits_soft_cap", "None (the operator has no soft cap)", "MS", lambda s: s.soft_cap),
    Constraint("scale", "non-zero with a bias or ALiBi (the operator multiplies real_shift by it)", "CANN",
               lambda s: _unless(s.scale != 0 or (s.bias_shape is None and s.alibi_shape is None), s.scale)),
    Constraint("key length", "a multiple of 8 with dropout (drop_mask packs 8 keys in a byte)", "MS",
               lambda s: _unless(not s.dropout_rate or s.kv_len % 8 == 0, s.kv_len),
               "Pad the keys and give key_value_seq_lengths, or use engine='portable'."),
    Constraint("q_offset", "an int or None with a compact mask", "ours",
               lambda s: _unless(not (s.compact_mask and s.dynamic_offset), "a tensor"), "Give the full mask instead."),
    Constraint("mask", "at most {:.0f} GiB as an explicit uint8 mask".format(MAX_MASK_BYTES / 2.0**30), "ours",
               _mask_bytes, "Use local_window_size (tokens, no explicit mask) or engine='portable'."),
)  # fmt: skip


def refused(spec):
    """The :class:`Reason` of the first rule that ``spec`` breaks, or None. Says nothing about the device."""
    for rule in CONSTRAINTS:
        value = rule.broken(spec)
        if value is not None:
            return Reason(rule.argument, value, rule.need, rule.remedy)
    return None


def table():
    """The rules as the lines of a Markdown table, for the documentation."""
    rows = [("argument", "must be", "source"), ("---",) * 3]
    rows += [(rule.argument, rule.need, rule.source) for rule in CONSTRAINTS]
    return ["| {} |".format(" | ".join(row)) for row in rows]
