"""Dynamic sparse attention in JAX: the properties of support/sparse.py, float64, and the tiles that are visited."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.jax_engines import in_float64
from support.sparse import HASH, QK, MoreSparse, Sparse, dense, draws

import flash_attention.jax as public
from flash_attention.jax.engines import xla_tiles
from flash_attention.jax.mechanisms import sparse

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


class _InJax:
    run, judged = staticmethod(in_jax.run_eagerly), staticmethod(in_jax.run)
    functions = in_jax.FUNCTIONS
    narrow = True  # JAX has no 64-bit integers unless asked for them

    @staticmethod
    def call(name, **options):
        return functools.partial(getattr(public, name), **options)

    @staticmethod
    def value(name, *arrays, **options):
        arrays = [jnp.asarray(x, jnp.float32) if getattr(x, "dtype", None) == np.float64 else x for x in arrays]
        return jax.tree.map(np.asarray, getattr(public, name)(*arrays, **options))


class TestInJax(_InJax, Sparse):
    pass


@pytest.mark.slow
class TestMoreInJax(_InJax, MoreSparse):
    def test_small_buffer_under_jit(self):
        """Flags that are not concrete cannot be counted: later ones are dropped, as documented."""
        q, k, v, _, q_keep, k_keep = draws(QK)
        call = jax.jit(functools.partial(public.qk_sparse_attention, buffer_size=(3, 41)))
        out = call(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), q_keep, k_keep)
        first = q_keep & (np.cumsum(q_keep, 1) <= 3)
        np.testing.assert_allclose(out, self.attend(QK, [q, k, v, first, k_keep])[0], atol=1e-6)

    def test_compact_under_jit(self):
        q, _, _, _, keep, _ = draws(QK)
        x, index, counts = jax.jit(public.compact)(keep, jnp.asarray(q, jnp.float32))
        assert x.shape == q.shape and index.shape == keep.shape
        np.testing.assert_array_equal(counts, keep.sum(1))


@pytest.mark.parametrize("case", [HASH, pytest.param(QK, marks=pytest.mark.slow)], ids=lambda case: case.mode)
def test_float64(case):
    q, k, v, d_out, q_idx, k_idx = draws(case)
    with in_float64():
        call = functools.partial(public.dynamic_sparse_attention, sparsity_mode=case.mode)
        out, pullback = jax.vjp(lambda *x: call(*x, q_idx, k_idx), *(jnp.asarray(x) for x in (q, k, v)))
        got = dict(zip(("out", "query", "key", "value"), (out, *pullback(jnp.asarray(d_out)))))
    for name, want in dense(np, case).items():
        assert got[name].dtype == np.float64
        np.testing.assert_allclose(got[name], want, atol=1e-12)


# --- work that is skipped -------------------------------------------------------------------------------------------
TILE = 64  # small, so that short sequences have many


def visited(attend, length, *indices):
    """Pairs of the tiles that the forward and the backward pass visit, a head and direction."""
    counts = []

    def bounds(geo, low, high):
        limits = real(geo, low, high)
        jax.debug.callback(lambda n: counts.append(int(n) * geo.q_tile * geo.kv_tile), limits[1] - limits[0])
        return limits

    real = xla_tiles._interval_bounds
    q, k, v = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((3, 1, length, 1, 8)))
    jax.clear_caches()
    with mock.patch.object(xla_tiles, "_interval_bounds", bounds), mock.patch.object(sparse, "TILE", (TILE, TILE)):
        jax.block_until_ready(jax.grad(lambda *x: attend(*x, *indices).sum(), (0, 1, 2))(q, k, v))
        jax.effects_barrier()
    jax.clear_caches()
    assert len(counts) % 2 == 0
    return sum(counts) / 2


@pytest.mark.slow
def test_work_falls_with_the_buckets(figure):
    length, shares = 2048, {}
    for buckets in (1, 4, 16):
        ids = np.random.default_rng(buckets).integers(0, buckets, (2, 1, length, 1)).astype(np.int32)
        shares[buckets] = visited(public.hash_sparse_attention, length, *ids) / (length**2 / 2)
    tiles = 4 * TILE / length  # two tiles a query
    figure("hash sparse, 1 bucket, 2,048 tokens: pairs visited / causal", shares[1], 1 + tiles)
    figure("hash sparse, 4 buckets, 2,048 tokens: pairs visited / causal", shares[4], 1 / 4 + tiles)
    figure("hash sparse, 16 buckets, 2,048 tokens: pairs visited / causal", shares[16], 1 / 16 + tiles)
    assert shares[4] < 0.4 * shares[1] and shares[16] < 0.25 * shares[1]


@pytest.mark.slow
def test_work_falls_with_what_is_kept(figure):
    length, shares = 2048, {}
    for kept in (1.0, 0.25):
        flags = np.random.default_rng(1).random((2, 1, length, 1)) < kept
        shares[kept] = visited(public.qk_sparse_attention, length, *flags) / (length**2 / 2)
    tiles = 4 * TILE / length
    figure("qk sparse, all of 2,048 tokens kept: pairs visited / causal", shares[1.0], 1 + tiles)
    figure("qk sparse, 25 % of 2,048 tokens kept: pairs visited / causal", shares[0.25], 0.25**2 + 0.25 * tiles)
