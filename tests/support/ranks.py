"""MindSpore's attention over several processes: each rank compares its share with one process's call.

msrun ... ranks.py FOLDER MODE CASE ...   (`test_context_mindspore.py` starts it; rank r writes {case: errors} to
                                           FOLDER/r.json)

MODE is that of what is tested; one process's results are always computed in PyNative, where nothing is compiled.
"""

import json
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init
from support.in_mindspore import mode

from flash_attention.nn import DilatedAttention, FlashAttention, RingAttention, UlyssesAttention, dilated_attention
from flash_attention.ops.collectives import choose, current_group

B, D = 2, 8
CELLS = {"ring": RingAttention, "ulysses": UlyssesAttention}


def _case(strategy, length, heads=(4, 2), kv_length=None, mask=None, dtype="float32", seed=None, **options):
    """length: tokens of all ranks; heads: (N, Nkv); mask: its shape, of all ranks' rows."""
    return strategy, length, heads, kv_length or length, mask, dtype, seed, options


CAUSAL, DROPOUT = {"causal": True}, {"dropout_rate": 0.3, "seed": 7}
CASES = {
    # 24 queries a rank are two chunks of 12: zig-zag; everything that counts on global indices at once
    "ring, causal, ALiBi, dropout": _case("ring", 48, alibi=True, **CAUSAL, **DROPOUT),
    "ring, window across borders": _case("ring", 60, local_window_size=(9, 2)),
    "ulysses, causal, ALiBi, dropout": _case("ulysses", 44, alibi=True, **CAUSAL, **DROPOUT),
}
SLOW_CASES = {
    "ring, dense": _case("ring", 40),
    "ring, causal, odd shares": _case("ring", 52, **CAUSAL),  # 13 tokens on each of 4: contiguous
    "ring, causal, window": _case("ring", 64, local_window_size=(20, 0), **CAUSAL),
    "ring, several tiles": _case("ring", 1200, heads=(2, 1), **CAUSAL),
    "ring, blocks": _case("ring", 64, prev_block_num=2, next_block_num=0, block_size=4),
    "ring, blocks, causal, zig-zag": _case("ring", 64, next_block_num=0, block_size=4, **CAUSAL),
    "ring, rows of a mask": _case("ring", 48, mask=(B, 1, 48, 48), **CAUSAL),
    "ring, keys of a mask": _case("ring", 48, mask=(B, 1, 1, 48)),
    "ring, fewer queries than keys": _case("ring", 16, kv_length=48, **CAUSAL),
    "ring, fp16": _case("ring", 48, dtype="float16", **CAUSAL),
    "ring, multi-query": _case("ring", 48, heads=(3, 1), alibi=True, **CAUSAL),
    "ulysses, gathered kv heads": _case("ulysses", 44, heads=(8, 1), **CAUSAL),
    "ulysses, kv heads that are shared": _case("ulysses", 44, heads=(12, 3), **CAUSAL),
    "ulysses, rows and heads of a mask": _case("ulysses", 48, mask=(1, 4, 48, 48), local_window_size=(20, 20)),
}  # fmt: skip


class _Weighted(nn.Cell):
    def __init__(self, cell, seed):
        super().__init__()
        self.cell, self.seed = cell, seed

    def construct(self, query, key, value, mask, d_out, d_lse):
        out, lse = self.cell(query, key, value, mask, dropout_seed=self.seed)
        seen = ops.where(lse > -3e38, lse, ops.zeros_like(lse))
        return (out.astype(ms.float32) * d_out).sum() + (seen * d_lse).sum(), out, lse


class _Results(nn.Cell):
    def __init__(self, cell, seed):
        super().__init__()
        self.of = ops.value_and_grad(_Weighted(cell, seed), (0, 1, 2), None, has_aux=True)

    def construct(self, *tensors):
        (_, out, lse), grads = self.of(*tensors)
        return (out, lse) + grads


def results(cell, seed, tensors):
    """[out, lse, d_query, d_key, d_value] as float64."""
    cell.set_train()
    return [x.astype(ms.float32).asnumpy().astype(np.float64) for x in _Results(cell, seed)(*tensors)]


def results_of_one(cell, seed, tensors):
    """The same of a Cell that computes all ranks' tokens."""
    with mode("pynative"):
        return results(cell, seed, tensors)


