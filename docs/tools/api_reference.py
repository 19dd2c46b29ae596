"""The API reference as a Markdown page, read from the sources with `ast`: no framework has to be installed.

Part of build_docs.py. `PUBLIC` lists what is public; signatures and docstrings come from the code.
"""

import ast
import inspect
import os
import re

INFER = "../../infer/flash_attention_infer/"

# section -> [(file below train/flash_attention, import path, names)]
PUBLIC = (
    (
        "MindSpore",
        (
            ("nn/layer/flash_attention.py", "flash_attention.nn", ("FlashAttention",)),
            ("ops/functional.py", "flash_attention.ops", ("flash_attention",)),
            ("nn/layer/context_parallel.py", "flash_attention.nn", ("RingAttention", "UlyssesAttention")),
            ("nn/layer/flexible.py", "flash_attention.nn", ("FlexibleAttention",)),
            ("nn/flexible/registry.py", "flash_attention.nn", ("Mechanism", "MechanismRegistry")),
            ("nn/transformer/attention.py", "flash_attention.nn", ("Attention",)),
            ("nn/transformer/feed_forward.py", "flash_attention.nn", ("FeedForward",)),
            (
                "nn/transformer/layers.py",
                "flash_attention.nn",
                ("AttentionLayers", "Encoder", "Decoder", "CrossAttender"),
            ),
            (
                "nn/transformer/wrappers.py",
                "flash_attention.nn",
                ("TransformerWrapper", "ContinuousTransformerWrapper"),
            ),
            ("nn/transformer/autoregressive.py", "flash_attention.nn", ("AutoregressiveWrapper",)),
            ("nn/layer/multi_query.py", "flash_attention.nn", ("MultiQueryAttention", "grouped_query_attention")),
            ("nn/layer/dilated.py", "flash_attention.nn", ("DilatedAttention", "dilated_attention")),
            ("nn/layer/blockwise.py", "flash_attention.nn", ("BlockwiseAttention", "BlockwiseFFN")),
            ("nn/layer/blockwise_block.py", "flash_attention.nn", ("BlockwiseParallel",)),
            (
                "nn/layer/blockwise_loss.py",
                "flash_attention.nn",
                ("Blockwise_LM_Head", "blockwise_cross_entropy", "blockwise_fused_cross_entropy"),
            ),
            (
                "nn/layer/sparse.py",
                "flash_attention.nn",
                (
                    "DynamicSparseAttention",
                    "dynamic_sparse_attention",
                    "hash_sparse_attention",
                    "qk_sparse_attention",
                ),
            ),
            (
                "nn/layer/sparse_steps.py",
                "flash_attention.nn",
                (
                    "hash_sparse_attention_kernel",
                    "qk_sparse_attention_kernel",
                    "compact",
                    "pad_index",
                    "sort_bucketed_attention",
                ),
            ),
            (
                "nn/layer/landmark.py",
                "flash_attention.nn",
                ("FusedLandmarkAttention", "fused_landmark_attention"),
            ),
            (
                "nn/layer/cross_modal.py",
                "flash_attention.nn",
                ("CrossModalAttention", "CrossModalBlock", "info_nce", "l2_normalize", "logit_scale"),
            ),
            (
                "nn/layer/colt5.py",
                "flash_attention.nn",
                (
                    "ConditionalRoutedAttention",
                    "ConditionalRoutedFeedForward",
                    "ConditionalRoutedTransformerBlock",
                    "ConditionalRoutedCrossAttention",
                ),
            ),
            ("nn/layer/colt5_routing.py", "flash_attention.nn", ("CoordinateDescentRouter", "coor_descent")),
            ("nn/layer/triangle_attention.py", "flash_attention.nn", ("TriangleAttention",)),
            ("nn/layer/projection.py", "flash_attention.nn", ("weights_of", "load_weights")),
            ("nn/layer/positions.py", "flash_attention.nn", ("Rotary", "XPos", "T5Bias", "alibi_bias")),
            (
                "integrations/mindformers.py",
                "flash_attention.integrations.mindformers",
                ("enable", "disable", "FlashAttention"),
            ),
            ("integrations/mindone.py", "flash_attention.integrations.mindone", ("enable", "disable")),
            ("ops/sampling.py", "flash_attention.ops.sampling", ("sample",)),
        ),
    ),
    (
        "JAX",
        (
            ("jax/layer.py", "flash_attention.jax", ("FlashAttention",)),
            ("jax/functional.py", "flash_attention.jax", ("flash_attention",)),
            ("jax/transformer/attention.py", "flash_attention.jax", ("Attention",)),
            ("jax/transformer/feed_forward.py", "flash_attention.jax", ("FeedForward",)),
            (
                "jax/transformer/layers.py",
                "flash_attention.jax",
                ("AttentionLayers", "Encoder", "Decoder", "CrossAttender"),
            ),
            (
                "jax/transformer/wrappers.py",
                "flash_attention.jax",
                ("TransformerWrapper", "ContinuousTransformerWrapper"),
            ),
            ("jax/transformer/autoregressive.py", "flash_attention.jax", ("AutoregressiveWrapper",)),
            ("jax/flexible/module.py", "flash_attention.jax", ("FlexibleAttentionModule",)),
            ("jax/flexible/output.py", "flash_attention.jax", ("AttentionOutput",)),
            ("jax/flexible/registry.py", "flash_attention.jax", ("AttentionRegistry", "AttentionImpl")),
            ("jax/flexible/metadata.py", "flash_attention.jax", ("AttentionMetadata",)),
            ("jax/flexible/config.py", "flash_attention.jax", ("AttentionBaseConfig",)),
            ("jax/flexible/partition.py", "flash_attention.jax", ("PartitionAxis",)),
            ("jax/flexible/record.py", "flash_attention.jax.flexible.record", ("Record",)),
            ("jax/flexible/cache.py", "flash_attention.jax", ("FlaxAttentionModule",)),
            ("jax/flexible/benchmark.py", "flash_attention.jax", ("run_attention_benchmarks",)),
            ("jax/flexible/benchmark.py", "flash_attention.jax.flexible", ("BenchmarkTable",)),
            ("jax/distributed/call.py", "flash_attention.jax.distributed", ("attention", "explain")),
            ("jax/distributed/mesh.py", "flash_attention.jax.distributed", ("Axes", "make_mesh")),
            ("jax/distributed/plan.py", "flash_attention.jax.distributed", ("Plan",)),
            ("jax/distributed/processes.py", "flash_attention.jax.distributed", ("initialize",)),
            (
                "jax/mechanisms/multi_query.py",
                "flash_attention.jax",
                ("MultiQueryAttention", "grouped_query_attention"),
            ),
            (
                "jax/mechanisms/sparse.py",
                "flash_attention.jax",
                (
                    "dynamic_sparse_attention",
                    "hash_sparse_attention",
                    "qk_sparse_attention",
                    "hash_sparse_attention_kernel",
                    "qk_sparse_attention_kernel",
                    "compact",
                    "pad_index",
                    "sort_bucketed_attention",
                ),
            ),
            (
                "jax/mechanisms/landmark.py",
                "flash_attention.jax",
                ("FusedLandmarkAttention", "fused_landmark_attention"),
            ),
            (
                "jax/mechanisms/blockwise.py",
                "flash_attention.jax",
                ("blockwise_compute_attn", "blockwise_compute_ffn"),
            ),
            ("jax/mechanisms/blockwise_block.py", "flash_attention.jax", ("BlockwiseParallelJax",)),
            (
                "jax/mechanisms/blockwise_loss.py",
                "flash_attention.jax",
                ("Blockwise_LM_Head", "blockwise_cross_entropy", "blockwise_fused_cross_entropy"),
            ),
            (
                "jax/mechanisms/colt5.py",
                "flash_attention.jax",
                (
                    "ConditionalRoutedAttention",
                    "ConditionalRoutedFeedForward",
                    "ConditionalRoutedTransformerBlock",
                    "ConditionalRoutedCrossAttention",
                ),
            ),
            ("jax/mechanisms/colt5_routing.py", "flash_attention.jax", ("CoordinateDescentRouter", "coor_descent")),
            ("jax/mechanisms/positions.py", "flash_attention.jax", ("rotary", "xpos", "t5_bias", "alibi_bias")),
            ("jax/nnx.py", "flash_attention.jax.nnx", ("attention_fn",)),
            ("jax/sampling.py", "flash_attention.jax.sampling", ("sample", "filter_logits")),
        ),
    ),
    (
        "Inference",
        (
            (INFER + "core/cache.py", "flash_attention_infer.core.cache", ("KVCache",)),
            (INFER + "core/sequences.py", "flash_attention_infer.core", ("SequenceTable",)),
            (INFER + "core/allocator.py", "flash_attention_infer.core", ("BlockAllocator",)),
            (INFER + "core/ring.py", "flash_attention_infer.core", ("Ring",)),
            (INFER + "core/step.py", "flash_attention_infer.core", ("Step",)),
            (INFER + "core/config.py", "flash_attention_infer.core.config", ("CacheConfig",)),
            (
                INFER + "core/errors.py",
                "flash_attention_infer.core",
                (
                    "CacheError",
                    "OutOfBlocksError",
                    "DoubleFreeError",
                    "StaleSequenceError",
                ),
            ),
            (INFER + "jax/cache.py", "flash_attention_infer.jax", ("KVCache",)),
            (INFER + "jax/attention.py", "flash_attention_infer.jax", ("prefill", "decode")),
            (INFER + "jax/storage.py", "flash_attention_infer.jax", ("LayerCache",)),
            (INFER + "nn/cache.py", "flash_attention_infer.nn", ("KVCache",)),
            (INFER + "nn/attention.py", "flash_attention_infer.nn", ("CachedAttention",)),
            (INFER + "nn/storage.py", "flash_attention_infer.nn", ("LayerCache",)),
            (INFER + "core/generation.py", "flash_attention_infer.core.generation", ("generate", "stream")),
            (INFER + "core/scheduler.py", "flash_attention_infer.core", ("Scheduler", "Request")),
            (INFER + "atlas/attention.py", "flash_attention_infer.atlas.attention", ("AtlasAttention",)),
            (
                INFER + "ascend_package/onnx_model.py",
                "flash_attention_infer.ascend_package.onnx_model",
                ("attention_node", "attention_model", "checkable"),
            ),
        ),
    ),
    (
        "Core",
        (
            ("core/spec.py", "flash_attention.core.spec", ("AttentionSpec", "Operands")),
            ("core/ranges.py", "flash_attention.core.ranges", ("Band", "visible", "key_tiles", "query_tiles")),
            ("core/plan.py", "flash_attention.core.plan", ("TilePlan", "make_plan")),
            ("core/tiling/base.py", "flash_attention.core.tiling", ("Tile", "Strategy")),
            ("core/tiling/__init__.py", "flash_attention.core.tiling", ("register_strategy", "get_strategy")),
            ("core/context.py", "flash_attention.core.context", ("RingPlan", "make_ring_plan", "part_of")),
            ("core/sharding.py", "flash_attention.core.sharding", ("strategies", "share")),
            ("core/registry.py", "flash_attention.core.registry", ("Registry",)),
            ("core/alibi.py", "flash_attention.core.alibi", ("alibi_slopes",)),
            (
                "core/transformer/attention.py",
                "flash_attention.core.transformer.attention",
                ("AttentionOptions", "Path"),
            ),
            (
                "core/transformer/layers.py",
                "flash_attention.core.transformer.layers",
                ("FeedForwardOptions", "LayersOptions"),
            ),
            (
                "core/transformer/wrappers.py",
                "flash_attention.core.transformer.wrappers",
                ("TokenOptions", "ContinuousOptions"),
            ),
            (
                "core/mechanisms/weights.py",
                "flash_attention.core.mechanisms.weights",
                ("flatten_params", "unflatten_params"),
            ),
            ("core/dropout.py", "flash_attention.core.dropout", ("keep", "threshold")),
            ("core/sampling.py", "flash_attention.core.sampling", ("Sampling",)),
            ("core/lse.py", "flash_attention.core.lse", ("merge",)),
            ("core/reference.py", "flash_attention.core.reference", ("attention", "attention_grad")),
            ("core/engine.py", "flash_attention.core.engine", ("Engine", "EngineTable")),
            ("core/errors.py", "flash_attention.core.errors", ("Reason", "UnsupportedError")),
        ),
    ),
)
TITLE = {"en": "API reference", "zh": "API 参考"}
INTRODUCTION = {
    "en": "Generated from the docstrings by `python docs/tools/build_docs.py`. Shapes are in the notation of "
    "[conventions](conventions.md).",
    "zh": "本页由 `python docs/tools/build_docs.py` 从 docstring 生成，因此说明文字为英文。"
    "形状记号见[约定](conventions.md)。",
}
_SECTION = re.compile(r"^(Args|Attributes|Inputs|Outputs|Returns|Raises|Examples|Supported Platforms):\s*$")
_LISTS = ("Args", "Attributes", "Raises")


