"""The tables of the documentation, each a function of the language; part of build_docs.py.

A function returns Markdown lines, or None where this computer lacks what the table is made from (a framework).
"""

import functools
import importlib
import importlib.util
import itertools
import json
import os
from dataclasses import replace

import library_tables
import transformer_tables

from flash_attention.ascend import cost
from flash_attention.core import conventions, dropout
from flash_attention.core.spec import AttentionSpec
from flash_attention.core.tiling import choose_tile, get_strategy, strategy_names
from flash_attention.core.tiling.base import Tile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BENCHMARKS = os.path.join(ROOT, "docs", "benchmarks")


def markdown(header, rows):
    """A Markdown table."""
    lines = [list(map(str, line)) for line in [header, ["---"] * len(header)] + [list(row) for row in rows]]
    return ["| {} |".format(" | ".join(line)) for line in lines]


def pick(language, english, chinese):
    """The text in the page's language."""
    return english if language == "en" else chinese


# --- support ----------------------------------------------------------------------------------------------------------
TESTS = ("**proven by the tests here**", "**本仓库测试验证**")
DOCUMENTATION = ("from documentation only", "仅依据文档")
NOT_RUN = ("same code, not run", "同一份代码，未运行")
ON_H200 = ("**tested and measured on an H200** (jax 0.11.2)", "**在 H200 上测试并测量**（jax 0.11.2）")
INTERPRETED = ("interpreted and lowered here, not run on device", "在此处解释执行并降级编译，未在设备上运行")
SIMULATED = ("simulated, not run on device", "仅在模拟器上运行，未在设备上运行")

# product, MindSpore, Python, CANN, engines, state; a pair is (English, Chinese)
CPU = ("x86-64 CPU, Linux", "x86-64 CPU，Linux")
ASCEND_910 = ("Ascend 910 (910A)", "昇腾 910（910A）")
SUPPORT = (
    (CPU, "2.10.0", "3.11", "-", ("`portable`, `jax` (jax 0.6.2)", "`portable`、`jax`（jax 0.6.2）"), TESTS),
    (CPU, "-", "3.11", "-",
     ("JAX `xla`, `reference` (jax 0.6.2, newest)", "JAX `xla`、`reference`（jax 0.6.2、最新版）"), TESTS),
    (("Atlas A2 (910B), A3", "Atlas A2（910B）、A3"), "2.3-2.10", "3.9-3.12", "8.0.RC2-9.0.0", "`aclnn`",
     DOCUMENTATION),
    (ASCEND_910, "2.2-2.6", "3.7-3.9", "7.0.RC1-8.1.RC1", "`tik`", SIMULATED),
    (ASCEND_910, "2.2-2.6", "3.7-3.9", "7.0.RC1-8.1.RC1", "`portable`", NOT_RUN),
    ("NVIDIA GPU", ("a GPU build", "GPU 版本"), ("as MindSpore", "同 MindSpore"), "-", "`portable`", NOT_RUN),
    (("NVIDIA GPU, Google TPU", "NVIDIA GPU、Google TPU"), "-", "3.10+", "-", "JAX `xla`", NOT_RUN),
    ("NVIDIA GPU", "-", "3.10+", "-", ("JAX `cudnn`, `pallas`", "JAX `cudnn`、`pallas`"), ON_H200),
    ("NVIDIA Hopper", "-", "3.11+", "-", ("JAX `mosaic` (jax 0.10+)", "JAX `mosaic`（jax 0.10+）"), INTERPRETED),
    ("Google TPU", "-", "3.10+", "-", "JAX `splash`", INTERPRETED),
    (("other CPUs (Arm; macOS, Windows)", "其他 CPU（Arm；macOS、Windows）"),
     ("where it has a wheel", "有 wheel 时"), "3.10+", "-",
     ("`portable`, `jax`, JAX `xla`", "`portable`、`jax`、JAX `xla`"), NOT_RUN),
)  # fmt: skip


def support(language):
    """What was proven where; it opens the README."""
    which = 0 if language == "en" else 1
    header = (("product", "MindSpore", "Python", "CANN", "engines", "state"),
              ("产品", "MindSpore", "Python", "CANN", "引擎", "状态"))[which]  # fmt: skip
    return markdown(header, [[cell if isinstance(cell, str) else cell[which] for cell in row] for row in SUPPORT])


