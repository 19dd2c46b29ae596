"""The conformance suite: one list of attention calls, their inputs, their float64 results, and the check of an engine.

Case -> make_inputs -> reference and naive results (numpy) -> check(engine, case). An engine joins through an adapter
(`support/jax_engines.py`, `support/mindspore_engines.py`), a feature with one entry of a table below. The benchmarks'
own shapes are in `flash_attention.tools.bench`; those tagged 'primary' here are theirs at test length.
"""

import functools
import itertools
import zlib
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Tuple
from unittest import mock

import numpy as np
import pytest

from flash_attention.core import alibi, reference
from flash_attention.core.errors import UnsupportedError
from flash_attention.core.spec import KEYWORDS, Operands
from flash_attention.core.validation import Options, TensorInfo, make_spec
from tolerances import FORWARD, GRADIENTS, Draw, assert_part_close, in_two_looks

LAYER = "flash_attention"

# Plain options of the functional call by the name of the feature.
BANDS = {
    "dense": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (33, 5)},
    "left-causal": {"local_window_size": (40, None), "is_causal": True},
    "blocks128": {"prev_block_num": 1, "next_block_num": 0},
    "blocks64": {"prev_block_num": 1, "next_block_num": 1, "block_size": 64},
    "blocks16-causal": {"prev_block_num": 3, "next_block_num": 0, "block_size": 16, "is_causal": True},
}
LOGITS = {
    "plain": {},
    "cap": {"logits_soft_cap": 3.0},
    "scale": {"scale": 0.3},
    "cap-scale": {"logits_soft_cap": 5.0, "scale": 0.5},
}
OFFSETS = {"aligned": {}, "offset0": {"q_offset": 0}, "offset-7": {"q_offset": -7}, "offset23": {"q_offset": 23}}
DTYPES = ("float32", "float16", "bfloat16")
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Case:
    """One call. Every field but `draw`, `name` and `tags` is an axis of the grid.

    Attributes:
        lengths: (Sq, Sk); heads: (B, N, Nkv).
        band, logits: keys of the tables above; offset: likewise, or 'traced' (a run-time scalar) or 'traced-batch'.
        mask: none, dense (B,1,Sq,Sk), heads (1,N,Sq,Sk), keys (B,1,1,Sk), rows (Sq,Sk; some see nothing), compact.
        bias: none, full (B,N,Sq,Sk), heads (1,N,Sq,Sk), keys (B,1,1,Sk).
        slopes: none, alibi (N,), alibi-batch (B,N).
        ids: none, segments, lengths (tensors), int-lengths.
        values: normal, large (inputs of 1e4, products of 50) or extreme (integers, products just below 6e4).
        gradients: whether the gradients are checked too; cotangent: whether the LSE has a cotangent.
        draw: which of the random inputs of this call.
    """

    dtype: str = "float32"
    lengths: Tuple[int, int] = (150, 150)
    head_dim: int = 32
    heads: Tuple[int, int, int] = (2, 4, 2)
    band: str = "dense"
    mask: str = "none"
    bias: str = "none"
    slopes: str = "none"
    logits: str = "plain"
    sinks: bool = False
    ids: str = "none"
    offset: str = "aligned"
    dropout: float = 0.0
    cotangent: bool = False
    layout: str = "BNSD"
    gradients: bool = True
    values: str = "normal"
    draw: int = field(default=0, repr=False)
    name: str = ""
    tags: Tuple[str, ...] = ()

    def __str__(self):
        if self.name:
            return self.name
        words = ["{}-{}x{}-D{}-{}.{}.{}".format(SHORT[self.dtype], *self.lengths, self.head_dim, *self.heads)]
        for axis in fields(self)[4:-2]:
            value = getattr(self, axis.name)
            if value != axis.default:
                words.append(axis.name if value is True else "fwd" if axis.name == "gradients" else str(value))
        return "-".join(words)

    @property
    def options(self):
        """Plain options of the functional call."""
        found = {"dropout_rate": self.dropout, "layout": self.layout}
        for table, key in ((BANDS, self.band), (LOGITS, self.logits), (OFFSETS, self.offset)):
            found.update(table.get(key, {}))
        return found

    @property
    def spec(self):
        """The AttentionSpec that a front end makes of this call."""
        return make_inputs(self).spec


