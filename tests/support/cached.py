"""Properties of cached attention, once for both frameworks: however a sequence is cut into steps, its outputs are those
of one causal forward over all of it.

The judge is `core.reference` in float64 on what the cache holds (rounded to its dtype, or quantised).
"""

import functools
from typing import NamedTuple, Optional

import numpy as np
import pytest
from support.judge import check

from conformance import round_to
from flash_attention.core import reference
from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.spec import AttentionSpec, Operands
from flash_attention_infer.core import OutOfBlocksError, StaleSequenceError
from flash_attention_infer.core.quantize import dequantize, quantize

D, BLOCK = 16, 4


class Case(NamedTuple):
    """One attention over one cache.

    Attributes:
        kind: 'contiguous', 'paged' or 'sliding'; held: dtype of the cache, None = that of the call.
        sink_tokens: of a sliding cache, whose window is ``window``.
        blocks: blocks of ``BLOCK`` tokens before its own that a query sees; not in a sliding cache.
    """

    name: str
    kind: str = "paged"
    heads: int = 4
    kv_heads: int = 2
    window: Optional[int] = None
    sink_tokens: int = 0
    alibi: bool = False
    soft_cap: Optional[float] = None
    sinks: bool = False
    scale: Optional[float] = None
    dtype: str = "float32"
    held: Optional[str] = None
    blocks: Optional[int] = None

    def options(self, array):
        """Keywords of prefill and decode; `array` makes the framework's arrays."""
        found = {"scale": self.scale, "logits_soft_cap": self.soft_cap}
        if self.window is not None and self.kind != "sliding":
            found["local_window_size"] = (self.window, 0)
        if self.blocks is not None:
            found.update(prev_block_num=self.blocks, block_size=BLOCK)
        if self.alibi:
            found["alibi_slopes"] = array(alibi_slopes(self.heads), "float32")
        if self.sinks:
            found["sinks"] = array(sink_logits(self), "float32")
        return found


FEATURES = {
    "plain": {},
    "one kv head": {"kv_heads": 1},
    "a head each": {"kv_heads": 4, "scale": 0.3},
    "ALiBi": {"alibi": True},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "window": {"window": 9},
    "blocks": {"blocks": 1},
    "everything": {"window": 9, "alibi": True, "soft_cap": 3.0, "sinks": True},
}
KINDS = ("contiguous", "paged", "sliding")


def cases(kinds=KINDS, dtypes=("float32",)):
    """Every feature in every kind of cache; a sliding one always has a window, and sink tokens every second time."""
    found = []
    for dtype in dtypes:
        for kind in kinds:
            for n, (name, fields) in enumerate(FEATURES.items()):
                if kind == "sliding" and "blocks" in fields:
                    continue
                if kind == "sliding":
                    fields = dict(fields, window=fields.get("window", 12), sink_tokens=3 * (n % 2))
                found.append(Case("{}, {}, {}".format(kind, name, dtype), kind, dtype=dtype, **fields))
    return found


ALL = dict(FEATURES["everything"])
FAST = [
    Case("contiguous, everything", "contiguous", **ALL),
    Case("paged, everything", "paged", blocks=2, **ALL),  # 8 to 11 tokens before, beside a window of 9
    Case("sliding, everything", "sliding", sink_tokens=3, **ALL),
    Case("paged, int8", "paged", held="int8"),
]


def fast(*numbers):
    """`parametrize` over FAST in which the other cases are slow."""
    slow = pytest.mark.slow
    params = [pytest.param(case, marks=() if n in numbers else slow) for n, case in enumerate(FAST)]
    return pytest.mark.parametrize("case", params, ids=lambda case: case.name)