# MindSpore, Python, CANN, where the row comes from. Nothing here was run on a device.
VERSIONS = (
    ("2.10.0", "3.10-3.12", "-", ("wheels on PyPI; the tests run this version", "PyPI 上的 wheel；测试用此版本")),
    ("2.9.0", "-", "9.0.0", ("MindSpore Transformers 1.9.0, installation page", "MindSpore Transformers 1.9.0 安装页")),
    ("2.7.2", "3.9-3.11", "8.5.0", ("the same page; file names of the wheels", "同一页面；wheel 文件名")),
    ("2.7.1", "-", "8.3.RC1", ("the same page", "同一页面")),
    ("2.7.0", "-", "8.2.RC1", ("the same page", "同一页面")),
    ("2.6.0", "3.9-3.11", "8.1.RC1", ("the same page (for 2.6.0-rc1); file names of the wheels",
                                      "同一页面（2.6.0-rc1）；wheel 文件名")),
    ("2.4.10", "-", "8.0.0", ("the same page", "同一页面")),
    ("2.4.0", "-", "8.0.RC3", ("the same page", "同一页面")),
    ("2.3.0", "-", "8.0.RC2", ("the same page", "同一页面")),
    ("2.2.0", "3.7-3.9", "7.0.RC1", ("the published TIK attention for Ascend 910", "已发布的昇腾 910 TIK 注意力")),
)  # fmt: skip


def versions(language):
    """Which MindSpore goes with which CANN, and where that is written."""
    which = 0 if language == "en" else 1
    header = (("MindSpore", "Python", "CANN", "source"), ("MindSpore", "Python", "CANN", "来源"))[which]
    return markdown(header, [row[:3] + (row[3][which],) for row in VERSIONS])


USES = {
    "mindspore": ("the Cell and the MindSpore engines", "Cell 与 MindSpore 引擎"),
    "jax": ("the JAX twin, and engine `jax` of the Cell", "JAX 孪生实现，以及 Cell 的 `jax` 引擎"),
    "cuda": ("the JAX twin on NVIDIA GPUs", "NVIDIA GPU 上的 JAX 孪生实现"),
    "tpu": ("the JAX twin on TPUs", "TPU 上的 JAX 孪生实现"),
    "bench": ("`bench`: the peers it compares with, and plots", "`bench`：对照库与绘图"),
    "test": ("the tests", "测试"),
    "docs": ("plots of the examples", "示例的绘图"),
    "flax": ("`attention_fn` inside Flax NNX", "Flax NNX 中的 `attention_fn`"),
    "onnx": ("ONNX models with the Ascend operator, and their check", "含昇腾算子的 ONNX 模型及其检查"),
    "dev": ("all of jax, test and docs", "jax、test、docs 的总和"),
}


def extras(language):
    """The extras of setup.py."""
    setup = importlib.import_module("setup")
    header = pick(language, ("extra", "for", "installs"), ("extra", "用途", "安装内容"))
    rows = []
    for name, lines in setup.EXTRAS.items():
        rows.append(("`{}`".format(name), pick(language, *USES[name]), ", ".join("`{}`".format(x) for x in lines)))
    return markdown(header, rows)


# --- core -------------------------------------------------------------------------------------------------------------
def calls(language):
    """Layout, polarity and alignment of every public call."""
    lines = conventions.table()
    if language == "zh":
        lines[0] = "| 调用 | 布局 | 掩码参数 | 极性 | 掩码形状 | 对齐 |"
    return lines


def strategies(language):
    """The tiling strategies and the tiles they choose for a few shapes."""
    shapes = ((4096, 4096, 64), (4096, 4096, 128), (1000, 1000, 64), (4096, 77, 40), (256, 256, 160))
    header = ["`tiling_stgy_name`", "block_size"] + ["Sq={} Sk={} D={}".format(*shape) for shape in shapes]
    rows = []
    for name in strategy_names():
        strategy = get_strategy(name)
        row = ["`{}`".format(name), strategy.block_size]
        for q_len, kv_len, head_dim in shapes:
            spec = AttentionSpec(1, 8, 8, q_len, kv_len, head_dim)
            tile = choose_tile(strategy, spec, "docs", (Tile(256, 128),))
            row.append("{} x {}".format(tile.q, tile.kv))
        rows.append(row)
    if language == "zh":
        header[1] = "块大小 block_size"
    return markdown(header, rows)


