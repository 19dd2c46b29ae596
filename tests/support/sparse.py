"""Properties of dynamic sparse attention, once for both frameworks. The judge is the masked softmax in float64."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from support.judge import check

from flash_attention.core import reference
from flash_attention.core.mechanisms import sparse as shared
from flash_attention.core.spec import AttentionSpec, Operands


class Case(NamedTuple):
    """One call of `dynamic_sparse_attention`; `share` is the number of buckets, or the part of the tokens kept."""

    name: str
    mode: str
    q_len: int
    kv_len: int
    share: float
    batch: int = 2
    heads: int = 3
    dim: int = 8
    dtype: str = "float32"


HASH = Case("hash, negative ids, more keys than queries", "hash", 41, 53, 5)
QK = Case("qk, more queries than keys", "qk", 53, 41, 0.5)
ONE_HEAD = Case("hash, one head, fp16", "hash", 37, 37, 3, heads=1, dtype="float16")
CASES = [
    HASH,
    QK,
    pytest.param(ONE_HEAD, marks=pytest.mark.slow),
    pytest.param(Case("qk, one head, bf16", "qk", 30, 30, 0.6, heads=1, dtype="bfloat16"), marks=pytest.mark.slow),
    pytest.param(Case("hash, many tiles", "hash", 1100, 1300, 4, batch=1, heads=2), marks=pytest.mark.slow),
    pytest.param(Case("qk, many tiles", "qk", 1300, 1100, 0.7, batch=1, heads=2), marks=pytest.mark.slow),
    pytest.param(Case("hash, many tiles, bf16", "hash", 700, 700, 2, 1, 2, dtype="bfloat16"), marks=pytest.mark.slow),
    pytest.param(Case("qk, many tiles, fp16", "qk", 700, 900, 0.8, 1, 2, dtype="float16"), marks=pytest.mark.slow),
]


@functools.lru_cache(maxsize=None)
def _draws(case):
    rng = np.random.default_rng(case.q_len)
    shapes = [(case.batch, n, case.heads) for n in (case.q_len, case.kv_len)]
    q, d_out = (np.round(rng.standard_normal(shapes[0] + (case.dim,)) * 16) / 16 for _ in range(2))
    k, v = (np.round(rng.standard_normal(shapes[1] + (case.dim,)) * 16) / 16 for _ in range(2))
    if case.mode == "hash":
        ids = [(rng.integers(0, case.share, shape) - 2).astype(np.int32) * 1000000007 for shape in shapes]
    else:
        ids = [rng.random(shape) < case.share for shape in shapes]
        ids[0][:, :, 0], ids[1][:, :, 0] = True, case.batch > 1  # a head that drops no query, one that drops all
        ids[1][0, :, -1] = False
    return q, k, v, d_out, ids[0], ids[1]


def draws(case):
    """q, k, v, d_out (B, N, H, D), exact in bfloat16, and the two index tensors; a copy."""
    return [x.copy() for x in _draws(case)]


def dense(xp, case):
    """Results by name, BNHD."""
    q, k, v, d_out, q_idx, k_idx = draws(case)
    q, k, v, d_out = (np.asarray(x.swapaxes(1, 2), xp.float64) for x in (q, k, v, d_out))
    seen = shared.visible(case.mode, q_idx, k_idx)
    spec = AttentionSpec(case.batch, case.heads, case.heads, case.q_len, case.kv_len, case.dim, mask_shape=seen.shape)
    operands = Operands(mask=seen)
    out, _ = reference.attention(xp, spec, q, k, v, operands)
    grads = reference.attention_grad(spec, q, k, v, operands, d_out)
    results = {name: grads[name].swapaxes(1, 2) for name in ("query", "key", "value")}
    return dict(results, out=out.swapaxes(1, 2))


def causal(q, k, v):
    """Plain causal attention, top-left, BNHD float64."""
    seen = np.arange(q.shape[1])[:, None] >= np.arange(k.shape[1])[None, :]
    scores = np.where(seen, np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)


class Calls:
    """A framework gives `run`, `judged` (`run` with a dtype), `functions`, `narrow` (no 64-bit integers), `call(name,
    **options)`: the public function of that name as `run` takes it, and `value(name, *arrays, **options)`: its outputs
    as numpy arrays."""

    def attend(self, case, tensors, d_out=None):
        """`(out, gradients)` of `dynamic_sparse_attention`."""
        return self.run(self.call("dynamic_sparse_attention", sparsity_mode=case.mode), tensors, d_out)


class Sparse(Calls):
    """What defines the mechanism, and its misuse."""

    def check_case(self, case):
        """Compare output and gradients of a case with the judge."""
        q, k, v, d_out, q_idx, k_idx = draws(case)
        call = self.call("dynamic_sparse_attention", sparsity_mode=case.mode)
        out, grads = self.judged(call, [q, k, v, q_idx, k_idx], d_out, case.dtype)
        got = dict(zip(("out", "query", "key", "value"), [out] + grads))
        check(got, functools.partial(dense, case=case), case.dtype, self.functions)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_equals_masked_softmax(self, case):
        self.check_case(case)

    def test_all_together_is_causal_attention(self):
        """One bucket; all kept."""
        q, k, v, _, _, _ = draws(HASH)
        ones = [np.ones(x.shape[:3], np.int32) for x in (q, k)]
        want = causal(q, k, v)
        np.testing.assert_allclose(self.attend(HASH, [q, k, v] + ones)[0], want, atol=1e-5)
        flags = [x.astype(bool) for x in ones]
        np.testing.assert_allclose(self.attend(QK, [q, k, v] + flags)[0], want, atol=1e-5)

    @pytest.mark.parametrize("case", [HASH, QK], ids=lambda case: case.mode)
    def test_what_is_not_selected_is_never_read(self, case):
        self.check_never_read(case)

    def check_never_read(self, case):
        """NaN in what is not selected changes no result, and its gradient is exactly 0."""
        q, k, v, d_out, q_idx, k_idx = draws(case)
        if case.mode == "hash":  # buckets without a query, and queries without a key
            q_idx[q_idx == 0], k_idx[k_idx == 1000000007] = 77, 88
        seen = shared.visible(case.mode, q_idx, k_idx)
        blind, unseen = (~seen.any(axis).transpose(0, 2, 1) for axis in (3, 2))
        assert blind.any() and unseen.any()
        want, want_grads = self.attend(case, [q, k, v, q_idx, k_idx], d_out)
        q[blind], d_out[blind], k[unseen], v[unseen] = np.nan, np.nan, np.nan, np.nan
        out, grads = self.attend(case, [q, k, v, q_idx, k_idx], d_out)
        np.testing.assert_array_equal(out, want)
        assert not out[blind].any()
        for got, grad, lost in zip(grads, want_grads, (blind, unseen, unseen)):
            np.testing.assert_array_equal(got, grad)
            assert not got[lost].any()

    # --- misuse ---
    @pytest.mark.parametrize("mode, change, error, match", [
        ("hsh", {}, KeyError, "'sparsity_mode' must be one of 'hash', 'qk', but got 'hsh'"),
        ("hash", {3: np.float32}, TypeError, "'q_bucket_idx' must be of integer dtype, but got float32"),
        ("hash", {4: bool}, TypeError, "'k_bucket_idx' must be of integer dtype, but got bool"),
        ("qk", {3: np.int32}, TypeError, "'q_keep' must be of float or bool dtype, but got int32"),
        ("hash", {1: (2, 53, 3, 9)}, ValueError, "'k' must be of shape"),
        ("hash", {2: (2, 53, 3)}, ValueError, r"'v' must be of shape \(B, N, H, D\)"),
        ("hash", {3: (2, 41)}, ValueError, r"'q_bucket_idx' must be of shape \(2, 41, 3\)"),
        ("qk", {0: (2, 0, 3, 8)}, ValueError, "'q' must be without an empty axis"),
    ])  # fmt: skip
    def test_refuses(self, mode, change, error, match):
        case = QK._replace(q_len=41, kv_len=53) if mode == "qk" else HASH
        q, k, v, _, q_idx, k_idx = draws(case)
        tensors = [q, k, v, q_idx, k_idx]
        for n, new in change.items():
            tensors[n] = np.zeros(new, tensors[n].dtype) if isinstance(new, tuple) else tensors[n].astype(new)
        with pytest.raises(error, match=match):
            self.attend(case._replace(mode=mode), tensors)

    def test_refuses_options(self):
        hashed, kept = draws(HASH), draws(QK)
        hashed, kept = hashed[:3] + hashed[4:], kept[:3] + kept[4:]
        for name, tensors, options, match in [
            (
                "dynamic_sparse_attention",
                hashed,
                {"buffer_size": 4},
                "'buffer_size' must be None unless sparsity_mode is 'qk'",
            ),
            ("qk_sparse_attention", kept, {"buffer_size": 0}, "'buffer_size' must be an int >= 1"),
            ("qk_sparse_attention", kept, {"buffer_size": (9, 9, 9)}, "'buffer_size' must be None, an int or a pair"),
            ("qk_sparse_attention", kept, {"buffer_size": 3}, "'buffer_size' must be at least 53"),
            ("hash_sparse_attention", hashed, {"sm_scale": float("nan")}, "'sm_scale' must be None or a finite float"),
            ("compact", [kept[3], kept[1]], {}, "'keep_tensor' must be of shape"),
            ("compact", [kept[3], kept[3]], {}, "'x' must be of shape"),
            ("compact", [kept[3], kept[0]], {"buffer_size": 3}, "'buffer_size' must be at least 53"),
            ("sort_bucketed_attention", [kept[0], kept[3]], {}, "'qkv_bucket_idx' must be of integer dtype"),
        ]:
            with pytest.raises((ValueError, TypeError), match=match):
                self.value(name, *tensors, **options)

    def test_kernels_refuse(self):
        x, ids = np.ones((1, 2, 4, 8)), np.array([0, 2, 1, 3], np.int32) * np.ones((1, 2, 1), np.int32)
        place = np.arange(4, dtype=np.int32) * np.ones_like(ids)
        for name, indices, match in [
            ("qk_sparse_attention_kernel", [place, ids], "'k_idx' must be in ascending order"),
            ("qk_sparse_attention_kernel", [ids, place], "'q_idx' must be in ascending order"),
            ("hash_sparse_attention_kernel", [place, place, place, ids], "'k_hash' must be in ascending order"),
            ("hash_sparse_attention_kernel", [ids, place, place * 0, place], "'q_hash' must be in ascending order"),
            ("qk_sparse_attention_kernel", [place[:, :1], place], r"'q_idx' must be of shape \(1, 2, 4\)"),
        ]:
            with pytest.raises(ValueError, match=match):
                self.value(name, x, x, x, *indices)


class MoreSparse(Calls):
    """What follows from the definition, and the published steps."""

    def test_bucket_names_do_not_matter(self):
        """Nor does their order; and 'qk' is 'hash' with kept 0, dropped queries 1, dropped keys 2."""
        q, k, v, _, q_idx, k_idx = draws(HASH)
        one = self.attend(HASH, [q, k, v, q_idx, k_idx])[0]
        other = self.attend(HASH, [q, k, v] + [-7 * (x // 1000000007) ** 3 for x in (q_idx, k_idx)])[0]
        np.testing.assert_allclose(other, one, atol=1e-6)
        q, k, v, _, q_keep, k_keep = draws(QK)
        ids = [np.where(q_keep, 0, 1), np.where(k_keep, 0, 2)]
        by_hash = self.attend(HASH, [q, k, v] + [x.astype(np.int32) for x in ids])[0]
        np.testing.assert_allclose(by_hash, self.attend(QK, [q, k, v, q_keep, k_keep])[0], atol=1e-6)

    def test_ids_of_64_bits(self):
        q, k, v, _, q_idx, k_idx = draws(HASH)
        wide = [x.astype(np.int64) * (1 if self.narrow else 2**31) for x in (q_idx, k_idx)]
        one = self.attend(HASH, [q, k, v, q_idx, k_idx])[0]
        np.testing.assert_allclose(self.attend(HASH, [q, k, v] + wide)[0], one, atol=1e-6)

    def test_no_earlier_key_in_the_bucket(self):
        q, k, v, _, q_idx, k_idx = draws(HASH)
        q_idx[:, 4], k_idx[:, 9] = 5, 5  # the only query and the only key of bucket 5, which comes later
        out = self.attend(HASH, [q, k, v, q_idx, k_idx])[0]
        assert not out[:, 4].any() and out[:, 5].any()

    @pytest.mark.parametrize("case", [HASH, QK], ids=lambda case: case.mode)
    def test_causal(self, case):
        q, k, v, _, q_idx, k_idx = draws(case)
        one = self.attend(case, [q, k, v, q_idx, k_idx])[0]
        k[:, 20] += 3.0
        v[:, 20] -= 9.0
        other = self.attend(case, [q, k, v, q_idx, k_idx])[0]
        np.testing.assert_array_equal(other[:, :20], one[:, :20])
        assert (other[:, 20:] != one[:, 20:]).any()

    def test_nothing_is_kept(self):
        q, k, v, d_out, q_keep, k_keep = draws(QK)
        for flags in ([q_keep & False, k_keep], [q_keep, k_keep & False]):
            out, grads = self.attend(QK, [q, k, v] + flags, d_out)
            assert not out.any() and not any(grad.any() for grad in grads)

    def test_float_flags_and_buffers(self):
        """Flags may be floats, without gradient; buffers that just fit change nothing."""
        q, k, v, d_out, q_keep, k_keep = draws(QK)
        sizes = tuple(int(x.sum(1).max()) for x in (q_keep, k_keep))
        call = self.call("dynamic_sparse_attention", sparsity_mode="qk", buffer_size=sizes, sm_scale=0.3)
        plain = self.call("qk_sparse_attention", sm_scale=0.3)
        want, want_grads = self.run(plain, [q, k, v, q_keep, k_keep], d_out)
        out, grads = self.run(call, [q, k, v, q_keep * 1.0, k_keep * 1.0], d_out)
        np.testing.assert_allclose(out, want, atol=1e-6)
        assert not grads[3].any() and not grads[4].any()
        for got, grad in zip(grads, want_grads):
            np.testing.assert_allclose(got, grad, atol=1e-5)

    def test_compact(self):
        q, _, _, _, keep, _ = draws(QK)
        order = np.argsort(~keep, axis=1, kind="stable").astype(np.int32)
        most = keep.sum(1).max()
        want = np.take_along_axis(q, order[:, :most, :, None], 1)
        for arguments in ((keep, q), (q, keep * 1.0)):  # either order
            x, index, counts = self.value("compact", *arguments)
            np.testing.assert_array_equal(index, order[:, :most])
            np.testing.assert_array_equal(counts, keep.sum(1))
            np.testing.assert_allclose(x, want)
        again, same, nothing = self.value("compact", keep, q + 1, index)
        np.testing.assert_allclose(again, want + 1)
        assert nothing is None and (same == index).all()
        x, index, counts = self.value("compact", keep & False, q)
        assert x.shape[1] == index.shape[1] == 0 and not counts.any()
        x, index, _ = self.value("compact", keep, q, buffer_size=keep.shape[1])
        np.testing.assert_array_equal(index, order)

    def test_pad_index(self):
        index, counts = np.arange(24).reshape(2, 4, 3), np.array([[0, 2, 4], [1, 1, 3]])
        padded = self.value("pad_index", index, counts, 10**9)
        assert padded.dtype == np.int32
        inside = np.arange(4)[None, :, None] < counts[:, None]
        np.testing.assert_array_equal(padded, np.where(inside, index, 10**9))
        np.testing.assert_array_equal(self.value("pad_index", index, counts), np.where(inside, index, -1))

    def test_sort(self):
        q, _, _, _, ids, _ = draws(HASH)
        order = np.argsort(ids, axis=1, kind="stable")
        x, sorted_ids, index = self.value("sort_bucketed_attention", q, ids)
        np.testing.assert_array_equal(index, order)
        np.testing.assert_array_equal(sorted_ids, np.take_along_axis(ids, order, 1))
        np.testing.assert_allclose(x, np.take_along_axis(q, order[..., None], 1))

    def test_kernels(self):
        """The published steps, one by one, give what the whole gives."""
        q, k, v, _, q_idx, k_idx = draws(HASH)
        (q_s, q_hash, q_pos), (k_s, k_hash, k_pos) = (
            self.value("sort_bucketed_attention", x, ids) for x, ids in ((q, q_idx), (k, k_idx))
        )
        v_s = self.value("sort_bucketed_attention", v, k_idx)[0]
        steps = [x.swapaxes(1, 2) for x in (q_s, k_s, v_s, q_pos, k_pos, q_hash, k_hash)]
        out = self.value("hash_sparse_attention_kernel", *steps).swapaxes(1, 2)
        whole = self.attend(HASH, [q, k, v, q_idx, k_idx])[0]
        np.testing.assert_allclose(out, np.take_along_axis(whole, q_pos[..., None], 1), atol=1e-6)
        q, k, v, _, q_keep, k_keep = draws(QK)
        q_c, q_pos, q_count = self.value("compact", q_keep, q)
        k_c, k_pos, k_count = self.value("compact", k_keep, k)
        v_c = self.value("compact", k_keep, v, k_pos)[0]
        padded = [self.value("pad_index", q_pos, q_count, -1), self.value("pad_index", k_pos, k_count, 10**9)]
        steps = [x.swapaxes(1, 2) for x in [q_c, k_c, v_c] + padded]
        out = self.value("qk_sparse_attention_kernel", *steps).swapaxes(1, 2)
        whole = self.attend(QK, [q, k, v, q_keep, k_keep])[0]
        np.testing.assert_allclose(out, np.take_along_axis(whole, q_pos[..., None], 1), atol=1e-6)
