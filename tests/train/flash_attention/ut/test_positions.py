"""Position encodings in JAX: the properties of support/positions.py, the bucket tables, and what jit traces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_jax
from support.positions import Encodings, X, bucket_tables, check, check_bucket_table

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.mechanisms.positions import check_t5
from flash_attention.jax import alibi_bias, rotary, t5_bias, xpos

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


class TestInJax(Encodings):
    run = staticmethod(in_jax.run)

    @staticmethod
    def rotary(**options):
        return functools.partial(rotary, **options)

    @staticmethod
    def xpos(**options):
        return functools.partial(xpos, **options)

    @staticmethod
    def alibi(*sizes):
        return np.asarray(alibi_bias(*sizes))

    @staticmethod
    def t5(table, q_len, kv_len, step, bidirectional, d_out):
        call = functools.partial(t5_bias, q_len=q_len, kv_len=kv_len, step=step, bidirectional=bidirectional)
        out, (d_table,) = in_jax.run(call, [table], d_out)
        return out, d_table


@pytest.mark.parametrize("num_buckets, max_distance, bidirectional", bucket_tables())
def test_bucket_tables(num_buckets, max_distance, bidirectional):
    check_bucket_table(num_buckets, max_distance, bidirectional)


@pytest.mark.parametrize("options, match", [
    ((31, 128, True), "'num_buckets' must be a multiple of 4"),
    ((2, 128, True), "'num_buckets' must be an int >= 4"),
    ((32, 8, True), "'max_distance' must be an int >= 9"),
    ((32, 128, 1), "'bidirectional' must be a bool"),
])  # fmt: skip
def test_t5_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        check_t5("T5Bias", *options)


def test_traced_positions_and_offset():
    given = jax.jit(lambda x, p: rotary(x, p))(jnp.asarray(X, jnp.float32), jnp.arange(11) + 3)
    check(given, rotary(jnp.asarray(X, jnp.float32), np.arange(11) + 3))
    traced = jax.jit(xpos)(jnp.asarray(X, jnp.float32), jnp.int32(5))
    check(traced, xpos(jnp.asarray(X, jnp.float32), 5))


def test_slopes_of_some_heads():
    assert alibi_slopes(6, 4).tolist() == alibi_slopes(4).tolist() + [0.0, 0.0]
    with pytest.raises(ValueError, match="'alibi_num_heads' must be None or an int in"):
        alibi_slopes(4, 5)


def test_lazy_names():
    import flash_attention.jax as twin

    assert {"rotary", "xpos", "flash_attention"} <= set(dir(twin))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        twin.nothing  # noqa: B018