def page(root, language):
    """The whole page."""
    lines = ["# " + TITLE[language], "", INTRODUCTION[language], ""]
    for section, files in PUBLIC:
        lines += ["## " + section, ""]
        for file, module, names in files:
            with open(os.path.join(root, "train", "flash_attention", *file.split("/")), encoding="utf-8") as stream:
                nodes = {node.name: node for node in ast.parse(stream.read()).body if hasattr(node, "name")}
            for name in names:
                lines += _entry(nodes[name], module)
    return "\n".join(lines).rstrip() + "\n"


def _entry(node, module):
    lines = ["### {}.{}".format(module, node.name), ""]
    if isinstance(node, ast.FunctionDef):
        return lines + _signed(_call(node.name, node.args)) + _markdown(ast.get_docstring(node))
    lines += _signed(_constructor(node)) + _markdown(ast.get_docstring(node))
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
            is_property = any(getattr(item, "id", "") == "property" for item in method.decorator_list)
            text = method.name if is_property else _call(method.name, method.args)
            lines += ["#### " + node.name + "." + method.name, ""] + _signed(text)
            lines += _markdown(ast.get_docstring(method))
    return lines


def _signed(text):
    return ["```py", text, "```", ""]


def _constructor(node):
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return _call(node.name, method.args)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    if not fields:
        return "{}({})".format(node.name, ast.unparse(node.bases[0]) if node.bases else "")
    return _wrapped(node.name, [
        _with_default(item.target.id, item.value) for item in fields
    ])  # fmt: skip


