"""Training steps with the Cell: equal to naive attention, recomputed, with dropout, saved and loaded; both modes.

`--engine NAME` runs the same cases on another engine, such as those of Ascend hardware.
"""

import functools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support.cells import ENGINES_HERE, ON_ASCEND, NaiveAttention, tensor

from flash_attention.nn.layer.flash_attention import FlashAttention

pytestmark = [
    pytest.mark.platform_x86_cpu,
    pytest.mark.platform_arm_ascend_training,
    pytest.mark.platform_x86_ascend_training,
    pytest.mark.platform_arm_ascend910b_training,
    pytest.mark.env_onecard,
]
HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 8, 24
WIDTH = HEADS * HEAD_DIM


@pytest.fixture(params=ENGINES_HERE)
def engine(request):
    return request.param


class Block(nn.Cell):
    """Projections around an attention Cell, with the residual; grouped heads. Always the same weights."""

    def __init__(self, attention, dtype=ms.float32):
        super().__init__()
        self.attention = attention
        self.dtype = dtype
        rng = np.random.RandomState(0)
        widths = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, WIDTH)
        self.q_dense, self.k_dense, self.v_dense, self.o_dense = [
            nn.Dense(WIDTH, width, Tensor((rng.randn(width, WIDTH) / WIDTH**0.5).astype(np.float32)), has_bias=False)
            for width in widths
        ]

    def heads_first(self, x, heads):
        return x.reshape((-1, LENGTH, heads, HEAD_DIM)).swapaxes(1, 2).astype(self.dtype)

    def construct(self, x):
        query = self.heads_first(self.q_dense(x), HEADS)
        key = self.heads_first(self.k_dense(x), KV_HEADS)
        value = self.heads_first(self.v_dense(x), KV_HEADS)
        out = self.attention(query, key, value).astype(ms.float32)
        return x + self.o_dense(out.swapaxes(1, 2).reshape((-1, LENGTH, WIDTH)))


def dtype_for(engine):
    return ms.float16 if engine in ON_ASCEND else ms.float32


def batch_of(size, seed):
    """(inputs, targets): the target of a token is the mean of all tokens so far, which attention can learn."""
    x = tensor((size, LENGTH, WIDTH), seed=seed)
    means = np.cumsum(x.asnumpy(), axis=1) / np.arange(1, LENGTH + 1).reshape(1, -1, 1)
    return x, Tensor(means.astype(np.float32))


def trainer_of(net):
    """`nn.TrainOneStepCell` of a network, with Adam."""
    optimizer = nn.Adam(net.trainable_params(), learning_rate=1e-2)
    return nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer).set_train()


def weights_of(net):
    return {p.name: p.asnumpy().copy() for p in net.trainable_params()}


def trained(net, steps=6):
    """(losses, weights) after some steps whose batches have different sizes."""
    train = trainer_of(net)
    losses = [float(train(*batch_of((4, 2, 4)[step % 3], seed=step)).asnumpy()) for step in range(steps)]
    return losses, weights_of(net)


@functools.lru_cache(maxsize=None)
def naive_training(dtype, steps=6):
    """:func:`trained` with naive attention; PyNative mode, whatever the mode of the test."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        return trained(Block(NaiveAttention(HEAD_DIM), dtype), steps)
    finally:
        ms.set_context(mode=before)


@pytest.mark.level0
def test_training_equals_naive_attention(engine, mode):
    """TrainOneStepCell: the loss goes down, and every loss and weight is that of the same net with naive attention."""
    dtype = dtype_for(engine)
    losses, weights = trained(Block(FlashAttention(HEAD_DIM, causal=True, engine=engine), dtype))
    naive_losses, naive_weights = naive_training(dtype)
    assert losses[-1] < 0.9 * losses[0]
    exact = dtype == ms.float32
    assert np.allclose(losses, naive_losses, rtol=1e-5 if exact else 1e-2)
    assert sorted(weights) == sorted(naive_weights)
    for name, weight in weights.items():
        # Adam turns a rounding error of a tiny gradient into one of the step's size: 1e-2.
        assert np.allclose(weight, naive_weights[name], atol=2e-4 if exact else 3e-2), name


class Loss(nn.Cell):
    """A block's output weighted with fixed numbers: every part of the output matters to the gradient."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.weights = tensor((2, LENGTH, WIDTH), seed=99)

    def construct(self, x):
        return (self.block(x) * self.weights).sum()


def gradients(net):
    """(loss, gradients by name) of a :class:`Loss` through `ms.value_and_grad`."""
    x, _ = batch_of(2, seed=1)
    loss, grads = ms.value_and_grad(net, None, net.trainable_params())(x)
    return float(loss.asnumpy()), {p.name: g.asnumpy() for p, g in zip(net.trainable_params(), grads)}


@pytest.mark.level0
def test_value_and_grad_of_weights(engine, mode):
    dtype = dtype_for(engine)
    loss, grads = gradients(Loss(Block(FlashAttention(HEAD_DIM, causal=True, engine=engine), dtype)))
    naive_loss, naive_grads = gradients(Loss(Block(NaiveAttention(HEAD_DIM), dtype)))
    relative = 1e-5 if dtype == ms.float32 else 2e-2
    assert np.isclose(loss, naive_loss, rtol=relative)
    assert len(grads) == 4
    for name, grad in grads.items():
        assert np.allclose(grad, naive_grads[name], atol=relative * np.abs(naive_grads[name]).max()), name


class Seeded(nn.Cell):
    """Attention whose dropout seed is given."""

    def __init__(self, engine):
        super().__init__()
        self.attention = FlashAttention(HEAD_DIM, 0.3, causal=True, engine=engine)

    def construct(self, query, key, value):
        return self.attention(query, key, value, None, None, 123)