def dropout_vectors(language):
    """The published test vectors of the dropout hash."""
    header = ["seed", "b", "h", "i", "j", pick(language, "hash", "哈希值")]
    return markdown(header, [list(row[:5]) + ["`0x{:08X}`".format(row[5])] for row in dropout.TEST_VECTORS])


# --- engines ----------------------------------------------------------------------------------------------------------
_BASE = dict(batch=2, heads=8, kv_heads=8, q_len=256, kv_len=256, head_dim=64, dtype="float16")
# (label en, zh), what it changes in the plain call
FEATURES = (
    (("float16", "float16"), {"dtype": "float16"}),
    (("bfloat16", "bfloat16"), {"dtype": "bfloat16"}),
    (("float32", "float32"), {"dtype": "float32"}),
    (("float64", "float64"), {"dtype": "float64"}),
    (("head_dim 40", "head_dim 40"), {"head_dim": 40}),
    (("head_dim 320", "head_dim 320"), {"head_dim": 320}),
    (("head_dim 640", "head_dim 640"), {"head_dim": 640}),
    (("2 key/value heads", "2 个键值头"), {"kv_heads": 2}),
    (("ragged lengths (129, 1000)", "不规则长度（129、1000）"), {"q_len": 129, "kv_len": 1000}),
    (("causal", "因果"), {"causal": True}),
    (("block window", "块窗口"), {"prev_block_num": 1, "next_block_num": 0}),
    (("token window", "词元窗口"), {"local_window_size": (100, 20)}),
    (("mask (B, 1, Sq, Sk)", "掩码 (B, 1, Sq, Sk)"), {"mask_shape": (2, 1, 256, 256)}),
    (("compact mask", "紧凑掩码"), {"mask_shape": (128, 128), "compact_mask": True}),
    (("bias (1, N, Sq, Sk)", "偏置 (1, N, Sq, Sk)"), {"bias_shape": (1, 8, 256, 256)}),
    (("ALiBi slopes (N,)", "ALiBi 斜率 (N,)"), {"alibi_shape": (8,)}),
    (("segment ids", "段编号"), {"segments": True}),
    (("query and key lengths", "查询与键的长度"), {"q_lengths": True, "kv_lengths": True}),
    (("soft cap", "soft cap"), {"soft_cap": 30.0}),
    (("sinks", "sinks"), {"sinks": True}),
    (("dropout", "dropout"), {"dropout_rate": 0.1}),
    (("q_offset, an int", "q_offset 为整数"), {"q_offset": 0}),
    (("q_offset, a tensor", "q_offset 为张量"), {"dynamic_offset": True}),
    (("batch only known at run time", "批大小运行时才知道"), {"batch": -1}),
)  # fmt: skip


CONSTRAINTS = {
    "aclnn": ("flash_attention.ops.aclnn.constraints", "refused"),
    "cudnn": ("flash_attention.jax.engines.cudnn", "constraints"),
    "splash": ("flash_attention.jax.engines.splash", "constraints"),
    "mosaic": ("flash_attention.jax.engines.mosaic", "constraints"),
}
"""Engine -> the function that says what it takes on its own device."""


def engine_matrix(table_module, framework, language):
    """Which engine takes what, from `supports(spec)` itself; below, all of them and why one does not run here."""
    if importlib.util.find_spec(framework) is None or importlib.util.find_spec("tbe") is not None:
        return None
    engines = list(importlib.import_module(table_module).ENGINES)
    plain = AttentionSpec(**_BASE)
    here = []  # (name, supports, dtype of the rows that name none)
    for engine in engines:
        supports = engine.supports
        if engine.name in CONSTRAINTS:  # its limits are known without its device
            module, function = CONSTRAINTS[engine.name]
            supports = getattr(importlib.import_module(module), function)
        taken = [dtype for dtype in ("float16", "bfloat16") if supports(replace(plain, dtype=dtype)) is None]
        if taken:
            here.append((engine.name, supports, taken[0]))
    notes, rows = [], []
    for label, changes in FEATURES:
        if "batch" in changes and framework == "jax":
            continue  # JAX compiles for every batch anew
        cells = []
        for _, supports, dtype in here:
            reason = supports(AttentionSpec(**dict(_BASE, **{"dtype": dtype, **changes})))
            if reason is None:
                cells.append(pick(language, "yes", "支持"))
            else:
                if str(reason) not in notes:
                    notes.append(str(reason))
                cells.append(pick(language, "no", "不支持") + " ({})".format(notes.index(str(reason)) + 1))
        rows.append([label[0 if language == "en" else 1]] + cells)
    lines = markdown([""] + ["`{}`".format(name) for name, *_ in here], rows)
    if notes:
        lines += [""] + ["{}. {}".format(number, note) for number, note in enumerate(notes, 1)]
    lines += [""] + _orders(engines, plain, language)
    return lines