def draws(case):
    """query, key, value, mask, d_out, d_lse of all ranks, numpy."""
    _, length, (heads, kv_heads), kv_length, mask, _, _, _ = case
    rng = np.random.default_rng(length)
    q_shape, kv_shape = (B, heads, length, D), (B, kv_heads, kv_length, D)
    tensors = [rng.standard_normal(shape).astype(np.float32) for shape in (q_shape, kv_shape, kv_shape)]
    discarded = None if mask is None else (rng.random(mask) < 0.3).astype(np.uint8)
    return tensors + [discarded, rng.standard_normal(q_shape), rng.standard_normal(q_shape[:3])]


def share(x, rank, size):
    """A rank's tokens: axis 2 in ``size`` pieces."""
    if x is None or x.shape[2] == 1:
        return x
    count = x.shape[2] // size
    return x[:, :, rank * count : (rank + 1) * count]


def run(name, rank, size):
    """[(what, error, largest value)] of this rank's share against one process's call on everything."""
    if name in OTHERS:
        return OTHERS[name](rank, size)
    case = dict(CASES, **SLOW_CASES)[name]
    strategy, _, _, _, _, dtype, seed, options = case
    tensors = draws(case)

    def given(arrays):
        query, key, value, mask, d_out, d_lse = arrays
        inputs = [Tensor(np.ascontiguousarray(x)).astype(getattr(ms, dtype)) for x in (query, key, value)]
        weights = [Tensor(np.ascontiguousarray(x).astype(np.float32)) for x in (d_out, d_lse)]
        return inputs + [None if mask is None else Tensor(np.ascontiguousarray(mask))] + weights

    options = dict(options, return_lse=True)
    found = results(CELLS[strategy](D, **options), seed, given([share(x, rank, size) for x in tensors]))
    if tensors[3] is not None:
        tensors[3] = np.broadcast_to(tensors[3], tensors[3].shape[:2] + (case[1], case[3]))
    want = results_of_one(FlashAttention(D, **options), seed, given(tensors))
    names = ("out", "lse", "query", "key", "value")
    return [(what, *_difference(x, share(whole, rank, size))) for what, x, whole in zip(names, found, want)]


def _difference(found, want):
    """(largest absolute difference, largest value); inf where the infinities are not the same."""
    finite = np.isfinite(want)
    if found.shape != want.shape or not np.array_equal(found[~finite], want[~finite]):
        return float("inf"), 0.0
    return float(np.abs(found[finite] - want[finite]).max()), float(np.abs(want[finite]).max())


