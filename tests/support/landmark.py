"""Properties of landmark attention, once for both frameworks. The judge is the plain formula beside it, in float64."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from support.judge import check
from support.sparse import causal

from flash_attention.core.mechanisms import landmark as shared


class Case(NamedTuple):
    """One call; `pattern`: 'regular', 'irregular', 'batched' (another one each batch row) or 'none'."""

    name: str
    q_len: int
    kv_len: int
    pattern: str = "regular"
    block: int = 8
    top_k: int = None
    dtype: str = "float32"
    heads: int = 2
    dim: int = 8

    def landmarks(self):
        if self.pattern == "regular":
            return shared.regular(self.kv_len, self.block)
        rng = np.random.default_rng(7)
        shape = (2, self.kv_len) if self.pattern == "batched" else (self.kv_len,)
        found = rng.random(shape) < (0 if self.pattern == "none" else 0.2)
        if self.pattern != "none":
            found[..., [0, 11, 12]] = True  # an empty row at the start, and a section without ordinary tokens
        return found

    def options(self):
        return {"block_size": self.block, "top_k_blocks": self.top_k}


REGULAR = Case("regular, ragged", 45, 45)
PREFIX = Case("regular, a prefix that is no multiple of the block", 19, 45)
IRREGULAR = Case("irregular, more keys", 30, 41, "irregular")
BEST = Case("two best blocks", 29, 61, top_k=2)
_slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [
    REGULAR,
    IRREGULAR,
    BEST,
    _slow(PREFIX),
    _slow(Case("irregular, one pattern each row", 33, 33, "batched")),
    _slow(Case("irregular, two best sections", 23, 41, "batched", top_k=2)),
    _slow(Case("regular, fp16", 45, 45, dtype="float16")),
    _slow(Case("irregular, bf16", 45, 45, "irregular", dtype="bfloat16")),
    _slow(Case("two best blocks, fp16", 29, 61, top_k=2, dtype="float16")),
    _slow(Case("many tiles", 700, 1300, block=64)),
    _slow(Case("many tiles, long blocks, bf16", 1100, 1100, block=600, dtype="bfloat16")),
    _slow(Case("irregular, many tiles", 300, 1100, "irregular")),
]


@functools.lru_cache(maxsize=None)
def _draws(case):
    rng = np.random.default_rng(case.kv_len)
    shapes = [(2, case.heads, n, case.dim) for n in (case.q_len, case.kv_len)]
    return [np.round(rng.standard_normal(shapes[n]) * 16) / 16 for n in (0, 1, 1, 0)]


def draws(case):
    """q, k, v, d_out (B, H, N, D), exact in bfloat16; a copy."""
    return [x.copy() for x in _draws(case)]


def dense(xp, case):
    """Results by name."""
    q, k, v, d_out = (np.asarray(x, xp.float64) for x in draws(case))
    return shared.formula(xp, q, k, v, case.landmarks(), d_out, top_k_blocks=case.top_k)


class Calls:
    """A framework gives `run`, `judged` (`run` with a dtype), `functions`, `call(**options)`: of (q, k, v, is_mem)."""

    def attend(self, case, tensors, d_out=None, landmarks=None, **options):
        """`(out, gradients)`."""
        landmarks = case.landmarks() if landmarks is None else landmarks
        return self.run(self.call(landmarks, **dict(case.options(), **options)), tensors, d_out)


class Landmark(Calls):
    """What defines the mechanism."""

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_equals_grouped_softmax(self, case):
        *tensors, d_out = draws(case)
        out, grads = self.judged(self.call(case.landmarks(), **case.options()), tensors, d_out, case.dtype)
        got = dict(zip(("out", "query", "key", "value"), [out] + grads))
        check(got, functools.partial(dense, case=case), case.dtype, self.functions, exps=self.exps)

    def test_no_landmark_is_causal_attention(self):
        q, k, v, _ = draws(REGULAR)
        out = self.attend(REGULAR._replace(pattern="none"), [q, k, v])[0]
        want = causal(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)
        np.testing.assert_allclose(out, want, atol=1e-5)

    def test_landmark_values_are_never_seen(self):
        """NaN there changes nothing, in either path; the weights of a row sum to 1."""
        for case in (REGULAR, IRREGULAR._replace(q_len=41)):
            q, k, v, d_out = draws(case)
            landmarks = case.landmarks()
            want, want_grads = self.attend(case, [q, k, v], d_out)
            v[:, :, landmarks] = np.nan
            out, grads = self.attend(case, [q, k, v], d_out)
            np.testing.assert_array_equal(out, want)
            for got, grad in zip(grads, want_grads):
                np.testing.assert_array_equal(got, grad)
            assert not grads[2][:, :, landmarks].any()
        q, k, v, _ = draws(REGULAR)
        np.testing.assert_allclose(self.attend(REGULAR, [q, k, np.ones_like(v)])[0], 1.0, atol=1e-5)

    def test_what_is_not_chosen_is_never_read(self):
        """One query: NaN in the sections that it does not choose changes no result, and their gradient is 0."""
        case = BEST._replace(q_len=1)
        q, k, v, d_out = draws(case)
        want, want_grads = self.attend(case, [q, k, v], d_out)
        logits = np.einsum("bhd,bhcd->bhc", q[:, :, 0], k[:, :, 7::8])  # seven closed blocks, all before the query
        order = np.argsort(-logits, axis=-1, kind="stable")
        for b, h in np.ndindex(2, 2):
            for c in order[b, h, 2:]:
                k[b, h, 8 * c : 8 * c + 7] = v[b, h, 8 * c : 8 * c + 7] = np.nan
        lost = np.isnan(k)
        assert lost.any()
        out, grads = self.attend(case, [q, k, v], d_out)
        np.testing.assert_array_equal(out, want)
        for got, grad in zip(grads, want_grads):
            np.testing.assert_array_equal(got, grad)
        assert not grads[1][lost].any() and not grads[2][lost].any()

    @pytest.mark.parametrize("change, options, error, match", [
        ({}, {"block_size": 1}, ValueError, "'block_size' must be an int >= 2"),
        ({}, {"top_k_blocks": 0}, ValueError, "'top_k_blocks' must be an int >= 1"),
        ({}, {"sm_scale": float("inf")}, ValueError, "'sm_scale' must be None or a finite float"),
        ({"is_mem": (44,)}, {}, ValueError, r"'is_mem' must be of shape \(45,\) or \(2, 45\)"),
        ({"is_mem": np.float32}, {}, TypeError, "'is_mem' must be of bool or integer dtype"),
        ({0: (2, 2, 46, 8)}, {}, ValueError, "'q' must be at most as long as k"),
        ({1: (2, 2, 45, 9)}, {}, ValueError, "'k' must be of shape"),
        ({2: (2, 45, 8)}, {}, ValueError, r"'v' must be of shape \(B, H, N, D\)"),
    ])  # fmt: skip
    def test_refuses(self, change, options, error, match):
        tensors, landmarks = draws(REGULAR)[:3], REGULAR.landmarks()
        for n, new in change.items():
            if n == "is_mem":
                landmarks = np.zeros(new, bool) if isinstance(new, tuple) else landmarks.astype(new)
            else:
                tensors[n] = np.zeros(new)
        with pytest.raises(error, match=match):
            self.attend(REGULAR, tensors, landmarks=landmarks, **options)


class MoreLandmark(Calls):
    """What follows from the formula."""

    def test_prefix(self):
        """Queries behind a prefix are the last rows of the whole call, in both paths."""
        for case in (PREFIX, PREFIX._replace(pattern="irregular"), BEST._replace(q_len=19)):
            whole = case._replace(q_len=case.kv_len)
            q, k, v, _ = draws(whole)
            want = self.attend(whole, [q, k, v])[0][:, :, -19:]
            np.testing.assert_allclose(self.attend(case, [q[:, :, -19:], k, v])[0], want, atol=1e-5)

    def test_landmarks_that_score_as_their_block_does(self):
        """When each landmark's logit is the LSE of its block's, the weights are those of one plain softmax."""
        case = REGULAR._replace(q_len=1, dim=4)
        _, k, v, _ = draws(case._replace(dim=4))
        q = np.zeros((2, 2, 1, 4))
        q[..., 0] = 2.0  # scores are k[..., 0] with scale 1/2
        landmarks = case.landmarks()
        for c in range(5):
            k[:, :, 8 * c + 7, 0] = np.log(np.exp(k[:, :, 8 * c : 8 * c + 7, 0]).sum(-1))
        out = self.attend(case, [q, k, v])[0]
        weight = np.where(landmarks, 0.0, np.exp(k[..., 0]))
        want = np.einsum("bhj,bhjd->bhd", weight / weight.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(out[:, :, 0], want, atol=1e-5)

    def test_a_landmarks_key_changes_later_sections_only(self):
        q, k, v, _ = draws(REGULAR)
        want = self.attend(REGULAR, [q, k, v])[0]
        k[:, :, 15] += 2.0
        out = self.attend(REGULAR, [q, k, v])[0]
        np.testing.assert_array_equal(out[:, :, :16], want[:, :, :16])
        assert (out[:, :, 16:] != want[:, :, 16:]).any()

    def test_enough_blocks_are_all_blocks(self):
        q, k, v, _ = draws(REGULAR)
        want = self.attend(REGULAR, [q, k, v])[0]
        np.testing.assert_allclose(self.attend(REGULAR, [q, k, v], top_k_blocks=5)[0], want, atol=1e-5)
        four = self.attend(REGULAR, [q, k, v], top_k_blocks=4)[0]
        np.testing.assert_allclose(four[:, :, :40], want[:, :, :40], atol=1e-5)

    def test_ties_go_to_the_earlier_block(self):
        case = BEST._replace(q_len=1)
        q, k, v, _ = draws(case)
        k[:, :, 7::8] = 0.5  # all landmarks score alike
        want = self.attend(case, [q, k, v])[0]
        v[:, :, 16:56] += 100.0  # blocks 2 to 6
        np.testing.assert_array_equal(self.attend(case, [q, k, v])[0], want)

    def test_path_does_not_matter(self):
        """The regular pattern under another block size is computed by the general path."""
        q, k, v, _ = draws(REGULAR)
        want = self.attend(REGULAR, [q, k, v])[0]
        other = self.attend(REGULAR, [q, k, v], landmarks=REGULAR.landmarks(), block_size=16)[0]
        np.testing.assert_allclose(other, want, atol=1e-5)