BY_JAX = {"mosaic": ("runs with jax 0.10 or newer, and absl-py", "配合 jax 0.10 或更新版本与 absl-py 可运行")}
"""What depends on the jax at hand: pages are the same whichever writes them."""


def _orders(engines, plain, language):
    """Every engine in the order of preference, its note, and why it does not run here."""
    header = pick(language, ("engine", "`auto`", "note", "on a computer with only a CPU"),
                  ("引擎", "`auto`", "说明", "只有 CPU 的机器上"))  # fmt: skip
    rows = []
    for place, engine in enumerate(engines, 1):
        reason = engine.supports(plain)
        chosen = pick(language, "only by name", "仅按名字") if engine.order is None else str(place)
        state = pick(language, "runs", "可运行") if reason is None else str(reason)
        state = pick(language, *BY_JAX[engine.name]) if engine.name in BY_JAX else state
        rows.append(("`{}`".format(engine.name), chosen, engine.note, state))
    return markdown(header, rows)


def engines_mindspore(language):
    """Engines of the MindSpore front end."""
    return engine_matrix("flash_attention.ops", "mindspore", language)


def engines_jax(language):
    """Engines of the JAX front end."""
    return engine_matrix("flash_attention.jax", "jax", language)


def engine_choice(language):
    """Which JAX engine `auto` takes where, and on what evidence."""
    if importlib.util.find_spec("jax") is None:
        return None
    choice = importlib.import_module("flash_attention.jax.engines.choice")
    header = pick(language, ("platform", "`auto` takes", "because"), ("平台", "`auto` 选用", "依据"))
    rows = [(row.backend, ", ".join(map("`{}`".format, row.engines)), row.because) for row in choice.TABLE]
    return markdown(header, rows)


def shared_memory(language):
    """Tiles of engine `pallas` and the bound of their shared memory."""
    if importlib.util.find_spec("jax") is None:
        return None
    sizes = importlib.import_module("flash_attention.jax.engines.pallas_sizes")
    header = pick(
        language,
        ("dtype", "head size", "forward", "dQ", "dK, dV", "d(bias)", "KiB of shared memory at most"),
        ("dtype", "head 大小", "前向", "dQ", "dK、dV", "d(bias)", "共享内存上界（KiB）"),
    )
    rows = []
    for dtype, dim in itertools.product(("bfloat16", "float32"), (64, 128, 256)):
        spec = AttentionSpec(**dict(_BASE, dtype=dtype, head_dim=dim, q_len=8192, kv_len=8192))
        biased = replace(spec, bias_shape=(1, spec.heads, spec.q_len, spec.kv_len))
        ways = [(biased if direction == "bias" else spec, direction) for direction in sizes.DIRECTIONS]
        tiles = [sizes.tiles_of(*way) for way in ways]
        most = max(sizes.shared_bytes(way[0], tile, way[1]) for way, tile in zip(ways, tiles))
        rows.append([dtype, dim] + ["{} x {}".format(x.rows, x.keys) for x in tiles] + ["{:.0f}".format(most / 1024)])
    return markdown(header, rows)


def aclnn_limits(language):
    """What the documentation of the vendor operator allows, with the source of each rule."""
    if importlib.util.find_spec("mindspore") is None:
        return None
    lines = importlib.import_module("flash_attention.ops.aclnn.constraints").table()
    if language == "zh":
        lines[0] = "| 参数 | 必须满足 | 来源 |"
    return lines