class Inputs(NamedTuple):
    """numpy tensors of a case, BNSD, float32 but exact in the case's dtype.

    `tensors` are the other operands by public keyword, `operands` the same as the reference takes them.
    """

    spec: object
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    d_out: np.ndarray
    d_lse: np.ndarray
    tensors: dict
    operands: Operands


DIFFERENTIABLE = {"bias": "bias", "alibi_slopes": "slopes", "sinks": "sinks"}


def round_to(x, dtype):
    """float32 array of the nearest values of `dtype` (ties to even)."""
    x = np.asarray(x, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(x), rounded.view(np.float32), x)
    return x


def _qkv(case, rng):
    batch, heads, kv_heads = case.heads
    q_shape = (batch, heads, case.lengths[0], case.head_dim)
    kv_shape = (batch, kv_heads, case.lengths[1], case.head_dim)
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in (q_shape, kv_shape, kv_shape))
    if case.values == "large":
        query, key, value = 1e4 * query, 1e-3 * key, 1e4 * value
    if case.values == "extreme":  # sums of integers: every order of addition gives the same products
        size = int(np.sqrt(6e4 / case.head_dim))
        query, key = size * np.where(query > 0, 1.0, -1.0), size * np.where(key > 0, 1.0, -1.0)
        query[:, :: case.heads[1] // kv_heads, 0] = key[:, :, -1]  # one product reaches the largest value there is
    return [round_to(x, case.dtype) for x in (query, key, value, rng.standard_normal(q_shape))]


def _tensors(case, rng):
    (batch, heads, _), (q_len, kv_len) = case.heads, case.lengths
    block = case.options.get("block_size", 128)
    shapes = {
        "dense": (batch, 1, q_len, kv_len),
        "full": (batch, heads, q_len, kv_len),
        "heads": (1, heads, q_len, kv_len),
        "keys": (batch, 1, 1, kv_len),
        "rows": (q_len, kv_len),
        "compact": (block, block),
    }
    tensors = {}
    if case.mask != "none":
        mask = rng.random(shapes[case.mask]) < 0.7
        if case.mask == "rows":
            mask[::5] = False
        kind = {"heads": np.float32, "keys": np.int32}.get(case.mask, np.bool_)
        tensors["mask"] = mask.astype(kind)
    if case.bias != "none":
        tensors["bias"] = rng.standard_normal(shapes[case.bias]).astype(np.float32)
    if case.slopes != "none":
        slopes = alibi.alibi_slopes(heads)
        tensors["alibi_slopes"] = (
            slopes if case.slopes == "alibi" else np.stack([slopes * (b + 1) for b in range(batch)])
        )
    if case.sinks:
        tensors["sinks"] = rng.standard_normal(heads).astype(np.float32)
    if case.ids == "segments":
        tensors["q_segment_ids"] = np.sort(rng.integers(0, 3, (batch, q_len)), axis=1).astype(np.int32)
        tensors["kv_segment_ids"] = np.sort(rng.integers(0, 3, (batch, kv_len)), axis=1).astype(np.int32)
    if case.ids == "lengths":
        tensors["query_seq_lengths"] = rng.integers(0, q_len + 1, batch).astype(np.int32)
        tensors["key_value_seq_lengths"] = rng.integers(0, kv_len + 1, batch).astype(np.int32)
    if case.ids == "int-lengths":
        tensors["query_seq_lengths"], tensors["key_value_seq_lengths"] = (q_len + 1) // 2, (kv_len + 1) // 2
    if case.offset.startswith("traced"):
        start = kv_len - q_len
        tensors["q_offset"] = (
            np.int32(start - 3) if case.offset == "traced" else start - np.arange(batch, dtype=np.int32)
        )
    if case.dropout:
        tensors["dropout_seed"] = 20231107
    return tensors


def _info(x, dtype=None):
    return TensorInfo(np.shape(x), dtype or str(np.asarray(x).dtype))


def _spec_and_operands(case, query, key, tensors):
    arrays = dict(tensors)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if isinstance(arrays.get(name), int):
            arrays[name] = np.full(case.heads[0], arrays[name], np.int32)
    if case.dropout:
        arrays["dropout_seed"] = np.uint32(arrays["dropout_seed"])
    infos = Operands(**{KEYWORDS[name]: _info(x) for name, x in arrays.items()})
    options = Options(**dict(case.options, layout="BNSD"))
    q_info, kv_info = _info(query, case.dtype), _info(key, case.dtype)
    spec = make_spec(LAYER, q_info, kv_info, kv_info, infos, options)
    operands = Operands(**{KEYWORDS[name]: x for name, x in arrays.items()})
    shaped = {}
    for name, shape in (("bias", spec.bias_shape), ("mask", spec.mask_shape), ("slopes", spec.alibi_shape)):
        if shape is not None:
            shaped[name] = getattr(operands, name).reshape(shape)
    return spec, operands._replace(**shaped)


@functools.lru_cache(maxsize=4)
def make_inputs(case):
    """The case's :class:`Inputs`: the same for every engine and every computer."""
    rng = np.random.default_rng([case.draw, zlib.crc32(repr(case).encode())])
    query, key, value, d_out = _qkv(case, rng)
    d_lse = rng.standard_normal(query.shape[:3]).astype(np.float32) * case.cotangent
    tensors = _tensors(case, rng)
    spec, operands = _spec_and_operands(case, query, key, tensors)
    return Inputs(spec, query, key, value, d_out, d_lse, tensors, operands)


def _results(case, inputs, xp):
    spec, operands = inputs.spec, inputs.operands
    tensors = [np.asarray(x, xp.float64) for x in inputs[1:4]]
    fwd = reference.forward(xp, spec, *tensors, operands)
    results = {"out": fwd.out, "lse": fwd.lse}
    if case.gradients:
        d_out, d_lse = inputs.d_out, inputs.d_lse if case.cotangent else None
        results.update(reference.attention_grad(spec, *tensors, operands, d_out, d_lse))
    return results


@functools.lru_cache(maxsize=4)
def run_reference(case):
    """Float64 results by name: out, lse and, with gradients, query, key, value and those of bias, slopes, sinks."""
    return _results(case, make_inputs(case), np)


class NaivePrecision:
    """numpy for `core.reference` in the precision of a call, see `tolerances`.

    Args:
        order: shuffles every sum of products.
        functions: None, or an object with the framework's own versions of some functions on numpy arrays.
    """

    float64 = np.float32

    def __init__(self, dtype, order, functions):
        self._dtype, self._order, self._functions = dtype, order, functions

    def __getattr__(self, name):
        return getattr(self._functions, name, None) or getattr(np, name)

    def matmul(self, a, b):
        order = np.random.default_rng(self._order).permutation(a.shape[-1])
        a, b = round_to(a[..., order], self._dtype), round_to(b[..., order, :], self._dtype)
        multiply = getattr(self._functions, "matmul", np.matmul)
        with np.errstate(all="ignore"):
            return round_to(multiply(a, b), self._dtype)

    def distance(self, xp, spec, operands):
        return _DISTANCE(np, spec, operands).astype(np.float32)


_DISTANCE = reference.distance
ORDERS = 3  # rounding errors are draws of chance: the naive error is the largest of so many


def naive_results(compute, dtype, functions=None):
    """What the naive implementation of `compute(xp) -> {name: array}` gives: one dict for each order of summation."""
    runs = []
    for order in range(ORDERS if dtype == "float32" else 1):
        narrow = NaivePrecision(dtype, order, functions)
        with mock.patch.multiple(reference, np=narrow, distance=narrow.distance), np.errstate(all="ignore"):
            runs.append(compute(narrow))
    return tuple(runs)


@functools.lru_cache(maxsize=4)
def run_naive(case, functions=None):
    """What the naive implementation gives for a case, by the same names: a tuple, see :func:`naive_results`."""
    return naive_results(functools.partial(_results, case, make_inputs(case)), case.dtype, functions)


@functools.lru_cache(maxsize=4)
def naive_lse(case, functions=None):
    """The LSE is float32 whatever the inputs are, and judged as such."""
    if case.dtype == "float32":
        runs = run_naive(case, functions)
    else:
        without_gradients = functools.partial(_results, replace(case, gradients=False), make_inputs(case))
        runs = naive_results(without_gradients, "float32", functions)
    return tuple({"lse": run["lse"]} for run in runs)


def more_draws(case):
    """The case with other random inputs: as many as a fair comparison of rounding errors needs, of few rows many."""
    rows = case.heads[0] * case.heads[1] * case.lengths[0]
    return [replace(case, draw=number) for number in range(1, min(64, max(4, -(-256 // rows))))]


def judge(run, case, functions=None, without=()):
    """Run `case` by `run(case)` and compare, see :func:`assert_matches`; a second look takes more draws."""
    got = {case: run(case)}

    def look(functions, again):
        if again:
            got.update((draw, run(draw)) for draw in more_draws(case))
        return assert_matches(got, functions, without)

    return in_two_looks(look, functions)


def check(engine, case):
    """Run `case` on `engine` (an adapter): right results, or a refusal with exactly the engine's own reason.

    Returns the largest error as a share of what is allowed; 0 for a refusal.
    """
    reason = engine.supports(case.spec)
    if reason is not None:
        with pytest.raises(UnsupportedError) as caught:
            engine.run(case)
        assert str(caught.value) == reason.message(LAYER, engine.name)
        return 0.0
    return judge(engine.run, case, engine.functions)


def assert_matches(got, functions=None, without=()):
    """Compare results by name with the reference, the largest error over all draws of a case.

    Args:
        got: {case: results by name}, the draws of one case.
        functions: those of the naive implementation.
        without: names of results that need not be there (constants have no gradient, mechanisms no LSE).

    Returns:
        The largest error as a share of what is allowed.
    """
    for case, results in got.items():
        want = run_reference(case)
        assert set(want) - set(without) <= set(results) <= set(want)
        dead = np.isneginf(want["lse"])
        for name, what in (("out", "give"), ("query", "have gradient")):
            if name in results:
                assert not np.asarray(results[name])[dead].any(), "a row that sees no key must {} exactly 0".format(
                    what
                )

    def worst(names, naive, dtype, direction):
        draws = [Draw(results, run_reference(case), naive(case, functions)) for case, results in got.items()]
        return assert_part_close(draws, names, dtype, direction)

    case, results = next(iter(got.items()))
    gradients = [name for name in results if name not in ("out", "lse")]
    return max(
        worst([name for name in ("lse",) if name in results], naive_lse, "float32", FORWARD),
        worst([name for name in ("out",) if name in results], run_naive, case.dtype, FORWARD),
        worst(gradients, run_naive, case.dtype, GRADIENTS),
    )


# --- the list --------------------------------------------------------------------------------------
LENGTHS = ((128, 128), (129, 129), (127, 127), (1, 1), (1, 129), (129, 1000), (1000, 127), (1000, 1000))
HEAD_DIMS = (64, 16, 40, 80, 128, 160, 256)
AXES = {
    "lengths": LENGTHS,
    "head_dim": HEAD_DIMS,
    "band": tuple(BANDS),
    "mask": ("none", "dense", "heads", "keys", "rows", "compact"),
    "offset": tuple(OFFSETS) + ("traced", "traced-batch"),
    "heads": ((1, 2, 2), (2, 2, 1), (1, 4, 2), (3, 1, 1)),
    "dtype": DTYPES,
    "bias": ("none", "full", "heads", "keys"),
    "ids": ("none", "segments", "lengths", "int-lengths"),
    "slopes": ("none", "alibi", "alibi-batch"),
    "logits": tuple(LOGITS),
    "dropout": (0.0, 0.1, 0.5),
    "sinks": (False, True),
    "cotangent": (False, True),
    "layout": ("BNSD", "BSND"),
    "gradients": (True, False),
}


def possible(row):
    """Whether a (partial) assignment of axes is a call that exists."""
    lengths = row.get("lengths")
    if row.get("mask") == "compact" and lengths and lengths[0] != lengths[1]:
        return False
    return not (row.get("cotangent") and row.get("gradients") is False)


def pairwise(axes, possible):
    """Rows (dicts) that contain every possible pair of values of any two axes; greedy, the same on every run."""
    names = list(axes)
    missing = {}
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(axes[a], axes[b]):
            if possible({a: x, b: y}):
                missing[a, x, b, y] = None  # a dict keeps the order
    rows = []
    while missing:
        a, x, b, y = next(iter(missing))
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(
                    (value for value in axes[name] if possible(dict(row, **{name: value}))),
                    key=lambda value: sum(
                        (other, row[other], name, value) in missing or (name, value, other, row[other]) in missing
                        for other in row
                    ),
                )
        for one, two in itertools.combinations(names, 2):
            missing.pop((one, row[one], two, row[two]), None)
        rows.append(row)
    return rows


def _ci(name, *tags, **fields):
    return Case(name=name, tags=("ci",) + tags, **fields)


# One feature at a time, so that a failure names its cause; 'graph' is the fixed subset that is compiled as a graph.
SINGLE = [
    _ci("plain", "graph"),
    _ci("plain, fp16", "graph", dtype="float16"),
    _ci("plain, bf16", "graph", dtype="bfloat16", layout="BSND"),
    _ci("one token", "graph", lengths=(1, 1)),
    _ci("causal", "graph", band="causal"),
    _ci("causal, Sq < Sk", band="causal", lengths=(70, 200)),
    _ci("causal, Sq > Sk: dead rows", "graph", band="causal", lengths=(200, 130), cotangent=True),
    _ci("two-sided token window", "graph", band="window", lengths=(300, 300)),
    _ci("one-sided token window", band="left-causal", lengths=(300, 300)),
    _ci("block window", "graph", band="blocks128", lengths=(400, 400)),
    _ci("block window, small blocks", "graph", band="blocks16-causal"),
    _ci("mask", "graph", mask="dense"),
    _ci("float mask a head", mask="heads"),
    _ci("padding mask", mask="keys"),
    _ci("mask with dead rows", "graph", mask="rows", cotangent=True),
    _ci("compact mask", "graph", mask="compact", band="blocks64"),
    _ci("bias", "graph", bias="full"),
    _ci("bias a key", bias="keys"),
    _ci("ALiBi", "graph", slopes="alibi", band="causal"),
    _ci("ALiBi slopes a batch", slopes="alibi-batch"),
    _ci("soft cap", "graph", logits="cap", bias="heads"),
    _ci("scale", logits="scale"),
    _ci("sinks", "graph", sinks=True, cotangent=True),
    _ci("segments", "graph", ids="segments", band="causal"),
    _ci("lengths", "graph", ids="lengths"),
    _ci("int lengths", ids="int-lengths"),
    _ci("offset 0", offset="offset0", band="causal", lengths=(70, 200)),
    _ci("run-time offset", "graph", offset="traced", band="causal", lengths=(70, 200)),
    _ci("run-time offset a batch", offset="traced-batch", band="window"),
    _ci("dropout", "graph", dropout=0.2),
    _ci("LSE cotangent", "graph", cotangent=True, band="causal"),
    _ci("one kv head", "graph", heads=(2, 4, 1), dtype="float16"),
    _ci("large inputs", values="large"),
    _ci("large inputs, bf16", values="large", dtype="bfloat16"),
    _ci("products near 6e4, fp16", values="extreme", logits="plain", dtype="float16", head_dim=64),
    # Forward only: the LSE of such rows, near 7e3, is stored as float32, and exp(score - LSE) inherits its rounding.
    _ci("products near 6e4, fp32", values="extreme", dtype="float32", head_dim=64, gradients=False),
]

# What the benchmarks measure, at lengths that the dense float64 reference can follow.
PRIMARY = [
    Case(name=name, tags=("primary",), **fields)
    for name, fields in {
        "LLM, causal": {"band": "causal", "lengths": (512, 512), "head_dim": 64, "heads": (1, 8, 2)},
        "LLM, fp16": {"band": "causal", "lengths": (512, 512), "head_dim": 128, "heads": (1, 4, 4), "dtype": "float16"},
        "ALiBi, window": {"band": "blocks128", "lengths": (700, 700), "head_dim": 64, "slopes": "alibi"},
        "U-Net self": {"lengths": (1024, 1024), "head_dim": 40, "heads": (1, 4, 4), "dtype": "float16"},
        "U-Net text": {"lengths": (256, 77), "head_dim": 80, "heads": (2, 4, 4), "dtype": "float16"},
        "decode": {"band": "causal", "lengths": (1, 1000), "head_dim": 128, "heads": (2, 8, 2), "dtype": "bfloat16"},
    }.items()
]
PAIRWISE = [Case(tags=("pairwise",), **row) for row in pairwise(AXES, possible)]


def _rest_of_the_grid():
    """Every length x head_dim x heads; the other axes run through their values at different speeds."""
    others = {name: values for name, values in AXES.items() if name not in ("lengths", "head_dim", "heads")}
    grid = itertools.product(LENGTHS, HEAD_DIMS, AXES["heads"])
    for number, (lengths, head_dim, heads) in enumerate(grid):
        row = {"lengths": lengths, "head_dim": head_dim, "heads": heads}
        rng = np.random.default_rng(number)
        for name, values in others.items():
            free = [value for value in values if possible(dict(row, **{name: value}))]
            # Half of the draws leave a feature out, so that rows with few features occur too.
            row[name] = free[0] if name != "dtype" and rng.random() < 0.5 else free[rng.integers(len(free))]
        yield Case(tags=("long",), **row)


CASES = SINGLE + PRIMARY + PAIRWISE + list(_rest_of_the_grid())


def tagged(*tags):
    """Cases that carry any of the tags, in the order of the list."""
    return [case for case in CASES if set(tags) & set(case.tags)]


def random_cases():
    """hypothesis strategy of cases of any sizes up to 300 tokens."""
    from hypothesis import strategies as st

    free = {
        name: st.sampled_from(values) for name, values in AXES.items() if name not in ("lengths", "head_dim", "heads")
    }
    # Half of the draws leave a feature out.
    plain = {"dtype", "band", "layout", "gradients"}
    for name in set(free) - plain:
        free[name] = st.one_of(st.just(AXES[name][0]), free[name])
    heads = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)).map(lambda x: (x[0], x[1] * x[2], x[1]))
    lengths = st.one_of(st.integers(1, 300).map(lambda n: (n, n)), st.tuples(st.integers(1, 300), st.integers(1, 300)))
    cases = st.builds(Case, lengths=lengths, head_dim=st.integers(1, 96), heads=heads, **free)
    return cases.filter(lambda case: possible({name: getattr(case, name) for name in AXES}))


def random_settings(count):
    """hypothesis settings for `count` random cases. A failure is reported as drawn: shrinking compiles for minutes."""
    from hypothesis import HealthCheck, Phase, settings

    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