def _call(name, arguments):
    plain = [item.arg for item in arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    words = [_with_default(*pair) for pair in zip(plain, defaults) if pair[0] not in ("self", "cls")]
    if arguments.vararg:
        words.append("*" + arguments.vararg.arg)
    elif arguments.kwonlyargs:
        words.append("*")
    if arguments.kwonlyargs:
        words += [_with_default(item.arg, value) for item, value in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        words.append("**" + arguments.kwarg.arg)
    return _wrapped(name, words)


_VALUES = {"NO_LIMIT": "65536"}  # constants that a reader wants to see as numbers


def _with_default(name, value):
    if value is None:
        return name
    text = ast.unparse(value)
    return "{}={}".format(name, _VALUES.get(text, text))


def _wrapped(name, words, width=100):
    """`name(words)`, broken into lines of at most `width` characters."""
    lines = [name + "("]
    for position, word in enumerate(words):
        word += ")" if position == len(words) - 1 else ", "
        if len(lines[-1]) + len(word) > width:
            lines[-1] = lines[-1].rstrip()
            lines.append("    ")
        lines[-1] += word
    return "\n".join(lines) if words else name + "()"


def _inline(text):
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda match: "`{}`".format(match.group(1).split(".")[-1]), text)
    return text.replace("``", "`")


def _markdown(docstring):
    """A Google-style docstring as Markdown lines, with an empty line at the end."""
    parts, title = [("", [])], ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        match = _SECTION.match(line)
        if match:
            title = match.group(1)
            parts.append((title, []))
        else:
            parts[-1][1].append(line)
    lines = []
    for title, body in parts:
        body = inspect.cleandoc("\n".join([""] + body)).splitlines()
        if title:
            lines += ["**{}**".format(title), ""]
        if title in _LISTS:
            lines += _items(body)
        elif title == "Examples":
            lines += ["```pycon"] + body + ["", "```"]  # the empty line ends the last output, for doctest
        else:
            lines += _paragraphs(body)
        lines.append("")
    return lines


def _items(body):
    """`name (type): text` lines, continued by deeper ones, as a Markdown list."""
    lines = []
    for line in body:
        match = re.match(r"(\w[\w, ]*?)( \([^)]*\))?: (.*)$", line)  # deeper lines begin with a space
        if match:
            names = ", ".join("`{}`".format(name.strip()) for name in match.group(1).split(","))
            lines.append("- {}{}: {}".format(names, match.group(2) or "", _inline(match.group(3))))
        elif line.strip():
            lines.append("  " + _inline(line.strip()))
    return lines


def _paragraphs(body):
    lines, formula = [], False
    for line in body:
        if line.strip() == ".. math::":
            lines += ["$$"]
            formula = True
        elif formula and line.strip() and not line.startswith(" "):
            lines += ["$$", "", _inline(line)]
            formula = False
        elif formula:
            if line.strip():
                lines.append(line.strip())
        else:
            lines.append(_inline(line))
    return lines + (["$$"] if formula else [])