# --- the kernels for Ascend 910 --------------------------------------------------------------------------------------
_CALL = AttentionSpec(4, 8, 8, 4096, 4096, 128, "float16")
_CALLS = (
    (("dense", "稠密"), {}),
    (("causal", "因果"), {"causal": True}),
    (("causal, window of 4 blocks", "因果，窗口 4 块"), {"causal": True, "prev_block_num": 4}),
    (("mask (1, 1, Sq, Sk)", "掩码 (1, 1, Sq, Sk)"), {"mask_shape": (1, 1, 4096, 4096)}),
    (("ALiBi slopes", "ALiBi 斜率"), {"alibi_shape": (8,)}),
    (("dropout", "dropout"), {"dropout_rate": 0.1}),
)
_SCENARIOS = (
    ("as assumed", "按假设"),
    ("exp, ln and division at the full vector rate", "exp、ln 与除法按向量全速"),
    ("all reads from L2, none from HBM", "全部读取来自 L2，而非 HBM"),
    ("10 more cycles an instruction", "每条指令多 10 个周期"),
)


@functools.lru_cache(maxsize=None)
def _predicted(number, direction="forward", scenario=0):
    """One of _CALLS by the cost model; the languages share it."""
    spec = replace(_CALL, **_CALLS[number][1])
    return cost.predict(spec, direction, scenario=cost.SCENARIOS[scenario])


