"""Dilated attention in MindSpore: the properties of support/dilated.py, the layer against its JAX twin, training."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support import in_mindspore
from support.dilated import BAD_LAYERS, CASES, LAYER, X_OUT, Dilated, X

from flash_attention.core.mechanisms.weights import unflatten_params
from flash_attention.nn import DilatedAttention, dilated_attention, load_weights, weights_of

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]


class _Function(nn.Cell):
    def __init__(self, segment_size, dilation_rate, options):
        super().__init__()
        self.segment_size, self.dilation_rate, self.options = segment_size, dilation_rate, options

    def construct(self, query, key, value, table=None):
        return dilated_attention(query, key, value, self.segment_size, self.dilation_rate, rel_pos_table=table,
                                 engine="portable", **self.options)  # fmt: skip


class _InMode:
    functions, mode = in_mindspore.FUNCTIONS, "pynative"
    exps = 2  # softmax within a pattern, then the weights of the patterns

    def run(self, *args, **options):
        with in_mindspore.mode(self.mode):
            return in_mindspore.run(*args, **options)

    @staticmethod
    def function(segment_size, dilation_rate, **options):
        return _Function(segment_size, dilation_rate, options)


class TestPynative(_InMode, Dilated):
    pass


class InGraph(_InMode, Dilated):
    mode = "graph"


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[4], marks=pytest.mark.slow)], ids=lambda case: case.name)
def test_graph(case):
    InGraph().check_case(case)


def test_graph_refuses():
    InGraph().test_refuses({"head_offset": "none"}, "'head_offset' must be one of 'mod', 'block'")
    with in_mindspore.mode("graph"), pytest.raises(ValueError, match="'x' must be of shape"):
        DilatedAttention(16, 2)(Tensor(np.ones((2, 5, 8), np.float32)))


@pytest.mark.parametrize("mode, recompute", [
    ("pynative", False),
    pytest.param("graph", False, marks=pytest.mark.slow),
    pytest.param("graph", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_layer_equals_its_twin(mode, recompute):
    pytest.importorskip("jax")
    from support import in_jax

    from flash_attention.jax import DilatedAttention as Twin

    cell = DilatedAttention(16, 2, causal=True, recompute=recompute, engine="portable", **LAYER)
    twin = Twin(16, 2, causal=True, **LAYER)
    twin.params = unflatten_params(weights_of(cell))
    with in_mindspore.mode(mode):
        got = in_mindspore.run_layer(cell, [X], X_OUT)
    want = in_jax.run_layer(twin, [X], X_OUT)
    assert set(got[2]) == set(want[2])
    for mine, other in [(got[0], want[0]), (got[1][0], want[1][0])] + [(got[2][n], want[2][n]) for n in want[2]]:
        np.testing.assert_allclose(mine, other, atol=3e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_trains_saves_and_loads(mode, tmp_path):
    cell = DilatedAttention(16, 2, (1, 2), (8, 16), dropout=0.1, causal=True, use_rel_pos_bias=True, engine="portable")
    x, target = (Tensor(a.astype(np.float32)) for a in (X, X_OUT))
    with in_mindspore.mode(mode):
        in_mindspore.check_training(cell, x, target)
        in_mindspore.check_checkpoint(
            cell,
            DilatedAttention(16, 2, (1, 2), (8, 16), causal=True, use_rel_pos_bias=True, engine="portable"),
            x,
            tmp_path,
        )


def test_half_precision_and_dropout():
    plain = DilatedAttention(16, 2, 2, 8, dtype=ms.float16, engine="portable")
    out = plain(Tensor(X.astype(np.float16)))
    assert out.dtype == ms.float16 and np.isfinite(out.asnumpy()).all()
    cell = DilatedAttention(16, 2, 2, 8, dropout=0.5, dtype=ms.float16, engine="portable")
    load_weights(cell, weights_of(plain))
    x = Tensor(X.astype(np.float16))
    np.testing.assert_array_equal(cell.set_train(False)(x).asnumpy(), out.asnumpy())
    assert (cell.set_train(True)(x).asnumpy() != out.asnumpy()).any()


@pytest.mark.parametrize("options, match", BAD_LAYERS)
def test_layer_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        DilatedAttention(**dict({"dim": 16, "heads": 2, "dilation_rate": 1, "segment_size": 8}, **options))
