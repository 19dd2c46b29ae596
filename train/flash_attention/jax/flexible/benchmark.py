"""run_attention_benchmarks: time, memory and error of mechanisms side by side, compiled and interleaved."""

import dataclasses
import statistics
import time
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core import reference
from flash_attention.core.errors import UnsupportedError, invalid_value
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention.jax.distributed.mesh import make_mesh
from flash_attention.jax.flexible.metadata import AttentionMetadata
from flash_attention.jax.flexible.registry import AttentionRegistry

LAYER = "run_attention_benchmarks"
TENSORS = ("out", "query", "key", "value")


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
    """One mechanism at one size. What was not measured is None.

    Attributes:
        mechanism, batch_size, sequence_length: what ran.
        status: 'passed', 'FAILED' (beyond the tolerance), 'not judged' (it computes something else by design), or
            'refused'; error: the reason of a refusal.
        mean_s, std_s: seconds a call (forward, or forward and backward), over the rounds.
        tokens_per_s: batch_size * sequence_length / mean_s.
        memory_bytes: temporaries and results of the compiled program, a device.
        difference, dq, dk, dv: largest elementwise difference of output and gradients from float64.
    """

    mechanism: str
    batch_size: int
    sequence_length: int
    status: str
    error: str = ""
    mean_s: Optional[float] = None
    std_s: Optional[float] = None
    tokens_per_s: Optional[float] = None
    memory_bytes: Optional[int] = None
    difference: Optional[float] = None
    dq: Optional[float] = None
    dk: Optional[float] = None
    dv: Optional[float] = None


class BenchmarkTable:
    """The rows; ``print`` shows them as text, :meth:`plot` as a figure."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        names = [field.name for field in dataclasses.fields(BenchmarkRow)]
        lines = [names] + [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    def plot(self, path):
        """Write milliseconds a call over sequence length, a line a mechanism, as an image; needs matplotlib."""
        from matplotlib.figure import Figure

        axes = Figure(figsize=(7, 4)).subplots()
        lines = {}
        for row in self.rows:
            if row.mean_s is not None:
                label = "{} (batch {})".format(row.mechanism, row.batch_size)
                lines.setdefault(label, []).append((row.sequence_length, 1e3 * row.mean_s))
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=label)
        axes.set(xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
        if lines:
            axes.legend(fontsize=7)
        axes.figure.savefig(path)


def _cell(value):
    if value is None:
        return "-"
    return "{:.3g}".format(value) if isinstance(value, float) else str(value)


class _Size(NamedTuple):
    """One problem: sizes, dtype and what is computed."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    gradients: bool


def run_attention_benchmarks(
    batch_sizes=None,
    sequence_lengths=None,
    attention_types=None,
    *,
    axis_dims=(1, -1, 1, 1),
    batch_size=None,
    sequence_length=None,
    test_attentions=None,
    num_attention_heads=8,
    num_key_value_heads=None,
    head_dim=64,
    chunk_size=None,
    blocksize_q=None,
    blocksize_k=None,
    dtype=jnp.float32,
    calculate_gradients=True,
    rounds=5,
):
    """Measure causal attention by several mechanisms.

    Each call is compiled, waited for, and timed in rounds that take the mechanisms in turn. Errors are judged against
    float64 on the first batch row and the first group of heads, by the rule of the documentation: at most twice the
    error of 'vanilla', or 4 units of the dtype's precision times the largest value.

    Args:
        batch_sizes, sequence_lengths: sizes to run, default (1, 2, 4, 8) and (512, 1024, 2048);
            ``batch_size``, ``sequence_length``: the same for a single size.
        attention_types: names, default every registered one; ``test_attentions`` is the same argument.
        axis_dims: the mesh ("dp", "fsdp", "tp", "sp") of all devices; one size may be -1.
        num_attention_heads, num_key_value_heads, head_dim: N, K (default N), D.
        blocksize_q, blocksize_k: tile of 'blockwise'; ``chunk_size`` sets both.
        dtype: of the tensors.
        calculate_gradients: backward too.
        rounds: how often each is timed.

    Returns:
        :class:`BenchmarkTable`.
    """
    batches = _either("batch_sizes", batch_sizes, "batch_size", batch_size, (1, 2, 4, 8))
    lengths = _either("sequence_lengths", sequence_lengths, "sequence_length", sequence_length, (512, 1024, 2048))
    names = _either("attention_types", attention_types, "test_attentions", test_attentions, None)
    names = AttentionRegistry.list_implementations() if names is None else names
    if chunk_size is not None and (blocksize_q is not None or blocksize_k is not None):
        raise invalid_value(LAYER, "chunk_size", "left out when blocksize_q or blocksize_k is given", chunk_size)
    metadata = AttentionMetadata(
        mesh=make_mesh(axis_dims),
        blocksize_q=blocksize_q or chunk_size or ...,
        blocksize_k=blocksize_k or chunk_size or ...,
    )
    kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
    rows = []
    for batch in batches:
        for length in lengths:
            size = _Size(
                batch, length, num_attention_heads, kv_heads, head_dim, jnp.dtype(dtype).name, calculate_gradients
            )
            rows += _run(size, names, metadata, rounds)
    return BenchmarkTable(rows)