def kernel_budget(language):
    """Every local buffer of the forward kernel for (4, 8, 4096, 128), dense."""
    budget = _predicted(0).budget
    header = pick(language, ("memory", "buffer", "type", "bytes", "holds"), ("存储", "缓冲区", "类型", "字节", "内容"))
    rows = []
    for scope, capacity in budget.chip.capacity:
        total = "**{:,} / {:,}**".format(budget.used(scope), capacity)
        rows.append(("**{}**".format(scope), "", "", total, pick(language, "used / available", "已用 / 可用")))
        for buffer in budget.buffers:
            if buffer.scope == scope:
                size = "{} x {:,}".format(buffer.copies, buffer.bytes // buffer.copies)
                rows.append((scope, "`{}`".format(buffer.name), buffer.dtype, size, buffer.content))
    return markdown(header, rows)


def kernel_cycles(language):
    """What the cost model says of (4, 8, 4096, 128): time, what bounds it, and each pipe's share of the time."""
    pipes = ("M", "V", "MTE1", "MTE2", "MTE3")
    header = pick(language, ("call", "tile", "ms", "TFLOPS", "bound by"), ("调用", "分块", "毫秒", "TFLOPS", "瓶颈"))
    header += pipes + ("GB", pick(language, "cycles a task, a tile pair", "每任务、每分块对的周期"))
    calls = [(direction, number) for direction in cost.FLOPS for number in range(len(_CALLS))] + [("preprocess", 0)]
    names = {"forward": "前向", "backward": "反向", "preprocess": "反向之前的内核"}
    rows = []
    for direction, number in calls:
        got = _predicted(number, direction)
        name = "{}, {}".format(pick(language, direction, names[direction]), pick(language, *_CALLS[number][0]))
        shares = ["{:.0%}".format(got.busy[pipe] / got.cycles) for pipe in pipes]
        lines = "; ".join("{:,.0f}, {:,.0f}".format(fit.task, fit.pair) for fit in got.fits)
        figures = ["{:.3g}".format(1e3 * got.seconds), "{:.0f}".format(got.tflops), got.bound]
        tile = "{} x {}".format(got.geometry.tiles.q, got.geometry.tiles.kv)
        rows.append([name, tile] + figures + shares + ["{:.2f}".format(got.gm_bytes / 1e9), lines])
    return markdown(header, rows)


def kernel_sensitivity(language):
    """The dense forward call under each assumption that nobody published a figure for."""
    header = pick(language, ("assumption", "ms", "bound by", "cube busy"), ("假设", "毫秒", "瓶颈", "立方单元占用"))
    rows = []
    for number, label in enumerate(_SCENARIOS):
        got = _predicted(0, scenario=number)
        cube = "{:.0%}".format(got.cube_utilisation)
        rows.append((pick(language, *label), "{:.3g}".format(1e3 * got.seconds), got.bound, cube))
    return markdown(header, rows)


# --- measurements -----------------------------------------------------------------------------------------------------
def _reports():
    names = sorted(os.listdir(BENCHMARKS)) if os.path.isdir(BENCHMARKS) else []
    for name in names:
        if name.endswith(".json") and not name.endswith("-quick.json"):
            with open(os.path.join(BENCHMARKS, name), encoding="utf-8") as stream:
                yield json.load(stream)


def _number(value):
    return "{:,.0f}".format(value) if abs(value) >= 1000 else "{:.3g}".format(value)


def _bound(figure):
    if figure.get("bound") is None:
        return "-"
    return "{} {}".format(">=" if figure.get("at_least") else "<=", _number(figure["bound"]))


def _holds(figure):
    if figure.get("bound") is None:
        return None
    if figure.get("at_least"):
        return figure["value"] >= figure["bound"]
    return figure["value"] <= figure["bound"]


def _verdict(figure, language):
    held = _holds(figure)
    return "" if held is None else pick(language, "met", "达到") if held else pick(language, "**missed**", "**未达到**")


def measured(language):
    """Every figure of docs/benchmarks, with its bound, CPU class, date and command."""
    rows = []
    for report in _reports():
        for figure in report["figures"]:
            value = "{} {}".format(_number(figure["value"]), figure.get("unit") or "").strip()
            where = _where(report)
            rows.append((report["name"], figure["name"], value, _bound(figure), _verdict(figure, language), where))
    if not rows:
        return _not_yet(language)
    header = pick(language, ("`bench` name", "figure", "measured", "target", "", "CPU class or GPU, date"),
                  ("`bench` 名称", "指标", "实测", "目标", "", "CPU 类别或 GPU，日期"))  # fmt: skip
    return markdown(header, rows) + [""] + _versions_line(language)


def _where(report):
    return "{}, {}".format(report.get("place", report["cpu_class"]), report["date"])


def _versions_line(language):
    found = sorted({
        "{} {}".format(name, number)
        for report in _reports()
        for name, number in report["versions"].items()
        if number
    })  # fmt: skip
    return [pick(language, "Versions: ", "版本：") + ", ".join(found) + pick(language, ".", "。")]


def _not_yet(language, command="bash build.sh bench"):
    return [pick(language, "Not measured yet: run {}.", "尚未测量：请运行 {}。").format("`{}`".format(command))]


def measured_targets(language):
    """One line a benchmark, for the README: how many targets it meets, and each that it misses."""
    rows = []
    for report in _reports():
        bounded = [figure for figure in report["figures"] if figure.get("bound") is not None]
        missed = [figure for figure in bounded if not figure["ok"]]
        texts = ["{}: {} ({})".format(f["name"], _number(f["value"]), _bound(f)) for f in missed]
        count = "{} / {}".format(len(bounded) - len(missed), len(bounded))
        where = _where(report)
        rows.append((report["name"], count, "; ".join(texts) or "-", where))
    if not rows:
        return _not_yet(language)
    header = pick(language, ("`bench` name", "targets met", "missed: measured (target)", "CPU class or GPU, date"),
                  ("`bench` 名称", "达到的目标", "未达到：实测（目标）", "CPU 类别或 GPU，日期"))  # fmt: skip
    return markdown(header, rows) + [""] + _versions_line(language)


def library_steps(language):
    """A training step in each model library, with its own attention and with our engines."""
    rows = library_tables.steps(_reports())
    header = pick(language, ("library", "model", "its own attention", "`portable`", "`jax`"),
                  ("库", "模型", "库自带的注意力", "`portable`", "`jax`"))  # fmt: skip
    return markdown(header, rows) if rows else _not_yet(language, "bash build.sh bench --integration")


TABLES = {
    "support": support,
    "versions": versions,
    "extras": extras,
    "calls": calls,
    "strategies": strategies,
    "dropout-vectors": dropout_vectors,
    "engines-mindspore": engines_mindspore,
    "engines-jax": engines_jax,
    "engine-choice": engine_choice,
    "shared-memory": shared_memory,
    "aclnn-limits": aclnn_limits,
    "kernel-budget": kernel_budget,
    "kernel-cycles": kernel_cycles,
    "kernel-sensitivity": kernel_sensitivity,
    "transformer-options": transformer_tables.options,
    "library-steps": library_steps,
    "measured": measured,
    "measured-targets": measured_targets,
}
