"""`python -m flash_attention check`: every engine of every installed framework against the numpy float64 reference.

Needs numpy and at least one of MindSpore and JAX. Each cell of the table is the error as a share of what is allowed,
forward / gradients; a share above 1 fails the check.
"""

import importlib
import time
from dataclasses import replace
from typing import Callable, NamedTuple

import numpy as np

from flash_attention.core import reference
from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.spec import KEYWORDS, AttentionSpec, Operands
from flash_attention.tools.bench.cases import round_to
from flash_attention.tools.frontends import FRONT_ENDS
from flash_attention.tools.table import format_table, progress

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
ALLOWED = 16.0  # times eps times the largest reference value: room for a framework's own exp, none for a mistake
DIRECTIONS = ("forward", "backward")


class CheckCase(NamedTuple):
    """A small call: its spec, and its operands by their public keywords."""

    name: str
    spec: AttentionSpec
    tensors: dict

    def options(self):
        """The spec's plain options under the names of the functional call."""
        spec = self.spec
        return {
            "scale": spec.scale,
            "is_causal": spec.causal,
            "local_window_size": spec.local_window_size,
            "prev_block_num": spec.prev_block_num,
            "next_block_num": spec.next_block_num,
            "block_size": spec.block_size,
            "logits_soft_cap": spec.soft_cap,
            "dropout_rate": spec.dropout_rate,
            "q_offset": spec.q_offset,
        }


def cases():
    """The calls that are checked: about one for each feature and dtype, S <= 200."""
    base = AttentionSpec(batch=2, heads=4, kv_heads=4, q_len=160, kv_len=160, head_dim=32)
    rng = np.random.default_rng(1)
    mask = rng.random((2, 1, 160, 160)) < 0.6
    mask[:, :, 7] = False  # a dead row
    ids = np.repeat(np.arange(4, dtype=np.int32), 40)[None].repeat(2, axis=0)
    lengths = np.array([160, 97], np.int32)
    bias = rng.standard_normal((1, 4, 160, 160)).astype(np.float32)
    blocks = {"prev_block_num": 2, "next_block_num": 0, "block_size": 32}

    def case(name, tensors=None, **changes):
        return CheckCase(name, replace(base, q_offset=None, **changes), tensors or {})

    segments = {"q_segment_ids": ids, "kv_segment_ids": ids}
    limits = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return [
        case("plain"),
        case("causal float16", causal=True, dtype="float16"),
        case("causal bfloat16", causal=True, dtype="bfloat16"),
        case("ragged, head_dim 40", causal=True, q_len=129, kv_len=129, head_dim=40),
        case("Sq < Sk, grouped heads", causal=True, kv_heads=2, q_len=40, kv_len=200),
        case("Sq > Sk: dead rows", causal=True, q_len=200, kv_len=130),
        case("token window", local_window_size=(33, 5)),
        case("block window, ALiBi", {"alibi_slopes": alibi_slopes(4)}, alibi_shape=(4,), **blocks),
        case("mask with a dead row, bias", {"mask": mask, "bias": bias}, mask_shape=mask.shape, bias_shape=bias.shape),
        case("segments, lengths", dict(segments, **limits), segments=True, q_lengths=True, kv_lengths=True),
        case("soft cap and sinks", {"sinks": rng.standard_normal(4).astype(np.float32)}, soft_cap=5.0, sinks=True),
        case("dropout", {"dropout_seed": 7}, causal=True, dropout_rate=0.2),
    ]


def inputs(case):
    """query, key, value, d_out as float32 numpy (BNSD), exact in the case's dtype."""
    spec, rng = case.spec, np.random.default_rng(2)
    kv = (spec.batch, spec.kv_heads, spec.kv_len, spec.head_dim)
    q = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
    return [round_to(rng.standard_normal(shape).astype(np.float32), spec.dtype) for shape in (q, kv, kv, q)]


def truth(case, arrays):
    """Float64 ``{'forward': {...}, 'backward': {...}}`` of a case."""
    query, key, value, d_out = (x.astype(np.float64) for x in arrays)
    operands = Operands(**{KEYWORDS[name]: x for name, x in case.tensors.items()})
    if operands.dropout_seed is not None:
        operands = operands._replace(dropout_seed=np.uint32(operands.dropout_seed))
    out, lse = reference.attention(np, case.spec, query, key, value, operands)
    grads = reference.attention_grad(case.spec, query, key, value, operands, d_out)
    return {"forward": {"out": out, "lse": lse}, "backward": {name: grads[name] for name in ("query", "key", "value")}}


def share(case, want, got):
    """Largest error of ``got`` as a share of the allowed one; infinite where values are not finite as they should."""
    worst = 0.0
    for name, value in want.items():
        found = np.asarray(got[name], np.float64)
        dead = np.isneginf(value)
        if found.shape != value.shape or not np.array_equal(np.isneginf(found), dead):
            return float("inf")
        difference = np.abs(np.where(dead, 0, found) - np.where(dead, 0, value)).max()
        largest = np.abs(np.where(dead, 0, value)).max()
        worst = max(worst, float(difference / (ALLOWED * EPS[case.spec.dtype] * largest)))
        if np.isnan(difference):
            return float("inf")
    return worst