def _attention(kind, engine):
    if kind == "seeded dropout":
        return Seeded(engine)
    return FlashAttention(HEAD_DIM, causal=True, engine=engine)


@pytest.mark.level1
@pytest.mark.parametrize(
    "kind, where", [("no dropout", "attention"), ("seeded dropout", "attention"), ("seeded dropout", "block")]
)
def test_recompute_changes_nothing(kind, where, engine, mode):
    dtype = dtype_for(engine)
    results = []
    for recompute in (False, True):
        net = Loss(Block(_attention(kind, engine), dtype)).set_train()
        if recompute:
            (net.block if where == "block" else net.block.attention).recompute()
        results.append(gradients(net))
    (loss, grads), (again, grads_again) = results
    assert np.isclose(loss, again, rtol=1e-6)
    for name in grads:
        assert np.allclose(grads[name], grads_again[name], rtol=1e-5, atol=1e-6 * np.abs(grads[name]).max()), name


class Linear(nn.Cell):
    """<attention(query, key, value), weights>: linear in the value."""

    def __init__(self, attention, weights):
        super().__init__()
        self.attention = attention
        self.weights = weights

    def construct(self, query, key, value):
        return (self.attention(query, key, value).astype(ms.float32) * self.weights).sum()


@pytest.mark.level1
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_backward_drops_what_the_forward_dropped(recompute, engine, mode):
    """With the automatic seed. The loss is linear in the value, so it equals <value, its gradient> for equal masks."""
    shape, dtype = (2, 2, LENGTH, HEAD_DIM), dtype_for(engine)
    attention = FlashAttention(HEAD_DIM, 0.5, engine=engine)
    net = Linear(attention, tensor(shape, seed=9)).set_train()
    if recompute:
        attention.recompute()
    function = ms.value_and_grad(net, (0, 1, 2))
    changes = []
    for step in range(3):
        query, key, value = (tensor(shape, dtype, 10 * step + place) for place in range(3))
        loss, grads = function(query, key, value)
        product = (value.asnumpy().astype(np.float64) * grads[2].asnumpy()).sum()
        scale = np.linalg.norm(value.asnumpy().astype(np.float64)) * np.linalg.norm(grads[2].asnumpy())
        assert abs(float(loss.asnumpy()) - product) < (2e-3 if dtype == ms.float16 else 1e-5) * scale
        assert int(attention.dropout_step.asnumpy()) == (0 if recompute else step + 1)
        net.set_train(False)
        undropped = float(net(query, key, value).asnumpy())
        net.set_train(True)
        changes.append(abs(undropped - float(loss.asnumpy())) / scale)
    assert max(changes) > 3e-3  # dropout did act


@pytest.mark.level0
def test_training_with_dropout_learns(engine):
    net = Block(FlashAttention(HEAD_DIM, 0.1, causal=True, engine=engine), dtype_for(engine))
    assert [p.name for p in net.get_parameters() if not p.requires_grad] == ["attention.dropout_step"]
    losses, _ = trained(net)
    assert losses[-1] < 0.9 * losses[0]
    assert int(net.attention.dropout_step.asnumpy()) == 6


@pytest.mark.level0
def test_checkpoint(engine, mode, tmp_path):
    """Training goes on from a checkpoint bit for bit: the weights and the counter of dropout draws are in it."""

    def make():
        net = Block(FlashAttention(HEAD_DIM, 0.2, causal=True, engine=engine), dtype_for(engine))
        # SGD: no optimizer here keeps a state, so that only the net's own could be missing.
        optimizer = nn.SGD(net.trainable_params(), learning_rate=0.1)
        return net, nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer).set_train()

    def losses(train, *steps):
        return [float(train(*batch_of(2, seed=step)).asnumpy()) for step in steps]

    net, train = make()
    losses(train, 0, 1)
    path = str(tmp_path / "step2.ckpt")
    ms.save_checkpoint(net, path)
    want = losses(train, 2, 3)
    other, train = make()
    assert int(other.attention.dropout_step.asnumpy()) == 0
    not_loaded = ms.load_param_into_net(other, ms.load_checkpoint(path))
    assert not any(not_loaded)
    assert int(other.attention.dropout_step.asnumpy()) == 2
    other.attention.salt = net.attention.salt  # in a process of its own the Cell would have the same number
    assert losses(train, 2, 3) == want


@pytest.mark.level1
@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16], ids=["fp16", "bf16"])
def test_training_in_half_precision(dtype, engine):
    losses, _ = trained(Block(FlashAttention(HEAD_DIM, causal=True, engine=engine), dtype))
    naive_losses, _ = naive_training(ms.float32)
    assert np.allclose(losses, naive_losses, rtol=1e-2)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.level1
def test_training_of_a_dynamic_batch(engine, mode):
    """Compiled once for a batch known only at run time, the losses are those of fixed sizes."""
    if engine == "jax":
        engine = None  # it compiles for sizes: 'auto' takes another engine
    want, _ = naive_training(dtype_for(engine), 3)
    train = trainer_of(Block(FlashAttention(HEAD_DIM, causal=True, engine=engine), dtype_for(engine)))
    dynamic = Tensor(shape=[None, LENGTH, WIDTH], dtype=ms.float32)
    train.set_inputs(dynamic, dynamic)
    losses = [float(train(*batch_of((4, 2, 4)[step], seed=step)).asnumpy()) for step in range(3)]
    assert np.allclose(losses, want, rtol=1e-5 if dtype_for(engine) == ms.float32 else 1e-2)