def _either(name, value, alias, other, default):
    if other is not None:
        if value is not None:
            raise invalid_value(
                LAYER, alias, "left out when {} is given (they are the same argument)".format(name), other
            )
        return other if isinstance(other, (list, tuple)) else (other,)
    return default if value is None else value


def _draws(size):
    rng = np.random.default_rng(0)
    heads = (size.heads, size.kv_heads, size.kv_heads, size.heads)
    return [
        jnp.asarray(rng.standard_normal((size.batch, size.length, n, size.head_dim), np.float32), size.dtype)
        for n in heads
    ]


def _function(impl, gradients):
    def attend(query, key, value):
        return impl(query, key, value, is_causal=True).attention_outputs

    def both(query, key, value, d_out):
        out, pullback = jax.vjp(attend, query, key, value)
        return (out, *pullback(d_out))

    return both if gradients else lambda query, key, value, d_out: (attend(query, key, value),)


def _run(size, names, metadata, rounds):
    inputs = _draws(size)
    compiled, refused = {}, {}
    for name in names:
        impl = AttentionRegistry.create(name, metadata)
        try:
            compiled[name] = jax.jit(_function(impl, size.gradients)).lower(*inputs).compile()
        except UnsupportedError as error:
            refused[name] = BenchmarkRow(name, size.batch, size.length, "refused", str(error))
    results = {name: jax.block_until_ready(run(*inputs)) for name, run in compiled.items()}
    times = {name: [] for name in compiled}
    for turn in range(rounds):
        order = list(compiled)[turn % max(len(compiled), 1) :] + list(compiled)[: turn % max(len(compiled), 1)]
        for name in order:
            begin = time.perf_counter()
            jax.block_until_ready(compiled[name](*inputs))
            times[name].append(time.perf_counter() - begin)
    judge = _Judge(size, inputs, metadata)
    rows = dict(refused)
    for name, run in compiled.items():
        mean, memory = statistics.mean(times[name]), run.memory_analysis()
        differences = judge.differences(results[name])
        rows[name] = BenchmarkRow(
            name,
            size.batch,
            size.length,
            judge.status(differences) if AttentionRegistry.get(name).exact else "not judged",
            mean_s=mean,
            std_s=statistics.pstdev(times[name]),
            tokens_per_s=size.batch * size.length / mean,
            memory_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes,
            **dict(zip(("difference", "dq", "dk", "dv"), differences)),
        )
    return [rows[name] for name in names]


class _Judge:
    """Float64 results of the first batch row and the first group of heads, and what errors they allow."""

    def __init__(self, size, inputs, metadata):
        group = size.heads // size.kv_heads
        self.heads = (group, group, 1, 1)  # of out and dq, dk, dv
        sample = [np.asarray(x[:1, :, :n], np.float64) for x, n in zip(inputs, (group, 1, 1, group))]
        q, k, v, d_out = (x.swapaxes(1, 2) for x in sample)
        spec = AttentionSpec(1, group, 1, size.length, size.length, size.head_dim, "float64", causal=True)
        want = [reference.attention(np, spec, q, k, v)[0]]
        if size.gradients:
            grads = reference.attention_grad(spec, q, k, v, Operands(), d_out)
            want += [grads[name] for name in TENSORS[1:]]
        self.want = [x.swapaxes(1, 2) for x in want]
        vanilla = _function(AttentionRegistry.create("vanilla", metadata), size.gradients)
        naive = self.differences(vanilla(*(jnp.asarray(x, size.dtype) for x in sample)))
        eps = float(jnp.finfo(size.dtype).eps)
        self.allowed = [max(2 * error, 4 * eps * np.abs(x).max()) for error, x in zip(naive, self.want)]

    def differences(self, results):
        """Largest elementwise difference of each tensor."""
        parts = (np.asarray(x[:1, :, :n], np.float64) for x, n in zip(results, self.heads))
        return [float(np.abs(x - want).max()) for x, want in zip(parts, self.want)]

    def status(self, differences):
        """'passed' or 'FAILED'."""
        return "passed" if all(x <= limit for x, limit in zip(differences, self.allowed)) else "FAILED"
