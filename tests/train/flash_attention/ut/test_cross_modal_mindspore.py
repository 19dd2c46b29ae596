"""Cross-modal attention in MindSpore against its JAX twin, both modes; masks, training, the joint embedding."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support import in_mindspore
from support.cross_modal import BAD_LAYERS, CONTEXT, KEEP, X_OUT, X

from flash_attention.core.mechanisms.weights import unflatten_params
from flash_attention.nn import CrossModalAttention, CrossModalBlock, info_nce, l2_normalize, logit_scale, weights_of

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu, pytest.mark.platform_arm_ascend_training]
MODES = ["pynative", pytest.param("graph", marks=pytest.mark.slow)]
SCALED = {"layer_scale": "scalar", "layer_scale_init": 0.5}


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_block_equals_its_twin(mode):
    pytest.importorskip("jax")
    from support import in_jax

    from flash_attention.jax import CrossModalBlock as Twin

    cell, twin = CrossModalBlock(16, 4, 12, engine="portable", **SCALED), Twin(16, 4, 12, **SCALED)
    twin.params = unflatten_params(weights_of(cell))
    with in_mindspore.mode(mode):
        got = in_mindspore.run_layer(cell, [X, CONTEXT], X_OUT)
    want = in_jax.run_layer(twin, [X, CONTEXT], X_OUT)
    assert set(got[2]) == set(want[2])
    pairs = [(got[0], want[0])] + list(zip(got[1], want[1])) + [(got[2][n], want[2][n]) for n in want[2]]
    for mine, other in pairs:
        np.testing.assert_allclose(mine, other, atol=3e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("mode", MODES)
def test_masks(mode):
    pytest.importorskip("jax")

    from flash_attention.jax import CrossModalAttention as Twin

    cell, twin = CrossModalAttention(16, 4, 12, engine="portable"), Twin(16, 4, 12)
    twin.params = unflatten_params(weights_of(cell))
    x, context = Tensor(X.astype(np.float32)), Tensor(CONTEXT.astype(np.float32))
    mask = np.tri(5, 7, dtype=np.float32)
    with in_mindspore.mode(mode):
        for arguments in ((None, KEEP), (mask, None), (mask, KEEP), (None, np.zeros((2, 7), bool))):
            want = twin(X.astype(np.float32), CONTEXT.astype(np.float32), *arguments)
            got = cell(x, context, *(None if a is None else Tensor(a) for a in arguments))
            np.testing.assert_allclose(got.asnumpy(), want, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_trains_drops_saves_and_loads(mode, tmp_path):
    cell = CrossModalBlock(16, 4, dropout=0.2, engine="portable")
    x, target = Tensor(X.astype(np.float32)), Tensor(X_OUT.astype(np.float32))
    with in_mindspore.mode(mode):
        in_mindspore.check_training(cell, x, target)
        one, two = cell(x).asnumpy(), cell(x).asnumpy()
        assert (one != two).any()
        cell.set_train(False)
        np.testing.assert_array_equal(cell(x).asnumpy(), cell(x).asnumpy())
        in_mindspore.check_checkpoint(cell, CrossModalBlock(16, 4, engine="portable"), x, tmp_path)


def test_half_precision():
    out = CrossModalBlock(16, 4, dtype=ms.float16, engine="portable")(Tensor(X.astype(np.float16)))
    assert out.dtype == ms.float16 and np.isfinite(out.asnumpy()).all()


def test_joint_embedding():
    twin = pytest.importorskip("flash_attention.jax")

    a, b = X[0].astype(np.float32), X_OUT[0].astype(np.float32)
    np.testing.assert_allclose(l2_normalize(Tensor(a)).asnumpy(), twin.l2_normalize(a), atol=1e-6)
    assert not l2_normalize(Tensor(np.zeros((2, 3), np.float32))).asnumpy().any()
    np.testing.assert_allclose(info_nce(Tensor(a), Tensor(b), 3.0).asnumpy(), twin.info_nce(a, b, 3.0), rtol=1e-5)
    scales = logit_scale(Tensor(np.log(np.float32([14.3, 1e4])))).asnumpy()
    np.testing.assert_allclose(scales, [14.3, 100.0], rtol=1e-4)


@pytest.mark.parametrize("options, match", BAD_LAYERS)
def test_refuses(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        CrossModalBlock(**dict({"dim": 16, "num_heads": 4}, **options))


def test_refuses_inputs():
    x, context = Tensor(np.ones((2, 5, 16), np.float32)), Tensor(np.ones((2, 7, 12), np.float32))
    cell = CrossModalAttention(16, 4, 12)
    with pytest.raises(ValueError, match="'context' must be of shape"):
        cell(x, x)
    with pytest.raises(ValueError, match="'attn_mask' must be of shape"):
        cell(x, context, Tensor(np.ones((7, 5), np.float32)))
    with pytest.raises(ValueError, match="'key_padding_mask' must be of shape"):
        cell(x, context, None, Tensor(np.ones((2, 5), np.float32)))