# --- collectives: what they give, and that each gradient is the transpose ---------------------------
class _Product(nn.Cell):
    """<cell(x), d_out>, its gradient by x."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.grad = cell, ops.grad(_Sum(cell))

    def construct(self, x, d_out):
        return self.cell(x), self.grad(x, d_out)


class _Sum(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, x, d_out):
        return (self.cell(x) * d_out).sum()


def collectives(rank, size):
    """Every collective of back end 'gathered' against numpy on all ranks' tensors."""
    group, back_end = current_group(), choose()
    x = np.random.default_rng(0).standard_normal((size, 2, 4 * size, 3)).astype(np.float32)
    targets = tuple((r + 1) % size for r in range(size))
    pieces = np.split(x, size, axis=2)  # pieces[n][r]: the n-th piece of rank r
    gathered = np.concatenate(list(x), axis=0)
    summed = np.stack([piece.sum(0) for piece in pieces])
    cases = {
        "permute": (back_end.Permute(group, targets, x.shape[1:], ms.float32), x[np.argsort(targets)]),
        "all to all": (
            back_end.AllToAll(group, 1, 0), np.stack([np.concatenate(list(piece), axis=0) for piece in pieces])
        ),
        "all gather": (back_end.AllGather(group, 0), np.stack([gathered] * size)),
        "reduce scatter": (back_end.ReduceScatter(group, 1), summed),
    }  # fmt: skip
    if size == 4:
        pairs = [np.concatenate(list(x[r // 2 * 2 : r // 2 * 2 + 2]), axis=0) for r in range(4)]
        cases["all gather of two"] = back_end.AllGather(group, 0, 2), np.stack(pairs)
        twos = np.stack([np.split(x[r // 2 * 2 : r // 2 * 2 + 2].sum(0), 2, axis=1)[r % 2] for r in range(4)])
        cases["reduce scatter of two"] = back_end.ReduceScatter(group, 1, 2), twos
    results = []
    for name, (cell, want) in cases.items():
        d_out = np.random.default_rng(1).standard_normal(want.shape).astype(np.float32)
        found, grad = _Product(cell)(Tensor(x[rank]), Tensor(d_out[rank]))
        results.append((name, *_difference(found.asnumpy(), want[rank])))
        # The transpose of a linear map L: <L x, d> = <x, L^T d>, both summed over all ranks.
        mine = Tensor(np.array([(x[rank] * grad.asnumpy()).sum()], np.float32))
        both = ops.AllReduce()(mine).asnumpy()
        results.append((name + ", gradient", *_difference(both, np.array([(want * d_out).sum()]))))
    return results


# --- dilated attention ----------------------------------------------------------------------------
class _Dilated(nn.Cell):
    def __init__(self, options, distributed):
        super().__init__()
        self.options, self.distributed = options, distributed

    def construct(self, query, key, value, mask, dropout_seed):
        return dilated_attention(query, key, value, return_lse=True, distributed=self.distributed, **self.options)


def _dilated(**options):
    def run_dilated(rank, size):
        rng = np.random.default_rng(2)
        arrays = [rng.standard_normal((B, 32, 4, D)).astype(np.float32) for _ in range(4)]
        d_lse = rng.standard_normal((B, 4, 32)).astype(np.float32)

        def given(part):
            tensors = [Tensor(np.ascontiguousarray(part(x, 1))) for x in arrays]
            return tensors[:3] + [None, tensors[3], Tensor(np.ascontiguousarray(part(d_lse, 2)))]

        def own(x, axis):
            return np.split(x, size, axis=axis)[rank]

        found = results(_Dilated(options, True), None, given(own))
        want = results_of_one(_Dilated(options, False), None, given(lambda x, axis: x))
        names = (("out", 1), ("lse", 2), ("query", 1), ("key", 1), ("value", 1))
        return [(what, *_difference(x, own(whole, axis))) for (what, axis), x, whole in zip(names, found, want)]

    return run_dilated


def dilated_layer(rank, size):
    """The layer with Distributed=True and dropout: output, and gradients of its weights summed over the ranks."""
    sizes = {"dim": 16, "heads": 4, "segment_size": (4, 32), "dilation_rate": (1, 2), "causal": True, "dropout": 0.3}
    x, d_out = np.random.default_rng(3).standard_normal((2, B, 32, 16)).astype(np.float32)

    def passes(distributed, part):
        np.random.seed(1)
        layer = DilatedAttention(**sizes, Distributed=distributed).set_train()
        layer.drop.salt = Tensor(5, ms.int32)  # the Cell's number is part of its seed
        inputs = [Tensor(np.ascontiguousarray(part(a))) for a in (x, d_out)]
        out = layer(inputs[0])
        layer.drop.dropout_step.set_data(Tensor(0, ms.int32))
        grads = ops.grad(_Sum(layer), None, ms.ParameterTuple(layer.trainable_params()))(*inputs)
        return out.asnumpy(), grads

    def own(a):
        return np.split(a, size, axis=1)[rank]

    out, grads = passes(True, own)
    with mode("pynative"):
        want, wanted = passes(False, lambda a: a)
    found = [("out", *_difference(out, own(want)))]
    for number, (grad, whole) in enumerate(zip(grads, wanted)):
        found.append((str(number), *_difference(ops.AllReduce()(grad).asnumpy(), whole.asnumpy())))
    return found


OTHERS = {
    "collectives": collectives,
    "dilated, causal, mixture": _dilated(segment_size=(4, 16, 32), dilation_rate=(1, 2, 4), is_causal=True),
    "dilated, both ways": _dilated(segment_size=(8, 4096), dilation_rate=(3, 4)),
    "dilated, xPos": _dilated(segment_size=(4, 32), dilation_rate=(1, 2), is_causal=True, use_xpos=True),
    "dilated layer": dilated_layer,
}


def main(folder, how, names):
    init()
    rank, size = get_rank(), get_group_size()
    with mode(how):
        errors = {name: run(name, rank, size) for name in names}
    with open("{}/{}.json".format(folder, rank), "w") as stream:
        json.dump(errors, stream)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