class Runner(NamedTuple):
    """An engine that can be asked for results: ``run(case, arrays)`` gives dicts like :func:`truth`."""

    name: str
    reason: Callable
    run: Callable


def runners():
    """Runners of every engine that takes at least one case, and lines about what is left out."""
    found, left_out = [], []
    for front_end in FRONT_ENDS:
        if front_end.missing():
            left_out.append("{}: {}".format(front_end.name, front_end.missing()))
            continue
        run = {"JAX": run_jax, "MindSpore": run_mindspore}[front_end.name]
        for engine in front_end.engines():
            reasons = [engine.supports(case.spec) for case in cases()]
            name = "{} {}".format(front_end.name, engine.name)
            if all(reasons):
                left_out.append("{}: {}".format(name, reasons[0]))
            else:
                found.append(Runner(name, engine.supports, _bound(run, engine.name)))
    return found, left_out


def _bound(run, engine):
    return lambda case, arrays: run(engine, case, arrays)


def run_jax(engine, case, arrays):
    """Results of a JAX engine."""
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    call = importlib.import_module("flash_attention.jax").flash_attention
    query, key, value, d_out = (jnp.asarray(x, getattr(jnp, case.spec.dtype)) for x in arrays)

    def attend(query, key, value):
        options = dict(case.options(), **case.tensors)
        return call(query, key, value, layout="BNSD", return_lse=True, implementation=engine, **options)

    def both(query, key, value, d_out):
        (out, lse), pullback = jax.vjp(attend, query, key, value)
        return out, lse, pullback((d_out, jnp.zeros_like(lse)))

    out, lse, grads = jax.jit(both)(query, key, value, d_out)
    names = ("query", "key", "value")
    return {
        "forward": {"out": out.astype(jnp.float32), "lse": lse},
        "backward": {name: np.asarray(x.astype(jnp.float32)) for name, x in zip(names, grads)},
    }


def run_mindspore(engine, case, arrays):
    """Results of a MindSpore engine, PyNative mode."""
    ms = importlib.import_module("mindspore")
    call = importlib.import_module("flash_attention.ops").flash_attention
    dtype = getattr(ms, case.spec.dtype)
    query, key, value, d_out = (ms.Tensor(x).astype(dtype) for x in arrays)
    tensors = {name: ms.Tensor(x) if isinstance(x, np.ndarray) else x for name, x in case.tensors.items()}
    options = dict(case.options(), layout="BNSD", engine=engine, **tensors)

    def attend(query, key, value):
        return call(query, key, value, **options)

    out, lse = call(query, key, value, return_lse=True, **options)
    grads = ms.ops.GradOperation(get_all=True, sens_param=True)(attend)(query, key, value, d_out)
    names = ("query", "key", "value")
    return {
        "forward": {"out": out.astype(ms.float32).asnumpy(), "lse": lse.asnumpy()},
        "backward": {name: x.astype(ms.float32).asnumpy() for name, x in zip(names, grads)},
    }


def add_arguments(parser):
    """`check` takes none."""
    del parser


def run(args):
    """Print the table; returns 0 when every engine agrees with the reference, else 1."""
    del args
    begin = time.monotonic()
    found, left_out = runners()
    rows, failures = [], []
    bar = progress(len(cases()), "check")
    for case in cases():
        bar.set_postfix_str(case.name)
        arrays = inputs(case)
        want = truth(case, arrays)
        rows.append([case.name] + [_cell(runner, case, arrays, want, failures) for runner in found])
        bar.update()
    bar.close()
    print(format_table(["case: error / allowed, forward  gradients"] + [runner.name for runner in found], rows))
    for line in left_out:
        print("left out  {}".format(line))
    for line in failures:
        print("FAILED    {}".format(line))
    verdict = "{} of {} engines checked agree".format(len(found) - len({f.split(":")[0] for f in failures}), len(found))
    print("{} with the float64 reference ({:.0f} s)".format(verdict, time.monotonic() - begin))
    return 1 if failures or not found else 0


def _cell(runner, case, arrays, want, failures):
    """One cell of the table; what is wrong goes to ``failures``."""
    reason = runner.reason(case.spec)
    if reason is not None:
        return "refused ({})".format(reason.argument)
    try:
        got = runner.run(case, arrays)
    except Exception as error:  # an engine that breaks is a finding, not the end of the check
        text = str(error).strip().split("\n")[0]
        failures.append("{}: {}: {}: {}".format(runner.name, case.name, type(error).__name__, text))
        return "error"
    shares = {direction: share(case, want[direction], got[direction]) for direction in DIRECTIONS}
    if max(shares.values()) > 1:
        failures.append("{}: {}: error above what is allowed: {}".format(runner.name, case.name, shares))
    return "{:.2f}  {:.2f}".format(shares["forward"], shares["backward"])
