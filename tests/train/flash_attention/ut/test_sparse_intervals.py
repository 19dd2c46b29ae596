"""Dynamic sparse attention, in numpy: intervals of reordered keys are exactly what each query sees."""

import numpy as np
import pytest

from flash_attention.core.mechanisms import sparse

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


def _repeat(count, step, state):
    for _ in range(count):
        state = step(*state)
    return state


def _take(x, index):
    return np.take_along_axis(x, index, -1)


def _check(first, stop, seen):
    key = np.arange(seen.shape[-1])
    np.testing.assert_array_equal((key >= first[..., None]) & (key < stop[..., None]), seen)
    assert (np.diff(first) >= 0).all() and (np.diff(stop) >= 0).all()
    key = np.broadcast_to(key, seen.shape[:2] + key.shape)
    np.testing.assert_array_equal(sparse.covered(_repeat, _take, np.where, first, stop, key), seen.any(-2))


@pytest.mark.parametrize("q_len, kv_len, buckets", [(37, 53, 5), (64, 1, 2), (20, 200, 50), (1, 16, 1)])
def test_buckets(q_len, kv_len, buckets):
    rng = np.random.default_rng(q_len)
    sides = []
    for length in (q_len, kv_len):
        ids = rng.integers(-2, buckets - 2, (2, 3, length))
        place = np.argsort(ids, -1, kind="stable")
        sides.append((place, _take(ids, place)))
    (q_pos, q_ids), (k_pos, k_ids) = sides
    seen = (q_ids[..., None] == k_ids[..., None, :]) & (q_pos[..., None] >= k_pos[..., None, :])
    _check(*sparse.hash_intervals(_repeat, _take, np.where, q_pos, k_pos, q_ids, k_ids), seen)


@pytest.mark.parametrize("q_len, kv_len, share", [(37, 53, 0.5), (53, 37, 0.1), (20, 20, 1.0), (9, 9, 0.0)])
def test_kept_tokens(q_len, kv_len, share):
    rng = np.random.default_rng(q_len)
    positions = []
    for length, pad in ((q_len, sparse.QUERY_PAD), (kv_len, sparse.KEY_PAD)):
        keep = (rng.random((2, 3, length)) < share).astype(int)
        rank, count = sparse.ranks(keep, lambda x: np.cumsum(x, -1))
        np.testing.assert_array_equal(np.argsort(rank, -1), np.argsort(1 - keep, -1, kind="stable"))
        np.testing.assert_array_equal(count[..., 0], keep.sum(-1))
        positions.append(np.where(np.arange(length) < count, np.argsort(rank, -1), pad))
    q_pos, k_pos = positions
    seen = q_pos[..., None] >= k_pos[..., None, :]
    _check(*sparse.qk_intervals(_repeat, _take, np.where, q_pos, k_pos), seen)
