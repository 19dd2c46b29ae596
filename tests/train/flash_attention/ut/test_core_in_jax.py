"""The parts of core that run over an array namespace: jax.numpy, also traced, gives what numpy gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import Case, make_inputs, run_reference
from flash_attention.core import dropout, reference
from flash_attention.core.lse import merge
from flash_attention.core.ranges import Band, key_tiles, query_tiles
from flash_attention.core.spec import Operands

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


@pytest.fixture
def x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.mark.parametrize(
    "band",
    [Band(50, 70), Band(50, 70, right=0), Band(70, 50, left=9, right=4), Band(50, 70, prev=1, next=0, block_size=8)],
)
@given(offset=st.integers(-60, 60), first=st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_ranges_of_traced_integers(band, offset, first):
    by_query = jax.jit(lambda p: key_tiles(band, p, p + 7, 16))(first + offset)
    assert tuple(map(int, by_query)) == key_tiles(band, first + offset, first + offset + 7, 16)
    by_key = jax.jit(lambda o, j: query_tiles(band, o, j, j + 7, 16))(offset, first)
    assert tuple(map(int, by_key)) == query_tiles(band, offset, first, first + 7, 16)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate):
    b, h, i, j = np.ogrid[:2, :3, :100, :130]
    want = dropout.keep(np, 0xFFFFFFFF, b, h, i, j, rate)
    found = jax.jit(lambda seed: dropout.keep(jnp, seed, b, h, i, j, rate))(jnp.uint32(0xFFFFFFFF))
    np.testing.assert_array_equal(found, want)
    for seed, *index, value in dropout.TEST_VECTORS:
        row = dropout.row_key(jnp, seed, *index[:3])
        assert int(dropout.element_hash(jnp, row, dropout.col_key(jnp, index[3]))) == value


def test_merge():
    outs = np.random.default_rng(0).standard_normal((3, 2, 5, 4)).astype(np.float32)
    lses = np.array([[[0, 1, 2, -np.inf, -np.inf]] * 2] * 3, np.float32)
    out, lse = jax.jit(lambda a, b: merge(jnp, a, b))(list(outs), list(lses))
    want = merge(np, list(outs), list(lses))
    np.testing.assert_allclose(out, want[0], atol=1e-6)
    np.testing.assert_allclose(lse, want[1], atol=1e-6)


REFERENCE_CASES = [
    Case(lengths=(40, 60), band="causal", bias="keys", slopes="alibi-batch", logits="cap", sinks=True, cotangent=True),
    Case(
        lengths=(60, 40), band="causal", mask="rows", dropout=0.3, offset="traced-batch", ids="lengths", cotangent=True
    ),
    Case(lengths=(40, 40), mask="compact", band="blocks16-causal", ids="segments", slopes="alibi", bias="full"),
]


@pytest.mark.parametrize("case", REFERENCE_CASES, ids=str)
def test_reference_and_its_explicit_backward(case, x64):
    """float64 jax.numpy equals numpy, and autodiff of the formula equals the explicit backward."""
    inputs, want = make_inputs(case), run_reference(case)
    arrays = [jnp.asarray(x, jnp.float64) for x in inputs[1:4]]
    names = [name for name in ("bias", "slopes", "sinks") if getattr(inputs.operands, name) is not None]
    wide = [jnp.asarray(getattr(inputs.operands, name), jnp.float64) for name in names]
    operands = Operands(*(None if x is None else jnp.asarray(x) for x in inputs.operands))

    def attend(arrays, wide):
        return reference.attention(jnp, inputs.spec, *arrays, operands._replace(**dict(zip(names, wide))))

    (out, lse), pullback = jax.vjp(attend, arrays, wide)
    d_lse = jnp.where(jnp.isneginf(lse), 0, inputs.d_lse)
    grads = pullback((jnp.asarray(inputs.d_out, jnp.float64), jnp.asarray(d_lse, jnp.float64)))
    found = dict(zip(["query", "key", "value"] + names, grads[0] + grads[1]), out=out, lse=lse)
    assert set(found) == set(want)
    for name, x in found.items():
        np.testing.assert_allclose(x, want[name], rtol=1e-11, atol=1e-11, err_msg=name)