@functools.lru_cache(maxsize=8)
def tensors(case, length, batch=2):
    """query (B, S, N, D), key, value (B, S, K, D), float32, exact in the case's dtype."""
    rng = np.random.default_rng(length)
    shapes = [(batch, length, heads, D) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    return [round_to(rng.standard_normal(shape).astype(np.float32), case.dtype) for shape in shapes]


def sink_logits(case):
    return np.random.default_rng(9).standard_normal(case.heads).astype(np.float32)


def held(x, dtype):
    """What a cache of `dtype` gives back of `x`."""
    return dequantize(np, *quantize(np, x)) if dtype == "int8" else round_to(x, dtype)


def full(xp, case, length, given=None):
    """The judge: {"out": (B, S, N, D)} of one causal forward over `given` tensors, None = those of the case."""
    query, key, value = given or tensors(case, length)
    key, value = (round_to(held(x, case.held or case.dtype), case.dtype) for x in (key, value))
    query, key, value = (np.asarray(x.swapaxes(1, 2), xp.float64) for x in (query, key, value))
    i, j = np.ogrid[:length, :length]
    mask = i >= j
    if case.window is not None:
        mask = mask & ((i - j <= case.window) | (j < case.sink_tokens))
    if case.blocks is not None:
        mask = mask & (i // BLOCK - j // BLOCK <= case.blocks)
    spec = AttentionSpec(
        len(query), case.heads, case.kv_heads, length, length, D, scale=case.scale, mask_shape=(1, 1) + mask.shape,
        alibi_shape=(case.heads,) if case.alibi else None, soft_cap=case.soft_cap, sinks=case.sinks,
    )  # fmt: skip
    operands = Operands(
        mask=mask[None, None],
        slopes=alibi_slopes(case.heads).astype(xp.float64) if case.alibi else None,
        sinks=sink_logits(case).astype(xp.float64) if case.sinks else None,
    )
    return {"out": reference.attention(xp, spec, query, key, value, operands)[0].swapaxes(1, 2)}


class Cached:
    """A framework gives `functions`, `KVCache`, `array(x, dtype)`, `numpy(x)`; `splits` for decoding."""

    exps, block_size = 1, 4

    def make(self, case, length, batch=2, lookahead=0, **options):
        """A cache for `batch` sequences of `length` tokens (paged: forks of them too)."""
        sizes = (case.kv_heads, D)
        options["dtype"] = case.held or case.dtype
        if case.kind == "paged":
            blocks = 2 * batch * -(-length // self.block_size)
            return self.KVCache.paged(2, blocks, *sizes, block_size=self.block_size, **options)
        if case.kind == "contiguous":
            return self.KVCache.contiguous(2, batch, length, *sizes, **options)
        return self.KVCache.sliding(2, batch, case.window, *sizes, case.sink_tokens, lookahead, **options)

    def poison(self, cache):
        """Fill every pool with NaN (int8: 127, with NaN scales): what nobody has written must not matter."""
        raise NotImplementedError

    def attend(self, cache, case, ids, starts, counts, rows=None, decode=False, guess=None, **more):
        """One step in layer 1 of 2: numpy (B, T, N, D). `guess` is the number of right tokens, the others are noise."""
        rows = range(len(ids)) if rows is None else rows
        query, key, value = tensors(case, self.length)
        with cache.step(ids, counts) as step:
            padded = [np.full((len(ids), step.tokens) + x.shape[2:], 7.0, np.float32) for x in (query, key, value)]
            for b, row in enumerate(rows):
                for x, y in zip((query, key, value), padded):
                    new = x[row, starts[b] : starts[b] + (counts[b] if guess is None else guess)]
                    y[b, : len(new)] = new
            call = cache.decode if decode else cache.prefill
            return self.numpy(
                call(1, step, *(self.array(x, case.dtype) for x in padded), **case.options(self.array), **more)
            )

    def run(self, case, length, plan, lookahead=0, poison=True, **more):
        """Outputs of two sequences by a plan: a list of (counts, decode, guess)."""
        self.length = length
        cache = self.make(case, length + 8, lookahead=lookahead)
        if poison:
            self.poison(cache)
        ids, got = cache.add(2), np.zeros((2, length, case.heads, D), np.float32)
        for counts, decode, guess in plan:
            starts = [cache.length(one) for one in ids]
            out = self.attend(cache, case, ids, starts, counts, decode=decode, guess=guess, **(more if decode else {}))
            for b, one in enumerate(ids):
                good = counts[b] if guess is None else min(guess, counts[b])
                if good < counts[b]:
                    cache.truncate(one, starts[b] + good)
                got[b, starts[b] : starts[b] + good] = out[b, :good]
                assert not out[b, counts[b] :].any(), "padding gives 0"
        assert [cache.length(one) for one in ids] == [length, length]
        return {"out": got}

    def check_plan(self, case, length, plan, **more):
        got = self.run(case, length, plan, **more)
        check(got, functools.partial(full, case=case, length=length), case.dtype, self.functions, exps=self.exps)

    # --- plans ------------------------------------------------------------------------------------
    @staticmethod
    def one_by_one(length, first=1):
        """A prefill of `first` tokens, then one token at a time."""
        return [([first] * 2, False, None)] + [([1, 1], True, None)] * (length - first)

    @staticmethod
    def ragged(length):
        """Chunks and single tokens mixed: sequence 0 runs ahead of sequence 1, which catches up."""
        a, b = length // 2, length // 3
        return [
            ([a, b], False, None),
            ([1, length // 4], False, None),
            ([0, 3], True, None),
            ([length - a - 1, length - b - length // 4 - 3], False, None),
        ]

    @staticmethod
    def speculative(length, right=2, guessed=4):
        """Guesses of which some are right; `length` is 1 + a multiple of `right`."""
        return [([1, 1], False, None)] + [([guessed, guessed], True, right)] * ((length - 1) // right)

    # --- properties -------------------------------------------------------------------------------
    @fast(0)
    def test_token_by_token(self, case):
        self.check_plan(case, 15, self.one_by_one(15, first=8))

    @fast(3)
    def test_ragged_chunks(self, case):
        self.check_plan(case, 40, self.ragged(40))

    @fast(2)
    def test_speculation(self, case):
        self.check_plan(case, 13, self.speculative(13), lookahead=4)

    @fast(1)
    def test_splits_of_the_keys(self, case):
        """The keys of a ring are not split."""
        splits = {} if case.kind == "sliding" else {"num_splits": 2 if case.kind == "paged" else 5}
        self.check_plan(case, 17, self.one_by_one(17, first=15), **splits)

    def test_forks_share_until_they_write(self):
        case, self.length = FAST[1], 24
        cache = self.make(case, 24)
        parent = cache.add()
        self.attend(cache, case, [parent], [0], [10])
        held = cache.free_blocks
        child = cache.fork(parent)
        assert cache.free_blocks == held, "a fork holds no block of its own"
        got = np.zeros((2, 24, case.heads, D), np.float32)
        query, key, value = tensors(case, 24)
        for start in range(10, 24):  # the child goes on as row 1, the parent as row 0
            got[:, start] = self.attend(cache, case, [parent, child], [start] * 2, [1, 1], rows=[0, 1], decode=True)[
                :, 0
            ]
        want = full(np, case, 24)["out"]
        np.testing.assert_allclose(got[0, 10:], want[0, 10:], atol=2e-5)
        # row 1 after the first ten tokens of row 0
        mixed = [np.concatenate([x[0, :10], x[1, 10:]])[None] for x in (query, key, value)]
        want = full(np, case, 24, mixed)["out"]
        np.testing.assert_allclose(got[1, 10:], want[0, 10:], atol=2e-5)

    def test_a_failed_step_leaves_no_trace(self):
        case, self.length = FAST[1], 12
        cache = self.make(case, 12)
        ids = cache.add(2)
        self.attend(cache, case, ids, [0, 0], [5, 5])
        before = cache.free_blocks
        with pytest.raises(KeyError, match="stop"):
            with cache.step(ids, [7, 3]) as step:
                assert step.lengths.tolist() == [12, 8]
                raise KeyError("stop")
        assert [cache.length(one) for one in ids] == [5, 5] and cache.free_blocks == before
        out = self.attend(cache, case, ids, [5, 5], [7, 7])
        np.testing.assert_allclose(out, full(np, case, 12)["out"][:, 5:], atol=2e-5)
        cache.free(ids)
        with pytest.raises(StaleSequenceError, match="has been freed"), cache.step(ids, [1, 1]):
            pass

    def error_after(self, cache, call, prefilled=32768, chunk=2048, decoded=64, **options):
        """Chunks, then single tokens: error against the last rows of `call(q, k, v)`, one forward."""
        rng, length = np.random.default_rng(3), prefilled + decoded
        q, k, v = (rng.standard_normal((1, length, heads, 64)).astype(np.float32) for heads in (2, 1, 1))
        one, outs, start = cache.add(), [], 0
        for count in [chunk] * (prefilled // chunk) + [1] * decoded:
            with cache.step([one], [count]) as step:
                new = (self.array(x[:, start : start + count], "float32") for x in (q, k, v))
                out = (cache.prefill if count > 1 else cache.decode)(0, step, *new, **options)
            outs.append(self.numpy(out) if count == 1 else None)
            start += count
        want = self.numpy(call(*(self.array(x, "float32") for x in (q, k, v))))[:, -decoded:]
        return np.abs(np.concatenate(outs[-decoded:], 1) - want).max()

    def test_refuses(self):
        case, self.length = FAST[1], 12
        cache = self.make(case, 4)  # 4 blocks of 4
        one = cache.add()
        with pytest.raises(OutOfBlocksError, match="at most 16 tokens, but got 17"), cache.step([one], [17]):
            pass
        query, key, value = (self.array(x[:1, :3], "float32") for x in tensors(case, 12))
        with cache.step([one], [3]) as step:
            with pytest.raises(ValueError, match=r"'query' must be of shape \(1, 3, a multiple of 2, 16\)"):
                cache.prefill(0, step, query[:, :2], key, value)
            with pytest.raises(ValueError, match=r"'value' must be of shape \(1, 3, 2, 16\)"):
                cache.prefill(0, step, query, key, value[..., :4])
            with pytest.raises(ValueError, match="'num_splits' must be a divisor of the 4 places"):
                cache.decode(0, step, query, key, value, num_splits=3)
            with pytest.raises(ValueError, match="'num_splits' must be such that parts are whole blocks of 4"):
                cache.decode(0, step, query, key, value, num_splits=2, prev_block_num=1, block_size=4)
        ring = self.make(Case("", "sliding", window=6), 12)
        with ring.step([ring.add()], [3]) as step:
            with pytest.raises(ValueError, match="'local_window_size' must be None or the ring's window 6, but got 5"):
                ring.prefill(0, step, query, key, value, local_window_size=5)
            with pytest.raises(ValueError, match="'num_splits' must be 1 with a ring"):
                ring.decode(0, step, query, key, value, num_splits=2)
            with pytest.raises(ValueError, match="'prev_block_num' must be 65536 with a ring .*, but got 1"):
                ring.prefill(0, step, query, key, value, prev_block_num=1)
        with pytest.raises(ValueError, match="'dtype' must be one of .*, but got 'int4'"):
            self.make(Case("", held="int4"), 12)
